"""What layers are made of, by fewer operations than transformers and PEFT take: the same numbers, but for rounding.

Linear layers with adapters, gated layers, RMSNorm, and rotary embeddings: each is one function with a backward of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor
from torch.nn import functional as F

ROTARY = "apply_rotary_pos_emb"
"""What models of transformers call the function that turns queries and keys."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same input."""
TOLERANCE = 1e-5
BROKEN = (RuntimeError, TypeError, ValueError, LookupError, ImportError)
"""What a model may raise where it is called in a way that it does not know: that is its own affair."""


def fuse(model: torch.nn.Module) -> None:
    """Have a model's RMSNorms, gated layers and rotary embeddings computed so, where that gives the model's own numbers."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_rms_norm(module):
            module.forward = MethodType(_norm, module)
        elif type(module).__name__.endswith("MLP") and _is_gated(module):
            module.forward = MethodType(_feed_forward, module)
        known = getattr(type(module).forward, "__globals__", {})
        if (turn := known.get(ROTARY)) is not None and not isinstance(turn, Rotary) and _is_rotary(turn):
            known[ROTARY] = Rotary(turn)


def fuse_lora(model: torch.nn.Module) -> None:
    """Have a model's plain linear layers with adapters forward so; other kinds (quantised, Conv1D, experts) stay PEFT's."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear:
            module.__class__ = LoraLinear
    for module in model.modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), LoraLinear)]
            if len(layers) == len(names):
                siblings = Siblings(layers)
                for layer in layers:
                    layer.siblings = siblings


def is_plain(layer: Any, adapter: str | None) -> bool:
    """Does the adapter add scaling · B A x to the layer's output, and nothing else?"""
    linear = isinstance(layer, LoraLayer) and adapter in layer.lora_A and type(layer.lora_A[adapter]) is torch.nn.Linear
    return linear and type(layer) is not ParamWrapper and not layer.lora_bias[adapter] and adapter not in layer.lora_variant


class LoraLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's layer, with its adapter on the thin side and sums in place; where more than an adapter is asked for PEFT's own."""

    siblings: Siblings | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor
        adapter = None if args or kwargs else self.plain_adapter()
        if adapter is None:
            found = super().forward(x, *args, **kwargs)
        elif self.drops(adapter):
            (found,) = _adapted([self], adapter, x, self.lora_dropout[adapter](x))
        elif self.siblings is None:
            (found,) = _adapted([self], adapter, x)
        else:
            found = self.siblings.output(self, adapter, x)
        return found

    def plain_adapter(self) -> str | None:
        """The adapter, where one is active that `is_plain`, beside a frozen weight."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        special = (self.disable_adapters, self.merged, base.weight.requires_grad, "forward" in vars(base))
        return None if any(special) or len(adapters) != 1 or not is_plain(self, adapters[0]) else adapters[0]

    def drops(self, adapter: str) -> bool:
        """Does dropout change the adapter's input?"""
        dropout = self.lora_dropout[adapter]
        return bool(dropout.training and getattr(dropout, "p", 0))


