"""Lengths and tokens that a model cannot take: defaults shrink and are said, what is written must fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.tiny import make_model, rlhf, write_pairs, write_rows

REWARD = {"reward": [{"function": "f.py:worth"}]}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("rows.jsonl", {}),
    "train-rm": ("pairs.jsonl", {}),
    "dpo": ("pairs.jsonl", {}),
    "kto": ("pairs.jsonl", {}),
    "ppo": ("rows.jsonl", REWARD),
    "online dpo": ("rows.jsonl", REWARD | {"rollout": {}}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 128 positions, and another one whose tokenizer has a token more than its embeddings."""
    folder = tmp_path_factory.mktemp("lengths")
    make_model(folder / "base", max_position_embeddings=128)
    make_model(folder / "grown")
    tokenizer = tiny_tokenizer(eos="<|im_end|>", template=CHATML)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder / "grown")
    write_rows(folder / "rows.jsonl", 8)
    write_pairs(folder / "pairs.jsonl", 8)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[5]["completion"] += "<tool>"
    (folder / "tool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "f.py").write_text("def worth(prompts, responses):\n    return [0.0] * len(responses)\n")
    return folder


@pytest.fixture(autouse=True)
def in_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def check(stage: str, data: str, sections: dict[str, Any], *more: str, model: str = "base") -> int:
    recipe = {"model": {"path": model}, "data": {"train": data}, "output": "run"} | sections
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    return rlhf(stage.split()[-1], "r.yaml", "--check", *more)


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_shrink_to_what_the_model_takes(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, sections = STAGES[stage]
    assert check(stage, data, sections) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "data.max_length: 128, all that base can take (default 1,024)"
    drawn = "rollout.max_new_tokens: 64, half of that (default 128)"
    assert (said[1] == drawn) == ("reward" in sections)


@pytest.mark.parametrize("stage", STAGES)
def test_written_lengths_must_fit(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, sections = STAGES[stage]
    assert check(stage, data, sections, "--set", "data.max_length=129") == 2
    words = "--set data.max_length: 129 tokens are more than base can take, 128. lower it\n"
    assert capsys.readouterr().err == f"error: {words}"
    drawn = ["--set", "rollout.max_new_tokens=30"] if sections else []
    assert check(stage, data, sections, "--set", "data.max_length=128", *drawn) == 0


def test_a_written_length_of_responses_must_fit_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("ppo", "rows.jsonl", REWARD, "--set", "rollout.max_new_tokens=128") == 2
    words = "leaves no room for a prompt in the 128 tokens of base. lower it"
    assert capsys.readouterr().err == f"error: --set rollout.max_new_tokens: {words}\n"


def test_a_run_with_defaults_that_shrank_trains_and_is_repeated() -> None:
    recipe = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "train": {"steps": 1}, "output": "run"} | REWARD
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert rlhf("ppo", "r.yaml", "--force") == 0
    recorded = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert (recorded["data"]["max_length"], recorded["rollout"]["max_new_tokens"]) == (128, 64)
    assert rlhf("ppo", "run/recipe.yaml", "--output", "again", "--force") == 0


def test_an_evaluation_fits_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    recipe: dict[str, Any] = {"models": {"a": "grown", "b": "base"}, "prompts": "rows.jsonl", "output": "eval"}
    Path("e.yaml").write_text(yaml.safe_dump(recipe))
    assert rlhf("eval", "e.yaml", "--check") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "max_length: 128, all that b can take (default 1,024)",
        "rollout.max_new_tokens: 64, half of that (default 128)",
    ]
    assert rlhf("eval", "e.yaml", "--check", "--set", "max_length=200") == 2
    assert capsys.readouterr().err == "error: --set max_length: 200 tokens are more than b can take, 128. lower it\n"


def test_a_token_beyond_the_embeddings_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = json.loads((home / "grown" / "config.json").read_text())["vocab_size"]
    words = f"tool.jsonl:6: the token '<tool>' ({size}) is beyond the embeddings of {{}}, which has {size}\n"
    assert check("sft", "tool.jsonl", {}, model="grown") == 2
    assert capsys.readouterr().err.startswith("error: " + words.format("grown"))
    ptx = REWARD | {"ptx": {"data": "tool.jsonl"}}
    assert check("ppo", "rows.jsonl", ptx, model="grown") == 2
    assert words.format("grown") in capsys.readouterr().err
    Path("e.yaml").write_text(yaml.safe_dump({"models": {"a": "grown"}, "text": "tool.jsonl", "output": "eval"}))
    assert rlhf("eval", "e.yaml", "--check") == 2
    assert words.format("a") in capsys.readouterr().err
