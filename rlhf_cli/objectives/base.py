"""What every objective is to the optimiser step: sums over a pass, and the global counts that divide them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class Term:
    """One role's loss in one forward pass, not yet divided."""

    loss: torch.Tensor  # (), a sum over the pass
    unit: str  # the count that divides it: a key of Objective.counts
    sums: dict[str, torch.Tensor]  # metric → sum over the pass, divided by the same count


class Objective(Protocol):
    """A loss: its fields are the recipe's `objective:` section. It knows tensors and roles; no files, devices or ranks."""

    @property
    def kind(self) -> str: ...

    def counts(self, trees: Sequence[Tree]) -> dict[str, int]:
        """What the sums over these trees are divided by; known before any forward pass, and additive over trees."""
        ...

    def terms(self, backbone: Backbone, batch: Batch) -> Iterator[Term]:
        """The loss terms of one pass, one role at a time: each is sent backward before the next is asked for."""
        ...

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The logged metrics, from the global means of `loss` and of every sum."""
        ...
