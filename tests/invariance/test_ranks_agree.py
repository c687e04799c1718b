"""The same losses and weights from one process and from two, and through the command line for any tokens_per_device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_model, read_lines, rlhf, spawn, write_recipe, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "base", initializer_range=0.2)
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "eval.jsonl", 5, seed=1)
    return folder


def _recipe(home: Path, output: Path, **train: Any) -> Path:
    data = {"eval": str(home / "eval.jsonl")}
    settings = {"save_every": None, "eval_every": 3} | train
    return write_recipe(output.with_suffix(".yaml"), home / "base", home / "rows.jsonl", output, data=data, train=settings)


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "model").glob("*.safetensors")))


def _agree(a: Path, b: Path) -> None:
    lines = [read_lines(run / "metrics.jsonl") for run in (a, b)]
    assert [(line["step"], line["split"]) for line in lines[0]] == [
        *[(0, "eval"), (1, "train"), (2, "train"), (3, "train"), (3, "eval")],
        *[(4, "train"), (5, "train"), (6, "train"), (6, "eval")],
    ]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        one.pop("split"), other.pop("split")
        assert one == pytest.approx(other, rel=1e-4)
    one, other = _tensors(a), _tensors(b)
    assert one.keys() == other.keys()
    # AdamW divides by the gradient's size, so that rounding of a tiny gradient shows: 0.3 % of one update of 1e-3.
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < 3e-6


@pytest.mark.parametrize("other", [{"tokens_per_device": 1}, {"tokens_per_device": 40}])
def test_tokens_per_device_changes_nothing(other: dict[str, Any], home: Path, tmp_path: Path) -> None:
    assert rlhf("sft", _recipe(home, tmp_path / "a", tokens_per_device=4096)) == 0
    assert rlhf("sft", _recipe(home, tmp_path / "b", **other)) == 0
    _agree(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_two_ranks_are_one(home: Path, tmp_path: Path) -> None:
    """Batches of 5 rows, so that the shares differ; the last evaluation batch is odd too."""
    assert rlhf("sft", _recipe(home, tmp_path / "one", batch_size=5)) == 0
    process = spawn("sft", _recipe(home, tmp_path / "two", batch_size=5), ranks=2)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    _agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_rank_without_a_row_takes_part(home: Path, tmp_path: Path) -> None:
    assert rlhf("sft", _recipe(home, tmp_path / "one", batch_size=1)) == 0
    process = spawn("sft", _recipe(home, tmp_path / "two", batch_size=1), ranks=2)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    _agree(tmp_path / "one", tmp_path / "two")
