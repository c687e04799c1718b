"""What every objective is to the optimiser step: sums over a pass, and the global counts that divide them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

from rlhf_cli.data.formats import COMPARISONS, Use

if TYPE_CHECKING:
    import torch

    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone

Tensor: TypeAlias = "torch.Tensor"  # named without importing torch, which reading a recipe does not need

Trained = Literal["lora", "full"]  # which weights learn: an adapter's, or all


def upload(values: Sequence[object], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_tensor(values)`, but the host does not wait until the GPU has done all that it was given before."""
    import torch

    return torch.tensor(values, dtype=dtype or like.dtype).to(like.device, non_blocking=like.is_cuda)


@dataclass(frozen=True)
class LossTerm:
    """One role's share of the loss in one forward pass, not yet divided."""

    losses: dict[str, Tensor]  # unit → (), a sum over the pass; divided by that count of Objective.counts, and added up
    sums: dict[str, tuple[Tensor, str]]  # metric → (sum over the pass, unit)


@dataclass(frozen=True)
class Objective:
    """A loss: its fields are the recipe's `objective:` section. It knows tensors and roles; no files, devices or ranks."""

    kind: str = ""

    role: ClassVar[Literal["policy", "reward"]] = "policy"  # whose weights it trains
    rows: ClassVar[Use] = COMPARISONS  # what it learns from; of PROMPTS the responses are the policy's own, drawn while it trains
    of_first_update: ClassVar[frozenset[str]] = frozenset()  # metrics with a meaning only before a step's first update of several
    reference: ClassVar[bool] = False  # does it need the reference's log-probabilities?
    token_figure: ClassVar[Literal["typicality", "kl"] | None] = None  # what it reads of whole distributions: `read_responses`
    iterated: ClassVar[bool] = False  # is its reference, by its paper, the policy of the iteration before?
    self_play: ClassVar[bool] = False  # does it learn from how probably the policy's own responses win, and nothing else?
    soft_labels: ClassVar[bool] = False  # does it use the probability that the chosen response is better, if the data have one?
    mismatches: ClassVar[bool] = False  # does it compare each response with one that was written for another prompt?
    learns_ties: ClassVar[bool] = True  # can it learn from responses of which some are tied?
    saturates: ClassVar[bool] = False  # does its gradient fade for pairs that are far apart? Then it logs rewards/saturated
    values: ClassVar[bool] = False  # does it learn a value, a role of its own?
    learning_rate: ClassVar[Mapping[Trained, float]] = {}  # the default, where it wants another than its stage
    known_as: ClassVar[Mapping[str, str]] = {}  # names of methods that it is with certain keys, and these

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that are saved as models: its own and, of an ensemble, those of the other members."""
        return (self.role,)

    @property
    def frozen(self) -> Mapping[str, str]:
        """The path of each frozen model that it needs beside the reference, by role."""
        return {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What it logs of every update."""
        raise NotImplementedError

    def with_class_counts(self, desirable: int, undesirable: int) -> Self:
        """The objective with what it takes from the numbers of desirable and undesirable responses in the training data."""
        return self

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        """What the sums over these trees are divided by; known before any forward pass, and additive over trees."""
        raise NotImplementedError

    def updates(self, trees: list[Tree], seed: int) -> list[list[Tree]]:
        """The global batches of a step's updates, one after the other; `seed` is the step's own."""
        return [trees]

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        """An update's trees as `statistics` sees them (it may need none), and as `terms` does, in parts that share no pass."""
        return [], [trees]

    def start_error(self, means: Mapping[str, float]) -> str | None:
        """What the means of a run's first update say is wrong, before its weights change."""
        return None

    def statistics(self, backbone: Backbone, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        """Name → (sum over one pass, unit), without gradient. Their global means come before the first `terms`, as `given`."""
        return {}

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        """The loss terms of one pass, one role at a time: each is sent backward before the next is asked for.

        `given`: the means of `statistics` and what `remember` keeps.
        """
        raise NotImplementedError

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The logged metrics, from the global means of `loss`, of every sum and of every statistic."""
        return means

    def remember(self, memory: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
        """The objective's own numbers after a step with these means; they are part of a checkpoint, and empty at the start."""
        return dict(memory)

    @property
    def margin_from(self) -> str | None:
        """The column of the data that holds the margin of a pair, for objectives that use one."""
        return None

    @property
    def announcement(self) -> str:
        """What a run says about its objective at the start: what its keys do not show; empty if that is nothing."""
        return ""

    def check_tree(self, tree: Tree) -> str | None:
        """Why this tree cannot be trained on, if it cannot: e.g. a score that its row lacks."""
        return None
