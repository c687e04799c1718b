"""Forward passes over some trees: whose, how large, and which share of them is this rank's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.ranks import Ranks


@dataclass(frozen=True)
class Passes:
    """What cuts a global batch into forward passes."""

    backbone: Backbone
    budget: int  # tokens of a pass at most, but for a longer tree
    ranks: Ranks

    def over(self, trees: list[Tree]) -> Iterator[Batch]:
        """This rank's share of the trees, pass by pass."""
        return self.backbone.batches(trees, self.budget, self.ranks.rank, self.ranks.size)

    def at_most(self, budget: int) -> Passes:
        return replace(self, budget=budget)
