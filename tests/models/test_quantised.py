"""The real bitsandbytes on a CPU: 8-bit optimiser states that are saved and taken up, and frozen bases of 4 and of 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe, write_rows

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module", params=[64, 48])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Of a width that bitsandbytes can pack for a CPU, and of one that it cannot."""
    return make_model(tmp_path_factory.mktemp("quantised") / "model", hidden_size=request.param, intermediate_size=128)


def test_an_8_bit_optimiser_resumes_to_the_byte(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "x.yaml",
        model,
        write_rows(tmp_path / "rows.jsonl", 12),
        tmp_path / "whole",
        lora=None,
        train={"steps": 4, "optimizer": "adamw_8bit", "schedule": "constant", "learning_rate": 1e-4},
    )
    assert rlhf("sft", recipe) == 0
    state = load_file(tmp_path / "whole" / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert {value.dtype for name, value in state.items() if name.endswith("|state1")} >= {torch.uint8}
    assert rlhf("sft", recipe, "--output", tmp_path / "again", "--set", "train.steps=2") == 0
    assert rlhf("sft", recipe, "--output", tmp_path / "again", "--resume") == 0
    files = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    assert read_lines(tmp_path / "whole" / "metrics.jsonl") == read_lines(tmp_path / "again" / "metrics.jsonl")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_learns_on_a_quantised_base(bits: str, model: Path, tmp_path: Path) -> None:
    """The policy that is its own reference has a first loss of log 2: with and without gradients the base is the same."""
    parts = model, write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "run"
    sections = {"model": {"quantize": bits}, "lora": {"r": 4}, "train": {"steps": 6, "learning_rate": 3e-3}}
    assert rlhf("dpo", write_recipe(tmp_path / "x.yaml", *parts, **sections)) == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(0.693147, abs=1e-3 if bits == "8bit" else 1e-5)
    assert losses[-1] < losses[0] - 0.01
