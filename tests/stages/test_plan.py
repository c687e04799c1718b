"""What the plan says of rows, of prompts alone, and of the tokens of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.templates import Template
from rlhf_cli.models.memory import Memory
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.stages.plan import plan
from rlhf_cli.stages.prepare import row_request
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer


def rows_of(folder: Path, stage: str, *overrides: str) -> dict[str, str]:
    """Label → value of all rows of a plan for eight prompts of equal length."""
    rows = [{"prompt": f"Hi {i}", "chosen": "Yes", "rejected": "No"} for i in range(8)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"model: {{path: m}}\noutput: o\ndata: {{train: {folder}/x.jsonl, max_length: 64}}\n"
    text += "train: {batch_size: 4, learning_rate: 1e-5}\n"
    (folder / "r.yaml").write_text(text)
    recipe: Any = load_recipe(stage, folder / "r.yaml", overrides).recipe
    dataset = prepare(recipe.data, row_request(recipe, str), tiny_tokenizer(), Template("x", CHATML))
    source = dataset.source(recipe.train, recipe.data, 0)
    sections = plan(recipe, dataset, source, 2, Memory(0, 1, 0), 100, {})
    return {label: str(value) for _, part in sections for label, value in part}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


def test_drawn_responses_are_counted_by_what_they_may_reach(tmp_path: Path) -> None:
    rollout = ["reward=[{function: f.py:a}]", "rollout={max_new_tokens: 10, responses_per_prompt: 3}"]
    rows = rows_of(tmp_path, "ppo", "objective.kind=rloo", *rollout)
    prompt = int(rows["prompt tokens"].split("longest ")[1])
    assert rows["prompt tokens"] == f"median {prompt}, 90 % {prompt}, 99 % {prompt}, longest {prompt}"
    assert rows["tokens a step"] == f"{4 * (prompt + 30)} at most: prompts of {prompt} on average and 30 drawn for each"
    assert rows["batch"] == "4 prompts, each with 3 responses of the policy, a step, over all devices"
    passes = round(4 * (prompt + 30) / 100)
    assert rows["forward passes"] == f"about {passes} for all of these, each of at most 100 tokens (tokens_per_device)"
    assert "end in EOS" not in rows and "response tokens" not in rows
    assert rows["kept"] == "8"


def test_rows_with_responses(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "dpo")
    assert rows["batch"] == "4 prompts with their responses a step, over all devices"
    assert rows["end in EOS"] == "100.0%"
    assert rows["tokens a step"].endswith(" on average")
    assert rows["forward passes"].endswith(" a step of at most 100 tokens (tokens_per_device)")
