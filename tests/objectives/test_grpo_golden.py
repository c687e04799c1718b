"""grpo's family against numbers from the papers' formulas: advantages, losses, gradients, whole methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Batch, Recorded, Tree
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import Advantages, Experience, PolicyGradient
from rlhf_cli.objectives.rloo import Rloo
from tests.objectives.lookup import Lookup, make_trees, passes, run, table
from tests.objectives.rollouts import Tokens, experience, flat, recorded

GOLDEN = json.loads(Path(__file__).with_name("golden_grpo.json").read_text())
"""Inputs and expected values in float64, computed from the papers' formulas without this package; 12 digits."""
INPUTS, WANTED = GOLDEN["options"]["inputs"], GOLDEN["options"]["expected"]
ORDER = np.argsort(INPUTS["prompt"], kind="stable")
"""A rollout has the responses of a prompt one after the other."""
LONGEST = INPUTS["max_new_tokens"]
SHAPE = [[INPUTS["length"][k] for k in ORDER if INPUTS["prompt"][k] == prompt] for prompt in range(3)]
GIVEN = {"temperature": 1.0, "max_new_tokens": float(LONGEST)}
SCALES = ("group", "batch", "none")


def ordered(values: list[Any]) -> list[Any]:
    return [values[k] for k in ORDER]


def drawn(objective: PolicyGradient) -> Experience:
    """The rollout as the objective sees it: scores with the penalty for length."""
    old, reference, scores = (ordered(INPUTS[name]) for name in ("old_logps", "ref_logps", "score"))
    lengths = np.array(ordered(INPUTS["length"]))
    return experience(
        old, reference, np.array(scores) + objective.length_penalty(lengths, LONGEST), None, sorted(INPUTS["prompt"])
    )


def by_response(values: np.ndarray, lengths: list[int]) -> list[float]:
    """What stands at all tokens of each response."""
    parts = np.split(values, np.cumsum(lengths)[:-1])
    assert all((part == part[0]).all() for part in parts)
    return [float(part[0]) for part in parts]


@pytest.mark.parametrize("overlong", [None, 3])
@pytest.mark.parametrize("scale", SCALES)
def test_advantages(scale: Any, overlong: int | None) -> None:
    objective = Grpo(scale=scale, overlong=overlong)
    found = by_response(objective.estimate_advantages(drawn(objective), 0.0, {}).advantages, ordered(INPUTS["length"]))
    name = scale if overlong is None else f"{scale}, overlong"
    if name in WANTED["advantages"]:
        assert found == pytest.approx(ordered(WANTED["advantages"][name]), abs=1e-10)
    if overlong is None:
        assert found[8:] == [0.0] * 4  # the third prompt's scores are all 0.7


def test_overlong_penalty() -> None:
    found = Rloo(overlong=INPUTS["overlong"]).length_penalty(np.array(INPUTS["length"]), LONGEST)
    assert found == pytest.approx(WANTED["overlong penalty"], abs=1e-10)
    assert Grpo().length_penalty(np.array([LONGEST]), LONGEST).tolist() == [0.0]


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("scale", SCALES)
def test_ties_are_exactly_0(scale: Any, case: int) -> None:
    """Seven times −7.3, whose sum is rounded; and 0 beside 0.0001, which is no tie."""
    given, wanted = GOLDEN["ties"]["inputs"][case], GOLDEN["ties"]["expected"][case][scale]
    ones = [[-1.0]] * len(given["score"])
    found = (
        Grpo(scale=scale).estimate_advantages(experience(ones, ones, given["score"], None, given["prompt"]), 0.0, {}).advantages
    )
    assert found == pytest.approx(wanted, abs=1e-10)
    assert all(value == 0 for value, zero in zip(found.tolist(), wanted, strict=True) if zero == 0)


def test_ties_of_rloo_are_exactly_0() -> None:
    """The mean of seven times −7.3, from a sum of eight less one, is off by 9e-16."""
    ones = [[-1.0]] * 8
    assert Rloo().estimate_advantages(experience(ones, ones, [-7.3] * 8, None, [0] * 8), 0.0, {}).advantages.tolist() == [0.0] * 8


def test_without_a_scale_the_kl_may_be_in_the_return() -> None:
    """κ = 0.5, log-ratios of 0.4 and −0.2: returns of 0.8 and 1.1 for a score of 1, so that equal scores are no tie."""
    seen = experience([[-0.6], [-1.2]], [[-1.0]] * 2, [1.0, 1.0], None, [0, 0])
    assert Grpo(scale="none").estimate_advantages(seen, 0.5, {}).advantages == pytest.approx([-0.15, 0.15], abs=1e-12)
    for scale in ("group", "batch"):
        assert Grpo(scale=scale).estimate_advantages(seen, 0.5, {}).advantages.tolist() == [0.0, 0.0]


