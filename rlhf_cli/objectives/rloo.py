"""REINFORCE leave-one-out: each response against the others of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import TIED, Advantages, Experience, PolicyGradient


@dataclass(frozen=True)
class Rloo(PolicyGradient):
    """Return less the mean of the prompt's other responses; Ahmadian et al. 2024."""

    kind: Literal["rloo"] = "rloo"
    metric_names: ClassVar[tuple[str, ...]] = (*PolicyGradient.metric_names, TIED)
    least_samples: ClassVar[int] = 2

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        import numpy as np

        from rlhf_cli.objectives.advantages import is_tied, response_returns

        returns, prompt = response_returns(experience, kl_coef), experience.prompt
        means_of_others = (np.bincount(prompt, returns)[prompt] - returns) / (np.bincount(prompt)[prompt] - 1)
        tied = {TIED: float(is_tied(experience.scores, prompt).mean())}
        return Advantages(np.repeat(returns - means_of_others, experience.lengths), None, dict(memory), tied)
