"""Proximal policy optimisation: advantages from a learned value, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.policy_gradient import ActorCritic, Advantages, Experience
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Ppo(ActorCritic):
    """PPO with generalised advantage estimation; Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022."""

    kind: Literal["ppo"] = "ppo"
    gamma: float = key(1.0, "γ: discount of a token's later rewards", low=0.0, high=1.0)
    lam: float = key(0.95, "λ of generalised advantage estimation", low=0.0, high=1.0)
    whiten: bool = key(True, "advantages get mean 0 and standard deviation 1 over the rollout's tokens")

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        from rlhf_cli.objectives.advantages import explained_variance, gae, token_rewards, whiten

        values = experience.values
        advantages, targets = gae(token_rewards(experience, kl_coef), values, experience.lengths, self.gamma, self.lam)
        metrics = {"value/explained_variance": explained_variance(values, targets)}
        return Advantages(whiten(advantages) if self.whiten else advantages, targets, dict(memory), metrics)
