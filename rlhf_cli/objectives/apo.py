"""Anchored preference optimisation: each response is compared with the reference, the anchor, not only with the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair
from rlhf_cli.objectives.unpaired import UnpairedObjective


@dataclass(frozen=True)
class ApoZero(LogRatioPair):
    """1 − σ(βρ_w) + σ(βρ_l): chosen responses become likelier, rejected ones less likely; D'Oosterlinck et al. 2024, eq. 7."""

    kind: Literal["apo_zero"] = "apo_zero"

    def loss(self, pair: Pair) -> Tensor:
        return (-self.reward(pair.chosen)).sigmoid() + self.reward(pair.rejected).sigmoid()


@dataclass(frozen=True)
class ApoDown(LogRatioPair):
    """σ(βρ_w) + 1 − σ(β(ρ_w − ρ_l)): both become less likely, rejected ones more so; D'Oosterlinck et al. 2024, eq. 8."""

    kind: Literal["apo_down"] = "apo_down"

    def loss(self, pair: Pair) -> Tensor:
        return self.reward(pair.chosen).sigmoid() + (-self.margin(pair)).sigmoid()


@dataclass(frozen=True)
class UnpairedApoZero(UnpairedObjective):
    """1 − σ(βρ) of a desirable response, σ(βρ) of another: the two terms of D'Oosterlinck et al. 2024, eq. 7, one by one."""

    kind: Literal["apo_zero"] = "apo_zero"

    def loss(self, logratio: Tensor, desirable: Tensor, given: Mapping[str, float]) -> Tensor:
        reward = self.beta * logratio
        return reward.where(~desirable, -reward).sigmoid()
