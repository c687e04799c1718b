"""ORPO: supervised fine-tuning on the chosen response and a penalty on the odds ratio, in one and without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor, Trained
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Orpo(PairObjective):
    """−mean log π(y_w) − λ log σ(log odds(y_w) − log odds(y_l)), log p = mean log π; Hong et al. 2024, eq. 6 and 7.

    The implicit reward is mean log π, of which the log odds are an increasing function.
    """

    kind: Literal["orpo"] = "orpo"
    lambda_: float = key(0.1, "λ: weight of the odds ratio beside the negative log-likelihood per token", low=0.0)
    reference: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = True
    learning_rate: ClassVar[Mapping[Trained, float]] = {"lora": 8e-5, "full": 8e-6}  # the paper's: it is SFT as well

    def hard_loss(self, margin: Tensor) -> Tensor:
        return self.lambda_ * super().hard_loss(margin)

    def margin(self, pair: Pair) -> Tensor:
        return log_odds(self.reward(pair.chosen)) - log_odds(self.reward(pair.rejected))

    def loss(self, pair: Pair) -> Tensor:
        p = pair.probability
        return super().loss(pair) - p * self.reward(pair.chosen) - (1 - p) * self.reward(pair.rejected)

    def reward(self, responses: Responses) -> Tensor:
        return responses.logps / responses.lengths


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p ≤ 0, which is kept below 0 by what float32 can tell from it, so that 1 − p > 0."""
    logp = logp.clamp(max=-1e-7)
    return logp - (-logp.expm1()).log()
