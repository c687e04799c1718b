"""Losses on pairs and rankings: limits, identities, metrics by hand, and what a tree must bring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.objectives.apo import ApoDown, ApoZero
from rlhf_cli.objectives.bco import Bco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.discopop import DiscoPop
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.exo import Exo
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.nca import Nca
from rlhf_cli.objectives.odpo import Odpo
from rlhf_cli.objectives.orpo import Orpo, log_odds
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuce, PlackettLuceReward
from rlhf_cli.objectives.preference import PairObjective, ordered_pairs
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.squared import Squared
from tests.objectives.kinds import PAIR_KINDS, draw_model, trees_for
from tests.objectives.lookup import Lookup, Ragged, lengths, make_trees, run, table
from tests.objectives.test_golden import POLICY, REFERENCE, pair_model, pair_trees


def model_of(policy: Ragged, reference: Ragged | None = None) -> Lookup:
    none = torch.zeros_like(table(policy))
    return Lookup(policy=table(policy), reference=table(reference) if reference else none, kl=none)


def one_pair(objective: Any, chosen: float, rejected: float, facts: Facts | None = None, **memory: float) -> Any:
    """A pair of responses with one token each, whose log-ratios (and log-probabilities) are given."""
    values = [[[chosen], [rejected]]]
    return run(objective, model_of(values), make_trees(lengths(values), [facts or Facts()]), memory=memory)


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "dpo": math.log(2),
        "cdpo": math.log(2),
        "robust": math.log(2),
        "hinge": 1.0,
        "squared": 1.0,
        "ipo": 1 / (4 * 0.3**2),
        "ipo per token": 1 / (4 * 0.3**2),
        "cal_dpo": math.log(2) + 0.5 * 2 * (1 / 0.6) ** 2,
        "rebel": 1.0,
        "odpo": math.log(2),
        "bco": 2 * math.log(2),
        "plackett_luce": math.log(2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "nca": 2 * math.log(2),
        "exo": math.log(0.5 / math.sqrt(0.99 * 0.01)),
        "discopop": (math.log(2) + 1) / 2,
        "tdpo2": math.log(2),
        "aot": math.log(2),
        "aot unpaired": math.log(2),
    }.items(),
)
def test_policy_equal_to_its_reference(name: str, wanted: float) -> None:
    """Scores that are 1 apart: rebel's square is 1, odpo's ln 1 = 0. No reward, no margin, half of the pairs right."""
    values = [[[-0.3, -1.2], [-0.7]]]
    found = run(PAIR_KINDS[name], model_of(values, values), make_trees(lengths(values), [Facts(scores=(3.0, 2.0))]))
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)
    zero = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logratio/mean")
    assert [found.metrics[key] for key in zero] == [0, 0, 0, 0]
    assert found.metrics["rewards/accuracies"] == 0.5
    assert found.metrics.get("rewards/saturated", 0.0) == 0


@pytest.mark.parametrize("kind", [Dpo, Robust, PlackettLuce])
def test_beta_to_zero(kind: Any) -> None:
    """ln 2 whatever the log-ratios, up to |z|/2 = 5e-9."""
    assert float(one_pair(kind(beta=1e-9), 7.0, -3.0).loss) == pytest.approx(math.log(2), abs=1e-8)


def test_squared_is_ipo_at_half_the_beta() -> None:
    """(βh − 1)² = β²(h − 1/β)²."""
    squared, ipo = (float(run(o, pair_model(), pair_trees()).loss) for o in (Squared(beta=0.3), Ipo(beta=0.15)))
    assert squared == pytest.approx(0.3**2 * ipo, rel=1e-12)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """The mean over labels of which a share ε is flipped is dpo's loss under the true ones."""
    kept, flipped = (
        float(one_pair(Robust(beta=0.3, label_smoothing=0.2), *values).loss) for values in ((2.0, -1.0), (-1.0, 2.0))
    )
    assert 0.8 * kept + 0.2 * flipped == pytest.approx(float(one_pair(Dpo(beta=0.3), 2.0, -1.0).loss), abs=1e-12)


