"""Exact answers: one prompt, four responses of one token, a policy of free logits, and every preference there can be."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.plackett_luce import PlackettLuce
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.squared import Squared
from tests.objectives.lookup import Lookup, make_trees, run

REWARDS = np.log(2) * np.array([3.0, 1.0, 0.0, 2.0])
"""Known rewards: under Bradley–Terry the odds of every pair are a power of 2."""
REFERENCE = torch.tensor([0.5, -1.0, 0.3, 2.0], dtype=torch.float64).log_softmax(0)
ROUNDS = 45  # 2/3, 4/5 and 8/9 of them are whole numbers


class Tabular:
    """Log-probabilities of four tokens after a prompt that does not matter."""

    def __init__(self) -> None:
        self.logits = REFERENCE.clone().requires_grad_()

    def logps(self, role: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values = (self.logits if role == "policy" else REFERENCE).log_softmax(0)[batch.target]
        return values, torch.zeros(len(values), dtype=torch.bool)


def tree(*responses: int, facts: Facts = Facts()) -> Tree:
    return Tree(np.zeros(1, np.int32), np.zeros(1, bool), tuple(np.array([r], np.int32) for r in responses), 0, facts)


def bradley_terry_data() -> list[Tree]:
    """Every pair as often each way round as the rewards say."""
    trees = []
    for a, b in combinations(range(4), 2):
        wins = ROUNDS / (1 + math.exp(REWARDS[b] - REWARDS[a]))
        assert wins == pytest.approx(round(wins))
        trees += [tree(a, b)] * round(wins) + [tree(b, a)] * (ROUNDS - round(wins))
    return trees


def fitted(objective: Objective, trees: list[Tree]) -> np.ndarray:
    """Log-ratios of the four responses at the minimum of the loss."""
    backbone = Tabular()
    optimizer = torch.optim.LBFGS(
        [backbone.logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = run(objective, backbone, trees).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert float(backbone.logits.grad.abs().max()) < 1e-6  # type: ignore[union-attr]
    return (backbone.logits.log_softmax(0) - REFERENCE).detach().numpy()


def margins(values: np.ndarray) -> np.ndarray:
    return values[:, None] - values[None, :]


def test_dpo_recovers_the_rewards() -> None:
    """The optimum is π* ∝ π_ref exp(r/β), so log-ratios differ by Δr/β."""
    ratio = fitted(Dpo(beta=0.5), bradley_terry_data())
    assert margins(ratio) == pytest.approx(margins(REWARDS / 0.5), abs=1e-5)
    optimum = REFERENCE + torch.from_numpy(REWARDS / 0.5)
    assert ratio == pytest.approx((optimum.log_softmax(0) - REFERENCE).numpy(), abs=1e-5)


def test_ipo_reaches_its_closed_form() -> None:
    """Log-ratios differ by (p(y ≻ μ) − p(y' ≻ μ))/β, μ the uniform distribution that the pairs come from; Azar et al. 2023."""
    wins = 1 / (1 + np.exp(-margins(REWARDS)))
    ratio = fitted(Ipo(beta=0.5), bradley_terry_data())
    assert margins(ratio) == pytest.approx(margins(wins.mean(axis=1) / 0.5), abs=1e-6)


@pytest.mark.parametrize("normalize", ["sum", "token_mean"])
def test_ipo_stops_at_its_target_where_dpo_goes_on(normalize: Any) -> None:
    """One pair that is always won one way round: 1/(2β); dpo has no optimum there."""
    objective = Ipo(beta=0.2, normalize=normalize)
    ratio = fitted(objective, [tree(0, 1)])
    assert ratio[0] - ratio[1] == pytest.approx(2.5, abs=1e-6)
    assert objective.target == pytest.approx(2.5)
    values = torch.tensor([0.0, 20.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = run(Dpo(beta=0.2), Lookup(policy=values, reference=torch.zeros(3)), make_trees([[1, 1]])).loss
    assert float(torch.autograd.grad(loss, values)[0][1]) < -1e-3


def test_rebel_fits_score_differences() -> None:
    """Log-ratios differ by η Δs, exactly, whatever the pairs."""
    trees = [tree(a, b, facts=Facts(scores=(REWARDS[a], REWARDS[b]))) for a, b in ((0, 1), (0, 2), (3, 2))]
    assert margins(fitted(Rebel(eta=1.5), trees)) == pytest.approx(margins(1.5 * REWARDS), abs=1e-6)


def test_plackett_luce_recovers_the_rewards_from_rankings() -> None:
    """All 24 rankings with the chances that the rewards give them: the gradient vanishes where log-ratios differ by Δr/β."""
    weights = np.exp(REWARDS)

    def chance(order: tuple[int, ...]) -> float:
        left = weights[list(order)]
        return math.prod(left[k] / left[k:].sum() for k in range(4))

    chances = {order: chance(order) for order in permutations(range(4))}
    assert sum(chances.values()) == pytest.approx(1)

    def largest_gradient(log_ratio: np.ndarray) -> float:
        backbone = Tabular()
        backbone.logits = (REFERENCE + torch.from_numpy(log_ratio)).requires_grad_()
        losses = [p * run(PlackettLuce(beta=0.5), backbone, [tree(*order)]).loss for order, p in chances.items()]
        return float(torch.autograd.grad(torch.stack(losses).sum(), backbone.logits)[0].abs().max())

    assert largest_gradient(REWARDS / 0.5) < 1e-9
    assert largest_gradient(0.9 * REWARDS / 0.5) > 1e-3


@pytest.mark.parametrize(
    ("objective", "wanted"), [(Dpo(beta=0.2), 2 / 0.2), (Squared(beta=0.2), 1 / 0.2), (Ipo(beta=0.2), 1 / 0.4)]
)
def test_margin_of_the_first_newton_step(objective: Objective, wanted: float) -> None:
    """−f′/f″ at log-ratio 0: 2/β for dpo, 1/β for the squared loss, 1/(2β) for ipo."""
    margin = torch.zeros((), dtype=torch.float64, requires_grad=True)
    policy = torch.stack((torch.zeros_like(margin), margin, torch.zeros_like(margin)))
    loss = run(objective, Lookup(policy=policy, reference=torch.zeros(3, dtype=torch.float64)), make_trees([[1, 1]])).loss
    (slope,) = torch.autograd.grad(loss, margin, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, margin)
    assert float((-slope / curvature).detach()) == pytest.approx(wanted, rel=1e-9)


def test_cal_dpo_ties_log_ratios_to_their_targets() -> None:
    """Where the squares dominate: ±1/(2β), up to the logistic term's pull of at most 1/(2c)."""
    values = torch.tensor([0.0, 2.5, -2.5], dtype=torch.float64, requires_grad=True)
    model = Lookup(policy=values, reference=torch.zeros(3, dtype=torch.float64))
    loss = run(CalDpo(beta=0.2, calibration=0.5), model, make_trees([[1, 1]])).loss
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-5)), abs=1e-12)
    doubt = 1 / (1 + math.exp(5))
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0.0, -doubt, doubt], abs=1e-12)
