"""The hinge loss on the margin of implicit rewards: pairs beyond 1 are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair


@dataclass(frozen=True)
class Hinge(LogRatioPair):
    """max(0, 1 − z), z = β(ρ_w − ρ_l); Tang et al. 2024 (GPO), table 1."""

    kind: Literal["hinge"] = "hinge"
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def hard_loss(self, margin: Tensor) -> Tensor:
        return (1 - margin).relu()
