"""What all objectives on preferences share: responses as sums of log-probabilities, pairs of them, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rlhf_cli.objectives.base import LossTerm, Objective, Tensor, upload
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
    figure: Tensor  # of `Objective.token_figure`; NaN where there is none


def read_responses(backbone: Backbone, batch: Batch, objective: Objective) -> Responses:
    """The policy's log-probabilities of a pass's responses, and what the objective asks for beside them.

    The reference's come with the batch, or from the role "reference" without gradient; for "kl" from the latter.
    """
    import torch

    asked = objective.token_figure
    known = batch.reference if objective.reference else None
    if objective.reference and known is None and asked != "kl":
        with torch.no_grad():
            known, _ = backbone.logps("reference", batch)
    if asked == "kl":
        each, known, figure = backbone.logps_and_kl("policy", "reference", batch)
    elif asked == "typicality":  # Σ_v π(v)² normalises π², which is π at temperature ½
        (each, squared), _ = backbone.tempered_logps("policy", batch, (1.0, 0.5))
        figure = (squared - each).detach()
    else:
        each, _ = backbone.logps("policy", batch)
        figure = torch.full_like(each, torch.nan)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(batch.last), dtype=torch.float64, device=values.device).index_add(0, batch.owner, values.double())

    logps = total(each)
    logratio = torch.full_like(logps, torch.nan) if known is None else logps - total(known)
    known_scores = (facts.scores or () for facts in batch.facts)
    scores = [s for n, own in zip(batch.counts, known_scores, strict=True) for s in (*own, *[torch.nan] * n)[:n]]
    return Responses(logps, logratio, total(torch.ones_like(each)), upload(scores, logps), total(figure))


def ordered_pairs(count: int, facts: Facts) -> list[tuple[int, int]]:
    """(better, worse) of every two responses of a tree that are not tied; those without a rank are compared with none.

    >>> from rlhf_cli.data.records import Facts
    >>> ordered_pairs(3, Facts(ranks=(1, 2, 2))), ordered_pairs(3, Facts(ranks=(2, 1)))
    ([(0, 1), (0, 2)], [(1, 0)])
    """
    ranks = facts.ranks or range(count)
    return [(a, b) if ranks[a] < ranks[b] else (b, a) for a, b in combinations(range(len(ranks)), 2) if ranks[a] != ranks[b]]


class PairIndices(NamedTuple):
    """The P pairs of one pass as indices into its M responses."""

    chosen: Tensor  # (P,) int64
    rejected: Tensor  # (P,) int64
    tree: Tensor  # (P,) int64: which tree of the pass
    counts: tuple[int, ...]  # responses of each tree; their sum is M
    facts: tuple[Facts, ...]  # of each tree
    places: tuple[int, ...]  # of each tree in the global batch
    probability: Tensor  # (P,) float64: p, that the chosen response is the better one; 1 where the data do not say


def pairs_of(batch: Batch) -> PairIndices:
    """All ordered pairs of a pass, tree by tree."""
    import torch

    found: list[tuple[int, int, int]] = []
    start = 0
    for tree, (count, fact) in enumerate(zip(batch.counts, batch.facts, strict=True)):
        found += [(start + a, start + b, tree) for a, b in ordered_pairs(count, fact)]
        start += count
    chosen, rejected, of_tree = upload(found, batch.owner).reshape(-1, 3).unbind(1)
    probability = upload([fact.soft_label for fact in batch.facts], batch.owner, torch.float64)
    return PairIndices(chosen, rejected, of_tree, batch.counts, batch.facts, batch.trees, probability[of_tree])


def accuracy(margin: Tensor, probability: Tensor) -> Tensor:
    """1 where a margin has the sign of p − ½, ½ where one of them is 0; float64."""
    agreed = margin.sign() * (probability - 0.5).sign()
    return (1 + agreed.double()) / 2


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """A loss on ordered responses, of a policy or of a reward model."""

    kind_for_ties: ClassVar[str] = ""  # the kind to take where `learns_ties` is False and some are tied

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Trees, responses and ordered pairs."""
        return {
            "trees": len(trees),
            "responses": sum(len(tree.responses) for tree in trees),
            "pairs": sum(len(ordered_pairs(len(tree.responses), tree.facts)) for tree in trees),
        }

    def check_tree(self, tree: Tree) -> str | None:
        if not ordered_pairs(len(tree.responses), tree.facts):
            return "needs two responses" if len(tree.responses) < 2 else "its responses are all tied"
        ranks = tree.facts.ranks or ()
        if not self.learns_ties and len(set(ranks)) < len(ranks):
            return f"kind {self.kind} takes no ties; kind {self.kind_for_ties} does"
        return None


class Pair(NamedTuple):
    """The P pairs of a pass as a loss sees them."""

    chosen: Responses  # (P,)
    rejected: Responses  # (P,)
    probability: Tensor  # (P,) float64: p, that the chosen response is the better one
    given: Mapping[str, float]  # as `terms` has it


