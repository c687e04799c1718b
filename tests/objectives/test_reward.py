"""Losses of reward models: options, limits and metrics by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.records import Facts
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuceReward
from tests.objectives.lookup import run
from tests.objectives.test_golden import scored


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def fit(objective: Any, rows: list[list[float]], *facts: Facts, budget: int = 4096) -> Any:
    trees, model = scored(rows, list(facts) or None)
    return run(objective, model, trees, budget=budget)


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (BradleyTerry(), math.log(2)),
        (AllPairs(), math.log(2)),
        (PlackettLuceReward(), math.log(6)),
        (BradleyTerry(label_smoothing=0.3), math.log(2)),
    ],
)
def test_equal_scores(objective: Any, wanted: float) -> None:
    """Three responses: each pair is a coin, each of 3! orders as likely as the others."""
    found = fit(objective, [[1.5, 1.5, 1.5]])
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)
    assert found.metrics["accuracy"] == 0.5


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_soft_labels(p: float) -> None:
    """−p log σ(2) − (1 − p) log σ(−2); its minimum over d is where σ(d) = p."""
    found = fit(BradleyTerry(), [[1.5, -0.5]], Facts(probability=p))
    assert float(found.loss) == pytest.approx(p * softplus(-2) + (1 - p) * softplus(2), abs=1e-12)


def test_soft_labels_that_are_smoothed() -> None:
    """p = 0.9 and ε = 0.2 give 0.9 · 0.8 + 0.1 · 0.2 = 0.74."""
    found = fit(BradleyTerry(label_smoothing=0.2), [[1.5, -0.5]], Facts(probability=0.9))
    assert float(found.loss) == pytest.approx(0.74 * softplus(-2) + 0.26 * softplus(2), abs=1e-12)


def test_margins_are_used_where_a_column_is_named() -> None:
    facts = Facts(margin=0.75)
    assert float(fit(BradleyTerry(), [[1.5, -0.5]], facts).loss) == pytest.approx(softplus(-2), abs=1e-12)
    named = BradleyTerry(margin_column="by")
    assert float(fit(named, [[1.5, -0.5]], facts).loss) == pytest.approx(softplus(-1.25), abs=1e-12)
    assert (named.margin_from, BradleyTerry().margin_from) == ("by", None)


def test_bradley_terry_weighs_pairs_and_pairs_weighs_prompts() -> None:
    """A pair and a ranking of three in one batch: 4 pairs, or ½ of the pair and ½ of the ranking's mean."""
    rows = [[1.0, 0.0], [2.0, 1.0, -1.0]]
    losses = [softplus(-1.0), softplus(-1.0), softplus(-3.0), softplus(-2.0)]
    for budget in (4096, 1):
        assert float(fit(BradleyTerry(), rows, budget=budget).loss) == pytest.approx(sum(losses) / 4, abs=1e-12)
        assert float(fit(AllPairs(), rows, budget=budget).loss) == pytest.approx((losses[0] + sum(losses[1:]) / 3) / 2, abs=1e-12)


def test_ties_are_no_pair() -> None:
    """Of four responses ranked 1, 2, 2, 3 five pairs are left."""
    r = [0.5, 0.4, -0.3, 0.1]
    kept = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    wanted = sum(softplus(r[b] - r[a]) for a, b in kept) / 5
    for objective in (AllPairs(), BradleyTerry()):
        found = fit(objective, [r], Facts(ranks=(1, 2, 2, 3)))
        assert float(found.loss) == pytest.approx(wanted, abs=1e-12)
    assert found.metrics["accuracy"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("budget", [4096, 1])
def test_metrics(budget: int) -> None:
    """Margins 2, 0 and −3: one right, one even, one wrong; mean and population deviation over the six scores."""
    rows = [[101.5, 99.5], [100.2, 100.2], [97.0, 100.0]]
    metrics = fit(BradleyTerry(), rows, budget=budget).metrics
    assert metrics.keys() == {"loss", "accuracy", "margin", "score_mean", "score_std"}
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert metrics["margin"] == pytest.approx(-1 / 3)
    assert metrics["score_mean"] == pytest.approx(np.mean(rows))
    assert metrics["score_std"] == pytest.approx(np.std(rows), rel=1e-9)


def test_equal_scores_have_no_deviation() -> None:
    """E s² − (E s)² may round to just below 0."""
    assert fit(BradleyTerry(), [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]]).metrics["score_std"] == pytest.approx(0.0, abs=1e-8)


def test_trains_the_role_reward() -> None:
    assert {objective.role for objective in (BradleyTerry, AllPairs, PlackettLuceReward)} == {"reward"}
