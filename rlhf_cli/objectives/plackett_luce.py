"""Plackett–Luce: the likelihood of a whole ranking, as a draw of the best, then of the best of the rest, and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.preference import LogRatioPair, Pair, PairIndices, Responses
from rlhf_cli.objectives.reward import RewardObjective

if TYPE_CHECKING:
    import torch

    from rlhf_cli.data.trees import Batch, Tree


@dataclass(frozen=True)
class PlackettLuce(LogRatioPair):
    """Plackett–Luce with r = βρ over K ranked responses; Rafailov et al. 2023, app. A.3. With K = 2 it is dpo. No ties."""

    kind: Literal["plackett_luce"] = "plackett_luce"

    ties: ClassVar[bool] = False

    def losses(self, responses: Responses, pair: Pair, given: Mapping[str, float]) -> dict[str, torch.Tensor]:
        return {"trees": ranking_losses(self.beta * responses.logratio, responses.counts).sum()}

    def check_tree(self, tree: Tree) -> str | None:
        return super().check_tree(tree) or check_ties(tree, "dpo")


@dataclass(frozen=True)
class PlackettLuceReward(RewardObjective):
    """Plackett–Luce with r the reward model's scores; Zhu et al. 2023 (K-wise). With K = 2 it is Bradley–Terry. No ties."""

    kind: Literal["plackett_luce"] = "plackett_luce"

    def losses(self, scores: torch.Tensor, pairs: PairIndices, batch: Batch) -> dict[str, torch.Tensor]:
        return {"trees": ranking_losses(scores, batch.counts).sum()}

    def check_tree(self, tree: Tree) -> str | None:
        return super().check_tree(tree) or check_ties(tree, "pairs")


def ranking_losses(rewards: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """−Σ_k [r_k − logsumexp_{i≥k} r_i] of every tree, (B,); `rewards` (M,) tree by tree, best first, `counts` its B parts."""
    import torch

    trees = torch.split(rewards, list(counts))
    return torch.stack([(tree.flip(0).logcumsumexp(0).flip(0) - tree).sum() for tree in trees])


def check_ties(tree: Tree, other: str) -> str | None:
    """Why a ranking has no Plackett–Luce likelihood, if it has none: the model gives ties no probability."""
    ranks = tree.facts.ranks
    if ranks and len(set(ranks)) < len(ranks):
        return f"kind plackett_luce takes no ties; kind {other} does"
    return None