def test_smoothed_labels_are_the_mean_of_both_labels() -> None:
    kept, flipped = (float(one_pair(Dpo(beta=0.3), *values).loss) for values in ((2.0, -1.0), (-1.0, 2.0)))
    smoothed = float(one_pair(Dpo(beta=0.3, label_smoothing=0.2), 2.0, -1.0).loss)
    assert smoothed == pytest.approx(0.8 * kept + 0.2 * flipped, abs=1e-12)


def slopes(objective: Any, chosen: float, rejected: float) -> tuple[float, float]:
    """The loss's derivatives with respect to the two log-ratios."""
    policy = torch.tensor([0.0, chosen, rejected], dtype=torch.float64, requires_grad=True)
    result = run(objective, Lookup(policy=policy, reference=torch.zeros(3)), make_trees([[1, 1]]))
    _, *found = torch.autograd.grad(result.loss, policy)[0].tolist()
    return found[0], found[1]


def test_which_way_each_response_goes() -> None:
    """At the reference, β = 1: σ' = ¼. apo_zero moves them apart; apo_down lowers both, the rejected one alone in the end."""
    assert slopes(ApoZero(beta=1.0), 0.0, 0.0) == pytest.approx((-0.25, 0.25), abs=1e-12)
    assert slopes(ApoDown(beta=1.0), 0.0, 0.0) == pytest.approx((0.0, 0.25), abs=1e-12)
    assert slopes(ApoDown(beta=1.0), 0.0, -2.0)[0] > 0 < slopes(ApoDown(beta=1.0), 0.0, -2.0)[1]
    # nca: −½ + ¼, and ¼; the chosen response rests where 1 − σ(r) = σ(r)/2, at twice the reference's probability.
    assert slopes(Nca(beta=1.0), 0.0, 0.0) == pytest.approx((-0.25, 0.25), abs=1e-12)
    assert slopes(Nca(beta=1.0), math.log(2), 0.0)[0] == pytest.approx(0.0, abs=1e-12)


def test_exo_is_least_where_its_labels_are() -> None:
    """KL is 0 at σ(z) = 1 − ε, and its gradient fades on both sides: σ(z) σ(−z) (z − log(1/ε − 1))."""
    best = math.log(1 / 0.2 - 1)
    objective = Exo(beta=1.0, label_smoothing=0.2)
    assert float(one_pair(objective, best, 0.0).loss) == pytest.approx(0.0, abs=1e-12)
    for z in (-3.0, 0.0, 1.0, 4.0):
        wanted = (z - best) / (1 + math.exp(-z)) / (1 + math.exp(z))
        assert slopes(objective, z, 0.0) == pytest.approx((wanted, -wanted), abs=1e-12)


def test_discopop_is_logistic_below_0_and_exponential_above() -> None:
    """At z = ±2, forty widths τ away, what is left of the other is below 1e-17; at 0 the mean of the two."""
    found = [float(one_pair(DiscoPop(beta=1.0), z, 0.0).loss) for z in (-2.0, 2.0, 0.0)]
    assert found == pytest.approx([math.log1p(math.exp(2)), math.exp(-2), (math.log(2) + 1) / 2], abs=1e-12)


def test_two_ranked_responses_are_a_pair() -> None:
    """Plackett–Luce with K = 2, dpo, and the reward models' three losses on βρ: one loss and one gradient."""
    ratios = [[[a], [b]] for a, b in ((0.3, -1.2), (-2.0, 0.4), (5.0, 4.0))]
    trees, zero = make_trees(lengths(ratios)), torch.zeros(7, dtype=torch.float64)
    losses, gradients = [], []
    for objective in (Dpo(beta=0.3), PlackettLuce(beta=0.3), BradleyTerry(), PlackettLuceReward(), AllPairs()):
        values = table(ratios).requires_grad_()
        loss = run(objective, Lookup(policy=values, reference=zero, reward=0.3 * values), trees).loss
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, values)[0].tolist())
    by_hand = sum(math.log1p(math.exp(-0.3 * (chosen[0] - rejected[0]))) for chosen, rejected in ratios) / 3
    assert losses == pytest.approx([by_hand] * 5, abs=1e-12)
    for gradient in gradients[1:]:
        assert gradient == pytest.approx(gradients[0], abs=1e-12)


