"""DiscoPOP: a loss that a language model found; logistic for pairs in the wrong order, exponential for those in the right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair
from rlhf_cli.sections import key


@dataclass(frozen=True)
class DiscoPop(LogRatioPair):
    """−(1 − σ(z/τ)) log σ(z) + σ(z/τ) exp(−z), z = β(ρ_w − ρ_l); Lu et al. 2024, eq. 5. Not convex."""

    kind: Literal["discopop"] = "discopop"
    tau: float = key(0.05, "τ: width around a margin of 0 in which one loss gives way to the other", low=1e-3, high=1.0)
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def hard_loss(self, margin: Tensor) -> Tensor:
        logistic, switch = super().hard_loss, margin / self.tau
        # One exponent: far below 0 exp(−z) alone is infinite, and its weight 0.
        return (-switch).sigmoid() * logistic(margin) + (-logistic(switch) - margin).exp()
