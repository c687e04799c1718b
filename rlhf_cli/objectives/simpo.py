"""SimPO: the mean log-probability per token as the reward, a margin, and no reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor, Trained
from rlhf_cli.objectives.preference import PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Simpo(PairObjective):
    """−log σ(m − γ), m = β(mean log π(y_w) − mean log π(y_l)); Meng et al. 2024, eq. 6. The implicit reward is β mean log π."""

    kind: Literal["simpo"] = "simpo"
    beta: float = key(2.0, "β: weight of the log-probability per token", low=1e-9)
    gamma: float = key(1.0, "γ: margin that the rewards are asked to have", low=0.0)
    reference: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True
    learning_rate: ClassVar[Mapping[Trained, float]] = {"lora": 5e-6, "full": 5e-7}  # the paper searched 3e-7 … 1e-6

    def hard_loss(self, margin: Tensor) -> Tensor:
        return super().hard_loss(margin - self.gamma)

    def reward(self, responses: Responses) -> Tensor:
        return self.beta * responses.logps / responses.lengths
