"""What all objectives on the policy's own responses share: clipped ratios, several updates a rollout, and their metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rlhf_cli.fields import key
from rlhf_cli.objectives.base import Objective

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


@dataclass(frozen=True)
class Experience:
    """What a rollout's M responses of N tokens were before any update; float64, responses tree by tree."""

    lengths: np.ndarray  # (M,) int64, their sum is N
    prompt: np.ndarray  # (M,) int64: which prompt of the batch; those of one prompt follow each other
    scores: np.ndarray  # (M,) combined reward, penalties taken off
    old: np.ndarray  # (N,) log π at the rollout's temperature
    reference: np.ndarray  # (N,) log π_ref at the rollout's temperature
    values: np.ndarray | None  # (N,) V before each token; None for kinds without a value


class Lesson(NamedTuple):
    """What an objective makes of an experience."""

    advantages: np.ndarray  # (N,)
    targets: np.ndarray | None  # (N,) what V is to become, NaN where nothing is learned; None for kinds without a value
    memory: dict[str, float]  # the objective's own numbers afterwards
    metrics: dict[str, float] = {}


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """−A w or its clipped form, a mean over the response tokens of a mini-batch; w = π/π_old a token."""

    kind: str = ""
    epochs: int = key(4, "passes over a rollout's responses", low=1)
    minibatches: int = key(1, "updates a pass: a rollout's prompts are dealt to so many", low=1)
    clip: float = key(0.2, "ε: token ratios are clipped to 1 − ε … 1 + ε", low=0.0)

    responses: ClassVar = "none"
    reference: ClassVar[bool] = True
    values: ClassVar[bool] = False
    """Does it learn a value, a role of its own?"""
    least_samples: ClassVar[int] = 1
    """Responses per prompt that it needs."""

    def learn(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Lesson:
        """Advantages and value targets. `kl_coef`: κ of the log-ratio in the reward, 0 where the KL is a loss term."""
        raise NotImplementedError
