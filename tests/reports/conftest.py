"""Reports are tested with their pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.brief import draw_again


@pytest.fixture(autouse=True, scope="module")
def drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_again(patch)
        yield
