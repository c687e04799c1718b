"""REBEL: regression of the difference of log-ratios on the difference of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Rebel(PairObjective):
    """((ρ_w − ρ_l)/η − (s_w − s_l))²; Gao et al. 2024, algorithm 1. The implicit reward is ρ/η.

    With `rollout` as in the paper: scores s are the reward's, and the reference is the policy at the last refresh. Without, one
    iteration on scores of the data.
    """

    kind: Literal["rebel"] = "rebel"
    eta: float = key(1.0, "η: nats of log-ratio for a score difference of 1", low=1e-9)
    needs_scores: ClassVar[bool] = True
    iterated: ClassVar[bool] = True

    def loss(self, pair: Pair) -> Tensor:
        lead = pair.chosen.scores - pair.rejected.scores
        return ((pair.chosen.logratio - pair.rejected.logratio) / self.eta - lead) ** 2

    def reward(self, responses: Responses) -> Tensor:
        return responses.logratio / self.eta
