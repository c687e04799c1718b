"""Group-relative policy optimisation: each response against the mean of its prompt, in units of their spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class Grpo(PolicyGradient):
    """(return − mean)/(std + 1e-4) over the responses of a prompt; Shao et al. 2024."""

    kind: Literal["grpo"] = "grpo"

    least_samples: ClassVar[int] = 2
