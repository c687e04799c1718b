"""What all objectives of reward models share: scores of responses, and how well they order them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import LossTerm, Objective
from rlhf_cli.objectives.preference import PairIndices, accuracy, check_order, count_preferences, pairs_of

if TYPE_CHECKING:
    import torch

    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class RewardObjective(Objective):
    """A loss on the scores r(x, y) of ranked responses."""

    kind: str = ""

    role: ClassVar[Literal["policy", "reward"]] = "reward"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "margin", "score_mean", "score_std")

    def losses(self, scores: torch.Tensor, pairs: PairIndices, batch: Batch) -> dict[str, torch.Tensor]:
        """Unit → sum over the pass. `scores`: (M,) float64, tree by tree, best first."""
        raise NotImplementedError

    def counts(self, trees: Sequence[Tree]) -> dict[str, int]:
        return count_preferences(trees)

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        scores = backbone.scores(self.role, batch).double()
        pairs = pairs_of(batch.counts, batch.facts, scores.device)
        seen = scores.detach()
        margin = seen[pairs.chosen] - seen[pairs.rejected]
        sums = {
            "accuracy": (accuracy(margin).sum(), "pairs"),
            "margin": (margin.sum(), "pairs"),
            "score_mean": (seen.sum(), "responses"),
            "score_square": (seen.square().sum(), "responses"),
        }
        yield LossTerm(self.losses(scores, pairs, batch), sums)

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Puts the population standard deviation over the responses in the place of the mean square."""
        logged = dict(means)
        return logged | {"score_std": math.sqrt(max(0.0, logged.pop("score_square") - logged["score_mean"] ** 2))}

    def check_tree(self, tree: Tree) -> str | None:
        return check_order(tree)
