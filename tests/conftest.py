"""One thread, no network and a cache of its own, for the tests and for the processes they start; and brief runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# Before torch is imported: sums over other numbers of threads differ in their last bit, and byte-identity is tested.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RLHF_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")

LONGEST = (
    "test_project",
    "test_sharded",
    "test_families",
    "test_docs",
    "test_ppo_runs",
    "test_resume",
    "test_processes",
    "test_eval_runs",
    "test_eval_edges",
    "test_rollouts",
    "test_stages",
    "test_evaluate",
    "test_recipes_run",
    "test_parents",
    "test_preferences",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: the last one would keep a core alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def brief() -> Iterator[None]:
    from tests.brief import be_brief

    with pytest.MonkeyPatch.context() as patch:
        be_brief(patch)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have their pictures in this test."""
    from tests.brief import draw_again

    draw_again(monkeypatch)
