"""Exact answers in a game without a best move: a policy over three responses learns from its own samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.objectives.dno import Dno
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.preference import PairObjective
from rlhf_cli.objectives.sppo import Sppo
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.source import best_and_worst, ranked
from tests.objectives.lookup import run

WINS = np.array([[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]])
"""P(one ≻ other): the second beats the first, the third the second, the first the third. Nash: a third of each."""
START = np.log([0.5, 0.3, 0.2])


class Tabular:
    """A policy of three logits, the same after every prompt."""

    def __init__(self) -> None:
        self.logits = torch.tensor(START).requires_grad_()

    def logps(self, role: str, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        assert role == "policy"
        return self.logits.log_softmax(0)[batch.target], torch.zeros(len(batch.target), dtype=torch.bool)

    @property
    def logarithms(self) -> np.ndarray:
        found: np.ndarray = self.logits.detach().log_softmax(0).numpy()
        return found


def exploitability(chances: np.ndarray) -> float:
    """How much more often than half the best answer to a policy wins."""
    return float((WINS @ chances).max() - 0.5)


def learn(
    objective: PairObjective,
    scores: np.ndarray | None,
    *,
    draws: int,
    updates: int,
    previous: bool,
    rate: float,
    samples: int = 4,
) -> list[np.ndarray]:
    """The policies after each draw, whose responses are judged by scores, or by how probably they win against the others."""
    policy, random, found = Tabular(), np.random.default_rng(0), []
    optimizer = torch.optim.Adam([policy.logits])
    for draw in range(draws):
        before, prompts = policy.logarithms, 32
        ids = random.choice(3, (prompts, samples), p=np.exp(before))
        wins = (WINS[ids[:, :, None], ids[:, None]].sum(2) - 0.5) / (samples - 1)
        trees = [
            Tree(np.zeros(1, np.int32), np.zeros(1, bool), tuple(np.full(1, k, np.int32) for k in row), number)
            for number, row in enumerate(ids)
        ]
        known = (before if previous else START)[ids.ravel()]
        worth = wins if scores is None else scores[ids]
        drawn = Rollout(trees, np.ones(ids.size, bool), {}, worth.ravel(), TokenFigures(*[known] * 5), {})
        batch = [tree for tree in ranked(drawn, known) if len(set(tree.facts.ranks or ())) > 1]
        if objective.self_play:
            batch = [best_and_worst(tree) for tree in batch]
        for update in range(updates if batch else 0):
            share = update / updates if updates > 1 else draw / draws
            optimizer.param_groups[0]["lr"] = rate * (1 - share)
            optimizer.zero_grad()
            run(objective, policy, batch).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found.append(np.exp(policy.logarithms))
    return found


def bradley_terry() -> np.ndarray:
    """The scores of maximum likelihood for pairs that the start draws: no three of them go in a circle."""
    weights = torch.tensor(np.outer(np.exp(START), np.exp(START)) * WINS)
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = -(weights * torch.nn.functional.logsigmoid(scores[:, None] - scores)).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        scores = (scores - gradient).detach().requires_grad_()
    found: np.ndarray = scores.detach().numpy()
    return found


def test_scores_end_in_one_response_that_another_beats() -> None:
    """The second wins most against what the start says most. All that is said in the end loses to the third in nine of ten."""
    scores = bradley_terry()
    assert scores.argmax() == 1
    last = learn(Dpo(beta=0.1), scores, draws=60, updates=1, previous=False, rate=0.2)[-1]
    assert last[1] > 0.97 and exploitability(last) > 0.38
    assert exploitability(np.exp(START)) == pytest.approx(0.12)


@pytest.mark.parametrize("objective", [Sppo(eta=1.0), Dno(beta=1.0)], ids=["sppo", "dno"])
def test_the_mean_of_self_play_is_hardly_exploitable(objective: PairObjective) -> None:
    """Iterations of π ∝ π_previous exp(ηP): the policies go round the even mixture, and their mean is near it."""
    policies = learn(objective, None, draws=24, updates=10, previous=True, rate=0.05)
    mean = np.mean(policies, 0)
    assert exploitability(mean) < 0.05 and np.abs(mean - 1 / 3).max() < 0.07
    assert max(map(exploitability, policies)) < 0.3 < 0.38


def test_dno_near_its_start_comes_to_rest_where_nothing_gains() -> None:
    """Of two samples p = σ(P_ij − ½). At rest Σ_j π_j (σ(z_ij) − p_ij) = 0, z_ij = β(h_i − h_j), h the log-ratio to the start."""
    beta, h = 0.4, np.zeros(3)
    p = 1 / (1 + np.exp(0.5 - WINS))
    for _ in range(4000):
        chances = np.exp(START + h) / np.exp(START + h).sum()
        z = 1 / (1 + np.exp(-beta * (h[:, None] - h)))
        h = h - 0.5 * (z - p) @ chances
        h = h - h.mean()
    assert exploitability(chances) == pytest.approx(0.0910, abs=1e-4)
    found = np.mean(learn(Dno(beta=beta), None, draws=200, updates=1, previous=False, rate=0.1, samples=2)[-30:], 0)
    assert np.abs(found - chances).sum() / 2 < 0.02
