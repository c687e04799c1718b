"""REINFORCE leave-one-out: each response against the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.policy_gradient import Advantages, Experience, GroupGradient
from rlhf_cli.objectives.policy_loss import PolicyLoss
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Rloo(GroupGradient):
    """Return less the mean of the prompt's other responses; Ahmadian et al. 2024."""

    kind: Literal["rloo"] = "rloo"
    mean_over: Literal["responses", "tokens", "constant"] = key("tokens", "of the loss, as with grpo")

    @property
    def policy_loss(self) -> PolicyLoss:
        return super().policy_loss._replace(mean_over=self.mean_over)

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        import numpy as np

        from rlhf_cli.objectives.advantages import is_tied, response_returns

        returns, prompt = response_returns(experience, kl_coef), experience.prompt
        means_of_others = (np.bincount(prompt, returns)[prompt] - returns) / (np.bincount(prompt)[prompt] - 1)
        advantages = np.where(is_tied(returns, prompt), 0.0, returns - means_of_others)
        return Advantages(advantages.repeat(experience.lengths), None, dict(memory), {})
