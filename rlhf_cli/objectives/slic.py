"""Sequence likelihood calibration: a hinge on the log-probabilities themselves, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Slic(PairObjective):
    """max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_w), sums over tokens; Zhao et al. 2023 (SLiC-HF), eq. 1.

    The paper regularises towards the target of supervised fine-tuning; here that is y_w. The implicit reward is log π.
    """

    kind: Literal["slic"] = "slic"
    delta: float = key(1.0, "δ: log-probability by which the chosen response is to lead, in nats", low=0.0)
    lambda_: float = key(0.1, "λ: weight of the chosen response's negative log-likelihood", low=0.0)
    reference: ClassVar[bool] = False

    def loss(self, pair: Pair) -> Tensor:
        return (self.delta - pair.chosen.logps + pair.rejected.logps).relu() - self.lambda_ * pair.chosen.logps

    def reward(self, responses: Responses) -> Tensor:
        return responses.logps
