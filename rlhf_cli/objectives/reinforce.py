"""REINFORCE: the whole return of a response against a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.fields import key
from rlhf_cli.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """Return of the response less a baseline; Williams 1992."""

    kind: Literal["reinforce"] = "reinforce"
    baseline: Literal["mean", "ema"] = key("mean", "of the returns: the rollout's mean, or a running mean over rollouts")
    whiten: bool = key(False, "advantages get mean 0 and standard deviation 1 over the rollout")
