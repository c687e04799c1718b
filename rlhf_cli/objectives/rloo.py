"""REINFORCE leave-one-out: each response against the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class Rloo(PolicyGradient):
    """Return less the mean of the prompt's other responses; Ahmadian et al. 2024."""

    kind: Literal["rloo"] = "rloo"

    least_samples: ClassVar[int] = 2
