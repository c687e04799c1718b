"""What layers are made of, by fewer operations than transformers and PEFT take: the same numbers, but for rounding.

Linear layers with an adapter, RMSNorm, and rotary embeddings: each is one function with a backward of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor
from torch.nn import functional as F

ROTARY = "apply_rotary_pos_emb"
"""What models of transformers call the function that turns queries and keys."""
TOLERANCE = 1e-5
BROKEN = (RuntimeError, TypeError, ValueError, LookupError, ImportError)
"""What a model may raise where it is called in a way that it does not know: that is its own affair."""


def fuse(model: torch.nn.Module) -> None:
    """Have a model's RMSNorms and rotary embeddings computed so, where that gives what they give on random numbers."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_rms_norm(module):
            module.forward = MethodType(_norm, module)
        known = getattr(type(module).forward, "__globals__", {})
        if (turn := known.get(ROTARY)) is not None and not isinstance(turn, Rotary) and _is_rotary(turn):
            known[ROTARY] = Rotary(turn)


def fuse_lora(model: torch.nn.Module) -> None:
    """Have a model's plain linear layers with adapters forward so; other kinds (quantised, Conv1D, experts) stay PEFT's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear:
            module.__class__ = LoraLinear


def is_plain(layer: Any, adapter: str | None) -> bool:
    """Does the adapter add scaling · B A x to the layer's output, and nothing else?"""
    linear = isinstance(layer, LoraLayer) and adapter in layer.lora_A and type(layer.lora_A[adapter]) is torch.nn.Linear
    return linear and type(layer) is not ParamWrapper and not layer.lora_bias[adapter] and adapter not in layer.lora_variant


class LoraLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer, with the scale on the thin side and sums in place; where more than an adapter is asked for PEFT's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        special = (args, kwargs, self.disable_adapters, self.merged, base.weight.requires_grad, "forward" in vars(base))
        if any(special) or len(adapters) != 1 or not is_plain(self, adapters[0]):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        (adapter,) = adapters
        dropout = self.lora_dropout[adapter]
        dropped = dropout(x) if dropout.training and getattr(dropout, "p", 0) else None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        own: Tensor = _Adapted.apply(x, dropped, base.weight, base.bias, a, b, self.scaling[adapter])  # type: ignore[no-untyped-call]
        return own


class _Adapted(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · d Aᵀ Bᵀ of x (…, in), W (out, in), A (r, in), B (out, r); d is x, or x after dropout.

    W and the bias are frozen. Computed in the dtype of autocast, or else in that of W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        given = (x if dropped is None else dropped).to(dtype).flatten(0, -2)
        thin = F.linear(given, a.to(dtype)).mul_(scale)
        found = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        found.view(len(thin), -1).addmm_(thin, b.to(dtype).T)
        ctx.save_for_backward(given, thin, weight, a, b)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        ctx.dropped = None if dropped is None else dropped.dtype
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        given, thin, weight, a, b = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        back = (rows @ b.to(rows.dtype)).mul_(ctx.scale)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = rows @ weight.to(rows.dtype)
            of_x = of_x if ctx.dropped else of_x.addmm_(back, a.to(rows.dtype))
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        if ctx.dropped and ctx.needs_input_grad[1]:
            of_dropped = (back @ a.to(rows.dtype)).view(ctx.shape).to(ctx.dropped)
        of_a = (back.T @ given).to(a.dtype) if ctx.needs_input_grad[4] else None
        of_b = (thin.T @ rows).T.to(b.dtype) if ctx.needs_input_grad[5] else None
        return of_x, of_dropped, None, None, of_a, of_b, None


def _same(found: Callable[..., Any], known: Callable[..., Any], *given: Any) -> bool:
    """Do both give the same?"""
    try:
        pairs = zip(found(*given), known(*given), strict=True)
        return all(one.dtype == other.dtype and torch.allclose(one, other, TOLERANCE, TOLERANCE) for one, other in pairs)
    except (*BROKEN, AttributeError):
        return False


def _is_rms_norm(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not isinstance(_epsilon(module), float):
        return False
    stub = copy.copy(module)  # with other weights, on the CPU: the module's own may be in shards
    stub.__dict__["_parameters"] = {"weight": torch.linspace(-1, 2, len(weight))}
    x = torch.linspace(-3, 5, 2 * len(weight)).view(2, -1)
    return _same(partial(_norm, stub), partial(type(stub).forward, stub), x)


def _epsilon(module: torch.nn.Module) -> Any:
    return vars(module).get("variance_epsilon", vars(module).get("eps"))


def _norm(module: Any, x: Tensor) -> Tensor:
    """The forward of an RMSNorm: torch's own kernel on a GPU; in half precision on a CPU what the model has."""
    if x.device.type == "cuda":
        with torch.autocast("cuda", enabled=False):  # else in float32, with casts before and after it
            return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), _epsilon(module))
    found: Tensor
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        found = type(module).forward(module, x)
    else:
        found = _RmsNorm.apply(x, module.weight, _epsilon(module))  # type: ignore[no-untyped-call]
    return found


class _RmsNorm(torch.autograd.Function):
    """y = w x / √(mean x² + ε) of x (…, D) and w (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        found: Tensor = (x * inverse).mul_(weight)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * x).mul_(inverse).flatten(0, -2).sum(0)
        # ∂ℓ/∂x = i (g w) − i³ x ((g w) · x) / D, with i the inverse root
        scaled = grad * weight
        along = torch.einsum("...d,...d->...", scaled, x)[..., None] * inverse**3 / x.shape[-1]
        return scaled.mul_(inverse).addcmul_(x, along, value=-1), of_weight, None


class Rotary:
    """A model's function that turns queries and keys (…, d) by cos and sin (R, L, d), whose halves are alike.

    What it is not made for (a part of the width, other shapes) goes to the model's own.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *given: Any, **named: Any) -> Any:
        same = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype and cos.dim() == 3
        if given or named or not same or cos.requires_grad:
            return self.plain(q, k, cos, sin, *given, **named)
        cos, sin = cos[:, None], sin[:, None]
        return _Turn.apply(q, cos, sin), _Turn.apply(k, cos, sin)  # type: ignore[no-untyped-call]


def _is_rotary(turn: Callable[..., Any]) -> bool:
    q, angles = torch.linspace(-2, 3, 48).view(1, 2, 3, 8), torch.linspace(0, 4, 12).view(1, 3, 4).repeat(1, 1, 2)
    return _same(Rotary(turn), turn, q, q[:, :1], angles.cos(), angles.sin())


class _Turn(torch.autograd.Function):
    """(x₁ cos − x₂ sin, x₂ cos + x₁ sin) of the halves x₁, x₂ of x (R, H, L, d); cos and sin (R, 1, L, d) are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """By the angle, or back by it (`way` −1)."""
    half = x.shape[-1] // 2
    found = x * cos
    found[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-way)
    found[..., half:].addcmul_(x[..., :half], sin[..., half:], value=way)
    return found
