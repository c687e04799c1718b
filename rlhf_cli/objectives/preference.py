"""What all objectives on preferences share: responses as sums of log-probabilities, pairs of them, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rlhf_cli.objectives.base import LossTerm, Objective, Tensor
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.records import Facts
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone

BETA = "β: weight of the log-ratio to the reference; the implicit reward is β(log π − log π_ref)"
"""The help of the recipe key wherever it means this."""

SATURATED = 0.05  # a pair whose gradient has less than this share of its size at log-ratio 0 teaches next to nothing any more


class Responses(NamedTuple):
    """Responses of a pass, tree by tree in the order of their ranks: sums over their tokens, in nats, (M,) float64."""

    logps: Tensor  # log π(y|x)
    logratio: Tensor  # ρ = log π(y|x) − log π_ref(y|x); NaN where the objective needs no reference
    lengths: Tensor  # tokens
    scores: Tensor  # of the data; NaN where they have none


def read_responses(backbone: Backbone, batch: Batch, reference: bool) -> Responses:
    """The policy's and, where asked for, the reference's log-probabilities of a pass's responses.

    The reference's come with the batch, or from the role "reference" without gradient.
    """
    import torch

    known = batch.reference if reference else None
    if reference and known is None:
        with torch.no_grad():
            known, _ = backbone.logps("reference", batch)
    each, _ = backbone.logps("policy", batch)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(batch.last), dtype=torch.float64, device=values.device).index_add(0, batch.owner, values.double())

    logps = total(each)
    logratio = torch.full_like(logps, torch.nan) if known is None else logps - total(known)
    scores = [s for count, facts in zip(batch.counts, batch.facts, strict=True) for s in facts.scores or [torch.nan] * count]
    return Responses(logps, logratio, total(torch.ones_like(each)), logps.new_tensor(scores))


def ordered_pairs(count: int, facts: Facts) -> list[tuple[int, int]]:
    """(better, worse) of every two responses of a tree that are not tied.

    >>> from rlhf_cli.data.records import Facts
    >>> ordered_pairs(3, Facts(ranks=(1, 2, 2)))
    [(0, 1), (0, 2)]
    """
    ranks = facts.ranks or range(count)
    return [(a, b) for a, b in combinations(range(count), 2) if ranks[a] < ranks[b]]


class PairIndices(NamedTuple):
    """The P pairs of one pass as indices into its M responses."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    tree: Tensor  # (P,) int64: which tree of the pass
    counts: tuple[int, ...]  # responses of each tree; their sum is M
    facts: tuple[Facts, ...]  # of each tree


def pairs_of(batch: Batch) -> PairIndices:
    """All ordered pairs of a pass, tree by tree."""
    found: list[tuple[int, int, int]] = []
    start = 0
    for tree, (count, fact) in enumerate(zip(batch.counts, batch.facts, strict=True)):
        found += [(start + a, start + b, tree) for a, b in ordered_pairs(count, fact)]
        start += count
    chosen, rejected, of_tree = batch.owner.new_tensor(found).reshape(-1, 3).unbind(1)
    return PairIndices(chosen, rejected, of_tree, batch.counts, batch.facts)


def accuracy(margin: Tensor) -> Tensor:
    """1 where a margin has the right sign, ½ where it is 0; float64."""
    return (margin > 0).double() + (margin == 0).double() / 2


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """A loss on ordered responses, of a policy or of a reward model."""

    kind_for_ties: ClassVar[str] = ""  # the kind to take where `ties` is False and some are tied

    def counts(self, trees: Sequence[Tree]) -> dict[str, int]:
        """Trees, responses and ordered pairs, and the tokens of each tree's first response."""
        return {
            "trees": len(trees),
            "responses": sum(len(tree.responses) for tree in trees),
            "pairs": sum(len(ordered_pairs(len(tree.responses), tree.facts)) for tree in trees),
            "tokens": sum(len(tree.responses[0]) - (len(tree.prompt) == 0) for tree in trees),
        }

    def check_tree(self, tree: Tree) -> str | None:
        if not ordered_pairs(len(tree.responses), tree.facts):
            return "needs two responses" if len(tree.responses) < 2 else "its responses are all tied"
        ranks = tree.facts.ranks or ()
        if not self.ties and len(set(ranks)) < len(ranks):
            return f"kind {self.kind} takes no ties; kind {self.kind_for_ties} does"
        return None