def model() -> Lookup:
    """The policy that has moved."""
    values = iter(ordered(INPUTS["new_logps"]))
    return Lookup(policy=table([[next(values) for _ in lengths] for lengths in SHAPE]).requires_grad_())


def rollout(objective: PolicyGradient, advantages: np.ndarray | None = None) -> list[Tree]:
    seen = drawn(objective)
    lesson = objective.estimate_advantages(seen, 0.0, {})
    return recorded(make_trees(SHAPE), seen, lesson if advantages is None else Advantages(advantages, None, {}, {}))


class Exact:
    """An objective that is told its rollout in float64, where batches have float32."""

    def __init__(self, objective: PolicyGradient) -> None:
        seen = drawn(objective)
        advantage = objective.estimate_advantages(seen, 0.0, {}).advantages
        self.objective = objective
        self.columns = [torch.from_numpy(np.concatenate(([0.0], each))) for each in (seen.old, seen.reference, advantage)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def terms(self, backbone: Any, batch: Batch, given: Any) -> Any:
        old, reference, advantage = (column[batch.target] for column in self.columns)
        known = Recorded(old, reference, advantage, torch.full_like(old, torch.nan), torch.full_like(old, torch.nan))
        return self.objective.terms(backbone, Batch(**(vars(batch) | {"recorded": known})), given)


def gradient(result: Any, known: Lookup) -> list[float]:
    found: list[float] = torch.autograd.grad(result.loss, known.tables["policy"])[0].tolist()[1:]
    return found


def check(objective: PolicyGradient, wanted: float, slopes: Tokens | None = None, given: Any = GIVEN) -> dict[str, float]:
    """Loss and gradient in float64, through a batch, and through one of several passes; returns its metrics."""
    exact: Any = Exact(objective)
    for tolerance, kind, budget in ((1e-10, exact, 4096), (1e-10, exact, 1), (1e-5, objective, 4096), (1e-5, objective, 1)):
        known = model()
        result = run(kind, known, rollout(objective), budget=budget, given=given)
        assert result.means["loss"] == pytest.approx(wanted, abs=tolerance)
        if slopes is not None:
            assert gradient(result, known) == pytest.approx(flat(ordered(list(slopes))).tolist(), abs=tolerance)
    return run(exact, model(), rollout(objective), given=given).metrics


CLIPPED = WANTED["clip=0.2 clip_high=0.28"]


@pytest.mark.parametrize("over", CLIPPED["loss"])
def test_clipped_losses(over: Any) -> None:
    objective = Grpo(clip=0.2, clip_high=0.28, mean_over=over)
    metrics = check(objective, CLIPPED["loss"][over], CLIPPED["gradient"].get(over))
    assert metrics["policy/clipfrac"] == pytest.approx(CLIPPED["clipfrac"], abs=1e-10)
    even = WANTED["clip=0.2 clip_high=null"]
    assert check(Grpo(mean_over=over), even["loss"][over])["policy/clipfrac"] == pytest.approx(even["clipfrac"], abs=1e-10)


@pytest.mark.parametrize("over", ["responses", "tokens", "constant"])
def test_rloo_has_the_same_losses(over: Any) -> None:
    """With grpo's advantages."""
    advantages = Grpo().estimate_advantages(drawn(Grpo()), 0.0, {}).advantages
    objective = Rloo(clip_high=0.28, mean_over=over)
    found = run(objective, model(), rollout(objective, advantages), given=GIVEN).means["loss"]
    assert found == pytest.approx(CLIPPED["loss"][over], abs=1e-5)


def test_losses_of_each_token() -> None:
    old, new = (torch.from_numpy(flat(INPUTS[name])) for name in ("old_logps", "new_logps"))
    advantages = torch.tensor(WANTED["advantages"]["group"]).double().repeat_interleave(torch.tensor(INPUTS["length"]))
    found, _ = Grpo(clip_high=0.28).policy_loss.of_tokens(new, (new - old).exp(), advantages)
    assert found.tolist() == pytest.approx(flat(CLIPPED["per token"]).tolist(), abs=1e-7)  # advantages were float32


@pytest.mark.parametrize(("clip", "high"), [(0.05, 0.08), (0.0003, 0.0004)])
def test_ratios_of_responses(clip: float, high: float) -> None:
    """The gradient is of any token of the response."""
    wanted = WANTED[f"ratio=sequence clip={clip} clip_high={high}"]
    slopes = [[slope] * length for slope, length in zip(wanted["gradient"], INPUTS["length"], strict=True)]
    metrics = check(Grpo(ratio="sequence", clip=clip, clip_high=high), wanted["loss"], slopes)
    assert metrics["policy/clipfrac"] == pytest.approx(wanted["share of responses clipped"], abs=1e-10)
    assert metrics["policy/ratio"] == pytest.approx(np.mean(wanted["ratio"]), abs=1e-10)


def test_cispo() -> None:
    """Its gradient is that of the loss with the weights as they are: no token is without one."""
    wanted = WANTED["surrogate=cispo clip_high=0.28"]
    metrics = check(Grpo(surrogate="cispo", clip_high=0.28), wanted["loss"], wanted["gradient"])
    check(Grpo(surrogate="cispo", clip_high=0.05), WANTED["surrogate=cispo clip_high=0.05"]["loss"])
    # Of the 32 tokens with an advantage: exp(new − old) > 1.28.
    moved = [np.exp(np.subtract(a, b)) for a, b in zip(INPUTS["new_logps"], INPUTS["old_logps"], strict=True)]
    taught = [w for w, a in zip(moved, WANTED["advantages"]["group"], strict=True) if a]
    assert metrics["policy/clipfrac"] == pytest.approx(sum((w > 1.28).sum() for w in taught) / sum(INPUTS["length"]), abs=1e-10)


@pytest.mark.parametrize("over", ["responses", "tokens", "constant"])
@pytest.mark.parametrize("name", ["k2", "k3"])
def test_the_kl_has_the_same_mean(name: str, over: Any) -> None:
    """Alone, and its gradient: what κ = 1 adds to the policy's."""
    objective, wanted = Grpo(clip_high=0.28, mean_over=over), WANTED["kl loss"][name]
    exact: Any = Exact(objective)
    known = model()
    plain, with_kl = (run(exact, known, rollout(objective), given=GIVEN | kl) for kl in ({}, {f"{name}_coef": 1.0}))
    assert with_kl.means["loss"] - plain.means["loss"] == pytest.approx(wanted[over], abs=1e-10)
    assert with_kl.means["loss/policy"] == plain.means["loss/policy"]
    if over == "tokens":
        found = np.subtract(gradient(with_kl, known), gradient(plain, known))
        assert found == pytest.approx(flat(ordered(wanted["gradient mean_over=tokens"])), abs=1e-10)


METHODS: dict[str, tuple[Grpo, dict[str, float]]] = {
    "grpo, kl coef=0.04 k2": (Grpo(clip_high=0.28), {"k2_coef": 0.04}),
    "grpo, kl coef=0.04 k3": (Grpo(clip_high=0.28), {"k3_coef": 0.04}),
    "DAPO: tokens, 0.2/0.28, overlong, no kl": (Grpo(mean_over="tokens", clip_high=0.28, overlong=3), {}),
    "Dr. GRPO: none, constant, 0.2/0.2, no kl": (Grpo(scale="none", mean_over="constant"), {}),
    "scale=batch, responses, 0.2/0.2, no kl": (Grpo(scale="batch"), {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_whole_methods(name: str) -> None:
    objective, kl = METHODS[name]
    check(objective, WANTED["whole recipes"][name], given=GIVEN | kl)


def test_every_golden_value_is_used() -> None:
    assert METHODS.keys() == WANTED["whole recipes"].keys()
    rest = {"advantages", "overlong penalty", "prompts whose scores tie (before the penalty)", "kl loss", "whole recipes"}
    assert {name.split(" ")[0].split("=")[0] for name in WANTED.keys() - rest} == {"clip", "ratio", "surrogate"}
    assert set(WANTED["advantages"]) == {*SCALES, "group, overlong"}


def test_half_of_the_prompts_and_the_other_half() -> None:
    """Whatever the mean is over, an update's loss is made of sums with counts: those of two parts add up to those of both."""
    for objective in (Grpo(), Grpo(mean_over="tokens"), Grpo(mean_over="constant"), Grpo(ratio="sequence", clip=0.05)):
        trees = rollout(objective)
        whole, parts = objective.counts(trees), [trees[:1], trees[1:]]
        sums: dict[str, float] = {}
        for part in parts:
            for term in (term for batch in passes(part, 4096) for term in objective.terms(model(), batch, GIVEN)):  # type: ignore[arg-type]
                ((unit, value),) = term.losses.items()
                sums[unit] = sums.get(unit, 0.0) + float(value)
        ((unit, total),) = sums.items()
        assert whole[unit] == sum(objective.counts(part)[unit] for part in parts)
        assert total / whole[unit] == pytest.approx(run(objective, model(), trees, given=GIVEN).means["loss"], abs=1e-12)
