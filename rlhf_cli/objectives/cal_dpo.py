"""Cal-DPO: the unscaled logistic loss, and squares that tie each log-ratio to a value of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class CalDpo(PairObjective):
    """−log σ(ρ_w − ρ_l) + c[(ρ_w − 1/(2β))² + (ρ_l + 1/(2β))²]; Xiao et al. 2024; c as in the authors' code.

    β stands in the targets alone: the implicit reward is ρ itself.
    """

    kind: Literal["cal_dpo"] = "cal_dpo"
    beta: float = key(0.1, "β: chosen log-ratios are tied to 1/(2β), rejected ones to −1/(2β)", low=1e-9)
    calibration: float = key(0.5, "c: weight of the squares", low=0.0)

    def loss(self, pair: Pair) -> Tensor:
        target = 1 / (2 * self.beta)
        squares = (pair.chosen.logratio - target) ** 2 + (pair.rejected.logratio + target) ** 2
        return self.hard_loss(self.margin(pair)) + self.calibration * squares

    def reward(self, responses: Responses) -> Tensor:
        return responses.logratio
