"""The hinge loss on the margin of implicit rewards: pairs beyond 1 are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair


@dataclass(frozen=True)
class Hinge(LogRatioPair):
    """max(0, 1 − z), z = β(ρ_w − ρ_l); Tang et al. 2024 (GPO), table 1."""

    kind: Literal["hinge"] = "hinge"
    saturates: ClassVar[bool] = True

    def loss(self, pair: Pair) -> Tensor:
        return (1 - self.margin(pair)).relu()

    def gradient_left(self, pair: Pair) -> Tensor:
        return (self.margin(pair) < 1).double()
