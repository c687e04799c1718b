"""The mean of the logistic losses of all ordered pairs of one prompt, so that every prompt weighs the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import PairIndices
from rlhf_cli.objectives.reward import RewardObjective


@dataclass(frozen=True)
class AllPairs(RewardObjective):
    """−1/C(K, 2) Σ log σ(r_w − r_l); Ouyang et al. 2022, eq. 1. Tied responses are no pair, and the mean is over those left."""

    kind: Literal["pairs"] = "pairs"

    def losses(self, scores: Tensor, pairs: PairIndices) -> dict[str, Tensor]:
        from torch.nn.functional import softplus

        pairs_of_tree = pairs.tree.bincount()[pairs.tree]
        return {"trees": (softplus(scores[pairs.rejected] - scores[pairs.chosen]) / pairs_of_tree).sum()}
