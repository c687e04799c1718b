"""Learning rates by hand; the optimisers that recipes name; their state as plain tensors."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_cli import sections
from rlhf_cli.training.optim import build_optimizer, learning_rate, optimizer_state, restore_optimizer, warmup_steps


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 0.0, [8, 8, 8, 8]),
        ("linear", 0.0, [8, 6, 4, 2]),
        ("cosine", 0.0, [8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2)]),  # 4 (1 + cos 0, 45, 90, 135 degrees)
        ("constant", 2, [4, 8, 8, 8]),
        ("linear", 2, [4, 8, 8, 4]),
        ("cosine", 1, [8, 8, 6, 2]),  # 4 (1 + cos 0, 60, 120 degrees)
        ("cosine", 0.5, [4, 8, 8, 4]),
        ("linear", 4, [2, 4, 6, 8]),
        ("linear", 0.03, [8, 8, 8 * 2 / 3, 8 / 3]),
    ],
)
def test_learning_rate(schedule: str, warmup: float, wanted: list[float]) -> None:
    train = sections.Train(learning_rate=8.0, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    assert [learning_rate(train, step, 4) for step in (1, 2, 3, 4)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"), [(0.0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (1, 100, 1), (20, 100, 20)]
)
def test_warmup_steps(warmup: float, steps: int, wanted: int) -> None:
    assert warmup_steps(warmup, steps) == wanted


def _parameters() -> dict[str, torch.nn.Parameter]:
    return {"a": torch.nn.Parameter(torch.tensor([1.0, -2.0])), "b": torch.nn.Parameter(torch.tensor([[3.0]]))}


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], scale: float = 1.0) -> None:
    for parameter in parameters.values():
        parameter.grad = scale * (parameter.detach() + 0.5)
    optimizer.step()


def test_first_adamw_update() -> None:
    """The first update moves every weight by the rate, against its gradient, after it has decayed by rate · decay."""
    parameters = _parameters()
    optimizer = build_optimizer({"policy": parameters}, sections.Train(learning_rate=0.1, weight_decay=0.2))
    _step(optimizer, parameters)
    assert parameters["a"].tolist() == pytest.approx([1.0 * 0.98 - 0.1, -2.0 * 0.98 + 0.1])
    assert parameters["b"].tolist()[0] == pytest.approx([3.0 * 0.98 - 0.1])


def test_sgd_update() -> None:
    parameters = _parameters()
    optimizer = build_optimizer({"policy": parameters}, sections.Train(learning_rate=0.1, optimizer="sgd", weight_decay=0.5))
    _step(optimizer, parameters)
    assert parameters["a"].tolist() == pytest.approx([1.0 - 0.1 * (1.5 + 0.5), -2.0 - 0.1 * (-1.5 - 1.0)])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_goes_through_plain_tensors(kind: str) -> None:
    train = sections.Train(learning_rate=0.1, optimizer=kind, betas=(0.8, 0.9))  # type: ignore[arg-type]
    straight, partial = _parameters(), _parameters()
    first = build_optimizer({"policy": straight}, train)
    before = build_optimizer({"policy": partial}, train)
    for scale in (1.0, 3.0):
        _step(first, straight, scale)
        _step(before, partial, scale)
    tensors, numbers = optimizer_state(before, partial)
    assert sorted(tensors) == ([f"{n}|{e}" for n in "ab" for e in ("exp_avg", "exp_avg_sq", "step")] if kind == "adamw" else [])
    resumed = {name: torch.nn.Parameter(p.detach().clone()) for name, p in partial.items()}
    after = build_optimizer({"policy": resumed}, train)
    restore_optimizer(after, resumed, tensors, numbers)
    for scale in (0.2, 5.0):
        _step(first, straight, scale)
        _step(after, resumed, scale)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
