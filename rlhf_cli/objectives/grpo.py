"""Group-relative policy optimisation: each response against the mean of its prompt, in units of their spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import TIED, Advantages, Experience, PolicyGradient

STD_EPSILON = 1e-4  # added to the standard deviation


@dataclass(frozen=True)
class Grpo(PolicyGradient):
    """(score − mean)/(population std + 1e-4) over the responses of a prompt, 0 where all scores tie; Shao et al. 2024.

    The KL is a loss term: within the return its noise would be divided by its own deviation where scores tie.
    """

    kind: Literal["grpo"] = "grpo"
    metric_names: ClassVar[tuple[str, ...]] = (*PolicyGradient.metric_names, TIED)
    least_samples: ClassVar[int] = 2
    scores_alone: ClassVar[bool] = True

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        from rlhf_cli.objectives.advantages import is_tied, prompt_means

        scores, prompt = experience.scores, experience.prompt
        centred = scores - prompt_means(scores, prompt)
        std = prompt_means(centred**2, prompt) ** 0.5
        tied = is_tied(scores, prompt)
        scaled = centred / (std + STD_EPSILON) * ~tied
        return Advantages(scaled.repeat(experience.lengths), None, dict(memory), {TIED: float(tied.mean())})
