"""Binary classifier optimisation: is a response a chosen or a rejected one, judged by its reward less a running mid-point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair
from rlhf_cli.objectives.unpaired import UnpairedObjective
from rlhf_cli.sections import key

DECAY = "share of the running mean rewards that a step keeps; their mid-point δ shifts the rewards"


@dataclass(frozen=True)
class Bco(LogRatioPair):
    """−log σ(βρ_w − δ) − log σ(−(βρ_l − δ)), δ as it stood before this batch; Jung et al. 2024 (reward shift)."""

    kind: Literal["bco"] = "bco"
    decay: float = key(0.9, DECAY, low=0.0, high=1.0)

    def loss(self, pair: Pair) -> Tensor:
        delta = midpoint(pair.given)
        return self.hard_loss(self.reward(pair.chosen) - delta) + self.hard_loss(delta - self.reward(pair.rejected))

    def remember(self, memory: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
        return running(memory, self.decay, means.get("rewards/chosen"), means.get("rewards/rejected"))


@dataclass(frozen=True)
class UnpairedBco(UnpairedObjective):
    """−log σ(±(βρ − δ)), + for desirable responses, δ as it stood before this batch; Jung et al. 2024 (reward shift).

    Without the weights that match the prompts of the two classes (underlying distribution matching).
    """

    kind: Literal["bco"] = "bco"
    decay: float = key(0.9, DECAY, low=0.0, high=1.0)

    def loss(self, logratio: Tensor, desirable: Tensor, given: Mapping[str, float]) -> Tensor:
        from torch.nn.functional import softplus

        excess = self.beta * logratio - midpoint(given)
        return softplus(excess.where(~desirable, -excess))

    def remember(self, memory: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
        return running(memory, self.decay, means.get("rewards/desirable"), means.get("rewards/undesirable"))


def midpoint(memory: Mapping[str, float]) -> float:
    """δ, half-way between the running mean rewards, which start at 0."""
    return (memory.get("reward/good", 0.0) + memory.get("reward/bad", 0.0)) / 2


def running(memory: Mapping[str, float], decay: float, good: float | None, bad: float | None) -> dict[str, float]:
    """The running means after a batch with these mean rewards; a class that it lacks keeps its own."""
    kept = {name: memory.get(name, 0.0) for name in ("reward/good", "reward/bad")}
    news = {"reward/good": good, "reward/bad": bad}
    return {name: old if (new := news[name]) is None else decay * old + (1 - decay) * new for name, old in kept.items()}
