"""A run repeated from the recipe.yaml that it wrote is the same run, to the byte: every value in force stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import make_base, read_lines, rlhf, write_pairs, write_ranked, write_recipe, write_rows

LEFT_OPEN: dict[str, Any] = {"train": {"steps": 2, "learning_rate": None, "save_every": None}, "lora": {"r": 2}}
DRAWN = {"reward": [{"model": "HOME/rm"}], "rollout": {"max_new_tokens": 6}}
TWICE = {"rollout": {"max_new_tokens": 6, "responses_per_prompt": 2}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "rows", {}),
    "sft of all weights": ("sft", "rows", {"lora": None}),
    "train-rm": ("train-rm", "pairs", {}),
    "train-rm plackett_luce": ("train-rm", "ranked", {"objective": {"kind": "plackett_luce"}}),
    "dpo": ("dpo", "pairs", {}),
    "dpo online": ("dpo", "rows", DRAWN),
    "ipo": ("ipo", "pairs", {}),
    "kto": ("kto", "pairs", {}),
    "ppo": ("ppo", "rows", DRAWN),
    "ppo of all weights": ("ppo", "rows", DRAWN | {"lora": None}),
    "rloo": ("ppo", "rows", DRAWN | TWICE | {"objective": {"kind": "rloo"}}),
    "grpo": ("ppo", "rows", DRAWN | TWICE | {"objective": {"kind": "grpo"}}),
    "grpo without KL": ("ppo", "rows", DRAWN | TWICE | {"objective": {"kind": "grpo", "surrogate": "cispo"}, "kl": {"coef": 0}}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    base = make_base(folder / "base")
    for name, write in (("rows", write_rows), ("pairs", write_pairs), ("ranked", write_ranked)):
        write(folder / name, 12).rename(folder / f"{name}.jsonl")
    assert rlhf("train-rm", write_recipe(folder / "rm.yaml", base, folder / "pairs.jsonl", folder / "rm", **LEFT_OPEN)) == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_from_its_own_recipe(name: str, home: Path, tmp_path: Path) -> None:
    stage, rows, sections = CASES[name]
    sections = yaml.safe_load(yaml.safe_dump(sections).replace("HOME", str(home)))
    recipe = write_recipe(tmp_path / "r.yaml", home / "base", home / f"{rows}.jsonl", tmp_path / "a", **(LEFT_OPEN | sections))
    assert rlhf(stage, recipe) == 0
    assert rlhf(stage, tmp_path / "a" / "recipe.yaml", "--output", tmp_path / "b") == 0
    assert read_lines(tmp_path / "a" / "metrics.jsonl") == read_lines(tmp_path / "b" / "metrics.jsonl")
    weights = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(weights) > 1
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in weights)
    a, b = (yaml.safe_load((tmp_path / run / "recipe.yaml").read_text()) for run in ("a", "b"))
    assert a | {"output": ""} == b | {"output": ""}
