"""Columns and keys of turns that change what is learned: refused where nothing reads them, left out only when asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.sources import Reading, read_data
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Data, Source
from tests.data.uses import request_of

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = {"prompt": "q", "completion": "a"}
TALK = {"messages": [ASKED, ANSWERED]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(rows: list[dict[str, Any]], stage: str = "sft", **source: Any) -> Reading:
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_data(Data([Source("x.jsonl", **source)]), request_of(stage))


def turn(**more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, ANSWERED | more]}


COLUMNS: list[tuple[str, dict[str, Any], str, str]] = [
    ("sft", PLAIN | {"input": "a list"}, "input", "a part of the prompt"),
    ("sft", PLAIN | {"context": "c"}, "context", "a part of the prompt"),
    ("sft", {"text": "t", "system": "s"}, "system", "a system turn"),
    ("sft", PLAIN | {"history": [["q", "a"]]}, "history", "earlier turns"),
    ("sft", TALK | {"images": ["x.png"]}, "images", "no text, and only text is read"),
    ("sft", {"text": "t", "parent_id": "7"}, "parent_id", "a place in a tree of messages"),
    (
        "sft",
        TALK | {"label": False},
        "label",
        "whether the response is desirable; as true or false beside prompt and completion it is read",
    ),
    (
        "sft",
        PLAIN | {"label": 0},
        "label",
        "whether the response is desirable; as true or false beside prompt and completion it is read",
    ),
    ("sft", PLAIN | {"weight": 0.5}, "weight", "how much of it is learned"),
    ("sft", PLAIN | {"reasoning": "r"}, "reasoning", "a part of the response"),
    ("dpo", PAIR | {"better_response_id": 0}, "better_response_id", "which response is better"),
    ("sft", turn(loss_weight=0.3), "loss_weight", "0.3 is neither 0 nor 1"),
    ("sft", turn(images=["x.png"]), "images", "no text, and only text is read"),
]


@pytest.mark.parametrize(("stage", "row", "name", "what"), COLUMNS)
def test_what_nothing_reads_is_refused_unless_waived(stage: str, row: dict[str, Any], name: str, what: str) -> None:
    plain = {"messages": TALK, "text": {"text": "u"}, "chosen": PAIR, "completion": PLAIN}
    other = next((own for column, own in plain.items() if column in row), {"prompt": "q2"})
    with pytest.raises(UsageError) as error:
        read([other, row], stage)
    said, advice = str(error.value).splitlines()
    place = r"data\.train\.0\.path: x\.jsonl:2: "
    assert re.fullmatch(rf"{place}'{name}'( in turn [12] of '\w+')? is not read, and changes what the row means: {what}", said)
    assert advice == f"  read it by a format or columns, or leave it out on purpose: data.train.0.ignore: [{name}]"
    assert len(read([other, row], stage, ignore=[name]).train) == 2


SAID_ANYWAY: list[tuple[str, dict[str, Any]]] = [
    ("sft", PLAIN | {"input": "", "system": None, "history": [], "tools": {}, "context": "  "}),
    ("sft", turn(weight=1, train=True, loss_weight=1.0, thinking="", tool_calls=None)),
    ("ppo", {"prompt": "q", "label": False, "weight": 0}),
    ("kto", PLAIN | {"label": False}),
    ("sft", PLAIN | {"label": True}),
]


@pytest.mark.parametrize(("stage", "row"), SAID_ANYWAY)
def test_what_says_nothing_more_is_taken(stage: str, row: dict[str, Any]) -> None:
    assert len(read([row], stage).train) == 1


def test_columns_that_are_renamed_are_read() -> None:
    reading = read([{"context": "q", "output": "a"}], columns={"prompt": "context", "completion": "output"})
    assert reading.train[0].prompt == "q"


def test_other_columns_are_listed() -> None:
    (report,) = read(
        [PLAIN | {"id": 1}, PLAIN | {"source": "s", "subset": "x"}, PLAIN | {"input": "i"}], ignore=["input"]
    ).reports
    assert report.left_out == ("id", "source")


def test_a_waiver_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.train\.0\.ignore: the data has no column 'tool'\. did you mean tools\?"):
        read([PLAIN | {"tools": []}], ignore=["tool"])


def test_it_is_no_matter_how_far_down_the_row_is() -> None:
    with pytest.raises(UsageError, match=r"x\.jsonl:300: 'context' is not read"):
        read([PLAIN] * 299 + [PLAIN | {"context": "s"}])
