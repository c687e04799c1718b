"""The cycle's data: the same bytes twice, responses of known styles, and preferences that go round."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GOLD = runpy.run_path(str(ROOT / "recipes/cycle/gold.py"))
TEXTS = {"brief": "Plum, dear.", "warm": "Ripe plum, my dear friend.", "exact": "Ripe plum, red thing."}


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield import_module("make_cycle")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_nothing_is_best() -> None:
    """By hand: words −2, −5, −4; kind words 1, 2, 0; describing words 0, 1, 2."""
    assert [GOLD["respects"](text) for text in TEXTS.values()] == [(-2, 1, 0), (-5, 2, 1), (-4, 0, 2)]
    assert {name: GOLD["style"](text) for name, text in TEXTS.items()} == dict(zip(TEXTS, TEXTS, strict=True))
    for one, other in (("warm", "brief"), ("exact", "warm"), ("brief", "exact")):
        assert GOLD["chance"](TEXTS[one], TEXTS[other]) == 0.9
        assert GOLD["chance"](TEXTS[other], TEXTS[one]) == pytest.approx(0.1)
        assert GOLD["chance"](TEXTS[one], TEXTS[one]) == 0.5


def test_wins_are_means_over_the_others_of_a_prompt() -> None:
    texts = [*TEXTS.values(), TEXTS["brief"], TEXTS["warm"]]
    assert GOLD["beats"](["a"] * 3 + ["b"] * 2, texts) == pytest.approx([0.5, 0.5, 0.5, 0.1, 0.9])


def test_what_is_written(maker: ModuleType, tmp_path: Path) -> None:
    maker.make_data(tmp_path, seed=3, sizes=maker.Sizes(sft=2000, pure=50, pairs=3000))
    styles = Counter(GOLD["style"](row["completion"]) for row in rows(tmp_path / "sft.jsonl"))
    assert {name: count / 2000 for name, count in styles.items()} == pytest.approx(maker.SHARES, abs=0.04)
    for name in maker.SHARES:
        assert {GOLD["style"](row["completion"]) for row in rows(tmp_path / f"{name}.jsonl")} == {name}
    pairs = [(row["chosen"], row["rejected"]) for row in rows(tmp_path / "pairs.jsonl")]
    apart = [GOLD["chance"](*pair) for pair in pairs if GOLD["chance"](*pair) != 0.5]
    assert sum(chance > 0.5 for chance in apart) / len(apart) == pytest.approx(0.9, abs=0.02)
    asked = {name: {row["prompt"] for row in rows(tmp_path / f"{name}.jsonl")} for name in ("sft", "pairs", "prompts")}
    held = {row["prompt"] for row in rows(tmp_path / "eval_prompts.jsonl")}
    assert len(held) == 96 and not any(held & own for own in asked.values())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(maker: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        maker.make_data(tmp_path / name, seed, maker.Sizes())
    made = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"}
    assert made["a"] == made["b"] and len(made["a"]) == 7
    assert all(made["a"][name] != made["c"][name] for name in made["a"])
