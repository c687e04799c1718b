"""A response as one action: its return against the value of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.fields import key
from rlhf_cli.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class Bandit(PolicyGradient):
    """Return less V(x), the value before the first token."""

    kind: Literal["bandit"] = "bandit"
    value_clip: float = key(0.2, "values move at most so far from those of the rollout", low=0.0)
    value_coef: float = key(0.5, "weight of the value loss", low=0.0)
    whiten: bool = key(True, "advantages get mean 0 and standard deviation 1 over the rollout")

    values: ClassVar[bool] = True
