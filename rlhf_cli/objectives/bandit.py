"""A response as one action: its return against the value of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.policy_gradient import ActorCritic, Advantages, Experience
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Bandit(ActorCritic):
    """Return R less V(x), the value before the first token, which is to become R; no other token has a value target."""

    kind: Literal["bandit"] = "bandit"
    whiten: bool = key(True, "advantages get mean 0 and standard deviation 1 over the rollout's responses")

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        import numpy as np

        from rlhf_cli.objectives.advantages import explained_variance, first_tokens, response_returns, whiten

        values, lengths = experience.values, experience.lengths
        returns = response_returns(experience, kl_coef)
        first = first_tokens(lengths)
        advantages = returns - values[first]
        targets = np.full(len(values), np.nan)
        targets[first] = returns
        metrics = {"value/explained_variance": explained_variance(values, targets)}
        advantages = np.repeat(whiten(advantages) if self.whiten else advantages, lengths)
        return Advantages(advantages, targets, dict(memory), metrics)
