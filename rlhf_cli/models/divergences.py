"""How far two models' distributions of the next token are apart, without ever holding all logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_cli.models.logps import Head

Divergence = Literal["forward", "reverse", "jsd"]

ON_CUDA = 4  # chunks are shorter than those of log-probabilities: both distributions and their gradients are held


def divergence_of(policy: Tensor, other: Tensor, kind: Divergence, beta: float) -> Tensor:
    """(…) of log-probabilities (…, V): forward KL(other ‖ policy), reverse KL(policy ‖ other), or one between them.

    jsd: β KL(other ‖ m) + (1 − β) KL(policy ‖ m), m = β other + (1 − β) policy (Agarwal et al. 2024, "On-Policy Distillation
    of Language Models", eq. 1).
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if kind != "jsd":
        return kl(other, policy) if kind == "forward" else kl(policy, other)
    mixed = torch.logaddexp(other + math.log(beta), policy + math.log1p(-beta))
    return beta * kl(other, mixed) + (1 - beta) * kl(policy, mixed)


def token_divergences(
    hidden: Tensor, head: Head, other_hidden: Tensor, other: Head, kind: Divergence, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(N,) float32 of the distributions that follow from hidden states (N, D) and a frozen model's (N, D'), and whether both have
    the same most likely token (N,).

    Where one vocabulary is padded to more entries than the other, both distributions are over those that both have.
    """
    size = min(len(head.weight), len(other.weight))

    def measure(heads: Tensor, part: slice, slope: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        known = other.rule.logits(F.linear(other_hidden[part], other.weight, other.bias).float())[:, :size].log_softmax(-1)
        logits = head.rule.logits(heads)
        inner = head.rule.slope(logits)
        with torch.set_grad_enabled(slope):
            logits = logits.requires_grad_(slope)
            own = logits[:, :size].log_softmax(-1)
            found = divergence_of(own, known, kind, beta)
        change = torch.autograd.grad(found, logits, torch.ones_like(found))[0].mul_(inner) if slope else None
        return found.detach(), own.argmax(-1) == known.argmax(-1), change

    return head.of(hidden, measure, ON_CUDA)
