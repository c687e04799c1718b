"""Forward passes over some trees: whose, how large, which share of them is this rank's, and what a role makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf_cli.data.trees import Batch, Tree, at_steps
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import pair_scores
from rlhf_cli.ranks import Ranks
from rlhf_cli.signals import Pause, no_pause


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


def parts(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """So many values for each, one after the other."""
    return np.split(values, np.cumsum(counts, dtype=np.int64)[:-1]) if counts else []


def score_responses(
    backbone: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks | None, tau: float | None = None
) -> list[np.ndarray]:
    """What `as_scores` makes of the role's head at every tree's responses."""
    return as_scores(head_outputs(backbone, role, trees, budget, ranks), tau)


def as_scores(outputs: Sequence[np.ndarray], tau: float | None) -> list[np.ndarray]:
    """The scores (K,) of every tree's responses; of a general preference model, which has a `tau`, s of every two, (K, K)."""
    return [own[:, 0] if tau is None else pair_scores(own[:, None], own[None], tau) for own in outputs]


@torch.no_grad()
def head_outputs(
    backbone: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks | None, batch_size: int = 64
) -> list[np.ndarray]:
    """(K, labels) float64 of every tree's responses; of `ranks` each reads a share of the trees, and all get all.

    Of trees that know where their steps end, those of the steps.

    `backbone` holds the role's weights. `batch_size` trees at a time are cut into passes of at most `budget` tokens, as held-out
    rows are while training, so that the accuracy is the logged one.
    """
    backbone.model.eval()
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    found: dict[int, np.ndarray] = {}
    most = len(trees) if backbone.shards is None else backbone.shards.sharding.most(len(trees))
    for start in range(0, most, batch_size):
        for batch in backbone.batches(list(trees[start : start + batch_size]), budget, rank, size):
            batch = at_steps(batch)
            own = parts(backbone.vectors(role, batch).double().cpu().numpy(), batch.counts)
            found |= {start + tree: part for tree, part in zip(batch.trees, own, strict=True)}
    if ranks:
        found = {tree: part for share in ranks.gather(found) for tree, part in share.items()}
    return [found[tree] for tree in range(len(trees))]


def token_figures(
    host: Backbone,
    trees: Sequence[Tree],
    budget: int,
    read: Callable[[Backbone, Batch], tuple[torch.Tensor, ...]],
    pause: Pause = no_pause,
) -> list[list[np.ndarray]]:
    """(rows of `read`, n) float64 for the n supervised tokens of every response, [tree][response]; pauses after each pass."""
    host.train(False)
    found: dict[int, list[np.ndarray]] = {}
    for batch in host.batches(list(trees), budget):
        with torch.no_grad():
            rows = torch.stack(read(host, batch)).double().cpu().numpy()
        owner = batch.owner.cpu().numpy()
        first = 0
        for tree, count in zip(batch.trees, batch.counts, strict=True):
            found[tree] = [rows[:, owner == response] for response in range(first, first + count)]
            first += count
        pause()
    return [found[tree] for tree in range(len(trees))]
