"""Two runs that should be one: every figure and every weight, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import read_lines

Steps = list[tuple[int, str]]


def steps_of(last: int, eval_every: int) -> Steps:
    """(step, split) of the lines of a run that evaluates so often."""
    found = [(0, "eval")]
    for step in range(1, last + 1):
        found += [(step, "train"), *([(step, "eval")] if step % eval_every == 0 or step == last else [])]
    return found


def agree(
    a: Path, b: Path, steps: Steps, *, rounding: tuple[str, ...] = (), figures: float = 1e-6, weights: float = 3e-6
) -> None:
    """Figures to 1e-4 or `figures`, whichever is more, weights to `weights`.

    AdamW divides by the gradient's size, so that rounding of a tiny gradient shows: 3e-6 is 0.3 % of one update of 1e-3.
    `rounding`: how metrics begin that are rounding and nothing else before the first step, or of a policy that is its reference.
    """
    lines = [read_lines(run / "metrics.jsonl") for run in (a, b)]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        assert one["split"] == other["split"]
        unmoved = one["step"] <= 1 or abs(one.get("rewards/margins", 1.0)) < 1e-6
        for name in one.keys() - {"split"}:
            if not unmoved or not name.startswith(rounding):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=figures), (one["step"], name)
    assert [(line["step"], line["split"]) for line in lines[0]] == steps
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < weights


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained; of an ensemble, all members."""
    files = sorted((run / "model").rglob("*.safetensors"))
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}
