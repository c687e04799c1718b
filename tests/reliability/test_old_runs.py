"""Runs that version 0.1.0 made: finished ones are parents, are evaluated and exported, and an unfinished one goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny import rlhf, write_recipe

OLD = Path(__file__).parent / "old_runs"
"""A base, sft of 4 steps, train-rm of 4 steps on it, and dpo that was stopped after 2 steps."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_they_are_parents(folder: Path) -> None:
    recipe = write_recipe(folder / "new.yaml", Path("runs/sft"), Path("data/pairs.jsonl"), Path("runs/new"), train={"steps": 1})
    assert rlhf("dpo", recipe) == 0
    recorded = json.loads((folder / "runs/new/manifest.json").read_text())["parents"]
    assert [parent["path"] for parent in recorded] == ["runs/sft"]


def test_they_are_evaluated(folder: Path) -> None:
    recipe = {
        "models": {"base": "models/tiny", "sft": "runs/sft"},
        "reference": "base",
        "prompts": "data/rows.jsonl",
        "preferences": "data/pairs.jsonl",
        "rollout": {"max_new_tokens": 8},
        "reward": [{"model": "runs/rm"}],
        "output": "runs/eval",
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert rlhf("eval", "eval.yaml") == 0
    result = json.loads((folder / "runs/eval/eval.json").read_text())
    assert set(result["models"]) == {"base", "sft"}


@pytest.mark.parametrize("run", ["sft", "rm"])
@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_they_are_exported(run: str, merge: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("export", f"runs/{run}", "exported", *merge) == 0
    assert "of the run's" in capsys.readouterr().out


def test_an_unfinished_one_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = rlhf("dpo", "dpo.yaml", "--resume", "--set", "train.steps=4")
    assert code == 0
    assert "resuming after step 2 from runs/dpo/checkpoints/step-00000002" in capsys.readouterr().out
    assert json.loads((folder / "runs/dpo/manifest.json").read_text())["steps"] == 4
