"""Pairs with the probability that the first response is the better one: p f(z) + (1 − p) f(−z)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.discopop import DiscoPop
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.exo import Exo
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.orpo import Orpo
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.squared import Squared
from rlhf_cli.objectives.wpo import Wpo
from tests.models.tiny_backbone import draw_trees, make, make_backbone, plain_logps
from tests.objectives.kinds import PAIR_KINDS, REWARD_KINDS, draw_model
from tests.objectives.lookup import Lookup, Ragged, lengths, make_trees, run, table
from tests.objectives.test_golden import scored
from tests.objectives.test_tabular import REFERENCE, fitted, tree

GOLDEN = json.loads(Path(__file__).with_name("soft_labels.json").read_text())
"""Inputs and expected values in float64, computed from the formulas without this package."""

DIRECT, REWARD = GOLDEN["direct"], GOLDEN["reward"]
P = DIRECT["inputs"]["probability"]
POLICY, KNOWN, TYPICALITY = (
    list(zip(*(DIRECT["inputs"][f"{whose}_{which}"] for which in ("chosen", "rejected")), strict=True))
    for whose in ("policy", "ref", "typicality")
)

KINDS: dict[str, PairObjective] = {
    "dpo beta=0.3": Dpo(beta=0.3),
    "dpo beta=0.3 label_smoothing=0.1": Dpo(beta=0.3, label_smoothing=0.1),
    "robust beta=0.3 label_smoothing=0.1": Robust(beta=0.3, label_smoothing=0.1),
    "hinge beta=0.3": Hinge(beta=0.3),
    "squared beta=0.3": Squared(beta=0.3),
    "ipo beta=0.3 normalize=sum": Ipo(beta=0.3),
    "ipo beta=0.3 normalize=token_mean": Ipo(beta=0.3, normalize="token_mean"),
    "simpo beta=2.0 gamma=0.5": Simpo(beta=2.0, gamma=0.5),
    "wpo beta=0.3": Wpo(beta=0.3),
    "exo beta=0.3 label_smoothing=0.01": Exo(beta=0.3, label_smoothing=0.01),
    "discopop beta=0.3 tau=0.05": DiscoPop(beta=0.3),
    "orpo lambda=0.2": Orpo(lambda_=0.2),
}
WITHOUT = {name: objective for name, objective in PAIR_KINDS.items() if not objective.soft_labels}


def test_every_row_of_golden_values_is_used_and_every_kind_has_one() -> None:
    assert KINDS.keys() == DIRECT["expected"].keys()
    assert {type(kind) for kind in KINDS.values()} == {type(kind) for kind in PAIR_KINDS.values()} - {
        type(kind) for kind in WITHOUT.values()
    }
    assert WITHOUT.keys() == {
        *(
            "slic",
            "odpo",
            "cal_dpo",
            "rebel",
            "sppo",
            "dno",
            "bco",
            "plackett_luce",
            "apo_zero",
            "apo_down",
            "nca",
            "tdpo2",
            "aot",
        ),
        "aot unpaired",
    }
    assert {name for name, kind in REWARD_KINDS.items() if kind.soft_labels} == {"bradley_terry", "general"}


@pytest.mark.parametrize("name", KINDS)
def test_golden_losses_and_gradients(name: str) -> None:
    """The classes' own `loss`, of sums over tokens; the golden gradient is that of the mean, the same for every token."""
    wanted = DIRECT["expected"][name]
    sides: list[Responses] = []
    for which in (0, 1):
        logps = torch.tensor([sum(pair[which]) for pair in POLICY], dtype=torch.float64, requires_grad=True)
        known = torch.tensor([sum(pair[which]) for pair in KNOWN], dtype=torch.float64)
        count = torch.tensor([len(pair[which]) for pair in POLICY], dtype=torch.float64)
        figure = torch.tensor([sum(pair[which]) for pair in TYPICALITY], dtype=torch.float64)
        sides.append(Responses(logps, logps - known, count, torch.full_like(known, torch.nan), figure))
    found = KINDS[name].loss(Pair(*sides, torch.tensor(P, dtype=torch.float64), {}))
    assert found.tolist() == pytest.approx(wanted["per pair"], abs=1e-10)
    assert float(found.mean().detach()) == pytest.approx(wanted["loss"], abs=1e-10)
    for gradient, which in zip(
        torch.autograd.grad(found.mean(), [side.logps for side in sides]), ("chosen", "rejected"), strict=True
    ):
        assert gradient.tolist() == pytest.approx(wanted[f"gradient {which}"], abs=1e-10)


def labelled(values: Ragged, probabilities: list[float]) -> list[Tree]:
    return make_trees(lengths(values), [Facts(probability=p) for p in probabilities])


