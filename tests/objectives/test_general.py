"""General preferences: pair scores against golden values, antisymmetry to the bit, and a circle that no score can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.evaluation.preference import circles
from rlhf_cli.models.heads import pair_scores
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.general import General
from tests.objectives.lookup import Lookup, make_trees, run

GOLDEN = json.loads(Path(__file__).with_name("beyond_scores.json").read_text())["general_preference"]
"""Inputs and expected values in float64, computed from the formula without this package."""

V, TAU, WANTED = torch.tensor(GOLDEN["inputs"]["v"], dtype=torch.float64), GOLDEN["inputs"]["tau"], GOLDEN["expected"]
PAIRS = GOLDEN["inputs"]["pairs (better, worse)"]
CIRCLE = np.array(GOLDEN["inputs"]["rock-paper-scissors v"])


class Vectors(Lookup):
    """A model whose head gives a vector for the last token of a response."""

    def vectors(self, role: str, batch: Batch) -> torch.Tensor:
        return self.tables[role][batch.ids.flatten()[batch.last]]

    @classmethod
    def of(cls, rows: torch.Tensor) -> Vectors:
        """The responses of `make_trees`, of one token each."""
        return cls(reward=torch.cat([torch.zeros_like(rows[:1]), rows]).requires_grad_())


def table(vectors: Any, tau: float) -> Any:
    return pair_scores(vectors[:, None], vectors[None], tau)


def test_golden_scores_and_probabilities() -> None:
    for vectors in (V, V.numpy()):
        found = torch.as_tensor(table(vectors, TAU))
        assert found.flatten().tolist() == pytest.approx(np.ravel(WANTED["score"]).tolist(), abs=1e-10)
        assert found.sigmoid().flatten().tolist() == pytest.approx(np.ravel(WANTED["probability"]).tolist(), abs=1e-10)
    circle = 1 / (1 + np.exp(-table(CIRCLE, 0.1)))
    assert circle.ravel().tolist() == pytest.approx(np.ravel(WANTED["rock-paper-scissors probability"]).tolist(), abs=1e-10)


@pytest.mark.parametrize("budget", [4096, 1])
def test_golden_losses_and_gradients(budget: int) -> None:
    """A tree for every pair; a vector that stands in two of them gets the sum of their gradients."""
    flat = [number for pair in PAIRS for number in pair]
    trees, model = make_trees([[1, 1]] * len(PAIRS)), Vectors.of(V[flat])
    alone = [float(run(General(tau=TAU), model, [tree]).loss.detach()) for tree in trees]
    assert alone == pytest.approx(WANTED["per pair"], abs=1e-10)
    result = run(General(tau=TAU), model, trees, budget=budget)
    assert float(result.loss.detach()) == pytest.approx(WANTED["loss"], abs=1e-10)
    (gradient,) = torch.autograd.grad(result.loss, model.tables["reward"])
    found = torch.zeros_like(V).index_add(0, torch.tensor(flat), gradient[1:])
    assert found.flatten().tolist() == pytest.approx(np.ravel(WANTED["gradient in v"]).tolist(), abs=1e-10)
    pairs = torch.tensor([WANTED["score"][a][b] for a, b in PAIRS])
    assert result.metrics == pytest.approx(
        {"loss": WANTED["loss"], "margin": float(pairs.mean()), "accuracy": float((pairs > 0).double().mean())}, abs=1e-6
    )


def test_soft_labels() -> None:
    """p = 0.3: 0.3 of the loss of the order of the row, 0.7 of the other; the pair counts as one in the other order."""
    (a, b), s = PAIRS[0], WANTED["score"][PAIRS[0][0]][PAIRS[0][1]]
    found = run(General(tau=TAU), Vectors.of(V[[a, b]]), make_trees([[1, 1]], [Facts(probability=0.3)]))
    assert float(found.loss.detach()) == pytest.approx(0.3 * np.log1p(np.exp(-s)) + 0.7 * np.log1p(np.exp(s)), abs=1e-10)
    assert found.metrics["accuracy"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antisymmetry_is_exact(dtype: torch.dtype) -> None:
    """Not up to rounding: s(y ≻ y) is 0, P(y ≻ y) is ½, and the two orders of a pair differ in sign alone."""
    scores = table(torch.randn(60, 8, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 100, 0.1)
    assert torch.equal(scores, -scores.T)
    assert torch.equal(scores.diagonal().sigmoid(), torch.full((60,), 0.5, dtype=dtype))
    assert float(scores.abs().max()) <= 10 * (1 + 1e-6)


def test_a_circle_is_learned_where_scores_tie() -> None:
    """Rock, paper and scissors with three prompts: the general model has all nine pairs, scores at most two of three.

    Bradley–Terry's optimum gives the three of a prompt one score. The pairs are named in the order in which they are won.
    """
    trees = [
        Tree(np.full(1, prompt, np.int32), np.zeros(1, bool), tuple(np.full(1, 1 + k, np.int32) for k in pair), 0)
        for prompt in range(3)
        for pair in ((0, 1), (1, 2), (2, 0))
    ]
    torch.manual_seed(0)
    head = torch.nn.Embedding(4, 4, dtype=torch.float64)
    scores = torch.nn.Embedding(4, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam([*head.parameters(), *scores.parameters()], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        general = run(General(width=4), Vectors(reward=head.weight), trees)
        ranked = run(BradleyTerry(), Lookup(reward=scores.weight[:, 0]), trees)
        (general.loss + ranked.loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert general.metrics["accuracy"] == 1.0
    assert general.metrics["loss"] < 0.01
    assert ranked.metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert ranked.metrics["accuracy"] <= 2 / 3
    assert float(np.ptp(scores.weight.detach().numpy()[1:])) < 1e-3
    assert circles(trees, [head.weight.detach().numpy()[[int(r[0]) for r in tree.responses]] for tree in trees], 0.1) == (3, 3)


def test_circles_of_a_prompt_are_counted_over_its_rows() -> None:
    """Angles that grow by less than half a turn are a ranking; with rock, paper and scissors one triple of four goes round."""
    one, other = make_trees([[1, 1, 1], [1]])
    angle = lambda *degrees: np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)  # noqa: E731
    assert circles([one], [angle(0, 50, 120)], 0.1) == (0, 1)
    assert circles([one], [CIRCLE], 0.1) == (1, 1)
    same = other._replace(prompt=one.prompt)
    # A fourth just beside the first stands in two triples with a circle: with paper and scissors, as the first one does.
    assert circles([one, same], [CIRCLE, angle(1)], 0.1) == (2, 4)
    assert circles([one, other], [CIRCLE, angle(1)], 0.1) == (1, 1)
    assert circles([one, one], [CIRCLE, CIRCLE], 0.1) == (1, 1)
