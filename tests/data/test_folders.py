"""Folders, splits and file types that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_cli.data.sources import Reading, read_data
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Data, Source
from tests.data.uses import request_of

ROW = {"prompt": "q", "completion": "a"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, *answers: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps({**ROW, "completion": text}) + "\n" for text in answers))


def read(path: str, **source: Any) -> list[str]:
    return [str(record.responses[0]) for record in reading(path, **source).train]


def reading(path: str, **source: Any) -> Reading:
    return read_data(Data([Source(path, **source)]), request_of("sft"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("alpaca_train.jsonl", "alpaca_test.jsonl"),
        ("training.jsonl", "testing.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("data/train.jsonl", "data/test.jsonl"),
    ],
)
def test_a_folder_is_read_by_split(train: str, test: str) -> None:
    write(f"d/{train}", "yes")
    write(f"d/{test}", "no")
    assert (read("d"), read("d", split="test")) == (["yes"], ["no"])
    with pytest.raises(UsageError, match=r"which files of .* are its split validation"):
        read("d", split="validation")


def test_a_folder_without_splits_is_read_whole_and_a_mixed_one_not_at_all() -> None:
    write("d/a.jsonl", "1")
    write("d/contest.jsonl", "2")  # no split's name
    assert read("d") == ["1", "2"]
    write("d/test.jsonl", "3")
    with pytest.raises(UsageError, match=r"which files of d are its split train\? found no split: .*, test: test.jsonl"):
        read("d")


def test_saved_data_sets() -> None:
    rows = datasets.Dataset.from_list([{**ROW, "tools": [{"name": "f", "a": None}, {"name": "g", "a": 1}]}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("s")
    record = reading("s").train[0]
    assert record.options["tools"][0]["function"] == {"name": "f"}  # a missing key is null where columns have types
    assert record.where == "s:1"
    with pytest.raises(UsageError, match="s has no split validation; it has train, test"):
        read("s", split="validation")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", "prompt\tcompletion\nq\ta, b; c\n"),
        ("x.csv", "prompt;completion\nq;a, b\n"),
        ("x.csv", 'prompt,completion\nq,"a; b"\n'),
        ("x.json", json.dumps({"data": [ROW]})),
        ("x.json", json.dumps({"version": 1, "rows": [ROW]}, indent=1)),
        ("x.json", json.dumps([ROW])),
    ],
)
def test_files_that_are_read(name: str, content: str) -> None:
    Path(name).write_text(content)
    assert read(name)[0].startswith("a")


def test_one_row_of_turns_is_no_wrapper() -> None:
    Path("x.json").write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    assert read("x.json") == ["a"]


def test_a_text_file_is_refused_with_what_to_do() -> None:
    Path("x.txt").write_text("q\n")
    with pytest.raises(UsageError, match=r'a text does not say where a row ends: write lines of \{"text": …\}'):
        read("x.txt")
