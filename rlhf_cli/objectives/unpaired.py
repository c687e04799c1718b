"""What all objectives on single responses, marked desirable or not, share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_cli.data.formats import LABELS, Use
from rlhf_cli.objectives.base import LossTerm, Objective, Tensor, upload
from rlhf_cli.objectives.preference import BETA, read_responses
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class UnpairedObjective(Objective):
    """A loss on the log-ratios of single responses; the implicit reward is βρ.

    A tree may bring a second response, one that was written for another prompt: `terms` never sees it.
    """

    beta: float = key(0.1, BETA, low=1e-9)

    rows: ClassVar[Use] = LABELS
    reference: ClassVar[bool] = True
    reward_metrics: ClassVar[tuple[str, ...]] = ("rewards/desirable", "rewards/undesirable", "rewards/margins")
    metric_names: ClassVar[tuple[str, ...]] = ("loss", *reward_metrics, "logps/desirable", "logps/undesirable", "logratio/mean")

    def loss(self, logratio: Tensor, desirable: Tensor, given: Mapping[str, float]) -> Tensor:
        """The loss of every response, (M,), from its ρ (M,) float64 and its mark (M,) bool."""
        raise NotImplementedError

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        desirable = sum(tree.facts.label is True for tree in trees)
        return {"trees": len(trees), "desirable": desirable, "undesirable": len(trees) - desirable}

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        return [], [[only(tree, 0) for tree in trees]]

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        import torch

        responses = read_responses(backbone, batch, self)
        logratio = responses.logratio
        marks = [facts.label is True for facts in batch.facts]
        desirable = upload(marks, logratio, torch.bool)
        sums = {"logratio/mean": (logratio.detach().sum(), "trees")}
        for unit, mine in (("desirable", True), ("undesirable", False)):
            # A class without a response has no sum, so that its mean is absent and not 0.
            if mine in marks:
                others = desirable != mine
                sums[f"rewards/{unit}"] = (self.beta * logratio.detach().masked_fill(others, 0).sum(), unit)
                sums[f"logps/{unit}"] = (responses.logps.detach().masked_fill(others, 0).sum(), unit)
        yield LossTerm({"trees": self.loss(logratio, desirable, given).sum()}, sums)

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Adds rewards/margins, the difference of the classes' mean rewards, where there are both."""
        if not {"rewards/desirable", "rewards/undesirable"} <= means.keys():
            return means
        return means | {"rewards/margins": means["rewards/desirable"] - means["rewards/undesirable"]}


def only(tree: Tree, response: int) -> Tree:
    """The tree with one of its responses."""
    return tree._replace(responses=(tree.responses[response],), reference=tree.reference and (tree.reference[response],))
