"""AOT: the whole distribution of what is wanted above that of what is not, quantile by quantile (optimal transport on a line)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair, PairIndices, Responses, ordered_pairs
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone

ENDS = ("above", "below")


@dataclass(frozen=True)
class Aot(LogRatioPair):
    """mean_k −log σ(β(a_(k) − b_(k))), each sorted over the pairs of the whole global batch; Melnyk et al. 2024, section 3.

    `paired`: a the policy's log π(y_w) − log π(y_l) and b the reference's; `unpaired`: a = ρ_w and b = ρ_l. All a and b are
    computed before any gradient, with dropout off; of held-out pairs, all are one batch.
    """

    kind: Literal["aot"] = "aot"
    pairing: Literal["paired", "unpaired"] = key(
        "paired", "margins of the policy above those of the reference; unpaired: chosen log-ratios above rejected ones"
    )

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        return trees, [trees]

    def statistics(self, backbone: Backbone, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        """Every a and b by its name, so that a sum over passes and ranks is a collection."""
        import torch

        with torch.no_grad():
            _, pairs, pair = self.read(backbone, batch, {})
        return {name: (value, "pairs") for name, value in zip(names(pairs), self._ends(pair).flatten().cpu(), strict=True)}

    def losses(self, responses: Responses, pairs: PairIndices, pair: Pair) -> dict[str, Tensor]:
        plan, ends = transport(pair.given), self._ends(pair)
        other_b, other_a = ends.new_tensor([plan[name] for name in names(pairs)]).reshape(2, -1)
        loss = self.hard_loss(self.beta * (ends[0] - other_b)) + self.hard_loss(self.beta * (other_a - ends[1]))
        return {"pairs": (loss - loss.detach() / 2).sum()}  # each term of the sum stands here twice, once for each gradient

    def _ends(self, pair: Pair) -> Tensor:
        """a and b of every pair, (2, P)."""
        import torch

        if self.pairing == "unpaired":
            return torch.stack((pair.chosen.logratio, pair.rejected.logratio))
        policy, reference = (pair.chosen[k] - pair.rejected[k] for k in (0, 1))
        return torch.stack((policy, policy - reference))

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in means.items() if not name.startswith(ENDS)}


def names(pairs: PairIndices) -> list[str]:
    """Of a of every pair and then of b, by where the pair stands in the global batch."""
    trees = zip(pairs.places, pairs.counts, pairs.facts, strict=True)
    own = [f"{place}: {pair}" for place, count, facts in trees for pair in ordered_pairs(count, facts)]
    return [f"{end} {name}" for end in ENDS for name in own]


def transport(given: Mapping[str, float]) -> dict[str, float]:
    """Name of an a or b → the value of the other kind and of the same rank, from their values divided by their number."""
    a, b = (sorted((name for name in given if name.startswith(end)), key=lambda name: (given[name], name)) for end in ENDS)
    return {name: len(a) * given[other] for name, other in (*zip(a, b, strict=True), *zip(b, a, strict=True))}
