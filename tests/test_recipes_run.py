"""Every shipped recipe trains two steps on a tiny model through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import WORDS, make_model, read_lines, rlhf

RECIPES = sorted(Path("recipes").rglob("*.yaml"))
STAGE = {"rm": "train-rm", "rloo": "ppo", "online-dpo": "dpo"}
"""The stage of recipes that are not named after theirs."""


def write_pairs(path: Path, count: int) -> Path:
    """Preference rows, which every stage takes: sft their chosen responses, kto both for themselves."""
    words = [WORDS[i % len(WORDS)] for i in range(count + 2)]
    rows = [{"prompt": f"{words[i]} {i}", "chosen": words[i + 1], "rejected": f"{words[i + 2]} sea"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(changes: dict[str, object]) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_two_steps(recipe: Path, tmp_path: Path) -> None:
    """Stages that draw responses do so with a reward model of the same tiny model."""
    model, rows, output = make_model(tmp_path / "model"), write_pairs(tmp_path / "rows.jsonl", 40), tmp_path / "run"
    changes = {"model.path": model, "data.train": rows, "data.max_length": 256, "train.steps": 2, "train.batch_size": 4}
    stage = STAGE.get(recipe.stem, recipe.stem)
    if "rollout:" in recipe.read_text():
        judge = {"model.path": model, "data.train": rows, "train.steps": 2, "train.batch_size": 4, "data.max_length": 256}
        assert rlhf("train-rm", "recipes/quickstart/rm.yaml", "--output", tmp_path / "rm", *settings_of(judge)) == 0
        changes |= {"reward.0.model": tmp_path / "rm", "rollout.max_new_tokens": 6}
    settings = settings_of(changes)
    assert rlhf(stage, recipe, "--output", output, *settings) == 0
    assert [(line["step"], line["split"]) for line in read_lines(output / "metrics.jsonl")] == [
        (0, "eval"),
        (1, "train"),
        (1, "eval"),
        (2, "train"),
        (2, "eval"),
    ]
    assert json.loads((output / "manifest.json").read_text())["steps"] == 2
    assert rlhf(stage, output / "recipe.yaml", "--output", tmp_path / "again") == 0
    assert read_lines(tmp_path / "again" / "metrics.jsonl") == read_lines(output / "metrics.jsonl")
