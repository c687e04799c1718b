"""General preferences: a model that compares two responses, and so can learn what no score puts in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import LossTerm
from rlhf_cli.objectives.preference import PreferenceObjective, accuracy, pairs_of
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class General(PreferenceObjective):
    """−p log σ(s) − (1 − p) log σ(−s) of every pair, s = (R v_w)ᵀv_l/τ; Zhang et al. 2024, "General Preference Modeling".

    v: what the head gives at a response's last token, scaled to length 1; R: blocks [[0, −1], [1, 0]], so that
    P(y ≻ y') = σ(s) is 1 − P(y' ≻ y). A circle of preferences can be learned; Bradley–Terry has at most two of its three pairs.
    """

    kind: Literal["general"] = "general"
    tau: float = key(0.1, "τ: no pair is surer than σ(1/τ)", low=1e-3)
    width: int = key(8, "numbers that the head gives a response; even", low=2)

    role: ClassVar[Literal["policy", "reward"]] = "reward"
    soft_labels: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        from torch.nn.functional import logsigmoid

        from rlhf_cli.models.heads import pair_scores

        pairs, vectors = pairs_of(batch), backbone.vectors(self.role, batch).double()
        s, p = pair_scores(vectors[pairs.chosen], vectors[pairs.rejected], self.tau), pairs.probability
        loss = -p * logsigmoid(s) - (1 - p) * logsigmoid(-s)
        seen = s.detach()
        yield LossTerm({"pairs": loss.sum()}, {"accuracy": (accuracy(seen, p).sum(), "pairs"), "margin": (seen.sum(), "pairs")})
