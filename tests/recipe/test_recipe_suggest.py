"""Did-you-mean, on every key of the schema and four kinds of typo."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.keys import walk
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.recipe.schema import SftRecipe
from rlhf_cli.recipe.suggest import closest, distance


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "abc", 3), ("abc", "acb", 1), ("kitten", "sitting", 3), ("train", "tarin", 1), ("a", "b", 1)],
)
def test_distance(a: str, b: str, edits: int) -> None:
    assert distance(a, b) == distance(b, a) == edits


def test_closest() -> None:
    assert closest("stf", ["sft", "export"]) == "sft"
    assert closest("x" * 61, ["x" * 60]) is None
    assert closest("banana", ["sft", "export"]) is None
    assert closest("any", []) is None


def typos(word: str, rng: random.Random) -> list[str]:
    """One letter dropped, one doubled, two neighbours swapped, one replaced; those that change nothing are left out."""
    at = rng.randrange(len(word))
    swap = rng.randrange(max(1, len(word) - 1))
    made = [
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:swap] + word[swap : swap + 2][::-1] + word[swap + 2 :],
        word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :],
    ]
    return [typo for typo in made if typo and typo != word]


def test_first_suggestion_is_right_for_every_key(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "r.yaml"
    path.write_text("output: o\nmodel: {path: m}\ndata: {train: x}\n")
    keys = dict.fromkeys(dotted for dotted, _ in walk(SftRecipe))
    asked, rejected, right = 0, 0, 0
    for dotted in keys:
        prefix, _, name = dotted.rpartition(".")
        place = prefix.replace("train.stop_if", "train.stop_if.loss").replace("data.eval", "data.eval.0").strip(".")
        for typo in typos(name, rng):
            wrong = f"{place}.{typo}" if place else typo
            meant = f"{place}.{name}" if place else name
            asked += 1
            with pytest.raises(UsageError) as caught:
                load_recipe("sft", path, [f"{wrong}=1"])
            rejected += f"--set {wrong.replace('eval.0', 'eval')}: unknown key." in str(caught.value).replace("eval.0", "eval")
            right += f"did you mean {meant}?".replace("eval.0", "eval") in str(caught.value).replace("eval.0", "eval")
    assert asked > 200
    assert rejected == asked
    assert right >= 0.95 * asked, f"{right} of {asked}"