@pytest.mark.parametrize("budget", [4096, 1])
@pytest.mark.parametrize("name", KINDS)
def test_golden_values_through_batches(name: str, budget: int) -> None:
    """Ragged responses in packed passes; the reference's log-probabilities are those of float32 that trees bring."""
    wanted, trees = DIRECT["expected"][name], labelled(POLICY, P)
    policy, typicality = table(POLICY).requires_grad_(), table(TYPICALITY)
    brought = [
        each._replace(reference=tuple(np.array(response, np.float32) for response in pair))
        for each, pair in zip(trees, KNOWN, strict=True)
    ]
    bare = Lookup(policy=policy, typicality=typicality)
    alone = [float(run(KINDS[name], bare, [each]).loss.detach()) for each in brought]
    assert alone == pytest.approx(wanted["per pair"], abs=1e-5)
    assert run(KINDS[name], bare, brought, budget=budget).means["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    exact = run(KINDS[name], Lookup(policy=policy, reference=table(KNOWN), typicality=typicality), trees, budget=budget)
    assert exact.means["loss"] == pytest.approx(wanted["loss"], abs=1e-10)
    (gradient,) = torch.autograd.grad(exact.loss, policy)
    of_responses = torch.tensor([wanted["gradient chosen"], wanted["gradient rejected"]], dtype=torch.float64).T.flatten()
    per_token = of_responses.repeat_interleave(torch.tensor([len(response) for pair in POLICY for response in pair]))
    assert gradient[1:].tolist() == pytest.approx(per_token.tolist(), abs=1e-10)


def test_golden_values_of_reward_models() -> None:
    kinds = {
        "bradley_terry": BradleyTerry(),
        "bradley_terry label_smoothing=0.1": BradleyTerry(label_smoothing=0.1),
        "bradley_terry margin": BradleyTerry(margin_column="by"),
    }
    assert kinds.keys() == REWARD["expected"].keys()
    inputs = REWARD["inputs"]
    odds, gaps = inputs["probability"], np.array(inputs["chosen"]) - np.array(inputs["rejected"])
    facts = [Facts(margin=m, probability=p) for m, p in zip(inputs["margin"], odds, strict=True)]
    trees, model = scored([list(pair) for pair in zip(inputs["chosen"], inputs["rejected"], strict=True)], facts)
    values = model.tables["reward"].requires_grad_()
    for name, objective in kinds.items():
        wanted = REWARD["expected"][name]
        assert [float(run(objective, model, [each]).loss.detach()) for each in trees] == pytest.approx(
            wanted["per pair"], abs=1e-10
        )
        result = run(objective, model, trees, budget=16)
        assert result.means["loss"] == pytest.approx(wanted["loss"], abs=1e-10)
        (gradient,) = torch.autograd.grad(result.loss, values)
        pairs = zip(wanted["gradient chosen"], wanted["gradient rejected"], strict=True)
        assert gradient[gradient != 0].tolist() == pytest.approx([each for pair in pairs for each in pair], abs=1e-10)
        assert result.metrics["accuracy"] == pytest.approx(np.mean(np.sign(gaps) * np.sign(np.array(odds) - 0.5) / 2 + 0.5))
        assert result.metrics["margin"] == pytest.approx(gaps.mean())


def test_margin_and_label_smoothing_together() -> None:
    """p = 0.9, ε = 0.2, so p' = 0.74; each response is asked to lead by 0.75 where it counts as the better one."""
    trees, model = scored([[1.5, -0.5]], [Facts(margin=0.75, probability=0.9)])
    found = run(BradleyTerry(margin_column="by", label_smoothing=0.2), model, trees)
    wanted = 0.74 * math.log1p(math.exp(-1.25)) + 0.26 * math.log1p(math.exp(2.75))
    assert float(found.loss) == pytest.approx(wanted, abs=1e-12)


def weighted(name: str) -> Any:
    return dataclasses.replace(KINDS[name], sft_weight=0.7)


SHAPE = [[2, 3], [4, 1], [1, 1], [3, 5]]
ODDS = [0.8, 0.3, 0.5, 0.0]


def drawn(shape: list[list[int]], odds: list[float]) -> list[Tree]:
    return make_trees(shape, [Facts(probability=p) for p in odds])


def swapped(each: Tree) -> Tree:
    """The same with the responses in the other order."""
    assert each.facts.probability is not None
    return each._replace(responses=each.responses[::-1], facts=Facts(probability=1 - each.facts.probability))


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_a_row_does_not_matter(name: str) -> None:
    """(a, b, p) and (b, a, 1 − p): one loss and one gradient, of the `sft_weight` term too; the figures change sides."""
    model, trees = draw_model(), drawn(SHAPE, ODDS)
    one, other = (run(weighted(name), model, rows, budget=12) for rows in (trees, [swapped(each) for each in trees]))
    gradients = [torch.autograd.grad(result.loss, model.tables["policy"])[0] for result in (one, other)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12) and gradients[0].abs().max() > 1e-3
    for same in ("loss", "rewards/accuracies", "rewards/saturated"):
        assert one.metrics.get(same) == pytest.approx(other.metrics.get(same), abs=1e-12)
    for side, across in (("chosen", "rejected"), ("rejected", "chosen")):
        for figure in ("rewards", "logps"):
            assert one.metrics[f"{figure}/{side}"] == pytest.approx(other.metrics[f"{figure}/{across}"], abs=1e-12)
    assert one.metrics["rewards/margins"] == pytest.approx(-other.metrics["rewards/margins"], abs=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_seven_of_ten_people(name: str) -> None:
    """p = 0.7 is the mean of seven rows in this order and three in the other, without labels."""
    (each,) = drawn([[2, 3]], [0.7])
    bare = each._replace(facts=Facts())
    rows = [bare] * 7 + [bare._replace(responses=bare.responses[::-1])] * 3
    model = draw_model()
    results = [run(weighted(name), model, trees) for trees in ([each], rows)]
    assert results[0].means["loss"] == pytest.approx(results[1].means["loss"], abs=1e-12)
    one, other = (torch.autograd.grad(result.loss, model.tables["policy"])[0] for result in results)
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_tokens_of_the_likelihood() -> None:
    """0.8·2 + 0.2·3, 0.3·4 + 0.7·1, 1, and 5; kinds without soft labels count the first response alone."""
    trees = drawn(SHAPE, ODDS)
    assert Dpo().counts(trees)["tokens"] == pytest.approx(2.2 + 1.9 + 1 + 5)
    assert PAIR_KINDS["slic"].counts(trees)["tokens"] == 2 + 4 + 1 + 3
    unprompted = trees[0]._replace(prompt=np.zeros(0, np.int32), supervised=np.zeros(0, bool))
    assert Dpo().counts([unprompted])["tokens"] == pytest.approx(0.8 * 1 + 0.2 * 2)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_by_finite_differences(name: str) -> None:
    model, trees = draw_model(), drawn(SHAPE, ODDS)
    start = model.tables["policy"].detach()[:21].requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return run(weighted(name), Lookup(**(model.tables | {"policy": values})), trees).loss

    assert torch.autograd.gradcheck(loss, start, eps=1e-6, atol=1e-6)


def simpo_optimum(p: float, gamma: float) -> float:
    """p σ(γ − z) = (1 − p) σ(γ + z), with u = e^z: (1 − p) u² + (1 − 2p) e^γ u − p = 0."""
    return math.log(max(np.roots([1 - p, (1 - 2 * p) * math.exp(gamma), -p]).real))


@pytest.mark.parametrize("p", [0.8, 0.5, 0.25])
@pytest.mark.parametrize(
    ("objective", "optimum"),
    [
        (Dpo(beta=0.5), lambda p: math.log(p / (1 - p)) / 0.5),
        # p' = 0.8 p + 0.1
        (Dpo(beta=0.5, label_smoothing=0.1), lambda p: math.log((0.8 * p + 0.1) / (0.9 - 0.8 * p)) / 0.5),
        # of the true labels: (p − 0.1)/0.8
        (Robust(beta=0.5, label_smoothing=0.1), lambda p: math.log((p - 0.1) / (0.9 - p)) / 0.5),
        (Squared(beta=0.5), lambda p: (2 * p - 1) / 0.5),
        (Ipo(beta=0.5), lambda p: (2 * p - 1) / 1.0),
        (Ipo(beta=0.5, normalize="token_mean"), lambda p: (2 * p - 1) / 1.0),
    ],
)
def test_optimum_of_a_tabular_policy(objective: Objective, optimum: Any, p: float) -> None:
    ratio = fitted(objective, [tree(0, 1, facts=Facts(probability=p))])
    assert ratio[0] - ratio[1] == pytest.approx(optimum(p), abs=1e-5)


@pytest.mark.parametrize("p", [0.8, 0.5, 0.25])
def test_simpo_has_an_optimum_too(p: float) -> None:
    logps = fitted(Simpo(beta=2.0, gamma=0.5), [tree(0, 1, facts=Facts(probability=p))]) + REFERENCE.numpy()
    assert 2 * (logps[0] - logps[1]) == pytest.approx(simpo_optimum(p, 0.5), abs=1e-5)


def one_pair(objective: Objective, z: float, p: float) -> dict[str, float]:
    policy = torch.tensor([0.0, z, 0.0], dtype=torch.float64)
    return run(objective, Lookup(policy=policy, reference=torch.zeros(3)), drawn([[1, 1]], [p])).metrics


@pytest.mark.parametrize(
    ("z", "p", "wanted"),
    [(2, 0.8, 1), (2, 0.2, 0), (-2, 0.2, 1), (-2, 0.8, 0), (2, 0.5, 0.5), (-2, 0.5, 0.5), (0, 0.8, 0.5), (0, 0, 0.5), (-1, 0, 1)],
)
def test_accuracy_is_agreement_with_the_label(z: float, p: float, wanted: float) -> None:
    assert one_pair(Dpo(beta=1.0), z, p)["rewards/accuracies"] == wanted


@pytest.mark.parametrize(
    ("objective", "z", "p", "wanted"),
    [
        # |σ(z) − 0.8| < 0.05 · 0.3 from σ(z) = 0.785 to 0.815
        (Dpo(beta=1.0), math.log(0.785 / 0.215) - 1e-6, 0.8, 0),
        (Dpo(beta=1.0), math.log(0.785 / 0.215) + 1e-6, 0.8, 1),
        (Dpo(beta=1.0), math.log(0.815 / 0.185) - 1e-6, 0.8, 1),
        (Dpo(beta=1.0), math.log(0.815 / 0.185) + 1e-6, 0.8, 0),
        (Dpo(beta=1.0), -math.log(0.8 / 0.2), 0.2, 1),
        # Of a certain pair the gradient fades beyond 1; of another it turns round and is 0.2 of 0.6.
        (Hinge(beta=1.0), 1.5, 1.0, 1),
        (Hinge(beta=1.0), 1.5, 0.8, 0),
        (Hinge(beta=1.0), -1.5, 0.0, 1),
        # A tie has no gradient at equal rewards that could fade.
        (Dpo(beta=1.0), 0.0, 0.5, 0),
        (Dpo(beta=1.0), 9.0, 0.5, 0),
        (Hinge(beta=1.0), 0.5, 0.5, 0),
        (Simpo(beta=1.0, gamma=2.0), 0.0, 0.5, 0),
    ],
)
def test_saturated_pairs(objective: Objective, z: float, p: float, wanted: float) -> None:
    assert one_pair(objective, z, p)["rewards/saturated"] == wanted


def test_the_target_of_ipo_is_that_of_its_labels() -> None:
    metrics = run(Ipo(beta=0.25), draw_model(), drawn(SHAPE, ODDS)).metrics
    assert metrics["margin/target"] == pytest.approx(2 * mean(2 * p - 1 for p in ODDS))
    assert metrics["margin/logratio"] == pytest.approx(metrics["rewards/margins"] / 0.25)


class Certain(Dpo):
    """A function of the margin alone that takes no soft labels all the same."""

    soft_labels: ClassVar[bool] = False


@pytest.mark.parametrize("objective", [*WITHOUT.values(), Certain(beta=0.3)])
def test_kinds_without_soft_labels_take_none(objective: PairObjective) -> None:
    objective, shape = dataclasses.replace(objective, sft_weight=0.7), SHAPE[:1]
    bare, told = (
        run(objective, draw_model(), make_trees(shape, [Facts(scores=(2.0, 1.0), probability=p)])).metrics for p in (None, 0.8)
    )
    assert bare == told


def test_a_model_learns_from_the_labels_of_its_rows() -> None:
    """A tiny transformer, packed and one row at a time, against dpo's loss on plain log-probabilities; ½·NLL beside it."""
    model, trees = make(), draw_trees(5, seed=3, branches=2)
    odds = [0.9, 0.2, 0.5, 1.0, 0.0]
    trees = [each._replace(facts=Facts(probability=p)) for each, p in zip(trees, odds, strict=True)]
    known = [tuple(np.full(len(r), -3.0, np.float32) for r in each.responses) for each in trees]
    trees = [each._replace(reference=own) for each, own in zip(trees, known, strict=True)]
    sizes = [len(r) for each in trees for r in each.responses]
    with torch.no_grad():
        sums = np.array([float(own.double().sum()) for own in plain_logps(model, trees).split(sizes)]).reshape(5, 2)
    count, p = np.array(sizes).reshape(5, 2), np.array(odds)
    z = 0.3 * ((sums + 3 * count) @ [1, -1])
    weight = np.stack([p, 1 - p], axis=1)
    wanted = (
        np.mean(p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z)) - 0.5 * (weight * sums).sum() / (weight * count).sum()
    )
    backbone = make_backbone(model, lora=False)
    for budget in (4096, 1):
        found = run(Dpo(beta=0.3, sft_weight=0.5), backbone, trees, budget=budget)
        assert found.means["loss"] == pytest.approx(wanted, rel=1e-5)
        assert found.metrics["rewards/accuracies"] == np.mean(np.sign(z) * np.sign(p - 0.5) / 2 + 0.5)
