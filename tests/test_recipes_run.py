"""Every shipped recipe trains two steps on a tiny model, or evaluates it, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.brief import draw_again
from tests.tiny import WORDS, make_model, read_lines, rlhf, write_steps

STAGE = dict(re.findall(r"^COMMAND_(\S+) := (\S+)$", Path("Makefile").read_text(), re.MULTILINE))
"""The command of recipes that are not named after theirs."""
RECIPES = sorted(path for path in Path("recipes").rglob("*.yaml") if not path.stem.startswith("rounds-"))
"""All but those that tests/labels/test_rounds.py runs."""
FAST = ("sft", "rm", "dpo", "ppo")
"""Of the quickstart's; the others take as long, and run the same code with other keys."""
EVALUATIONS = [path for path in RECIPES if STAGE.get(path.stem, path.stem) == "eval"]
TRAINED = [
    pytest.param(path, marks=() if path.stem in FAST and path.parent.name == "quickstart" else pytest.mark.slow)
    for path in RECIPES
    if path not in EVALUATIONS
]


def text_of(recipe: Path) -> str:
    """With what it is based on."""
    text = recipe.read_text()
    return text + (recipe.parent / text.split("base: ")[1].split()[0]).read_text() if "\nbase: " in text else text


def write_pairs(path: Path, count: int) -> Path:
    """Preference rows, which every stage takes: sft their chosen responses, kto both for themselves."""
    words = [WORDS[i % len(WORDS)] for i in range(count + 2)]
    rows = [
        {"prompt": f"{words[i]} {i}", "chosen": words[i + 1], "rejected": f"{words[i + 2]} sea", "answer": i}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(changes: dict[str, object]) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def pictured(run: Path) -> bool:
    """Has its report the pictures that were drawn for it?"""
    names, text = [path.name for path in (run / "plots").glob("*.png")], (run / "report.md").read_text()
    return bool(names) and all(f"](plots/{name})" in text for name in names)


class Parts(NamedTuple):
    """What all recipes are run with."""

    model: Path
    rows: Path
    judge: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A tiny model, 40 pairs, and a reward model by two steps of the quickstart's recipe."""
    folder = tmp_path_factory.mktemp("parts")
    model, rows = make_model(folder / "model"), write_pairs(folder / "rows.jsonl", 40)
    changes = {"model.path": model, "data.train": rows, "train.steps": 2, "train.batch_size": 4, "data.max_length": 256}
    assert rlhf("train-rm", "recipes/quickstart/rm.yaml", "--output", folder / "rm", *settings_of(changes)) == 0
    return Parts(model, rows, folder / "rm")


def learned(parts: Parts, recipe: str, name: str, rows: Path) -> Path:
    """Another reward model, by two steps of its recipe."""
    changes = {"model.path": parts.model, "data.train": rows, "train.steps": 2, "train.batch_size": 4, "data.max_length": 256}
    output = parts.judge.with_name(name)
    assert rlhf("train-rm", recipe, "--output", output, *settings_of(changes)) == 0
    return output


@pytest.fixture(scope="module")
def ensemble(parts: Parts) -> Path:
    """Several as one."""
    return learned(parts, "recipes/quickstart/rm-ensemble.yaml", "ensemble", parts.rows)


@pytest.fixture(scope="module")
def general(parts: Parts) -> Path:
    """One that compares."""
    return learned(parts, "recipes/cycle/gpm.yaml", "general", parts.rows)


@pytest.fixture(scope="module")
def steps(parts: Parts) -> Path:
    """Stepwise rows."""
    return write_steps(parts.rows.with_name("steps.jsonl"), 40)


@pytest.fixture(scope="module")
def process(parts: Parts, steps: Path) -> Path:
    """One of steps."""
    return learned(parts, "recipes/arithmetic/prm.yaml", "process", steps)


@pytest.mark.parametrize("recipe", TRAINED, ids=str)
def test_two_steps(
    recipe: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Stages that draw responses do so with a reward model of the same tiny model; the first reports have their pictures."""
    model, rows, output = parts.model, parts.rows, tmp_path / "run"
    changes = {"model.path": model, "data.train": rows, "data.max_length": 256, "train.steps": 2, "train.batch_size": 4}
    stage = STAGE.get(recipe.stem, recipe.stem)
    text = text_of(recipe)
    if "kind: steps" in text:
        changes["data.train"] = request.getfixturevalue("steps")
    if 'separator: ""' in text:
        changes["data.train"] = tmp_path / "outcome.jsonl"
        own = [
            row | {"steps": row["steps"][:1], "labels": row["labels"][:1]}
            for row in read_lines(parts.rows.with_name("steps.jsonl"))
        ]
        (tmp_path / "outcome.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    if "rollout:" in text:
        kind = "ensemble" if "combine:" in text else "general" if "kind: sppo" in text or "kind: dno" in text else None
        judge = request.getfixturevalue(kind) if kind else parts.judge
        changes |= {"rollout.max_new_tokens": 6} | ({} if "- match:" in text else {"reward.0.model": judge})
    settings = settings_of(changes)
    with monkeypatch.context() as patch:
        if drawn := recipe.stem in FAST and recipe.parent.name == "quickstart":
            draw_again(patch)
        assert rlhf(stage, recipe, "--output", output, *settings) == 0
    assert pictured(output) == drawn
    measured = [(0, "eval"), (1, "train"), (1, "eval"), (2, "train"), (2, "eval")]
    if "eval_every: null" in text:
        measured.remove((1, "eval"))
    if "holdout:" not in text:
        measured = [(1, "train"), (2, "train")]
    assert [(line["step"], line["split"]) for line in read_lines(output / "metrics.jsonl")] == measured
    assert json.loads((output / "manifest.json").read_text())["steps"] == 2
    assert rlhf(stage, recipe, "--output", output, "--resume", *settings) == 0, "the run's recipe.yaml says what this one says"
    if drawn:
        assert rlhf(stage, output / "recipe.yaml", "--output", tmp_path / "again") == 0
        assert read_lines(tmp_path / "again" / "metrics.jsonl") == read_lines(output / "metrics.jsonl")


@pytest.mark.parametrize("recipe", EVALUATIONS, ids=str)
def test_an_evaluation(recipe: Path, parts: Parts, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, rows, output = parts.model, parts.rows, tmp_path / "run"
    text = recipe.read_text()
    names = [*yaml.safe_load(text)["models"]][:3]
    names = names if "\ncompare_at_kl:" in text else names[:2]
    sections = [name for name in ("prompts", "preferences", "text") if f"\n{name}:" in text]
    changes: dict[str, object] = {name: rows for name in sections} | {
        "models": f"{{{', '.join(f'{name}: {model}' for name in names)}}}",
        **({"reward.0.model": parts.judge} if "\nreward:" in text else {}),
        **({"reward.0.model": request.getfixturevalue("general")} if "runs/cycle/gpm" in text else {}),
        "rollout.max_new_tokens": 6,
        "max_length": 256,
    }
    if "aggregate:" in text:
        changes |= dict.fromkeys(("reward.0.model", "reward.1.model"), request.getfixturevalue("process"))
    changes |= {f"{name}.0.holdout": 0.3 for name in sections if "holdout" in text}
    if "dump_pairs" in text:
        changes["dump_pairs"] = tmp_path / "pairs.jsonl"
    settings = settings_of(changes)
    if first := recipe.stem == "eval" and recipe.parent.name == "quickstart":
        request.getfixturevalue("pictures")
    assert rlhf("eval", recipe, "--output", output, *settings) == 0
    assert pictured(output) == first
    result = json.loads((output / "eval.json").read_text())
    assert list(result["models"]) == names
    assert result["about"]["prompts"] >= 2
    assert list(result["votes"]) == (names if "\nvote:" in text else [])
    assert rlhf("eval", recipe, "--output", output, "--resume", *settings) == 0, "the run's recipe.yaml says what this one says"
    if first:
        assert rlhf("eval", output / "recipe.yaml", "--output", tmp_path / "again") == 0
        assert json.loads((tmp_path / "again/eval.json").read_text()) == result
