"""SPPO and DNO: golden values from win probabilities of own samples to losses and gradients, and what they are at the start."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.objectives.dno import Dno
from rlhf_cli.objectives.preference import PairObjective
from rlhf_cli.objectives.sppo import Sppo
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.source import best_and_worst, ranked
from tests.objectives.lookup import Lookup, lengths, make_trees, run, table

GOLDEN = json.loads(Path(__file__).with_name("beyond_scores.json").read_text())["self_play"]
"""Inputs and expected values in float64, computed from the formulas without this package."""

INPUTS, WANTED = GOLDEN["inputs"], GOLDEN["expected"]
WINS = np.array(INPUTS["win probability of sample i against sample k, per prompt"])
POLICY, REFERENCE = (
    list(zip(INPUTS[f"{whose}_chosen"], INPUTS[f"{whose}_rejected"], strict=True)) for whose in ("policy", "ref")
)
KINDS: dict[str, PairObjective] = {
    "sppo eta=1000": Sppo(),
    "sppo eta=10": Sppo(eta=10.0),
    "dno_soft beta=0.3": Dno(beta=0.3),
}


def rollout(scores: np.ndarray) -> Rollout:
    """(P, K) scores of responses of one token, which is the number of the response among its prompt's."""
    prompts, samples = scores.shape
    trees = [
        Tree(np.zeros(1, np.int32), np.zeros(1, bool), tuple(np.full(1, k, np.int32) for k in range(samples)), row)
        for row in range(prompts)
    ]
    tokens = TokenFigures(*[np.arange(scores.size, dtype=float)] * 5)
    return Rollout(trees, np.ones(scores.size, bool), {}, scores.ravel(), tokens, {})


def picked() -> list[Tree]:
    """What a step learns from, of the golden probabilities as a term gives them: means over the other samples."""
    others = (WINS.sum(2) - 0.5) / (WINS.shape[1] - 1)
    found = rollout(others)
    return [best_and_worst(tree) for tree in ranked(found, found.tokens.plain)]


def test_the_best_and_the_worst_of_all_samples() -> None:
    trees = picked()
    assert [[int(response[0]) for response in tree.responses] for tree in trees] == [
        [*pair] for pair in zip(WANTED["chosen"], WANTED["rejected"], strict=True)
    ]
    for row, (tree, mean) in enumerate(zip(trees, WANTED["mean win probability"], strict=True)):
        assert tree.facts.scores == pytest.approx((max(mean), min(mean)), abs=1e-10)
        assert tree.reference is not None
        assert [float(known[0]) for known in tree.reference] == [4 * row + int(ids[0]) for ids in tree.responses]


@pytest.mark.parametrize("budget", [4096, 1])
@pytest.mark.parametrize("name", KINDS)
def test_golden_losses_and_gradients(name: str, budget: int) -> None:
    wanted, facts = WANTED[name], [tree.facts for tree in picked()]
    policy = table(POLICY).requires_grad_()
    trees, model = make_trees(lengths(POLICY), facts), Lookup(policy=policy, reference=table(REFERENCE))
    alone = [float(run(KINDS[name], model, [tree]).loss.detach()) for tree in trees]
    assert alone == pytest.approx(wanted["per pair"], rel=1e-10)
    result = run(KINDS[name], model, trees, budget=budget)
    assert float(result.loss.detach()) == pytest.approx(wanted["loss"], rel=1e-10)
    (gradient,) = torch.autograd.grad(result.loss, policy)
    of_responses = [each for pair in zip(wanted["gradient chosen"], wanted["gradient rejected"], strict=True) for each in pair]
    per_token = np.repeat(of_responses, [len(response) for pair in POLICY for response in pair])
    assert gradient[1:].tolist() == pytest.approx(per_token.tolist(), abs=1e-8)


def test_soft_labels_of_dno() -> None:
    """p = σ(P_w − P_l): the loss at log-ratio 0 is ln 2, and its slope (½ − p)β for the chosen response."""
    for tree, p in zip(picked(), WANTED["dno_soft probability"], strict=True):
        logps = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        (own,) = make_trees([[1, 1]], [tree.facts])
        result = run(Dno(beta=0.3), Lookup(policy=logps, reference=torch.zeros(3, dtype=torch.float64)), [own])
        assert float(result.loss.detach()) == pytest.approx(math.log(2), abs=1e-12)
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert gradient.tolist() == pytest.approx([0, 0.3 * (0.5 - p), 0.3 * (p - 0.5)], abs=1e-10)


def test_sppo_at_its_reference() -> None:
    """Two samples, one of which always wins: P is ¾ and ¼, each log-ratio is asked to be η/4 from 0; the reward is ρ/η."""
    found = rollout(np.array([[0.0, 1.0]]))
    (tree,) = map(best_and_worst, ranked(found, found.tokens.plain))
    assert tree.facts.scores == (0.75, 0.25)
    (own,) = make_trees([[1, 1]], [tree.facts])
    at = run(Sppo(eta=8.0), Lookup(policy=torch.zeros(3), reference=torch.zeros(3)), [own])
    assert at.means["loss"] == pytest.approx(4.0)
    there = run(Sppo(eta=8.0), Lookup(policy=torch.tensor([0.0, 2.0, -2.0]), reference=torch.zeros(3)), [own])
    assert there.means["loss"] == 0 and there.metrics["rewards/margins"] == pytest.approx(0.5)


def test_scores_that_are_no_probabilities() -> None:
    tree = Tree(np.zeros(1), np.zeros(1, bool), (np.ones(1), np.ones(1)), 0, Facts(ranks=(0, 1), scores=(1.5, 0.2)))
    with pytest.raises(UsageError, match=r"expected the probability to win, from 0 to 1, and a response has 1\.5"):
        best_and_worst(tree)
