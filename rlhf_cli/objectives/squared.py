"""Least squares on the margin of implicit rewards, with the target 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair


@dataclass(frozen=True)
class Squared(LogRatioPair):
    """(z − 1)², z = β(ρ_w − ρ_l); Tang et al. 2024 (GPO), table 1. It is β² times ipo at β/2."""

    kind: Literal["squared"] = "squared"
    soft_labels: ClassVar[bool] = True

    def hard_loss(self, margin: Tensor) -> Tensor:
        return (margin - 1) ** 2