def test_plackett_luce_is_the_likelihood_of_drawing_the_ranking() -> None:
    """Three items of weights 1, 2, 4, ranked 4, 1, 2: 4/7 · 1/3."""
    values = [[[math.log(4)], [0.0], [math.log(2)]]]
    found = run(PlackettLuce(beta=1.0), model_of(values), make_trees(lengths(values)))
    assert float(found.loss) == pytest.approx(-math.log(4 / 7 * 1 / 3), abs=1e-12)


def test_rankings_count_as_their_pairs() -> None:
    """Three responses, the last two tied: the mean over two pairs, by hand."""
    values = [[[0.0], [-1.0], [-3.0]]]
    found = run(Dpo(beta=1.0), model_of(values), make_trees(lengths(values), [Facts(ranks=(1, 2, 2))]))
    assert float(found.loss) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2, abs=1e-12)
    assert found.metrics["rewards/margins"] == pytest.approx(2.0)
    assert ordered_pairs(3, Facts()) == [(0, 1), (0, 2), (1, 2)]


def test_log_odds() -> None:
    """p = ¾ has odds 3; p = 1 is kept away from infinity; a tiny p is its own odds."""
    found = log_odds(torch.tensor([math.log(0.75), 0.0, -700.0], dtype=torch.float64)).tolist()
    assert found == pytest.approx([math.log(3), math.log(1e7), -700.0], abs=1e-6)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(certain).sum(), certain)
    assert torch.isfinite(gradient).all()


class TestMetrics:
    """Golden pairs at β = 0.3, with numpy."""

    CHOSEN = np.array([sum(pair[0]) - sum(other[0]) for pair, other in zip(POLICY, REFERENCE, strict=True)])
    REJECTED = np.array([sum(pair[1]) - sum(other[1]) for pair, other in zip(POLICY, REFERENCE, strict=True)])
    LENGTHS = np.array(lengths(POLICY))
    LOGPS = np.array([[sum(response) for response in pair] for pair in POLICY])

    def check(
        self, objective: PairObjective, chosen: np.ndarray, rejected: np.ndarray, saturated: float | None
    ) -> dict[str, float]:
        metrics = run(objective, pair_model(), pair_trees()).metrics
        margins = chosen - rejected
        wanted = {
            "loss": metrics["loss"],
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).mean(),
            "logps/chosen": self.LOGPS[:, 0].mean(),
            "logps/rejected": self.LOGPS[:, 1].mean(),
        }
        if saturated is not None:
            wanted["rewards/saturated"] = saturated
        if objective.reference:
            wanted["logratio/mean"] = (self.CHOSEN + self.REJECTED).mean() / 2
        own = {name: metrics.pop(name) for name in ("margin/target", "margin/logratio") if name in metrics}
        assert metrics == pytest.approx(wanted, abs=1e-9)
        return own

    def test_kinds_with_a_reference(self) -> None:
        z = 0.3 * (self.CHOSEN - self.REJECTED)
        doubt = 1 / (1 + np.exp(z))
        rewards = 0.3 * self.CHOSEN, 0.3 * self.REJECTED
        assert 0 < (z >= 1).mean() < 1
        self.check(Dpo(beta=0.3), *rewards, (2 * doubt < 0.05).mean())
        self.check(Hinge(beta=0.3), *rewards, (z >= 1).mean())
        self.check(Squared(beta=0.3), *rewards, None)
        self.check(Rebel(eta=0.5), self.CHOSEN / 0.5, self.REJECTED / 0.5, None)
        self.check(PAIR_KINDS["cal_dpo"], self.CHOSEN, self.REJECTED, None)
        for name in ("plackett_luce", "apo_zero", "apo_down", "nca", "aot", "aot unpaired"):
            self.check(PAIR_KINDS[name], *rewards, None)

    def test_ipo(self) -> None:
        """Its rewards are in the units of its h, and its target is there to compare with."""
        own = self.check(Ipo(beta=0.3), 0.3 * self.CHOSEN, 0.3 * self.REJECTED, None)
        assert own == pytest.approx({"margin/target": 1 / 0.6, "margin/logratio": (self.CHOSEN - self.REJECTED).mean()})
        chosen, rejected = self.CHOSEN / self.LENGTHS[:, 0], self.REJECTED / self.LENGTHS[:, 1]
        own = self.check(Ipo(beta=0.3, normalize="token_mean"), 0.3 * chosen, 0.3 * rejected, None)
        assert own == pytest.approx({"margin/target": 1 / 0.6, "margin/logratio": (chosen - rejected).mean()})

    def test_kinds_without_a_reference(self) -> None:
        sums, means = self.LOGPS.T, (self.LOGPS / self.LENGTHS).T
        self.check(PAIR_KINDS["slic"], *sums, None)
        self.check(Orpo(), *means, None)
        self.check(Simpo(beta=2.0, gamma=0.5), *(2 * means), 0.0)