@dataclass(frozen=True)
class PairObjective(PreferenceObjective):
    """A loss on pairs of responses. A ranking counts as all its ordered pairs, each with the same weight.

    With `soft_labels` it is p f(z) + (1 − p) f(−z): z one difference of the two, p the probability that the data name, else 1.
    `sft_weight` adds the negative log-likelihood of the best response, a mean over the tokens of the global batch. In that mean
    the tokens of the chosen response weigh p and those of the rejected one 1 − p, above and below the line.
    """

    sft_weight: float = key(0.0, "adds this much of the better responses' negative log-likelihood per token", low=0.0)

    reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        saturated = ("rewards/saturated",) if self.saturates else ()
        logratio = ("logratio/mean",) if self.reference else ()
        return ("loss", *rewards, *saturated, "logps/chosen", "logps/rejected", *logratio)

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Adds the tokens that the `sft_weight` term is a mean over, each with its weight."""
        tokens = 0.0
        for tree in trees:
            shares = self._shares(len(tree.responses), tree.facts)
            tokens += sum(share * (len(r) - (len(tree.prompt) == 0)) for share, r in zip(shares, tree.responses, strict=True))
        return super().counts(trees) | {"tokens": tokens}

    def _shares(self, count: int, facts: Facts) -> list[float]:
        """The weight of each response's tokens in the `sft_weight` term, (count,)."""
        p = facts.soft_label if self.soft_labels else 1.0
        shares = [1 - p] * count
        shares[facts.ranks.index(min(facts.ranks)) if facts.ranks else 0] = p
        return shares

    def hard_loss(self, margin: Tensor) -> Tensor:
        """f(z): the loss of a pair whose chosen response is certainly the better one; −log σ(z) unless a kind says another."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(margin)

    def loss(self, pair: Pair) -> Tensor:
        """The loss of every pair, (P,)."""
        return self._soft_loss(self.margin(pair), pair.probability)

    def _soft_loss(self, margin: Tensor, probability: Tensor) -> Tensor:
        return probability * self.hard_loss(margin) + (1 - probability) * self.hard_loss(-margin)

    def reward(self, responses: Responses) -> Tensor:
        """Implicit rewards, (P,), in the units in which the loss compares them."""
        raise NotImplementedError

    def margin(self, pair: Pair) -> Tensor:
        """z, (P,)."""
        return self.reward(pair.chosen) - self.reward(pair.rejected)

    def gradient_left(self, pair: Pair) -> Tensor:
        """The size of ∂loss/∂z as a share of its size at z = 0, (P,); not finite for a tie, whose gradient is 0 there."""
        import torch

        z = self.margin(pair).detach()
        with torch.enable_grad():
            both = torch.stack([z, torch.zeros_like(z)]).requires_grad_()
            (slope,) = torch.autograd.grad(self._soft_loss(both, pair.probability).sum(), both)
        return slope[0].abs() / slope[1].abs()

    def losses(self, responses: Responses, pairs: PairIndices, pair: Pair) -> dict[str, Tensor]:
        """Unit → sum over the pass, without the `sft_weight` term."""
        return {"pairs": self.loss(pair).sum()}

    def read(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> tuple[Responses, PairIndices, Pair]:
        """A pass's responses, which of them are pairs, and these."""
        responses, pairs = read_responses(backbone, batch, self), pairs_of(batch)
        chosen, rejected = (Responses(*(values[side] for values in responses)) for side in (pairs.chosen, pairs.rejected))
        p = pairs.probability if self.soft_labels else pairs.probability.new_ones(len(pairs.tree))
        return responses, pairs, Pair(chosen, rejected, p, given)

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        responses, pairs, pair = self.read(backbone, batch, given)
        losses = self.losses(responses, pairs, pair)
        if self.sft_weight:
            shares = [s for count, facts in zip(batch.counts, batch.facts, strict=True) for s in self._shares(count, facts)]
            losses["tokens"] = -self.sft_weight * (upload(shares, responses.logps) * responses.logps).sum()
        yield LossTerm(losses, {name: (value.detach().sum(), "pairs") for name, value in self.figures(pair).items()})

    def figures(self, pair: Pair) -> dict[str, Tensor]:
        """Metric → its value of every pair, (P,)."""
        chosen, rejected = self.reward(pair.chosen), self.reward(pair.rejected)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": accuracy(chosen - rejected, pair.probability),
            "logps/chosen": pair.chosen.logps,
            "logps/rejected": pair.rejected.logps,
        }
        if self.saturates:
            found["rewards/saturated"] = (self.gradient_left(pair) < SATURATED).double()
        if self.reference:
            found["logratio/mean"] = (pair.chosen.logratio + pair.rejected.logratio) / 2
        return found

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
