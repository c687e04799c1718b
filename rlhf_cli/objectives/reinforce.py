"""REINFORCE: the whole return of a response against a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.policy_gradient import Advantages, Experience, PolicyGradient
from rlhf_cli.sections import key

DECAY = 0.9  # share of the running mean that stays after a rollout


@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """Return of the response less a baseline; Williams 1992.

    The running mean is the one before the rollout, so that it does not depend on the responses it is compared with; the first
    rollout has its own.
    """

    kind: Literal["reinforce"] = "reinforce"
    baseline: Literal["mean", "ema"] = key("mean", "of the returns: the rollout's mean, or a running mean over rollouts")
    whiten: bool = key(False, "advantages get mean 0 and standard deviation 1 over the rollout's responses")

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        """The running mean is kept as "baseline"."""
        from rlhf_cli.objectives.advantages import response_returns, whiten

        returns = response_returns(experience, kl_coef)
        baseline = mean = float(returns.mean())
        kept = dict(memory)
        if self.baseline == "ema":
            baseline = memory.get("baseline", mean)
            kept["baseline"] = DECAY * baseline + (1 - DECAY) * mean
        advantages = returns - baseline
        advantages = whiten(advantages) if self.whiten else advantages
        return Advantages(advantages.repeat(experience.lengths), None, kept, {})

    @property
    def announcement(self) -> str:
        if self.baseline == "ema" and self.whiten:
            return "objective.baseline: ema has no effect with whiten, which takes off each rollout's own mean"
        return ""