SHIFTED = 2 + math.log((1 + math.exp(-2)) / 0.05 - 1)
"""The m with σ(2 − m) = 0.05 σ(2)."""


@pytest.mark.parametrize(
    ("objective", "edge"),
    [
        (Dpo(beta=1.0), math.log(39)),  # 2 σ(−z) = 0.05
        (Dpo(beta=1.0, label_smoothing=0.2), math.log(1 / 0.215 - 1)),  # σ(−z) − 0.2 = 0.05 · 0.3
        (Robust(beta=1.0, label_smoothing=0.01), math.log(0.98 / 0.015 - 1)),  # 2 (0.98 σ(−z) + 0.01) = 0.05
        (Hinge(beta=1.0), 1.0),
        (Odpo(beta=1.0, f="identity"), SHIFTED),
        (Simpo(beta=1.0, gamma=2.0), SHIFTED),
    ],
)
def test_saturated_from_where_a_twentieth_of_the_gradient_is_left(objective: PairObjective, edge: float) -> None:
    """Compared with the gradient itself, as a share of its size at equal log-probabilities. The score gap is 2."""
    facts = Facts(scores=(2.0, 0.0))

    def slope(margin: float) -> float:
        policy = torch.tensor([0.0, margin, 0.0], dtype=torch.float64, requires_grad=True)
        result = run(objective, Lookup(policy=policy, reference=torch.zeros(3)), make_trees([[1, 1]], [facts]))
        return abs(float(torch.autograd.grad(result.loss, policy)[0][1]))

    below, above = one_pair(objective, edge - 1e-6, 0.0, facts), one_pair(objective, edge + 1e-6, 0.0, facts)
    assert (below.metrics["rewards/saturated"], above.metrics["rewards/saturated"]) == (0.0, 1.0)
    assert slope(edge - 1e-6) >= 0.05 * slope(0.0) > slope(edge + 1e-6)


def test_robust_saturates_only_where_few_labels_are_flipped() -> None:
    """Its gradient never falls below 2ε of that at 0."""
    assert one_pair(Robust(beta=1.0, label_smoothing=0.1), 50.0, 0.0).metrics["rewards/saturated"] == 0
    assert one_pair(Robust(beta=1.0, label_smoothing=0.01), 50.0, 0.0).metrics["rewards/saturated"] == 1


def test_bco_remembers_the_mean_rewards() -> None:
    """Rewards 0.4 and −0.2, decay 0.9: running means 0.04 and −0.02, then 0.076 and −0.038; δ is that before the batch."""
    objective = Bco(beta=0.1)
    first = one_pair(objective, 4.0, -2.0)
    assert first.memory == pytest.approx({"reward/good": 0.04, "reward/bad": -0.02})
    assert float(first.loss) == pytest.approx(math.log1p(math.exp(-0.4)) + math.log1p(math.exp(-0.2)), abs=1e-12)
    second = one_pair(objective, 4.0, -2.0, **first.memory)
    assert second.memory == pytest.approx({"reward/good": 0.076, "reward/bad": -0.038})
    assert float(second.loss) == pytest.approx(math.log1p(math.exp(-0.39)) + math.log1p(math.exp(-0.21)), abs=1e-12)
    third = one_pair(objective, 0.0, 0.0, **first.memory)
    assert third.memory == pytest.approx({"reward/good": 0.036, "reward/bad": -0.018})


