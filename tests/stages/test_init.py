"""A recipe for somebody's own rows, and what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.tiny import make_base, rlhf

COUNT = 40


def row(shape: str, i: int) -> dict[str, Any]:
    said, other = f"It is {i} indeed.", f"No {i}."
    asked = f"Which number is {i}?"
    return {
        "messages": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]},
        "sharegpt": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]},
        "alpaca": {"instruction": asked, "input": "", "output": said},
        "preference": {"prompt": asked, "chosen": said, "rejected": other, "source": "x"},
        "hh": {"chosen": f"\n\nHuman: {asked}\n\nAssistant: {said}", "rejected": f"\n\nHuman: {asked}\n\nAssistant: {other}"},
        "scored": {
            "instruction": asked,
            "completions": [{"response": said, "overall_score": 3}, {"response": other, "overall_score": 1}],
        },
        "unpaired": {"prompt": asked, "completion": said if i % 4 else other, "label": bool(i % 4)},
        "prompt": {"question": asked, "answer": f"So it is\n#### {i}"},
    }[shape]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("init")
    make_base(folder / "base")
    for shape in ("messages", "sharegpt", "alpaca", "preference", "hh", "scored", "unpaired", "prompt"):
        (folder / f"{shape}.jsonl").write_text("".join(json.dumps(row(shape, i)) + "\n" for i in range(COUNT)))
    (folder / "one.jsonl").write_text('{"x": "Which is it?"}\n')
    yield folder


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        ("sft", "messages"),
        ("sft", "sharegpt"),
        ("sft", "alpaca"),
        ("dpo", "preference"),
        ("dpo", "hh"),
        ("train-rm", "scored"),
        ("kto", "unpaired"),
        ("ppo", "prompt"),
    ],
)
def test_a_recipe_runs_as_it_is_written(
    stage: str, shape: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, recipe = str(home / f"{shape}.jsonl"), tmp_path / "mine.yaml"
    assert rlhf("init", stage, recipe, "--data", rows, "--model", home / "base") == 0
    written = yaml.safe_load(recipe.read_text())
    assert written["data"]["train"] == [{"path": rows, "format": shape}]
    first, *_ = recipe.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=mine.schema.json"
    jsonschema.validate(written, json.loads((tmp_path / "mine.schema.json").read_text()))
    quick = ["train.steps=1", *(["rollout.max_new_tokens=4", "rollout.responses_per_prompt=2"] if stage == "ppo" else [])]
    assert rlhf(stage, recipe, *quick) == 0
    assert (tmp_path / "runs" / stage / "manifest.json").exists()
    assert rlhf("init", stage, recipe, "--data", rows) == 2  # it is there


def test_the_answers_column_becomes_the_reward(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("init", "ppo", "--data", str(home / "prompt.jsonl")) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["reward"] == [{"match": {"column": "answer", "extract": "last-number", "compare": "number"}}]


FOREIGN = {
    "pair": lambda i: {"question": f"Which is {i}?", "good": f"It is {i}.", "bad": f"No {i}."},
    "answers": lambda i: {"question": f"Which is {i}?", "answer": f"It is {i}."},
    "results": lambda i: {"query": f"Which is {i}?", "winner_text": f"It is {i}.", "loser_text": f"No {i}."},
    "capitals": lambda i: {"Instruction": f"Which is {i}?", "Answer": f"It is {i}."},
    "dialogues": lambda i: {
        "id": i,
        "dialog": [{"from": "human", "value": f"Which is {i}?"}, {"from": "gpt", "value": f"It is {i}."}],
    },
    "thumbs": lambda i: {"userQuery": f"Which is {i}?", "reply": f"It is {i}.", "thumbs_up": bool(i % 3)},
    "named": lambda i: {"ask": f"Which is {i}?", "reply_a": f"It is {i}.", "reply_b": f"No {i}.", "preference": "ab"[i % 2]},
    "number": lambda i: {"text_a": f"It is {i}.", "text_b": f"No {i}.", "label": i % 2, "about: it": f"Which is {i}?"},
    "nameless": lambda i: {"x": f"Which is {i}?", "y": f"It is {i}."},
    "two": lambda i: {"question": f"Which is {i}?", "good": f"It is {i}.", "better": f"It is {i} indeed.", "bad": f"No {i}."},
}


def foreign(folder: Path, shape: str) -> str:
    path = folder / f"{shape}.jsonl"
    path.write_text("".join(json.dumps(FOREIGN[shape](i)) + "\n" for i in range(COUNT)))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "shape", "format", "columns"),
    [
        ("dpo", "pair", "preference", {"prompt": "question", "chosen": "good", "rejected": "bad"}),
        ("sft", "pair", "preference", {"prompt": "question", "chosen": "good", "rejected": "bad"}),
        ("sft", "answers", "prompt-completion", {"prompt": "question", "completion": "answer"}),
        ("dpo", "results", "preference", {"prompt": "query", "chosen": "winner_text", "rejected": "loser_text"}),
        ("sft", "capitals", "prompt-completion", {"prompt": "Instruction", "completion": "Answer"}),
        ("sft", "dialogues", "messages", {"messages": "dialog"}),
        ("kto", "thumbs", "unpaired", {"prompt": "userQuery", "completion": "reply", "label": "thumbs_up"}),
        ("sft", "thumbs", "unpaired", {"prompt": "userQuery", "completion": "reply", "label": "thumbs_up"}),
        (
            "train-rm",
            "named",
            "choice",
            {"prompt": "ask", "response_a": "reply_a", "response_b": "reply_b", "winner": "preference"},
        ),
    ],
)
def test_columns_of_other_names_are_guessed(
    stage: str, shape: str, format: str, columns: dict[str, str], home: Path, tmp_path: Path
) -> None:
    rows, recipe = foreign(tmp_path, shape), tmp_path / "r.yaml"
    assert rlhf("init", stage, recipe, "--data", rows, "--model", home / "base") == 0
    text = recipe.read_text()
    assert yaml.safe_load(text)["data"]["train"] == [{"path": rows, "format": format, "columns": columns}]
    assert "# A guess from the names of the columns. Mend it where it is wrong.\n" in text
    assert f"# The rows have: {', '.join(FOREIGN[shape](0))}\n" in text
    unread = [name for names in re.findall(r"; not read: (.*)", text) for name in names.split(", ")]
    assert [name for name in unread if name in columns.values()] == []
    assert rlhf(stage, recipe, "--check") == 0


@pytest.mark.parametrize(
    ("stage", "shape", "guessed", "asked", "filled"),
    [
        ("dpo", "number", {"response_a": "text_a", "response_b": "text_b"}, ["prompt", "winner"], ["'about: it'", "label"]),
        ("sft", "nameless", {}, ["prompt", "completion"], ["x", "y"]),
        ("dpo", "two", {"prompt": "question", "rejected": "bad"}, ["chosen"], ["better"]),
    ],
)
def test_columns_without_a_guess_are_to_be_filled_in(
    stage: str,
    shape: str,
    guessed: dict[str, str],
    asked: list[str],
    filled: list[str],
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Numbers do not say whether 1 is the first or the second; of two columns of one meaning neither is taken."""
    rows, recipe = foreign(tmp_path, shape), tmp_path / "r.yaml"
    assert rlhf("init", stage, recipe, "--data", rows, "--model", home / "base") == 0
    text = recipe.read_text()
    (source,) = yaml.safe_load(text)["data"]["train"]
    assert source["columns"] == guessed | dict.fromkeys(asked)
    assert "# FILL IN which of your columns are meant.\n" in text
    capsys.readouterr()
    assert rlhf(stage, recipe, "--check") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in said] == [f"data.train.0.columns.{name}" for name in asked]
    for name, value in zip(asked, filled, strict=True):
        text = text.replace(f"  {name}: ", f"  {name}: {value} ")
    recipe.write_text(text)
    assert rlhf(stage, recipe, "--check") == 0


