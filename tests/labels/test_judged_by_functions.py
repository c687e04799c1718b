"""Labels by a Python function: what its numbers say, where it says nothing, and what it cannot be given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import read_lines, rlhf

JUDGES = """
def length(prompts, responses):
    return [float(len(response)) for response in responses]

def near(prompts, responses, answer):
    return [-abs(len(response) - number) for response, number in zip(responses, answer)]

def shy(prompts, responses):
    return [None if response == "say nothing" else float(len(response)) for response in responses]
"""
ROWS = [
    {"prompt": "p0", "responses": ["a", "bbb", "cc"], "answer": 2},
    {"prompt": "p1", "responses": ["xx", "yy"], "answer": 9},
    {"prompt": "p2", "responses": ["say nothing", "ok"], "answer": 1},
]


def label(folder: Path, function: str, *options: str, **sections: Any) -> int:
    (folder / "judges.py").write_text(JUDGES)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    judge = {"function": f"{folder}/judges.py:{function}", **sections.pop("judge", {})}
    recipe = {"rows": str(folder / "rows.jsonl"), "judge": judge, "output": str(folder / "out"), **sections}
    (folder / "label.yaml").write_text(yaml.safe_dump(recipe))
    return rlhf("label", folder / "label.yaml", *options)


def better(folder: Path) -> dict[tuple[str, str], float]:
    """(the one, the other) → probability."""
    return {(row["chosen"], row["rejected"]): row["probability"] for row in read_lines(folder / "out" / "preferences.jsonl")}


def test_the_higher_number_is_the_better_one(tmp_path: Path) -> None:
    assert label(tmp_path, "length") == 0
    expected = {("bbb", "a"): 1.0, ("cc", "a"): 1.0, ("bbb", "cc"): 1.0, ("xx", "yy"): 0.5, ("say nothing", "ok"): 1.0}
    assert better(tmp_path) == expected
    assert {row["annotator"] for row in read_lines(tmp_path / "out" / "preferences.jsonl")} == {"length"}
    for line in read_lines(tmp_path / "out" / "verdicts.jsonl"):
        first, second = (len(ROWS[line["row"]]["responses"][at]) for at in line["order"])
        assert line["verdict"] == ("tie" if first == second else "a" if first > second else "b")


def test_a_column_of_the_rows(tmp_path: Path) -> None:
    assert label(tmp_path, "near") == 0
    assert better(tmp_path) == {
        ("cc", "a"): 1.0,
        ("a", "bbb"): 0.5,
        ("cc", "bbb"): 1.0,
        ("xx", "yy"): 0.5,
        ("ok", "say nothing"): 1.0,
    }


def test_rationality_makes_probabilities(tmp_path: Path) -> None:
    """σ(β · difference): 2 characters at β = 0.5 are e/(1 + e)."""
    assert label(tmp_path, "length", judge={"rationality": 0.5}) == 0
    own = better(tmp_path)
    assert own["bbb", "a"] == pytest.approx(math.e / (1 + math.e))
    assert own["cc", "a"] == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_none_is_a_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label(tmp_path, "shy") == 0
    assert len(better(tmp_path)) == 4
    (skipped,) = [line for line in read_lines(tmp_path / "out" / "verdicts.jsonl") if line["verdict"] == "skip"]
    assert (skipped["row"], skipped["p"]) == (2, None)
    assert "1 pair skipped: shy said nothing that is a verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "sections", "words"),
    [
        ("length", {"judge": {"people": {"annotators": ["ann"]}}}, "judge.people: has no effect where a function judges"),
        ("length", {"judge": {"path": "x"}}, "judge.path: has no effect where a function judges"),
        ("length", {"judge": {"function": "length"}}, "expected file.py:name, found length"),
        ("length", {"judge": {"function": None, "rationality": 1.0}}, "judge.rationality: has no effect without function"),
        ("missing", {}, "has no function missing"),
        ("near", {"rows": None, "samples": "samples.jsonl"}, "reads the column 'answer', and samples have no columns"),
    ],
)
def test_what_cannot_judge(
    function: str, sections: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(tmp_path, function, "--check", **sections) == 2
    assert words in " ".join(capsys.readouterr().err.split())
