"""TDPO2: dpo that keeps the policy from leaving the reference faster on rejected responses than on chosen ones, by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Tdpo2(LogRatioPair):
    """−log σ(β(ρ_w − ρ_l) − αβ(D_l − sg D_w)), D = Σ_t KL(π_ref ‖ π) before the tokens of a response; Zeng et al. 2024, TDPO₂.

    The KL is exact, over the whole vocabulary, so that the reference runs in every step. sg: without gradient.
    """

    kind: Literal["tdpo2"] = "tdpo2"
    alpha: float = key(0.5, "α: weight of the difference of the two KLs", low=0.0)
    saturates: ClassVar[bool] = True
    token_figure: ClassVar[Literal["kl"]] = "kl"

    @property
    def announcement(self) -> str:
        return "tdpo2 compares whole distributions: the reference runs in every step, and nothing of it is stored"

    def margin(self, pair: Pair) -> Tensor:
        return super().margin(pair) - self.alpha * self.beta * (pair.rejected.figure - pair.chosen.figure.detach())
