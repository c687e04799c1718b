"""WPO: dpo in which a pair counts by how likely the policy itself would have written both of its responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair


@dataclass(frozen=True)
class Wpo(LogRatioPair):
    """−w log σ(z), z = β(ρ_w − ρ_l); Zhou et al. 2024, eq. 2 (sampled alignment); w ≤ 1 as in the authors' code.

    w = min(1, w(y_w) w(y_l)) without gradient, w(y) = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), v the vocabulary.
    """

    kind: Literal["wpo"] = "wpo"
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True
    token_figure: ClassVar[Literal["typicality"]] = "typicality"

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = (side.figure / side.lengths for side in (pair.chosen, pair.rejected))
        return (chosen + rejected).clamp(max=0.0).exp() * super().loss(pair)
