"""Bradley–Terry: logistic regression of who wins on the difference of two scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import PairIndices
from rlhf_cli.objectives.reward import RewardObjective
from rlhf_cli.sections import key

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Tree


@dataclass(frozen=True)
class BradleyTerry(RewardObjective):
    """−p log σ(d − m) − (1 − p) log σ(−d − m) + c(r_w + r_l)², d = r_w − r_l, of every pair; Ouyang et al. 2022, eq. 1.

    m: the data's margin (Touvron et al. 2023, eq. 2), 0 without `margin_column`. p: the data's probability that the first
    response is the better one, 1 where they have none; label smoothing ε makes it (1 − ε)p + ε(1 − p). c: Eisenstein et al. 2023.
    """

    kind: Literal["bradley_terry"] = "bradley_terry"
    margin_column: str | None = key(None, "column of the margin by which the chosen score is to lead")
    label_smoothing: float = key(0.0, "ε: share of labels taken to be wrong", low=0.0, high=0.499)
    center_coef: float = key(0.0, "c: weight of (r_w + r_l)², which keeps scores around 0", low=0.0)
    soft_labels: ClassVar[bool] = True

    @property
    def margin_from(self) -> str | None:
        return self.margin_column

    def losses(self, scores: Tensor, pairs: PairIndices) -> dict[str, Tensor]:
        import torch
        from torch.nn.functional import logsigmoid

        chosen, rejected = scores[pairs.chosen], scores[pairs.rejected]
        d, m = chosen - rejected, scores.new_zeros(())
        if self.margin_column is not None:
            m = d.new_tensor([pairs.facts[tree].margin for tree in pairs.tree.tolist()])
        p = torch.lerp(pairs.probability, 1 - pairs.probability, self.label_smoothing)
        loss = -p * logsigmoid(d - m) - (1 - p) * logsigmoid(-d - m) + self.center_coef * (chosen + rejected) ** 2
        return {"pairs": loss.sum()}

    def check_tree(self, tree: Tree) -> str | None:
        if self.margin_column is not None and tree.facts.margin is None:
            return f"no margin in the column '{self.margin_column}'"
        return super().check_tree(tree)