def test_what_has_to_be_filled_in_is_named_by_the_check(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("init", "ppo", tmp_path / "r.yaml", "--data", str(home / "messages.jsonl")) == 0
    assert rlhf("ppo", tmp_path / "r.yaml", "--check") == 2
    said = capsys.readouterr().err
    assert "r.yaml:4: model.path: expected text, found nothing" in said
    assert "reward: the list is empty. name a term" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo", "--data", "HOME/unpaired.jsonl"], "unpaired rows are of no use to dpo. they are good for sft, kto, ppo"),
        (["dop", "--data", "HOME/hh.jsonl"], "rlhf init dop: no such stage. did you mean dpo?"),
        (["sft", "--data", "HOME/one.jsonl"], "error: the rows: HOME/one.jsonl: found the columns x; rlhf needs messages | "),
        (["dpo", "--data", "HOME/prompt.jsonl"], "prompt rows are of no use to dpo. they are good for ppo"),
        (["dpo"], "rlhf init: --data is missing"),
        (["dpo", "--data", "HOME/hhh.jsonl"], "error: the rows: no such file or folder: "),
    ],
)
def test_what_cannot_be_written(words: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("init", *(word.replace("HOME", str(home)) for word in words)) == 2
    assert message.replace("HOME", str(home)) in capsys.readouterr().err


class TestData:
    def test_says_what_rows_are(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("data", home / "preference.jsonl") == 0
        said = " ".join(capsys.readouterr().out.split())
        for words in (
            "40 rows as preference",
            "columns not used source",
            "40 different",
            "is the longer one in 100% of the pairs",
        ):
            assert words in said
        assert "[assistant, rank 1] It is 0 indeed. [assistant, rank 2] No 0." in said

    def test_as_json(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("data", home / "unpaired.jsonl", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["labels"] == {"desirable": 30, "undesirable": 10}
        assert (found["rows"], found["repeated"], found["prompts"]) == (40, 0, 40)
        assert found["stages"] == ["sft", "kto", "ppo"]
        assert found["words"]["prompt"] == {"p50": 4, "p90": 4, "p99": 4, "max": 4}

    def test_prompts_alone_are_for_drawing(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("data", home / "prompt.jsonl", "--json") == 0
        assert json.loads(capsys.readouterr().out)["stages"] == ["ppo"]

    def test_repeated_rows_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [row("messages", i % 3) for i in range(5)]
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
        assert rlhf("data", tmp_path / "r.jsonl") == 0
        assert "5, 2 of them repeat another one" in capsys.readouterr().out
