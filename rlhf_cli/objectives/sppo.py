"""SPPO: log-ratios regressed on how probably a response wins against the policy's own others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import Pair, PairObjective, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Sppo(PairObjective):
    """½[(ρ_w − η(P_w − ½))² + (ρ_l − η(P_l − ½))²]; Wu et al. 2024, eq. 4.7. The implicit reward is ρ/η.

    P: the mean probability to win against the prompt's K responses of the policy, itself included at ½; w and l: the responses
    whose P is highest and lowest. Needs `rollout`; the reference is the policy at the last refresh.
    """

    kind: Literal["sppo"] = "sppo"
    eta: float = key(1000.0, "η: nats of log-ratio for a probability to win that is higher by 1; the paper's 1/β", low=1e-9)
    needs_scores: ClassVar[bool] = True
    iterated: ClassVar[bool] = True
    self_play: ClassVar[bool] = True

    def loss(self, pair: Pair) -> Tensor:
        gaps = (side.logratio - self.eta * (side.scores - 0.5) for side in (pair.chosen, pair.rejected))
        first, second = (gap**2 / 2 for gap in gaps)
        return first + second

    def reward(self, responses: Responses) -> Tensor:
        return responses.logratio / self.eta
