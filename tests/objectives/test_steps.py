"""Steps: the loss against golden values, one number of several steps, and rewards that come where a step or a token is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.objectives.advantages import token_rewards
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.objectives.steps import Steps
from rlhf_cli.rollout.reward_models import AGGREGATES
from tests.objectives.lookup import Lookup, make_trees, run
from tests.objectives.rollouts import experience

GOLDEN = json.loads(Path(__file__).with_name("steps.json").read_text())
"""Inputs and expected values in float64, computed from the formula without this package."""
Z, LABELS = GOLDEN["loss"]["inputs"]["z"], GOLDEN["loss"]["inputs"]["labels"]
WANTED = GOLDEN["loss"]["expected"]


def judged(z: list[list[float]], labels: list[list[float]]) -> tuple[list[Any], Lookup]:
    """Responses whose steps are of two tokens each, the second of which the model knows; a last token follows."""
    ends = [tuple(2 * k - 1 for k in range(len(row), 0, -1)) for row in z]
    facts = [Facts(steps=tuple(map(float, own)), ends=(end,)) for own, end in zip(labels, ends, strict=True)]
    table = [0.0, *(value for row in z for value in (*(v for each in row for v in (7.7, each)), 7.7))]
    model = Lookup(reward=torch.tensor(table, dtype=torch.float64).requires_grad_())
    return make_trees([[2 * len(row) + 1] for row in z], facts), model


@pytest.mark.parametrize("budget", [4096, 12, 1])
def test_golden_loss_and_gradient(budget: int) -> None:
    """A mean over the 15 steps of the batch, not of the means of 5 responses."""
    trees, model = judged(Z, LABELS)
    found = run(Steps(), model, trees, budget=budget)
    assert found.means["loss"] == pytest.approx(WANTED["loss"], abs=1e-10)
    (gradient,) = torch.autograd.grad(found.loss, model.tables["reward"])
    wanted = [0.0, *(value for row in WANTED["gradient"] for value in (*(v for each in row for v in (0.0, each)), 0.0))]
    assert gradient.tolist() == pytest.approx(wanted, abs=1e-10)


def test_golden_loss_of_each_step() -> None:
    for z, labels, wanted in zip(Z, LABELS, WANTED["per step"], strict=True):
        for one in zip(z, labels, wanted, strict=True):
            found = run(Steps(), *reversed(judged([[one[0]]], [[one[1]]])))
            assert found.means["loss"] == pytest.approx(one[2], abs=1e-10)


@pytest.mark.parametrize("how", ["min", "prod", "last", "mean"])
def test_golden_scores(how: str) -> None:
    found = [AGGREGATES[how](np.exp(-np.logaddexp(0, -np.array(row)))) for row in Z]
    assert found == pytest.approx(GOLDEN["score"]["expected"][how], abs=1e-10)


def test_logits_of_a_thousand() -> None:
    """A step that is surely wrong and labelled right costs 1000, one that is judged rightly 0."""
    trees, model = judged([[1000.0, -1000.0, -1000.0]], [[1.0, 0.0, 1.0]])
    found = run(Steps(), model, trees)
    assert found.means["loss"] == pytest.approx(1000 / 3, abs=1e-9)
    (gradient,) = torch.autograd.grad(found.loss, model.tables["reward"])
    assert gradient[[2, 4, 6]].tolist() == pytest.approx([0.0, 0.0, -1 / 3])
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)


def test_steps_that_were_cut_off_are_no_part_of_it() -> None:
    """Three labels and the ends of two steps: the third one has neither a loss nor a count."""
    trees, model = judged([[0.4, -1.2]], [[1.0, 0.0]])
    cut = [trees[0]._replace(facts=trees[0].facts._replace(steps=(1.0, 0.0, 1.0)))]
    assert float(run(Steps(), model, cut).loss.detach()) == float(run(Steps(), model, trees).loss.detach())
    assert Steps().counts(cut) == {"steps": 2}
    assert Steps().check_tree(cut[0]) is None
    assert "no step of it is left" in str(Steps().check_tree(cut[0]._replace(facts=Facts(steps=(1.0,), ends=((),)))))


def test_step_rewards_in_gae_by_hand() -> None:
    """Two steps, worth 0.6 at token 2 and 0.3 at token 4, and 0.2 taken off at the end for the length; κ = 0.1, γ = 1, λ = 0.5.

    Score: 0.6 + 0.3 − 0.2 = 0.7. Log-ratios to the reference 0.5, −0.5, 0, 1, so that r = (−0.05, 0.6 + 0.05, 0, 0.1 − 0.1).
    V = (0.2, 0.1, 0.4, −0.3): δ = (−0.05 + 0.1 − 0.2, 0.65 + 0.4 − 0.1, 0 − 0.3 − 0.4, 0 + 0.3) = (−0.15, 0.95, −0.7, 0.3).
    A₄ = 0.3, A₃ = −0.7 + 0.15 = −0.55, A₂ = 0.95 − 0.275 = 0.675, A₁ = −0.15 + 0.3375 = 0.1875; targets A + V.
    """
    seen = experience([[-1.0, -1.0, -1.0, -1.0]], [[-1.5, -0.5, -1.0, -2.0]], [0.7], [[0.2, 0.1, 0.4, -0.3]])
    seen = replace(seen, dense=np.array([0.0, 0.6, 0.0, 0.3]))
    assert token_rewards(seen, 0.1).tolist() == pytest.approx([-0.05, 0.65, 0.0, 0.0], abs=1e-12)
    found = Ppo(gamma=1.0, lam=0.5, whiten=False).estimate_advantages(seen, 0.1, {})
    assert found.advantages.tolist() == pytest.approx([0.1875, 0.675, -0.55, 0.3], abs=1e-12)
    assert found.targets is not None
    assert found.targets.tolist() == pytest.approx([0.3875, 0.775, -0.15, 0.0], abs=1e-12)


OLD = [[-1.0, -0.3, -2.0], [-0.7], [-0.2, -1.1], [-0.4, -0.9, -0.1, -1.3]]
SCORES = [0.3, -1.7, 0.1 + 0.2, 2.9]
KINDS: list[PolicyGradient] = [Ppo(), Bandit(), Reinforce(), Rloo(), Grpo(), Grpo(scale="none")]


def rollout() -> Any:
    reference = [[value - 0.1 * k for k, value in enumerate(row)] for row in OLD]
    return experience(OLD, reference, SCORES, [[0.1 * value for value in row] for row in OLD], prompt=[0, 0, 1, 1])


@pytest.mark.parametrize("objective", KINDS, ids=str)
def test_a_number_at_the_end_is_the_score_to_the_bit(objective: PolicyGradient) -> None:
    plain = rollout()
    dense = np.zeros(len(plain.old))
    dense[np.cumsum(plain.lengths) - 1] = SCORES
    one, other = (objective.estimate_advantages(seen, 0.05, {}) for seen in (plain, replace(plain, dense=dense)))
    assert one.advantages.tobytes() == other.advantages.tobytes()


@pytest.mark.parametrize("objective", KINDS[1:], ids=str)
def test_kinds_with_one_return_for_a_response_add_up(objective: PolicyGradient) -> None:
    """Wherever in a response its score comes, they have the same advantages."""
    plain = rollout()
    dense = np.array([0.3, 0.0, 0.0, -1.7, 0.1, 0.2, 1.0, 1.0, 0.9, 0.0])
    one, other = (objective.estimate_advantages(seen, 0.05, {}) for seen in (plain, replace(plain, dense=dense)))
    assert one.advantages == pytest.approx(other.advantages, abs=1e-12)
    moved = Ppo().estimate_advantages(replace(plain, dense=dense), 0.05, {}).advantages
    assert np.abs(moved - Ppo().estimate_advantages(plain, 0.05, {}).advantages).max() > 0.1
