"""DPO whose expectation under labels flipped at a known rate is the loss under the true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Robust(LogRatioPair):
    """[−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε), z = β(ρ_w − ρ_l); Chowdhury et al. 2024 (rDPO). Has no lower bound."""

    kind: Literal["robust"] = "robust"
    label_smoothing: float = key(0.0, "ε: share of labels that are flipped", low=0.0, high=0.499)
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def hard_loss(self, margin: Tensor) -> Tensor:
        flipped = self.label_smoothing
        return ((1 - flipped) * super().hard_loss(margin) - flipped * super().hard_loss(-margin)) / (1 - 2 * flipped)
