"""Distillation: the policy's distribution of every token is drawn to a teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.data.formats import ANSWERS, Use
from rlhf_cli.objectives.base import LossTerm, Objective
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Distil(Objective):
    """Σ D(teacher, π) over the supervised tokens, divided by their number in the global batch.

    Agarwal et al. 2024, "On-Policy Distillation of Language Models", eq. 1 and 3; no gradient flows through what was drawn.
    """

    kind: Literal["distil"] = "distil"
    teacher: str = key(help="a local run, adapter or model with the policy's tokens, that is imitated", path=True)
    divergence: Literal["forward", "reverse", "jsd"] = key(
        "forward",
        "forward: KL(teacher ‖ policy), covers all that the teacher may say; reverse: KL(policy ‖ teacher); jsd: between",
    )
    beta: float = key(
        0.5, "of jsd, the teacher's share of the mixture: near 0 as forward, near 1 as reverse", low=1e-3, high=0.999
    )
    rows: ClassVar[Use] = ANSWERS
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "teacher/agreement")

    @property
    def frozen(self) -> Mapping[str, str]:
        return {"teacher": self.teacher}

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        from rlhf_cli.data.trees import supervised_tokens

        return {"tokens": sum(map(supervised_tokens, trees))}

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        apart, alike = backbone.divergences("policy", "teacher", batch, self.divergence, self.beta)
        yield LossTerm({"tokens": apart.sum()}, {"teacher/agreement": (alike.sum(), "tokens")})
