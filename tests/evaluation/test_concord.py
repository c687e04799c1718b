"""How often judges of the same pairs agree: counted by hand, and through the command line, with annotators and subsets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_cli.data.records import Facts, Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.evaluation.concord import by_subset, concord, labels, verdicts
from rlhf_cli.evaluation.intervals import wilson
from tests.tiny import make_model, rlhf


def row(number: int, prompt: str, *texts: str, annotator: str | None = None, **facts: object) -> tuple[Tree, Record]:
    response = np.zeros(1, np.int32)
    known = Facts(**facts)  # type: ignore[arg-type]
    columns = "" if annotator is None else json.dumps({"annotator": annotator})
    record = Record(prompt, texts, f"rows:{number + 1}", known, columns=columns)
    return Tree(response, np.zeros(1, bool), tuple(response for _ in texts), number, known), record


ROWS = [
    row(0, "p", "b", "a", annotator="ann", subset="one"),
    row(1, "p", "a", "b", annotator="bo", subset="one"),
    row(2, "q", "c", "d", annotator="ann", subset="two"),
    row(3, "q", "d", "c", annotator="bo", probability=0.2, subset="two"),
    row(4, "r", "e", "f", annotator="ann", probability=0.5, subset="two"),
]
TREES, RECORDS = [tree for tree, _ in ROWS], [record for _, record in ROWS]


def test_labels_are_a_judge_and_so_is_each_annotator() -> None:
    """On p they differ, so that the labels are a tie; on q both take c, the second by a probability below a half; r is a tie."""
    found = labels(TREES, RECORDS)
    assert found == {
        "labels": {("p", "a", "b"): 0.5, ("q", "c", "d"): 1.0},
        "labels/ann": {("p", "a", "b"): 0.0, ("q", "c", "d"): 1.0},
        "labels/bo": {("p", "a", "b"): 1.0, ("q", "c", "d"): 1.0},
    }
    assert labels(TREES[:1], RECORDS).keys() == {"labels"}, "one annotator is all labels"


def test_agreement_is_counted_pair_by_pair() -> None:
    """A judge that likes c better than d, and finds a and b equally good."""
    scores = [np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([2.0, 1.0]), np.array([1.0, 2.0]), np.array([0.0, 0.0])]
    judges = labels(TREES, RECORDS) | {"rm": verdicts(TREES, RECORDS, scores)}
    found = concord(judges)
    assert {name: own.value for name, own in found["rm"].items()} == {"labels": 0.75, "labels/ann": 0.75, "labels/bo": 0.75}
    between = found["labels/ann"]["labels/bo"]
    assert (between.value, between.pairs) == (0.5, 2)
    assert (between.low, between.high) == pytest.approx(wilson(0.5, 2))
    assert found["labels/bo"]["labels/ann"] == between
    parts = by_subset(judges, TREES, RECORDS)
    assert {name: own["rm"]["labels/ann"].value for name, own in parts.items()} == {"one": 0.5, "two": 1.0}
    assert by_subset(judges, [tree._replace(facts=Facts()) for tree in TREES], RECORDS) == {}


def test_rankings_are_all_their_pairs() -> None:
    tree, record = row(0, "p", "x", "y", "z", ranks=(1.0, 2.0, 2.0))
    assert labels([tree], [record])["labels"] == {("p", "x", "y"): 1.0, ("p", "x", "z"): 1.0}
    assert verdicts([tree], [record], [np.array([1.0, 3.0, 0.0])]) == {("p", "x", "y"): 0.0, ("p", "x", "z"): 1.0}


def test_an_evaluation_has_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two terms, the labels and two annotators who disagree on every second pair."""
    make_model(tmp_path / "base")
    rows = []
    for number in range(12):
        pair = {"prompt": f"q {number}", "chosen": "a longer answer", "rejected": "short", "annotator": "ann", "subset": "s"}
        swapped = {"chosen": pair["rejected"], "rejected": pair["chosen"]} if number % 2 else {}
        rows += [pair, pair | swapped | {"annotator": "bo"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "f.py").write_text(
        "def long(responses):\n    return [len(r) for r in responses]\n\n\n"
        "def brief(responses):\n    return [-len(r) for r in responses]\n"
    )
    recipe = {
        "models": {"base": str(tmp_path / "base")},
        "preferences": str(tmp_path / "pairs.jsonl"),
        "gold": [{"function": f"{tmp_path}/f.py:long"}, {"function": f"{tmp_path}/f.py:brief"}],
        "output": str(tmp_path / "eval"),
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    assert rlhf("eval", tmp_path / "eval.yaml") == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    agreement = {x: {y: share["value"] for y, share in own.items()} for x, own in found["agreement"].items()}
    assert agreement["labels/ann"] == {"labels": 0.75, "labels/bo": 0.5, "gold/long": 1.0, "gold/brief": 0.0}
    assert agreement["labels/bo"]["gold/long"] == 0.5 and agreement["gold/long"]["gold/brief"] == 0.0
    assert found["agreement_by_subset"]["s"] == found["agreement"]
    report = (tmp_path / "eval" / "report.md").read_text()
    assert "How often two judges of the same pairs agree" in report and "How often two judges agree on s" in report
