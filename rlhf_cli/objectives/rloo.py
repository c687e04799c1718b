"""REINFORCE leave-one-out: each response against the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.advantages import means_of_others, response_returns, spread, token_rewards
from rlhf_cli.objectives.policy_gradient import Advantages, Experience, PolicyGradient

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Rloo(PolicyGradient):
    """Return less the mean of the prompt's other responses; Ahmadian et al. 2024."""

    kind: Literal["rloo"] = "rloo"

    least_samples: ClassVar[int] = 2

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        returns = response_returns(token_rewards(experience, kl_coef), experience.lengths)
        advantages = returns - means_of_others(returns, experience.prompt)
        return Advantages(spread(advantages, experience.lengths), None, dict(memory), {})
