"""Records in mapped files are the records that lists hold, in every order, and files that are damaged are made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data import sources, stored
from rlhf_cli.data.dataset import Dataset, prepare
from rlhf_cli.data.records import Record
from rlhf_cli.data.stored import Records, Stored, joined, take
from rlhf_cli.data.templates import choose_template
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Data, Source
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.data.uses import request_of

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"How many is {i}?"}] if i % 3 else f"How many is {i}?",
        "chosen": f"It is {i}.",
        "rejected": [{"role": "assistant", "content": "", "tool_calls": [{"name": "count", "arguments": {"n": i}}]}],
        **({"score_chosen": i, "score_rejected": -1.5} if i % 2 else {}),
        **({"subset": "small"} if i < 5 else {}),
    }
    for i in range(23)
]
TOOLS = CHATML.replace("+ '<|im_end|>", "+ (m['tool_calls'] | tojson if m['tool_calls'] else '') + '<|im_end|>")


@pytest.fixture(autouse=True)
def small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", "cache")
    monkeypatch.setattr(stored, "BATCH", 2)
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:7]) + "{\n")


def read(in_memory: int, monkeypatch: pytest.MonkeyPatch, kept_from: int = 0) -> Dataset:
    monkeypatch.setattr(stored, "IN_MEMORY", in_memory)
    monkeypatch.setattr(sources, "KEPT_FROM", kept_from)
    data = Data([Source("a.jsonl", limit=20), Source("b.jsonl")], holdout=0.3, max_lost=0.5)
    return prepare(data, request_of("dpo"), tiny_tokenizer(), choose_template(tiny_tokenizer(template=TOOLS), None))


def content(dataset: Dataset) -> list[Any]:
    parts = [part for part in (dataset.train, dataset.held_out) if part is not None]
    trees = [[tree.prompt.tolist(), [r.tolist() for r in tree.responses], tree.facts] for part in parts for tree in part.trees]
    reading = dataset.reading
    return [trees, [p.trees.locations for p in parts], [*reading.train], [*reading.held_out], reading.reports, reading.sizes]


def test_what_is_kept_in_files_is_what_lists_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(10**6, monkeypatch)
    assert isinstance(plain.reading.train, list)
    filed = read(4, monkeypatch)
    assert isinstance(filed.reading.train, Records)
    assert len([*Path("cache").glob("rows-*.arrow")]) == 2
    again = read(4, monkeypatch)
    assert content(plain) == content(filed) == content(again)


def test_rows_are_read_again_where_anything_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(read(4, monkeypatch))
    monkeypatch.setattr(sources, "_convert", lambda *_: pytest.fail("read again"))
    assert content(read(4, monkeypatch)) == before
    with Path("a.jsonl").open("a") as file:
        file.write(json.dumps(PAIRS[0]) + "\n")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        read(4, monkeypatch)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(read(4, monkeypatch))
    path = next(Path("cache").glob("rows-*.arrow"))
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes({"flip": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], "cut": whole[:-9], "empty": b""}[damage])
    assert stored.read(path) is None
    assert content(read(4, monkeypatch)) == before
    assert path.read_bytes() == whole


def test_no_file_is_left_of_rows_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("a.jsonl").open("a") as file:
        file.write(json.dumps(PAIRS[0] | {"context": "c"}) + "\n")
    with pytest.raises(UsageError, match="'context' is not read"):
        read(4, monkeypatch)
    assert [*Path("cache").glob("*")] == []


def test_small_files_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    read(4, monkeypatch, kept_from=1 << 20)
    assert [*Path("cache").glob("rows-*")] == []


def test_any_order_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", 2)
    texts = [Record(f"p{i}", (f"r{i}",), f"x.jsonl:{i + 1}") for i in range(5)]
    with stored.Writer(None) as writer:
        for i, record in enumerate(texts):
            writer.add(record, record.serialised, i / 10)
        filed, falls = writer.finish(None, {})
    assert isinstance(filed, Stored) and falls.tolist() == [0, 0.1, 0.2, 0.3, 0.4]
    listed = [Record("q", ("s",), "y.jsonl:9")]
    both = joined([take(filed, np.array([3, 1])), listed])
    assert [*both] == [texts[3], texts[1], listed[0]] == both[0:3]
    assert [*filed] == texts == filed[:]
