"""Log-probabilities of given tokens, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**23  # logits held at a time: 32 MiB in float32
ON_CUDA = 16
"""As many times more on CUDA, which reads the whole head for each chunk: 1,046 rows of a vocabulary of 128 k instead of 65."""


def chunk_elements(device: str, on_cuda: int = ON_CUDA) -> int:
    """Logits held at a time on a type of device."""
    return CHUNK_ELEMENTS * (on_cuda if device == "cuda" else 1)


@dataclass(frozen=True)
class LogitRule:
    """What a model makes of its head's numbers h: logits = cap · tanh(scale · h / cap), or scale · h where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def at(self, temperature: float) -> LogitRule:
        """The rule that gives these logits divided by the temperature."""
        return LogitRule(self.scale / temperature, self.cap and self.cap / temperature)

    def logits(self, heads: Tensor) -> Tensor:
        """Of the head's numbers, (…, V) float32, which are overwritten."""
        if self.scale != 1:
            heads = heads.mul_(self.scale)
        return heads if self.cap is None else heads.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """∂ logits / ∂ h, elementwise."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


PLAIN_LOGITS = LogitRule()

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the cap in configurations."""
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Names of the scale. Some models multiply by it, others divide: the rule is the one that their logits agree with."""


def find_rule(config: dict[str, Any], heads: Tensor, logits: Tensor) -> tuple[LogitRule, float]:
    """What a model makes of its head's numbers (N, V), by its configuration's names; and how far off that is, at most.

    `logits` (N, V) are the model's own; the difference is relative to the largest of them.
    """
    cap = next((config[name] for name in CAPS if config.get(name)), None)
    named = [float(config[name]) for name in SCALES if config.get(name)]
    rules = [LogitRule(scale, cap) for scale in (1.0, *(s for value in named for s in (value, 1 / value)))]
    off = [float((rule.logits(heads.clone()) - logits).abs().max() / logits.abs().max()) for rule in rules]
    return rules[off.index(min(off))], min(off)


Measure = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor, Tensor | None]]
"""Of the head's numbers (n, V) float32 of some rows, which may be overwritten: a number and a verdict for each row, (n,), and
where it is asked for the gradient of each number with respect to the row, (n, V)."""


class _OfHead(torch.autograd.Function):
    """What `measure` makes of head · hidden per row, the head applied in chunks.

    With a frozen head the gradient of each number with respect to its hidden state is computed with the logits still at hand and
    kept, (N, D): backward is one multiplication, the logits are never computed twice. A trained head needs them again for its
    own gradient: then chunks are recomputed in backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, measure: Measure, elements: int) -> Any:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        keep = hidden.requires_grad and not trained
        found = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        hits = torch.empty(len(hidden), device=hidden.device, dtype=torch.bool)
        slope = torch.empty_like(hidden) if keep else None
        parts = _chunks(len(hidden), max(16, elements // len(weight)))
        for part in parts:
            found[part], hits[part], change = measure(F.linear(hidden[part], weight, bias).float(), part, keep)
            if slope is not None and change is not None:
                slope[part] = (change.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.trained, ctx.measure, ctx.parts = trained, measure, parts
        ctx.save_for_backward(*((hidden, weight, bias) if trained else (slope,)))
        ctx.mark_non_differentiable(hits)
        return found, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        if not ctx.trained:
            (slope,) = ctx.saved_tensors
            return slope * grad[:, None].to(slope.dtype), None, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32 over the chunks, whatever the dtype of the products.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=grad_weight.dtype)
        for part in ctx.parts:
            change = ctx.measure(F.linear(hidden[part], weight, bias).float(), part, True)[2]
            slope = change.mul_(grad[part, None]).to(weight.dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        grad_bias = None if grad_bias is None else grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, rows, size)]


class Head(NamedTuple):
    """What makes logits of hidden states; weight (V, D) and bias (V,) have their dtype."""

    weight: Tensor
    bias: Tensor | None
    rule: LogitRule = PLAIN_LOGITS

    def of(self, hidden: Tensor, measure: Measure, on_cuda: int = ON_CUDA) -> tuple[Tensor, Tensor]:
        """Numbers (N,) float32 and verdicts (N,) of hidden states (N, D). `on_cuda`: fewer where `measure` holds more."""
        elements = chunk_elements(self.weight.device.type, on_cuda)
        numbers, verdicts = _OfHead.apply(hidden, self.weight, self.bias, measure, elements)  # type: ignore[no-untyped-call]
        return numbers, verdicts


def token_logps(hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) float32 of `target` (N,) under the head, and whether each is the most likely token (N,).

    hidden: (N, D); the rule and the log-softmax are float32.
    """

    def measure(heads: Tensor, part: slice, slope: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, places = head.rule.logits(heads), target[part, None]
        top, chosen, change = logits.amax(-1, keepdim=True), logits.gather(-1, places), None
        inner = head.rule.slope(logits) if slope and head.rule != PLAIN_LOGITS else None
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if slope:
            # One-hot minus softmax before the product: afterwards, in bfloat16, the difference would be rounding noise.
            change = weights.div_(-total).scatter_add_(-1, places, torch.ones_like(total))
            change = change if inner is None else change.mul_(inner)
        return (chosen - top - total.log())[:, 0], (chosen >= top)[:, 0], change

    return head.of(hidden, measure)
