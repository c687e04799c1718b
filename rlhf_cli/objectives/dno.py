"""Direct Nash optimisation: soft labels that follow from how probably responses win against the policy's own others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair


@dataclass(frozen=True)
class Dno(LogRatioPair):
    """−p log σ(z) − (1 − p) log σ(−z), z = β(ρ_w − ρ_l), p = σ(P_w − P_l); Rosset et al. 2024, algorithm 1 on own samples.

    P: the mean probability to win against the prompt's K responses of the policy, itself included at ½; w and l: the responses
    whose P is highest and lowest. Needs `rollout`; the reference is the policy at the last refresh.
    """

    kind: Literal["dno"] = "dno"
    needs_scores: ClassVar[bool] = True
    iterated: ClassVar[bool] = True
    self_play: ClassVar[bool] = True

    def loss(self, pair: Pair) -> Tensor:
        return self._soft_loss(self.margin(pair), (pair.chosen.scores - pair.rejected.scores).sigmoid())
