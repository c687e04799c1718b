"""Steps of a response: whether each is right, read at its last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.data.formats import STEPS, Use
from rlhf_cli.objectives.base import LossTerm, Objective
from rlhf_cli.objectives.preference import accuracy
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch, Tree
    from rlhf_cli.models.backbone import Backbone


@dataclass(frozen=True)
class Steps(Objective):
    """−p log σ(z) − (1 − p) log σ(−z) of every step, z the head at its last token, p its label; Lightman et al. 2023.

    A mean over the steps of the batch, not over responses first.
    """

    kind: Literal["steps"] = "steps"
    separator: str = key("\n\n", 'what stands between steps, in the rows and in what is judged later; "": a response is one step')

    role: ClassVar[Literal["policy", "reward"]] = "reward"
    rows: ClassVar[Use] = STEPS
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        return {"steps": sum(len(own) for tree in trees for own in tree.facts.ends or ())}

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        from torch.nn.functional import binary_cross_entropy_with_logits

        from rlhf_cli.data.trees import at_steps

        steps = at_steps(batch)
        z = backbone.scores(self.role, steps).double()
        known = zip(steps.facts, steps.counts, strict=True)
        p = z.new_tensor([p for facts, count in known for p in (facts.steps or ())[:count]])
        loss = binary_cross_entropy_with_logits(z, p, reduction="sum")
        yield LossTerm({"steps": loss}, {"accuracy": (accuracy(z.detach(), p).sum(), "steps")})

    def check_tree(self, tree: Tree) -> str | None:
        return None if any(tree.facts.ends or ()) else "no step of it is left, or its tokens have other steps than the row"
