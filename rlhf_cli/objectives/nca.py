"""Noise-contrastive alignment: is a response the policy's or the reference's? Chosen ones are kept likely, not only likelier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair


@dataclass(frozen=True)
class Nca(LogRatioPair):
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), r = βρ; Chen et al. 2024, the NCA loss of two responses (NCA-preference)."""

    kind: Literal["nca"] = "nca"

    def loss(self, pair: Pair) -> Tensor:
        chosen, rejected = self.reward(pair.chosen), self.reward(pair.rejected)
        return self.hard_loss(chosen) + (self.hard_loss(-chosen) + self.hard_loss(-rejected)) / 2
