"""Plackett–Luce: the likelihood of a whole ranking, as a draw of the best, then of the best of the rest, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair, PairIndices, Responses
from rlhf_cli.objectives.reward import RewardObjective


@dataclass(frozen=True)
class PlackettLuce(LogRatioPair):
    """Plackett–Luce with r = βρ over K ranked responses; Rafailov et al. 2023, app. A.3. With K = 2 it is dpo. No ties."""

    kind: Literal["plackett_luce"] = "plackett_luce"
    learns_ties: ClassVar[bool] = False
    kind_for_ties: ClassVar[str] = "dpo"

    def losses(self, responses: Responses, pairs: PairIndices, pair: Pair) -> dict[str, Tensor]:
        return {"trees": ranking_losses(self.beta * responses.logratio, pairs.counts).sum()}


@dataclass(frozen=True)
class PlackettLuceReward(RewardObjective):
    """Plackett–Luce with r the reward model's scores; Zhu et al. 2023 (K-wise). With K = 2 it is Bradley–Terry. No ties."""

    kind: Literal["plackett_luce"] = "plackett_luce"
    learns_ties: ClassVar[bool] = False
    kind_for_ties: ClassVar[str] = "pairs"

    def losses(self, scores: Tensor, pairs: PairIndices) -> dict[str, Tensor]:
        return {"trees": ranking_losses(scores, pairs.counts).sum()}


def ranking_losses(rewards: Tensor, counts: Sequence[int]) -> Tensor:
    """−Σ_k [r_k − logsumexp_{i≥k} r_i] of every tree, (B,); `rewards` (M,) tree by tree, best first, `counts` its B parts."""
    import torch

    found = [(tree.flip(0).logcumsumexp(0).flip(0) - tree).sum() for tree in torch.split(rewards, list(counts))]
    return torch.stack(found) if found else rewards  # an idle pass has no trees
