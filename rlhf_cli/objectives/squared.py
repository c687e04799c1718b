"""Least squares on the margin of implicit rewards, with the target 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair


@dataclass(frozen=True)
class Squared(LogRatioPair):
    """(z − 1)², z = β(ρ_w − ρ_l); Tang et al. 2024 (GPO), table 1. It is β² times ipo at β/2."""

    kind: Literal["squared"] = "squared"

    def loss(self, pair: Pair) -> Tensor:
        return (self.margin(pair) - 1) ** 2
