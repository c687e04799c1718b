"""Group-relative policy optimisation: each response against the mean of its prompt, in units of their spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import Advantages, Experience, PolicyGradient

STD_EPSILON = 1e-4  # added to the standard deviation: a prompt whose returns are all equal has advantages of 0


@dataclass(frozen=True)
class Grpo(PolicyGradient):
    """(return − mean)/(population std + 1e-4) over the responses of a prompt; Shao et al. 2024."""

    kind: Literal["grpo"] = "grpo"
    least_samples: ClassVar[int] = 2

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        from rlhf_cli.objectives.advantages import prompt_means, response_returns

        returns = response_returns(experience, kl_coef)
        centred = returns - prompt_means(returns, experience.prompt)
        std = prompt_means(centred**2, experience.prompt) ** 0.5
        return Advantages((centred / (std + STD_EPSILON)).repeat(experience.lengths), None, dict(memory), {})
