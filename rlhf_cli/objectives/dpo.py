"""Direct preference optimisation: logistic regression on the difference of two log-ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair, PairIndices, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Dpo(LogRatioPair):
    """−(1 − ε) log σ(z) − ε log σ(−z), z = β(ρ_w − ρ_l); Rafailov et al. 2023, eq. 7; with ε > 0 Mitchell 2023 (cDPO)."""

    kind: Literal["dpo"] = "dpo"
    label_smoothing: float = key(0.0, "ε: share of labels taken to be wrong", low=0.0, high=0.499)
    soft_labels: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def losses(self, responses: Responses, pairs: PairIndices, pair: Pair) -> dict[str, Tensor]:
        """Adds to the mean over trees what `explore` asks for of each tree's last response, which the reference wrote.

        α log π (xpo: Xie et al. 2024) or αβρ (selm: Zhang et al. 2024, as in the authors' code); α is given under their names.
        """
        found = super().losses(responses, pairs, pair)
        for kind, values in {"xpo": responses.logps, "selm": self.beta * responses.logratio}.items():
            if kind in pair.given:
                found["trees"] = pair.given[kind] * values[responses.lengths.new_tensor(pairs.counts).cumsum(0).long() - 1].sum()
        return found

    def hard_loss(self, margin: Tensor) -> Tensor:
        return (1 - self.label_smoothing) * super().hard_loss(margin) + self.label_smoothing * super().hard_loss(-margin)
