from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli import sections
from rlhf_cli.data import cache
from rlhf_cli.data import encode as module
from rlhf_cli.data.encode import Encoded, encode
from rlhf_cli.data.records import Facts, Record
from rlhf_cli.data.templates import Template
from tests.data.tiny_tokenizer import CHATML, ZEPHYR, tiny_tokenizer

ROWS = [Record("Hi", ("No", "Yes"), "a:1"), Record("Hello <s>", ("It",), "a:2"), Record("What is it?", ("It is four.",), "a:3")]
DATA = sections.SftData(train=[])


def run(folder: Path | None, rows: list[Record] = ROWS, tokenizer: Any = None, text: str = CHATML, **data: Any) -> Encoded:
    tokenizer = tokenizer or tiny_tokenizer()
    return encode(rows, tokenizer, Template("x", text), replace(DATA, **data), responses="first", cache=folder)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def no_work(*_: Any) -> None:
    raise AssertionError("tokenised again")


def same(one: Encoded, other: Encoded) -> bool:
    return (
        one.trees.ids.tolist() == other.trees.ids.tolist()
        and one.trees.supervised.tolist() == other.trees.supervised.tolist()
        and [tree.row for tree in one.trees] == [tree.row for tree in other.trees]
        and replace(one, trees=other.trees, notices=()) == replace(other, notices=())
    )


def test_a_second_run_reads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = run(tmp_path / "new")
    monkeypatch.setattr(module._Encoder, "run", no_work)
    assert same(run(tmp_path / "new"), fresh)
    assert fresh.lost == {"a control token in the text": 1}


def test_moved_rows_are_found_and_named_by_their_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr(module._Encoder, "run", no_work)
    moved = run(tmp_path, [row._replace(where="b" + row.where[1:]) for row in ROWS])
    assert moved.trees.locations == ("b:1", "b:3")
    assert moved.trees.facts == (Facts(), Facts())
    assert moved.examples == ("b:2: a control token in the text ('<s>')",)


def test_what_is_said_of_rows_is_no_part_of_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr(module._Encoder, "run", no_work)
    judged = run(tmp_path, [row._replace(facts=Facts(margin=float(i))) for i, row in enumerate(ROWS)])
    assert [tree.facts.margin for tree in judged.trees] == [0.0, 2.0]


def test_truncated_rows_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_length": 34, "overlong": "truncate-response"}
    rows = [ROWS[0], ROWS[2]._replace(responses=("It is four. " * 9,))]
    fresh = run(tmp_path, rows, **settings)
    monkeypatch.setattr(module._Encoder, "run", no_work)
    assert fresh.truncated_rows == run(tmp_path, rows, **settings).truncated_rows == (1,)


def test_everything_that_decides_about_tokens_is_in_the_key(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, [*ROWS[:2], ROWS[2]._replace(responses=("It is five.",))])
    run(tmp_path, tokenizer=tiny_tokenizer(eos="<|im_end|>"))
    run(tmp_path, text=ZEPHYR)
    run(tmp_path, max_length=99)
    run(tmp_path, overlong="error")
    run(tmp_path, train_on="last")
    run(tmp_path, control_tokens="keep")
    assert len(files(tmp_path)) == 8
    run(tmp_path, max_lost=0.5)  # decides about the run, not about tokens
    run(tmp_path, [ROWS[0]._replace(responses=("No", "Never")), *ROWS[1:]])  # the second response is not used
    assert len(files(tmp_path)) == 8


def test_the_code_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr(cache, "source_hash", lambda *_: "other")
    run(tmp_path)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "junk"])
def test_a_damaged_file_is_replaced_with_a_notice(tmp_path: Path, damage: str) -> None:
    fresh = run(tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes({"flip": bytes(flipped), "cut": whole[:-3], "empty": b"", "junk": b"\xff" * 100}[damage])
    again = run(tmp_path)
    assert again.notices == (f"{path}: damaged; its tokens are made again",)
    assert same(again, fresh)
    assert files(tmp_path) == [path]
    assert run(tmp_path).notices == ()


def test_a_folder_that_takes_no_files_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert same(run(tmp_path / "file" / "cache"), run(None))
    assert cache.write(tmp_path / "file" / "cache" / "k", cache.Stored({"a": np.zeros(1)}, {})) is False


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_no_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert same(run(tmp_path), run(None))
    assert files(tmp_path) == []


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.default_folder({"RLHF_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c")
    assert cache.default_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/rlhf")
    assert cache.default_folder({}) == Path.home() / ".cache" / "rlhf"

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(cache.Path, "home", homeless)
    assert cache.default_folder({}) is None


def test_key_parts_do_not_run_together() -> None:
    assert len({cache.key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""])}) == 4
    assert cache.key([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
