"""The arithmetic task's data: the same bytes twice, right answers, and sums that training never sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SMALL = {"sft": 60, "prompts": 50, "eval_prompts": 20}
SOLVED = {"solver": 40, "steps": 400}
FILES = (*SMALL, *SOLVED, "outcome")


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield import_module("make_arithmetic")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_answer_is_right_and_held_out_sums_occur_nowhere_else(maker: ModuleType, tmp_path: Path) -> None:
    maker.make_data(tmp_path, seed=3, sizes=maker.Sizes(**SMALL))
    found = {name: rows(tmp_path / f"{name}.jsonl") for name in SMALL}
    assert {name: len(own) for name, own in found.items()} == SMALL
    for name, own in found.items():
        column = "completion" if name == "sft" else "answer"
        assert all(row.keys() == {"prompt", column} for row in own)
        right = [sum(map(int, row["prompt"].split("+"))) for row in own]
        assert [row[column] for row in own] == ([*map(str, right)] if name == "sft" else right)
        assert all(len(row["prompt"]) == 7 for row in own)
    asked = {name: {row["prompt"] for row in own} for name, own in found.items()}
    assert {name: len(own) for name, own in asked.items()} == SMALL  # each once
    assert not asked["eval_prompts"] & (asked["sft"] | asked["prompts"])


def test_steps_are_labelled_by_the_right_solution(maker: ModuleType, tmp_path: Path) -> None:
    maker.make_data(tmp_path, seed=3, sizes=maker.Sizes(**SMALL, **SOLVED))
    found = {name: rows(tmp_path / f"{name}.jsonl") for name in FILES}
    held = {row["prompt"] for row in found["eval_prompts"]}
    right = {}
    for row in (row for name in ("solver", "steps") for row in found[name]):
        a, b, c, d = map(int, row["prompt"].split("+"))
        right[row["prompt"]] = [f"{a}+{b}={a + b}", f"{a + b}+{c}={a + b + c}", f"{a + b + c}+{d}={a + b + c + d}"]
        assert row["prompt"] not in held
    assert all(row["completion"].split("\n") == right[row["prompt"]] for row in found["solver"])
    for row, outcome in zip(found["steps"], found["outcome"], strict=True):
        own = [step == other for step, other in zip(row["steps"], right[row["prompt"]], strict=True)]
        first = own.index(False) if False in own else 3
        assert row["labels"] == [True] * first + [False] * (3 - first)
        result = row["steps"][-1].rpartition("=")[2] == right[row["prompt"]][-1].rpartition("=")[2]
        assert outcome == {"prompt": row["prompt"], "steps": ["\n".join(row["steps"])], "labels": [result]}
        for step, after in zip(row["steps"], row["steps"][1:], strict=False):
            assert after.startswith(step.rpartition("=")[2] + "+"), "it goes on from what is there"
    assert {len(found[name]) for name in ("steps", "outcome")} == {400}
    labels = [label for row in found["steps"] for label in row["labels"]]
    assert 0.55 < sum(labels) / len(labels) < 0.75
    by_luck = [one for row, one in zip(found["steps"], found["outcome"], strict=True) if one["labels"] > row["labels"][-1:]]
    assert by_luck, "two slips may cancel"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(maker: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        maker.make_data(tmp_path / name, seed, maker.Sizes())
    made = {name: [(tmp_path / name / f"{file}.jsonl").read_bytes() for file in FILES] for name in "abc"}
    assert made["a"] == made["b"]
    assert all(one != other for one, other in zip(made["a"], made["c"], strict=True))
    assert [data.count(b"\n") for data in made["a"]] == [4000, 3000, 256, 4000, 8000, 8000]


def test_the_model_reads_digit_by_digit(maker: ModuleType, tmp_path: Path) -> None:
    from quickstart_model import make_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    maker.make_data(tmp_path, seed=0, sizes=maker.Sizes())
    make_model(tmp_path / "model", tmp_path, 0, maker.VOCABULARY, hidden=96, inner=256, layers=3, heads=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_ids_to_tokens(tokenizer("17+20")["input_ids"]) == ["1", "7", "+", "2", "0"]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "model").parameters())
    # 261·96 embeddings; 3 layers of 4·96² attention, 3·96·256 MLP and 2·96 norms; a last norm of 96.
    assert parameters == 25_056 + 3 * (36_864 + 73_728 + 192) + 96