class Siblings:
    """Layers that read the same input: the first that is called with it computes the outputs of all."""

    waiting: ClassVar[tuple[Tensor, int, dict[LoraLinear, Tensor]] | None] = None
    """An input, its version (it may be changed in place), and the outputs not yet asked for: of the layers called last."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers

    def output(self, layer: LoraLinear, adapter: str, x: Tensor) -> Tensor:
        found = dict[LoraLinear, Tensor]()
        if self.waiting is not None and self.waiting[0] is x and self.waiting[1] == x._version:
            found = self.waiting[2]
        if layer not in found:
            alike = all(each.plain_adapter() == adapter and not each.drops(adapter) for each in self.layers)
            layers = self.layers if alike else [layer]
            found = dict(zip(layers, _adapted(layers, adapter, x), strict=True))
        output = found.pop(layer)
        Siblings.waiting = (x, x._version, found) if found else None
        return output


def _adapted(layers: list[LoraLinear], adapter: str, x: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, ...]:
    """Outputs of layers that read the same input; `dropped`: what the adapters read, if not that."""
    scales, given = [layer.scaling[adapter] for layer in layers], list[Tensor | None]()
    for layer in layers:
        given += layer.base_layer.weight, layer.base_layer.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    found: tuple[Tensor, ...] = _Adapted.apply(x, dropped, scales, *given)  # type: ignore[no-untyped-call]
    return found


class _Adapted(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · d Aᵀ Bᵀ of x (…, in), for each W (out, in), A (r, in), B (out, r); d is x, or x after dropout.

    W and the bias are frozen. The products with all A are one. Computed in the dtype of autocast, or else in that of W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, scales: list[float], *given: Any) -> tuple[Tensor, ...]:
        weights, biases, a, b = (given[first::4] for first in range(4))
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights[0].dtype
        read = (x if dropped is None else dropped).to(dtype).flatten(0, -2)
        thin, cast, found = F.linear(read, _rows(a, dtype)), x.to(dtype), list[Tensor]()
        ranks = [len(each) for each in a]
        for weight, bias, own, wide, scale in zip(weights, biases, torch.split(thin, ranks, 1), b, scales, strict=True):
            out = F.linear(cast, weight.to(dtype), None if bias is None else bias.to(dtype))
            out.view(len(thin), -1).addmm_(own, wide.to(dtype).T, alpha=scale)
            found.append(out)
        ctx.save_for_backward(read, thin, *weights, *a, *b)
        ctx.ranks, ctx.scales, ctx.shape, ctx.dtype = ranks, scales, x.shape, x.dtype
        ctx.dropped = None if dropped is None else dropped.dtype
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        n = len(grads)
        read, thin, *saved = ctx.saved_tensors
        weights, a, b = saved[:n], saved[n : 2 * n], saved[2 * n :]
        rows = [grad.flatten(0, -2) for grad in grads]
        dtype, parts = rows[0].dtype, torch.split(thin, ctx.ranks, 1)
        back = torch.empty_like(thin)
        for own, grad, wide, scale in zip(torch.split(back, ctx.ranks, 1), rows, b, ctx.scales, strict=True):
            torch.mm(grad, wide.to(dtype) * scale, out=own)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = rows[0] @ weights[0].to(dtype)
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                of_x.addmm_(grad, weight.to(dtype))
            of_x = of_x if ctx.dropped else of_x.addmm_(back, _rows(a, dtype))
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        if ctx.dropped and ctx.needs_input_grad[1]:
            of_dropped = (back @ _rows(a, dtype)).view(ctx.shape).to(ctx.dropped)
        of_a = torch.split((back.T @ read).to(a[0].dtype), ctx.ranks)
        of_b = [(own.T @ grad).mul_(scale).T.to(b[0].dtype) for own, grad, scale in zip(parts, rows, ctx.scales, strict=True)]
        of_layers = [(None, None, *each) for each in zip(of_a, of_b, strict=True)]
        return of_x, of_dropped, None, *itertools.chain.from_iterable(of_layers)


def _rows(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One matrix of the rows of all."""
    return (torch.cat(tuple(matrices)) if len(matrices) > 1 else matrices[0]).to(dtype)


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


def _is_gated(module: torch.nn.Module) -> bool:
    if type(module._modules.get("act_fn")).__name__ != "SiLUActivation":
        return False
    stub = copy.copy(module)  # with functions in the place of its layers
    layers = {"gate_proj": torch.sin, "up_proj": torch.cos, "down_proj": torch.exp}
    stub.__dict__["_modules"] = module._modules | layers
    return _same(partial(_feed_forward, stub), partial(type(stub).forward, stub), torch.linspace(-3, 5, 8).view(2, 4))


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    """The forward of down(silu(gate(x)) · up(x))."""
    found: Tensor = module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return found


class _Gated(torch.autograd.Function):
    """silu(gate) · up, elementwise, which keeps nothing but the two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        of_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, F.silu(gate).mul_(grad)


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