def test_ipo_says_what_it_asks_for() -> None:
    assert Ipo().announcement == "ipo at beta 0.1 (sum) asks for a log-ratio margin of 5 nats"
    per_token = Ipo(beta=0.25, normalize="token_mean")
    assert per_token.announcement == "ipo at beta 0.25 (token_mean) asks for a log-ratio margin of 2 nats per token"
    assert Dpo().announcement == ""


@pytest.mark.parametrize(
    ("objective", "shape", "facts", "wanted"),
    [
        (Dpo(), [1, 1], Facts(), None),
        (Dpo(), [1, 1, 1], Facts(ranks=(1, 1, 2)), None),
        (Dpo(), [1, 1], Facts(ranks=(1, 1)), "its responses are all tied"),
        (Dpo(), [1], Facts(), "needs two responses"),
        (AllPairs(), [1, 1], Facts(ranks=(1, 1)), "its responses are all tied"),
        (Odpo(), [1, 1], Facts(), "kind odpo needs scores: score_chosen and score_rejected, or the scores of a ranking"),
        (Rebel(), [1, 1], Facts(), "kind rebel needs scores: score_chosen and score_rejected, or the scores of a ranking"),
        (Rebel(), [1, 1], Facts(scores=(1.0, 1.0)), None),
        (Odpo(), [1, 1], Facts(scores=(2.0, 1.0)), None),
        (
            Odpo(),
            [1, 1, 1],
            Facts(scores=(2.5, 1.0, 1.0)),
            "kind odpo with f: log needs a higher score for the better response, found 1 and 1",
        ),
        (Odpo(), [1, 1, 1], Facts(ranks=(1, 2, 2), scores=(2.5, 1.0, 1.0)), None),
        (Odpo(f="identity"), [1, 1], Facts(scores=(1.0, 1.0)), None),
        (PlackettLuce(), [1, 1, 1], Facts(ranks=(1, 2, 3)), None),
        (PlackettLuce(), [1, 1, 1], Facts(ranks=(1, 2, 2)), "kind plackett_luce takes no ties; kind dpo does"),
        (PlackettLuceReward(), [1, 1, 1], Facts(ranks=(1, 1, 2)), "kind plackett_luce takes no ties; kind pairs does"),
        (BradleyTerry(margin_column="by"), [1, 1], Facts(), "no margin in the column 'by'"),
        (BradleyTerry(margin_column="by"), [1, 1], Facts(margin=0.0), None),
        (BradleyTerry(), [1, 1], Facts(), None),
    ],
)
def test_trees_that_cannot_be_trained_on(objective: Any, shape: list[int], facts: Facts, wanted: str | None) -> None:
    (tree,) = make_trees([shape], [facts])
    assert objective.check_tree(tree) == wanted


def test_counts() -> None:
    """Five prompts: 13 responses, 1 + 3 + 1 + 1 + 6 pairs, 2 + 4 + 1 + 3 + 2 tokens in the best ones; a tie is no pair."""
    assert Dpo().counts(trees_for("dpo")) == {"trees": 5, "responses": 13, "pairs": 12, "tokens": 12}
    (tied,) = make_trees([[2, 2, 1]], [Facts(ranks=(1, 1, 2))])
    assert Dpo().counts([tied])["pairs"] == 2


def test_scores_stand_beside_their_responses() -> None:
    """rebel on a ranking with scores 4, 2, 1 and no log-ratio: (2² + 3² + 1²)/3."""
    values = [[[-1.0], [-1.0], [-1.0]]]
    found = run(Rebel(), model_of(values, values), make_trees(lengths(values), [Facts(scores=(4.0, 2.0, 1.0))]))
    assert float(found.loss) == pytest.approx(14 / 3, abs=1e-12)


def test_needs_no_reference() -> None:
    """The kinds without one work with a model that has none."""
    model = draw_model()
    for name in ("slic", "simpo", "orpo"):
        metrics = run(PAIR_KINDS[name], Lookup(policy=model.tables["policy"]), trees_for(name)).metrics
        assert "logratio/mean" not in metrics
        assert all(map(math.isfinite, metrics.values()))
