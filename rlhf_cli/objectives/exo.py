"""EXO: the policy's preferences come as close to the labels as a reverse KL asks, which seeks modes where dpo covers them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Exo(LogRatioPair):
    """KL((σ(z), σ(−z)) ‖ (1 − ε, ε)), z = β(ρ_w − ρ_l); Ji et al. 2024, eq. 16 (EXO-pref). Least at z = log(1/ε − 1)."""

    kind: Literal["exo"] = "exo"
    label_smoothing: float = key(1e-3, "ε: share of labels taken to be wrong", low=1e-9, high=0.499)
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def hard_loss(self, margin: Tensor) -> Tensor:
        right, wrong = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        logistic = super().hard_loss
        return -margin.sigmoid() * (logistic(margin) + right) - (-margin).sigmoid() * (logistic(-margin) + wrong)
