"""Log-probabilities of given tokens, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**23  # logits held at a time: 32 MiB in float32


class _TokenLogps(torch.autograd.Function):
    """log π(target | hidden) per row, the head applied in chunks.

    With a frozen head the gradient of each log-probability with respect to its hidden state, W[target] − softmax(logits)·W,
    is computed with the logits still at hand and kept, (N, D): backward is one multiplication, the logits are never computed
    twice. A trained head needs the softmax again for its own gradient: then chunks are recomputed in backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor) -> Any:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        keep = hidden.requires_grad and not trained
        logps = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        hits = torch.empty(len(hidden), device=hidden.device, dtype=torch.bool)
        slope = torch.empty_like(hidden) if keep else None
        for part in _chunks(len(hidden), len(weight)):
            logits = F.linear(hidden[part], weight, bias).float()
            lse = logits.logsumexp(-1)
            chosen = logits.gather(-1, target[part, None])[:, 0]
            logps[part] = chosen - lse
            hits[part] = chosen >= logits.amax(-1)
            if slope is not None:
                # One-hot minus softmax before the product: afterwards, in bfloat16, the difference would be rounding noise.
                change = logits.sub_(lse[:, None]).exp_().neg_()
                change.scatter_add_(-1, target[part, None], torch.ones_like(change[:, :1]))
                slope[part] = (change.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.trained = trained
        ctx.save_for_backward(*((hidden, weight, bias, target) if trained else (slope,)))
        ctx.mark_non_differentiable(hits)
        return logps, hits

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
        if not ctx.trained:
            (slope,) = ctx.saved_tensors
            return slope * grad[:, None].to(slope.dtype), None, None, None
        hidden, weight, bias, target = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32 over the chunks, whatever the dtype of the products.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=grad_weight.dtype)
        for part in _chunks(len(hidden), len(weight)):
            slope = F.linear(hidden[part], weight, bias).float().softmax(-1).neg_()
            slope.scatter_add_(-1, target[part, None], torch.ones_like(slope[:, :1]))
            slope = slope.mul_(grad[part, None]).to(weight.dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(weight.dtype), None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, i + size) for i in range(0, rows, size)]


def token_logps(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N,) float32 of `target` (N,) under the head, and whether each is the most likely token (N,).

    hidden (N, D), weight (V, D) and bias (V,) share one dtype; the log-softmax is float32.
    """
    logps, hits = _TokenLogps.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]
    return logps, hits
