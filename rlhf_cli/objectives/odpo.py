"""DPO with an offset: the margin is asked to grow with how much better the chosen response is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair, ordered_pairs
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Tree


@dataclass(frozen=True)
class Odpo(LogRatioPair):
    """−log σ(z − Δ), z = β(ρ_w − ρ_l), Δ = α f(s_w − s_l); Amini et al. 2024. Scores s come from the data."""

    kind: Literal["odpo"] = "odpo"
    alpha: float = key(1.0, "α: weight of the offset", low=0.0)
    f: Literal["log", "identity"] = key("log", "of the difference of scores; log needs it above 0")
    needs_scores: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def loss(self, pair: Pair) -> Tensor:
        return self.hard_loss(self.margin(pair) - self._offset(pair))

    def gradient_left(self, pair: Pair) -> Tensor:
        """σ(Δ − z) / σ(Δ)."""
        offset = self._offset(pair)
        return (offset - self.margin(pair)).sigmoid() / offset.sigmoid()

    def _offset(self, pair: Pair) -> Tensor:
        lead = pair.chosen.scores - pair.rejected.scores
        return self.alpha * (lead.log() if self.f == "log" else lead)

    def check_tree(self, tree: Tree) -> str | None:
        scores = tree.facts.scores
        if scores and self.f == "log":
            for better, worse in ordered_pairs(len(tree.responses), tree.facts):
                if scores[better] <= scores[worse]:
                    found = f"{scores[better]:g} and {scores[worse]:g}"
                    return f"kind odpo with f: log needs a higher score for the better response, found {found}"
        return super().check_tree(tree)
