"""Supervised fine-tuning: the negative log-likelihood of the assistant's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.data.formats import ANSWERS, Use
from rlhf_cli.objectives.base import LossTerm, Objective

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class Sft(Objective):
    """−Σ log π(y_t | …) over the supervised tokens, divided by their number in the global batch."""

    kind: Literal["sft"] = "sft"
    rows: ClassVar[Use] = ANSWERS
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        from rlhf_cli.data.trees import supervised_tokens

        return {"tokens": sum(map(supervised_tokens, trees))}

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        logps, hits = backbone.logps("policy", batch)
        yield LossTerm({"tokens": -logps.sum()}, {"token_accuracy": (hits.sum(), "tokens")})

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))}
