"""What holds for every kind: gradients, the cut into passes, extreme numbers, log-probabilities that come with the data."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree, build_batch, idle_batch, plan_passes
from rlhf_cli.objectives.unpaired import only
from tests.objectives.kinds import ALL, PAIR_KINDS, REWARD_KINDS, UNPAIRED_KINDS, draw_model, trees_for
from tests.objectives.lookup import Lookup, lengths, make_trees, run, table

MEMORY = {"reward/good": 0.3, "reward/bad": -0.1}


@pytest.mark.parametrize("name", ALL)
def test_gradient_by_finite_differences(name: str) -> None:
    """With respect to the log-probability, or score, of every token; the mismatched responses of kto are held fixed."""
    model, trees = draw_model(), trees_for(name)
    role = ALL[name].role
    free = torch.ones(40, dtype=torch.bool)
    if name in UNPAIRED_KINDS:
        free[np.concatenate([tree.responses[1] for tree in trees])] = False
    start = model.tables[role].detach()

    def loss(values: torch.Tensor) -> torch.Tensor:
        moved = Lookup(**(model.tables | {role: start.masked_scatter(free, values)}))
        return run(ALL[name], moved, trees, memory=MEMORY).loss

    assert torch.autograd.gradcheck(loss, start[free].requires_grad_(), eps=1e-6, atol=1e-6)
    assert torch.autograd.functional.jacobian(loss, start[free]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_passes_change_nothing(name: str) -> None:
    """Loss, gradient and metrics of a batch in one pass, and with one or two trees in each."""
    found = []
    for budget in (4096, 16, 1):
        model = draw_model()
        result = run(ALL[name], model, trees_for(name), budget=budget, memory=MEMORY)
        (gradient,) = torch.autograd.grad(result.loss, model.tables[ALL[name].role])
        found.append((gradient, result))
    for (a, one), (b, other) in pairwise(found):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)
        assert one.memory == pytest.approx(other.memory, abs=1e-12)


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("name", ALL)
def test_an_idle_pass_adds_nothing(name: str, cached: bool) -> None:
    """Of models in shards every rank makes as many passes: one without trees has sums of 0, and gradients of 0."""
    objective, model, trees = ALL[name], draw_model(), trees_for(name)
    if cached:
        trees = [tree._replace(reference=tuple(np.zeros(len(r), np.float32) for r in tree.responses)) for tree in trees]
    seen = objective.phases(trees)[0]
    batch = build_batch(seen or trees, plan_passes(seen or trees, 1, 4096, "long")[0][0])
    known = {metric: float(value) for metric, (value, _) in objective.statistics(model, batch).items()} if seen else {}
    idle = idle_batch(trees)
    assert all(float(value) == 0 for value, _ in objective.statistics(model, idle).values()) or not seen
    for term in objective.terms(model, idle, MEMORY | known):
        loss = torch.stack([*term.losses.values()]).sum()
        (gradient,) = torch.autograd.grad(loss, model.tables[objective.role])
        assert float(loss) == 0 and float(gradient.abs().max()) == 0
        assert all(float(value) == 0 for value, _ in term.sums.values())


@pytest.mark.parametrize("far", [1e3, 1e4])
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("name", [*PAIR_KINDS, *REWARD_KINDS])
def test_differences_of_thousands(name: str, better: bool, far: float) -> None:
    """Loss, gradient and metrics stay finite, and a loss that is linear far out has the size of what is missing."""
    low, high = [[-far]], [[0.0]]
    values = [[*(high if better else low), *(low if better else high)]]
    role = ALL[name].role
    tables = {role: table(values).requires_grad_(), "reference": torch.full((3,), -0.5, dtype=torch.float64)}
    tables["policy"] = tables.get("policy", tables["reference"])
    tables |= {figure: torch.tensor([0.0, 2.0, far], dtype=torch.float64) for figure in ("typicality", "kl")}
    result = run(ALL[name], Lookup(**tables), make_trees(lengths(values), [Facts(scores=(2.0, 1.0))]))
    (gradient,) = torch.autograd.grad(result.loss, tables[role])
    assert torch.isfinite(result.loss) and torch.isfinite(gradient).all()
    assert all(map(math.isfinite, result.metrics.values()))
    if name in ("dpo", "plackett_luce", "discopop", "wpo", "aot"):
        assert result.means["loss"] == pytest.approx(0.0 if better else 0.3 * far, abs=1e-9)
    if name == "exo":  # of a certainty that is right, and of one that is wrong
        assert result.means["loss"] == pytest.approx(-math.log(0.99 if better else 0.01), abs=1e-9)
    if name in ("reward plackett_luce", "pairs"):
        assert result.means["loss"] == pytest.approx(0.0 if better else far, abs=1e-9)


@pytest.mark.parametrize("name", UNPAIRED_KINDS)
@pytest.mark.parametrize("logratio", [1e3, -1e3, 1e4, -1e4])
def test_log_ratios_of_thousands(name: str, logratio: float) -> None:
    values = [[[logratio], [0.0]], [[logratio], [0.0]]]
    policy = table(values).requires_grad_()
    model = Lookup(policy=policy, reference=torch.zeros(5, dtype=torch.float64))
    result = run(ALL[name], model, make_trees(lengths(values), [Facts(label=True), Facts(label=False)]))
    (gradient,) = torch.autograd.grad(result.loss, policy)
    # kto: the worse one of λ_D = 1 and λ_U = 1.5, over two; bco: 0.3 of it over two; apo_zero: one of two
    wanted = {"kto": 0.75 if logratio > 0 else 0.5, "unpaired bco": 0.15 * abs(logratio), "unpaired apo_zero": 0.5}[name]
    assert result.means["loss"] == pytest.approx(wanted, abs=1e-9)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [name for name, objective in ALL.items() if objective.reference])
def test_reference_from_the_trees(name: str) -> None:
    """Log-probabilities that the trees bring stand for the role, which is not asked; they are float32.

    All but tdpo2's, which needs the reference itself: what is stored of it is not enough, and has no effect.
    """
    model, trees = draw_model(), trees_for(name)
    wanted = run(ALL[name], model, trees)
    known = [tree._replace(reference=tuple(_at(model.tables["reference"], ids) for ids in tree.responses)) for tree in trees]
    if ALL[name].token_figure == "kl":
        known = [tree._replace(reference=tuple(np.zeros(len(r), np.float32) for r in tree.responses)) for tree in trees]
        assert run(ALL[name], model, known).metrics == wanted.metrics
        return
    model.asked.clear()
    assert run(ALL[name], model, known).metrics == pytest.approx(wanted.metrics, abs=1e-5)
    assert {role for role, _ in model.asked} == {"policy"}
    alone = Lookup(policy=model.tables["policy"], typicality=model.tables["typicality"])
    assert run(ALL[name], alone, known).means["loss"] == pytest.approx(wanted.means["loss"], abs=1e-5)


def _at(values: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    return values[torch.from_numpy(ids.astype(np.int64))].numpy().astype(np.float32)


@pytest.mark.parametrize("name", ALL)
def test_the_reference_has_no_gradients_and_is_asked_for_where_it_is_needed_alone(name: str) -> None:
    model = draw_model()
    run(ALL[name], model, trees_for(name))
    roles = {"reference": False, "policy": True} if ALL[name].reference else {"policy": True} if name in PAIR_KINDS else {}
    assert {role for role, _ in model.asked} == set(roles)
    assert not any(graded for role, graded in model.asked if role == "reference")


@pytest.mark.parametrize("name", PAIR_KINDS)
def test_sft_weight_adds_the_mean_over_the_tokens_of_the_best_responses(name: str) -> None:
    model, trees = draw_model(), trees_for(name)
    best = torch.from_numpy(np.concatenate([tree.responses[0] for tree in trees]).astype(np.int64))
    assert len(best) == 12
    nll = -float(model.tables["policy"][best].detach().mean())
    plain = run(PAIR_KINDS[name], model, trees)
    weighted = run(dataclasses.replace(PAIR_KINDS[name], sft_weight=0.7), model, trees, budget=16)
    assert weighted.means["loss"] - plain.means["loss"] == pytest.approx(0.7 * nll, abs=1e-12)


def test_one_of_two_responses() -> None:
    numbers = lambda *values: np.array(values, np.int32)  # noqa: E731
    tree = Tree(numbers(1), np.zeros(1, bool), (numbers(2), numbers(3, 4)), 7, Facts(label=True), (numbers(5), numbers(6, 7)))
    left = only(tree, 1)
    assert (left.responses[0].tolist(), left.row, left.facts) == ([3, 4], 7, Facts(label=True))
    assert left.reference is not None
    assert [values.tolist() for values in left.reference] == [[6, 7]]
    assert only(tree._replace(reference=None), 0).reference is None
