"""Group-relative policy optimisation: each response against the mean of its prompt, in units of their spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import Advantages, Experience, GroupGradient
from rlhf_cli.objectives.policy_loss import MeanOver, PolicyLoss
from rlhf_cli.sections import key

STD_EPSILON = 1e-4  # added to the standard deviation
WIDE = 0.01  # a clip of a whole response's ratio that is hardly ever reached: the papers' are 3e-4 and 4e-4


@dataclass(frozen=True)
class Grpo(GroupGradient):
    """(score − mean)/(population std + 1e-4) over the responses of a prompt, 0 where all scores tie; Shao et al. 2024.

    The KL is a loss term: within the return its noise would be divided by its own deviation where scores tie. Without a scale
    (Dr. GRPO) nothing is divided, and it may be in the return.
    """

    kind: Literal["grpo"] = "grpo"
    scale: Literal["group", "batch", "none"] = key(
        "group", "scores less their prompt's mean are divided by the deviation in the prompt, in the rollout, or by nothing"
    )
    mean_over: Literal["auto", "responses", "tokens", "constant"] = key(
        "auto",
        "of the loss; responses: over each one's tokens, then over all; tokens: over all of an update; constant: their sum, "
        "divided by responses × rollout.max_new_tokens; auto: responses, with surrogate: cispo tokens",
    )
    ratio: Literal["token", "sequence"] = key("token", "sequence: one for a response, the geometric mean of its tokens'")
    surrogate: Literal["clip", "cispo"] = key("clip", "cispo: log π, weighted by its clipped ratio: no token loses its gradient")

    kl_in_loss: ClassVar[bool] = True
    known_as: ClassVar[Mapping[str, str]] = {
        "Dr. GRPO": "scale: none, mean_over: constant, kl.coef: 0",
        "DAPO": "mean_over: tokens, clip_high: 0.28, ties: redraw, kl.coef: 0, overlong: 25 (a fifth of rollout.max_new_tokens)",
        "GSPO": "ratio: sequence, clip: 3e-4, clip_high: 4e-4",
        "CISPO": "surrogate: cispo, kl.coef: 0, clip_high: 0.28 (the paper names no number)",
    }

    @property
    def meant_over(self) -> MeanOver:
        """`mean_over` with what auto stands for."""
        if self.mean_over != "auto":
            return self.mean_over
        return "tokens" if self.surrogate == "cispo" else "responses"

    @property
    def policy_loss(self) -> PolicyLoss:
        options = {"by_response": self.ratio == "sequence", "cispo": self.surrogate == "cispo"}
        return super().policy_loss._replace(mean_over=self.meant_over, **options)

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        import numpy as np

        from rlhf_cli.objectives.advantages import is_tied, prompt_means, response_returns

        values, prompt = experience.scores, experience.prompt
        if self.scale == "none":
            values = response_returns(experience, kl_coef)
        centred = values - prompt_means(values, prompt)
        if self.scale == "group":
            centred /= prompt_means(centred**2, prompt) ** 0.5 + STD_EPSILON
        elif self.scale == "batch":
            centred /= values.std() + STD_EPSILON
        advantages = np.where(is_tied(values, prompt), 0.0, centred)
        return Advantages(advantages.repeat(experience.lengths), None, dict(memory), {})

    @property
    def announcement(self) -> str:
        if self.ratio == "sequence" and self.clip > WIDE:
            return f"objective.clip: {self.clip:g} hardly ever clips the ratio of a whole response; GSPO has 3e-4 and 4e-4"
        return ""
