"""Exact answers: a policy that can be any distribution over thirteen responses learns from its own samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import Experience, PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from tests.objectives.lookup import run
from tests.objectives.rollouts import recorded

TOKENS, END, PROMPT = 4, 3, 4
"""Responses are the end alone, or any token before it and one more; the prompt is a token of its own."""
RESPONSES = [(END,), *((a, b) for a in range(END) for b in range(TOKENS))]
KL_COEF = 0.5
STEPS = 100
REWARDS = np.array([0.2, 1.0, -0.5, 0.3, 0.0, -1.0, 0.6, 0.1, 0.9, 0.4, 0.0, -0.3, 0.8])
REFERENCE = torch.tensor(
    [[0.3, -0.5, 0.0, 0.4], [0.0, 0.8, -0.2, 0.1], [-0.6, 0.0, 0.5, 0.2], [0.0] * 4, [0.2, -0.1, 0.4, -0.3]], dtype=torch.float64
).log_softmax(1)
"""Logarithms of the chances of the next token, (last token, next token)."""


class Bigrams:
    """Logits and values of the next token by the last one."""

    def __init__(self) -> None:
        self.logits = REFERENCE.clone().requires_grad_()
        self.before = torch.zeros(len(REFERENCE), dtype=torch.float64, requires_grad=True)

    def logps(self, role: str, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert role == "policy"
        logps = (self.logits / temperature).log_softmax(1)[batch.ids.flatten()[batch.source], batch.target]
        return logps, torch.zeros(len(logps), dtype=torch.bool)

    def values(self, role: str, batch: Batch) -> torch.Tensor:
        assert role == "value"
        return self.before[batch.ids.flatten()[batch.source]]


def tempered(logps: torch.Tensor, temperature: float) -> np.ndarray:
    """The table of log-probabilities at a temperature."""
    found: np.ndarray = (logps.detach() / temperature).log_softmax(1).numpy()
    return found


def chances(logps: np.ndarray) -> np.ndarray:
    """Of the responses, from the table of a token's log-probabilities."""
    return np.exp([sum(logps[a, b] for a, b in pairwise((PROMPT, *response))) for response in RESPONSES])


def rollout(model: Bigrams, prompts: int, samples: int, temperature: float, random: Any) -> tuple[list[Tree], Experience]:
    """Responses of the policy, and what is known of them."""
    logps, reference = tempered(model.logits, temperature), tempered(REFERENCE, temperature)
    picked = random.choice(len(RESPONSES), prompts * samples, p=chances(logps))
    ids = [np.array(RESPONSES[i], np.int32) for i in picked]
    trees = [
        Tree(np.array([PROMPT], np.int32), np.zeros(1, bool), tuple(ids[p * samples : (p + 1) * samples]), p)
        for p in range(prompts)
    ]
    source = np.concatenate([[PROMPT, *response[:-1]] for response in ids])
    target = np.concatenate(ids)
    seen = Experience(
        lengths=np.array([len(response) for response in ids]),
        prompt=np.repeat(np.arange(prompts), samples),
        scores=REWARDS[picked],
        old=logps[source, target],
        reference=reference[source, target],
        values=model.before.detach().numpy()[source],
    )
    return trees, seen


def distances(objective: PolicyGradient, *, samples: int, temperature: float = 1.0) -> list[float]:
    """Total variation to the optimum π_ref exp(r/κ)/Z, before training and after it; the learning rate falls to 0."""
    model, random = Bigrams(), np.random.default_rng(0)
    optimizer = torch.optim.Adam([model.logits, model.before])
    optimum = chances(tempered(REFERENCE, temperature)) * np.exp(REWARDS / KL_COEF)
    optimum /= optimum.sum()

    def distance() -> float:
        return float(np.abs(chances(tempered(model.logits, temperature)) - optimum).sum() / 2)

    before = distance()
    memory: dict[str, float] = {}
    for step in range(STEPS):
        trees, seen = rollout(model, 64 // samples, samples, temperature, random)
        lesson = objective.estimate_advantages(seen, KL_COEF, memory)
        memory = lesson.memory
        for update in objective.updates(recorded(trees, seen, lesson), step):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
            optimizer.zero_grad()
            run(objective, model, update, given={"temperature": temperature, "max_new_tokens": 2.0}).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [before, distance()]


@pytest.mark.parametrize(
    ("objective", "samples"),
    [
        pytest.param(Ppo(epochs=2), 1, id="ppo"),
        pytest.param(Bandit(epochs=2), 1, id="bandit"),
        pytest.param(Reinforce(epochs=2), 1, id="reinforce"),
        pytest.param(Reinforce(epochs=2, baseline="ema"), 1, id="reinforce with a running mean"),
        pytest.param(Rloo(epochs=2), 4, id="rloo"),
        pytest.param(Rloo(epochs=1, minibatches=4), 4, id="rloo in four parts"),
        pytest.param(Rloo(epochs=2, mean_over="responses", clip_high=0.4), 4, id="rloo over responses"),
        pytest.param(Grpo(epochs=2, scale="none", mean_over="constant"), 4, id="Dr. GRPO"),
        pytest.param(Grpo(epochs=2, scale="none", ratio="sequence"), 4, id="ratios of responses"),
        pytest.param(Grpo(epochs=2, scale="none", surrogate="cispo"), 4, id="cispo"),
    ],
)
def test_reaches_the_optimum(objective: PolicyGradient, samples: int) -> None:
    """The reward less κ·KL is largest at π_ref exp(r/κ)/Z: nothing else about the policy is right or wrong."""
    before, after = distances(objective, samples=samples)
    assert before == pytest.approx(0.3714, abs=1e-4)
    assert after < 0.01


def test_reaches_the_optimum_of_its_temperature() -> None:
    """Log-probabilities at the temperature that drew: the optimum is of the tempered policy and reference."""
    before, after = distances(Rloo(epochs=2), samples=4, temperature=2.0)
    assert before > 0.3
    assert after < 0.02
