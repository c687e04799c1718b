"""What all objectives of reward models share: scores of responses, and how well they order them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import LossTerm, Tensor
from rlhf_cli.objectives.preference import PairIndices, PreferenceObjective, accuracy, pairs_of

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class RewardObjective(PreferenceObjective):
    """A loss on the scores r(x, y) of ranked responses."""

    role: ClassVar[Literal["policy", "reward"]] = "reward"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "score_mean", "score_std")

    def losses(self, scores: Tensor, pairs: PairIndices) -> dict[str, Tensor]:
        """Unit → sum over the pass. `scores`: (M,) float64, tree by tree, best first."""
        raise NotImplementedError

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        scores = backbone.scores(self.role, batch).double()
        pairs = pairs_of(batch)
        seen = scores.detach()
        margin = seen[pairs.chosen] - seen[pairs.rejected]
        sums = {
            "accuracy": (accuracy(margin, pairs.probability).sum(), "pairs"),
            "margin": (margin.sum(), "pairs"),
            "score_mean": (seen.sum(), "responses"),
            "score_square": (seen.square().sum(), "responses"),
        }
        yield LossTerm(self.losses(scores, pairs), sums)

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Puts the population standard deviation over the responses in the place of the mean square."""
        logged = dict(means)
        return logged | {"score_std": math.sqrt(max(0.0, logged.pop("score_square") - logged["score_mean"] ** 2))}