class Pair(NamedTuple):
    """The P pairs of a pass as a loss sees them."""

    chosen: Responses  # (P,)
    rejected: Responses  # (P,)
    given: Mapping[str, float]  # as `terms` has it


@dataclass(frozen=True)
class PairObjective(PreferenceObjective):
    """A loss on pairs of responses. A ranking counts as all its ordered pairs, each with the same weight.

    `sft_weight` adds the negative log-likelihood of the best response, a mean over the tokens of the global batch.
    """

    sft_weight: float = key(0.0, "adds this much of the chosen responses' negative log-likelihood per token", low=0.0)

    reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        saturated = ("rewards/saturated",) if self.saturates else ()
        logratio = ("logratio/mean",) if self.reference else ()
        return ("loss", *rewards, *saturated, "logps/chosen", "logps/rejected", *logratio)

    def loss(self, pair: Pair) -> Tensor:
        """The loss of every pair, (P,)."""
        raise NotImplementedError

    def reward(self, responses: Responses) -> Tensor:
        """Implicit rewards, (P,), in the units in which the loss compares them."""
        raise NotImplementedError

    def gradient_left(self, pair: Pair) -> Tensor:
        """The size of ∂loss/∂margin as a share of its size at log-ratio 0, (P,); for losses that saturate."""
        raise NotImplementedError

    def losses(self, responses: Responses, pairs: PairIndices, pair: Pair) -> dict[str, Tensor]:
        """Unit → sum over the pass, without the `sft_weight` term."""
        return {"pairs": self.loss(pair).sum()}

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        responses = read_responses(backbone, batch, self.reference)
        pairs = pairs_of(batch)
        chosen, rejected = (Responses(*(values[side] for values in responses)) for side in (pairs.chosen, pairs.rejected))
        pair = Pair(chosen, rejected, given)
        losses = self.losses(responses, pairs, pair)
        if self.sft_weight:
            best = list(accumulate(batch.counts[:-1], initial=0))
            losses["tokens"] = -self.sft_weight * responses.logps[best].sum()
        yield LossTerm(losses, self._sums(pair))

    def _sums(self, pair: Pair) -> dict[str, tuple[Tensor, str]]:
        chosen, rejected = self.reward(pair.chosen), self.reward(pair.rejected)
        sums = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": accuracy(chosen - rejected),
            "logps/chosen": pair.chosen.logps,
            "logps/rejected": pair.rejected.logps,
        }
        if self.saturates:
            sums["rewards/saturated"] = (self.gradient_left(pair) < SATURATED).double()
        if self.reference:
            sums["logratio/mean"] = (pair.chosen.logratio + pair.rejected.logratio) / 2
        return {name: (value.detach().sum(), "pairs") for name, value in sums.items()}

    def check_tree(self, tree: Tree) -> str | None:
        if self.needs_scores and tree.facts.scores is None:
            return f"kind {self.kind} needs scores: score_chosen and score_rejected, or the scores of a ranking"
        return super().check_tree(tree)


@dataclass(frozen=True)
class LogRatioPair(PairObjective):
    """A loss on pairs whose implicit reward is βρ."""

    beta: float = key(0.1, BETA, low=1e-9)

    def reward(self, responses: Responses) -> Tensor:
        return self.beta * responses.logratio

    def margin(self, pair: Pair) -> Tensor:
        """z = β(ρ_w − ρ_l), (P,)."""
        return self.beta * (pair.chosen.logratio - pair.rejected.logratio)
