"""What the ratios of a policy to the one that drew make of advantages, token by token, and what their mean is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf_cli.objectives.base import Tensor

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Batch

MeanOver = Literal["responses", "tokens", "constant"]
"""A mean over each response's tokens and then over the responses; over all tokens; or a sum over tokens, divided by what the
responses could have had of them."""


class PolicyLoss(NamedTuple):
    """How a kind makes a loss of ratios w = π/π_old and advantages A."""

    low: float  # ε: ratios are clipped to 1 − low … 1 + high
    high: float
    mean_over: MeanOver = "tokens"
    by_response: bool = False  # w is that of a whole response, the geometric mean of its tokens' (Zheng et al. 2025, eq. 7)
    cispo: bool = False

    def ratios(self, logratio: Tensor, batch: Batch, share: Tensor) -> Tensor:
        """w of every token, (N,), from log π − log π_old, (N,)."""
        if self.by_response:
            means = logratio.new_zeros(len(batch.last)).index_add(0, batch.owner, share * logratio)
            logratio = means[batch.owner]
        return logratio.exp()

    def of_tokens(self, logps: Tensor, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every token, and whether its ratio was clipped, (N,) each.

        max(−A w, −A clip(w)) (Schulman et al. 2017, eq. 7); cispo: −min(w, 1 + high) A log π, no gradient through the weight
        (MiniMax-M1 2025, eq. 4 and 5).
        """
        import torch

        if self.cispo:
            weight = ratio.detach().clamp(max=1 + self.high)
            return -weight * advantage * logps, (weight != ratio) & (advantage != 0)
        plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - self.low, 1 + self.high)
        return torch.maximum(plain, clipped), clipped > plain

    def weights(self, share: Tensor, given: Mapping[str, float]) -> tuple[Tensor | float, str]:
        """What a token weighs, (N,) or all the same, and the unit whose count divides the sum; `given`: "max_new_tokens"."""
        if self.mean_over == "tokens":
            return 1.0, "tokens"
        return share if self.mean_over == "responses" else 1 / given["max_new_tokens"], "responses"


def shares(batch: Batch) -> Tensor:
    """1/length of the response that every token belongs to, (N,) float64: those of a response add up to 1."""
    import torch

    ones = torch.ones_like(batch.owner, dtype=torch.float64)
    return (1 / ones.new_zeros(len(batch.last)).index_add(0, batch.owner, ones))[batch.owner]
