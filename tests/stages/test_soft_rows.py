"""Pairs with probabilities, from a file to trained weights: which rows a kind learns from, and what a run says of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.formats import Purpose
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.data.templates import choose_template
from rlhf_cli.evaluation.rows import SECTIONS
from rlhf_cli.sections import Data, Source
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe

ODDS = [0.9, 0.5, 0.2, None, 1.0, 0.6, 0.0, 0.5]
LEFT_OUT = {"a tie: neither response is better": 2, "a wrong order: the rejected response is more likely the better one": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs with ODDS, and the same pairs in the other order."""
    folder = tmp_path_factory.mktemp("soft")
    make_model(folder / "model", initializer_range=0.2)
    rows: list[dict[str, Any]] = list(read_lines(write_pairs(folder / "plain.jsonl", len(ODDS))))
    told = [row | {"probability": p} for row, p in zip(rows, ODDS, strict=True)]
    other = [
        {
            "prompt": row["prompt"],
            "chosen": row["rejected"],
            "rejected": row["chosen"],
            "probability": 1 - (1.0 if p is None else p),
        }
        for row, p in zip(rows, ODDS, strict=True)
    ]
    for name, own in (("pairs", told), ("swapped", other), ("certain", [row | {"probability": 1} for row in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("command", "kind", "used"),
    [
        ("dpo", "dpo", True),
        ("dpo", "orpo", True),
        ("ipo", "ipo", True),
        ("train-rm", "bradley_terry", True),
        ("dpo", "slic", False),
        ("train-rm", "pairs", False),
        ("kto", "kto", False),
    ],
)
def test_rows_of_every_label(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str, used: bool
) -> None:
    path = write_recipe(
        tmp_path / "x.yaml", home / "model", home / "pairs.jsonl", tmp_path / "run", objective={"kind": kind}, lora={"r": 4}
    )
    assert rlhf(command, path, "--check") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    for reason, count in LEFT_OUT.items():
        assert (f"{reason} {count}" in said) is not used
    warning = f"the probability of a pair has no effect with kind {kind}: every chosen response counts as better"
    assert (warning in said) is not used
    assert rlhf(command, path, "--check", "--set", f"data.train={home / 'certain.jsonl'}") == 0
    assert "has no effect" not in "".join(capsys.readouterr())


def test_evaluations_keep_pairs_in_either_order(home: Path) -> None:
    tokenizer = tiny_tokenizer(template=CHATML)
    request = RowRequest(Purpose("preferences", SECTIONS["preferences"], SECTIONS), 0)
    data = Data(train=[Source(str(home / "pairs.jsonl"))])
    read = prepare(data, request, tokenizer, choose_template(tokenizer, None))
    assert [facts.probability for facts in read.train.trees.facts] == [0.9, 0.2, None, 1.0, 0.6, 0.0]
    assert read.reading.reports[0].unused == {"a tie: neither response is better": 2}


def test_a_run_learns_the_same_from_rows_in_the_other_order(home: Path, tmp_path: Path) -> None:
    """Held-out figures and weights after four steps of dpo with `sft_weight`, of (a, b, p) and (b, a, 1 − p)."""
    found = []
    for name in ("pairs", "swapped"):
        path = write_recipe(
            tmp_path / f"{name}.yaml",
            home / "model",
            home / f"{name}.jsonl",
            tmp_path / name,
            objective={"kind": "dpo", "beta": 0.5, "sft_weight": 0.3},
            data={"eval": str(home / f"{name}.jsonl")},
            lora={"r": 4},
            train={"steps": 4, "learning_rate": 0.01},
        )
        assert rlhf("dpo", path) == 0
        weights = load_file(tmp_path / name / "model" / "adapter_model.safetensors")
        found.append((weights, [x for x in read_lines(tmp_path / name / "metrics.jsonl") if x["split"] == "eval"][-1]))
    (weights, one), (others, other) = found
    for key, value in weights.items():
        assert float((value - others[key]).abs().max()) < 1e-5
    assert max(float(value.abs().max()) for key, value in weights.items() if "lora_B" in key) > 1e-3
    for key in ("loss", "rewards/accuracies"):
        assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"], abs=1e-4) and abs(one["rewards/margins"]) > 0.01
