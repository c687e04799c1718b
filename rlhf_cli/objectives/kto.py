"""KTO: each response against the mean log-ratio of responses that belong to other prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from rlhf_cli.errors import UsageError
from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import read_responses
from rlhf_cli.objectives.unpaired import UnpairedObjective, only
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class Kto(UnpairedObjective):
    """λ_D(1 − σ(β(ρ − z0))) of a desirable response, λ_U(1 − σ(β(z0 − ρ))) of another; Ethayarajh et al. 2024, eq. 7 and 8.

    z0 = max(0, mean ρ of the mismatched responses) over the global batch, without gradient. Trees have two responses: the
    prompt's own and, after it, the mismatched one.
    """

    kind: Literal["kto"] = "kto"
    lambda_d: float = key(1.0, "λ_D: weight of a desirable response", low=0.0)
    lambda_u: float = key(1.0, "λ_U: weight of an undesirable response", low=0.0)
    lambda_: Literal["auto"] | None = key(None, "auto: λ_D and λ_U balance the classes, the smaller one is 1")
    mismatches: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = (*UnpairedObjective.metric_names, "kl")

    def with_class_counts(self, desirable: int, undesirable: int) -> Self:
        """With `lambda: auto` as weights such that n_D λ_D = n_U λ_U. Raises UsageError if there is nothing to balance."""
        if self.lambda_ is None:
            return self
        if not (desirable and undesirable):
            missing = "undesirable" if desirable else "desirable"
            raise UsageError(f"objective.lambda: auto balances two classes, and no {missing} response is there; remove the key")
        return replace(self, lambda_d=max(1.0, undesirable / desirable), lambda_u=max(1.0, desirable / undesirable), lambda_=None)

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        return [only(tree, 1) for tree in trees], [[only(tree, 0) for tree in trees]]

    def statistics(self, backbone: Backbone, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        import torch

        with torch.no_grad():
            return {"kl": (read_responses(backbone, batch, self).logratio.sum(), "trees")}

    def loss(self, logratio: Tensor, desirable: Tensor, given: Mapping[str, float]) -> Tensor:
        assert self.lambda_ is None, "call with_class_counts() first"
        gain = self.beta * (logratio - max(given["kl"], 0.0))
        return self.lambda_d * desirable * (-gain).sigmoid() + self.lambda_u * ~desirable * gain.sigmoid()

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """`kl` is z0."""
        return super().metrics(means | {"kl": max(means["kl"], 0.0)})
