"""Proximal policy optimisation: advantages from a learned value, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.fields import key
from rlhf_cli.objectives.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class Ppo(PolicyGradient):
    """PPO with generalised advantage estimation; Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022."""

    kind: Literal["ppo"] = "ppo"
    value_clip: float = key(0.2, "values move at most so far from those of the rollout", low=0.0)
    value_coef: float = key(0.5, "weight of the value loss", low=0.0)
    gamma: float = key(1.0, "γ: discount of a token's later rewards", low=0.0, high=1.0)
    lam: float = key(0.95, "λ of generalised advantage estimation", low=0.0, high=1.0)
    whiten: bool = key(True, "advantages get mean 0 and standard deviation 1 over the rollout")

    values: ClassVar[bool] = True
