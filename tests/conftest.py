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
