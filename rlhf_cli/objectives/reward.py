"""What all objectives of reward models share: scores of responses, how well they order them, and ensembles of such models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import LossTerm, Tensor
from rlhf_cli.objectives.preference import PairIndices, PreferenceObjective, accuracy, pairs_of
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


SUMMED = ("accuracy", "margin", "score_mean", "score_square")


def member_role(role: str, member: int) -> str:
    """The role of an ensemble's member; the first has the role of the whole."""
    return f"{role}/{member}" if member else role


@dataclass(frozen=True)
class RewardObjective(PreferenceObjective):
    """A loss on the scores r(x, y) of ranked responses; of each member of an ensemble on those of its own trees."""

    members: int | None = key(
        None, "so many reward models at once: each an adapter and a head, from a bootstrap sample of the prompts", low=2
    )

    role: ClassVar[Literal["policy", "reward"]] = "reward"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "score_mean", "score_std")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(member_role(self.role, member) for member in range(self.members or 1))

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Of each member's trees apart."""
        own = [super(RewardObjective, self).counts([t for t in trees if t.member in (None, k)]) for k in range(len(self.roles))]
        return {f"{unit}{self._mark(k)}": count for k, counted in enumerate(own) for unit, count in counted.items()}

    def _mark(self, member: int) -> str:
        """Ends the names of a member's units and sums."""
        return "" if self.members is None else f" of {member}"

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        """Each member's trees apart, and those for all."""
        parts = [[tree for tree in trees if tree.member == member] for member in (None, *range(self.members or 0))]
        return [], [part for part in parts if part]

    def losses(self, scores: Tensor, pairs: PairIndices) -> dict[str, Tensor]:
        """Unit → sum over the pass. `scores`: (M,) float64, tree by tree, best first."""
        raise NotImplementedError

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        pairs = pairs_of(batch)
        for member, role in enumerate(self.roles):
            if batch.member not in (None, member):
                continue
            scores, mark = backbone.scores(role, batch).double(), self._mark(member)
            seen = scores.detach()
            margin = seen[pairs.chosen] - seen[pairs.rejected]
            of_pairs, of_responses = (accuracy(margin, pairs.probability), margin), (seen, seen.square())
            units = ("pairs", "pairs", "responses", "responses")
            sums = zip(SUMMED, (*of_pairs, *of_responses), units, strict=True)
            yield LossTerm(
                {f"{unit}{mark}": loss for unit, loss in self.losses(scores, pairs).items()},
                {f"{name}{mark}": (values.sum(), f"{unit}{mark}") for name, values, unit in sums},
            )

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """With the mean over the members of what each measures; score_std is the population deviation over its responses."""
        logged = dict(means)
        own = [{name: logged.pop(f"{name}{self._mark(k)}") for name in SUMMED} for k in range(len(self.roles))]
        for one in own:
            one["score_std"] = math.sqrt(max(0.0, one.pop("score_square") - one["score_mean"] ** 2))
        logged["loss"] /= len(own)
        return logged | {name: sum(one[name] for one in own) / len(own) for name in own[0]}
