"""AOT: sorted ends over the whole batch, whatever its cut; the least cost over all ways to match them."""

from __future__ import annotations

from itertools import permutations
from typing import Any, Literal

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.aot import Aot
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.preference import ordered_pairs
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.step import evaluate
from tests.models.tiny_backbone import draw_trees, make, make_backbone, plain_logps
from tests.objectives.kinds import draw_model, trees_for
from tests.objectives.lookup import Lookup, make_trees, run, table
from tests.objectives.test_golden import POLICY, REFERENCE, pair_model, pair_trees

Pairing = Literal["paired", "unpaired"]
PAIRINGS: list[Pairing] = ["paired", "unpaired"]
SUMS = np.array([[[sum(side) for side in pair] for pair in rows] for rows in (POLICY, REFERENCE)])


def ends(pairing: Pairing, sums: np.ndarray = SUMS) -> np.ndarray:
    """a and b, (2, P), from log-probabilities (model, pair, side)."""
    return np.array([*(sums[:, :, 0] - sums[:, :, 1])] if pairing == "paired" else [*(sums[0] - sums[1]).T])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_least_cost_of_all_matchings(pairing: Pairing) -> None:
    """The cost is convex in a − b, so the sorted matching is the cheapest transport: found here without any sorting."""
    a, b = ends(pairing)
    costs = [np.logaddexp(0, -0.3 * (a - b[[*order]])).mean() for order in permutations(range(len(a)))]
    found = float(run(Aot(beta=0.3, pairing=pairing), pair_model(), pair_trees()).loss)
    assert found == pytest.approx(min(costs), abs=1e-12)
    assert found < costs[0] - 1e-2  # that of the pairs as they are


@pytest.mark.parametrize("budget", [4096, 16, 1])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_gradient_of_sorting_the_whole_batch(pairing: Pairing, budget: int) -> None:
    """Through torch.sort, on pairs and rankings; the library never holds the batch in one graph."""
    trees, model = trees_for("aot"), draw_model()
    policy = model.tables["policy"]
    total = lambda values, response: values[torch.from_numpy(response.astype(np.int64))].sum()  # noqa: E731
    rows = [[tree.responses[k] for k in pair] for tree in trees for pair in ordered_pairs(len(tree.responses), tree.facts)]
    own, known = (
        torch.stack([torch.stack([total(values, response) for response in pair]) for pair in rows])
        for values in (policy, model.tables["reference"])
    )
    a, b = (
        (own[:, 0] - own[:, 1], known[:, 0] - known[:, 1]) if pairing == "paired" else ((own - known)[:, 0], (own - known)[:, 1])
    )
    wanted = torch.nn.functional.softplus(-0.3 * (a.sort().values - b.sort().values), threshold=100).mean()
    found = run(Aot(beta=0.3, pairing=pairing), model, trees, budget=budget)
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (found.loss, wanted)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12) and gradients[0].abs().max() > 1e-3


def test_a_pair_alone_is_dpo() -> None:
    """a − b is the difference of log-ratios then, paired or not; and β weighs it."""
    for pairing in PAIRINGS:
        for tree in pair_trees():
            losses = [float(run(kind, pair_model(), [tree]).loss) for kind in (Aot(beta=0.3, pairing=pairing), Dpo(beta=0.3))]
            assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_by_hand() -> None:
    """ρ_w = 1, 5 and ρ_l = 4, 0, β = 1: a row compares 1 with 4 and 5 with 0; the sorted 1 with 0, and 5 with 4."""
    ratios = [[[1.0], [4.0]], [[5.0], [0.0]]]
    model = Lookup(policy=table(ratios).requires_grad_(), reference=torch.zeros(5, dtype=torch.float64))
    found = run(Aot(beta=1.0, pairing="unpaired"), model, make_trees([[1, 1], [1, 1]]), budget=1)
    assert float(found.loss.detach()) == pytest.approx(np.log1p(np.exp(-1)), abs=1e-12)
    (gradient,) = torch.autograd.grad(found.loss, model.tables["policy"])
    assert gradient[1:].tolist() == pytest.approx(np.array([-1, 1, -1, 1]) / (1 + np.e) / 2, abs=1e-12)


def test_equal_ends_have_one_order() -> None:
    """Ties are matched by their place in the batch, so that no cut moves a gradient."""
    ratios = [[[1.0], [0.0]], [[1.0], [3.0]], [[1.0], [-2.0]]]
    found = []
    for budget in (4096, 1):
        model = Lookup(policy=table(ratios).requires_grad_(), reference=torch.zeros(7, dtype=torch.float64))
        result = run(Aot(beta=1.0, pairing="unpaired"), model, make_trees([[1, 1]] * 3), budget=budget)
        found.append(torch.autograd.grad(result.loss, model.tables["policy"])[0].tolist())
    assert found[0] == pytest.approx(found[1], abs=1e-12)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_held_out_pairs_are_one_batch(pairing: Pairing) -> None:
    """70 pairs, more than are cut into passes together: against numpy on plain transformers' numbers. Nothing else is logged."""
    model, trees = make(), draw_trees(70, seed=5, branches=2, longest=4)
    with torch.no_grad():
        split = plain_logps(model, trees).double().split([len(r) for tree in trees for r in tree.responses])
    policy = np.array([float(own.sum()) for own in split]).reshape(70, 2)
    known: Any = [tuple(np.full(len(r), -3.5, np.float32) for r in tree.responses) for tree in trees]
    brought = [tree._replace(reference=own, facts=Facts()) for tree, own in zip(trees, known, strict=True)]
    lengths = np.array([[len(r) for r in tree.responses] for tree in trees])
    a, b = np.sort(ends(pairing, np.stack((policy, -3.5 * lengths))))
    objective = Aot(beta=0.3, pairing=pairing)
    metrics = evaluate(Passes(make_backbone(model, lora=False), 60, Ranks(expected=False)), objective, brought)
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, -0.3 * (a - b)).mean(), rel=1e-5)
    assert metrics.keys() == set(objective.metric_names)
