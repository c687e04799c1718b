"""KTO, and BCO on single responses: z0, classes that a batch lacks, weights that balance, metrics by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.errors import UsageError
from rlhf_cli.objectives.bco import UnpairedBco
from rlhf_cli.objectives.kto import Kto
from tests.objectives.kinds import UNPAIRED_KINDS
from tests.objectives.lookup import Lookup, make_trees, run, table

Row = tuple[float, float, bool]
"""Log-ratio of a response, of the mismatched one, and whether the response is desirable."""


def judge(objective: Any, rows: list[Row], *, budget: int = 4096, memory: Any = None) -> Any:
    """Responses of two tokens, which share their log-ratio; the reference says −1 and −2."""
    trees = make_trees([[2, 2]] * len(rows), [Facts(label=label) for _, _, label in rows])
    reference = table([[[-1.0, -2.0]] * 2] * len(rows))
    ratio = table([[[own / 2] * 2, [other / 2] * 2] for own, other, _ in rows])
    policy = (reference + ratio).requires_grad_()
    result = run(objective, Lookup(policy=policy, reference=reference), trees, budget=budget, memory=memory)
    return result, torch.autograd.grad(result.loss, policy)[0][1:].view(-1, 2, 2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


MIXED: list[Row] = [(1.0, 2.0, True), (-3.0, 0.5, False), (0.4, 1.1, True)]
"""z0 = 1.2."""


@pytest.mark.parametrize("budget", [4096, 8, 1])
def test_kto_by_hand(budget: int) -> None:
    """The same numbers however the batch is cut: z0 belongs to all of it."""
    result, _ = judge(Kto(beta=0.5, lambda_d=1.1, lambda_u=0.9), MIXED, budget=budget)
    d1, d2, u = 1.1 * sigmoid(-0.5 * (1.0 - 1.2)), 1.1 * sigmoid(-0.5 * (0.4 - 1.2)), 0.9 * sigmoid(0.5 * (-3.0 - 1.2))
    assert result.metrics == pytest.approx(
        {
            "loss": (d1 + d2 + u) / 3,
            "kl": 1.2,
            "rewards/desirable": 0.35,
            "rewards/undesirable": -1.5,
            "rewards/margins": 1.85,
            "logps/desirable": -3 + 0.7,
            "logps/undesirable": -6.0,
            "logratio/mean": -1.6 / 3,
        }
    )


def test_no_gradient_goes_through_z0() -> None:
    """The mismatched responses move the loss, and have no gradient."""
    result, gradient = judge(Kto(beta=0.5), MIXED)
    assert gradient[:, 1].abs().max() == 0
    assert gradient[:, 0].abs().min() > 0.01
    moved, _ = judge(Kto(beta=0.5), [(own, other + 1, label) for own, other, label in MIXED])
    assert abs(moved.means["loss"] - result.means["loss"]) > 0.01


def test_z0_is_not_negative() -> None:
    result, _ = judge(Kto(beta=0.5), [(1.0, -2.0, True), (-3.0, -0.5, False)])
    assert result.means["kl"] == pytest.approx(-1.25)
    assert result.metrics["kl"] == 0
    assert result.means["loss"] == pytest.approx((sigmoid(-0.5) + sigmoid(-1.5)) / 2, abs=1e-12)


def test_z0_is_the_mean_over_the_batch_and_not_of_each() -> None:
    """Mismatched log-ratios 3 and −1: z0 is 1, not the 1.5 of log-ratios that are cut at 0 one by one."""
    assert judge(Kto(), [(0.0, 3.0, True), (0.0, -1.0, False)])[0].metrics["kl"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", UNPAIRED_KINDS)
def test_policy_equal_to_its_reference(name: str) -> None:
    """kto: half of the weights' mean, (1 + 1.5)/4; bco: ln 2; apo_zero: ½. z0, rewards and margins are 0."""
    result, _ = judge(UNPAIRED_KINDS[name], [(0.0, 0.0, True), (0.0, 0.0, False)])
    metrics = result.metrics
    assert metrics.pop("loss") == pytest.approx(
        {"kto": 0.625, "unpaired bco": math.log(2), "unpaired apo_zero": 0.5}[name], abs=1e-12
    )
    assert {metrics.pop("logps/desirable"), metrics.pop("logps/undesirable")} == {-3.0}
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("name", UNPAIRED_KINDS)
def test_batch_of_one_class(name: str, label: bool) -> None:
    """No NaN, and nothing is said of the class that is not there."""
    result, gradient = judge(UNPAIRED_KINDS[name], [(0.5, 0.2, label), (-0.5, 0.2, label)])
    mine, other = ("desirable", "undesirable") if label else ("undesirable", "desirable")
    wanted = {"loss", "logratio/mean", f"rewards/{mine}", f"logps/{mine}"} | ({"kl"} if name == "kto" else set())
    assert result.metrics.keys() == wanted
    assert all(map(math.isfinite, result.metrics.values()))
    assert result.metrics[f"rewards/{mine}"] == pytest.approx(0.0)
    assert torch.isfinite(gradient).all()
    assert (-1 if label else 1) * float(gradient[:, 0].sum()) > 0
    assert UNPAIRED_KINDS[name].counts(make_trees([[1]], [Facts(label=label)])) == {"trees": 1, mine: 1, other: 0}


def test_bco_keeps_the_mean_of_a_class_that_is_absent() -> None:
    """Rewards 0.4 and −0.2 at decay 0.9, then a batch of desirable ones with 0.6 alone."""
    objective = UnpairedBco(beta=0.1)
    first = judge(objective, [(4.0, 0.0, True), (-2.0, 0.0, False)])[0]
    assert first.memory == pytest.approx({"reward/good": 0.04, "reward/bad": -0.02})
    second = judge(objective, [(6.0, 0.0, True)], memory=first.memory)[0]
    assert second.memory == pytest.approx({"reward/good": 0.096, "reward/bad": -0.02})
    assert second.means["loss"] == pytest.approx(math.log1p(math.exp(0.01 - 0.6)), abs=1e-12)


def test_bco_looks_at_the_prompts_own_responses_alone() -> None:
    trees = make_trees([[1, 2]], [Facts(label=True)])
    seen, (learned,) = UnpairedBco().phases(trees)
    assert seen == []
    assert [[ids.tolist() for ids in tree.responses] for tree in learned] == [[[1]]]
    (mismatched,), ((own,),) = Kto().phases(trees)
    assert [ids.tolist() for ids in (*mismatched.responses, *own.responses)] == [[2, 3], [1]]


@pytest.mark.parametrize(
    ("desirable", "undesirable", "wanted"), [(300, 100, (1.0, 3.0)), (50, 80, (1.6, 1.0)), (7, 7, (1.0, 1.0))]
)
def test_lambda_auto_balances_the_classes(desirable: int, undesirable: int, wanted: tuple[float, float]) -> None:
    with_class_counts = Kto(beta=0.2, lambda_="auto").with_class_counts(desirable, undesirable)
    assert with_class_counts == Kto(beta=0.2, lambda_d=wanted[0], lambda_u=wanted[1])
    assert desirable * with_class_counts.lambda_d == pytest.approx(undesirable * with_class_counts.lambda_u)
    assert Kto(lambda_d=2.0).with_class_counts(desirable, undesirable) == Kto(lambda_d=2.0)


def test_lambda_auto_needs_both_classes() -> None:
    with pytest.raises(UsageError, match="no undesirable response is there"):
        Kto(lambda_="auto").with_class_counts(5, 0)
