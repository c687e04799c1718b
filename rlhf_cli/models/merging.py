"""A role's adapter folded into copies of the base's weights while it samples, and weights packed for many small products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.fused import LoraLinear, is_plain
from rlhf_cli.models.memory import gpu_memory

ROWS = 8
"""How many rows the packing is chosen for; the same one serves 3 to 64 rows 1.3 to 2.4 × as fast as F.linear, which packs anew
for every product (576 × 1536 in float32, AVX-512)."""

KEPT = 0.9
"""The least share of an adapter that must be left of it in half precision; with less it stays beside its layers."""
COPIES = 0.5
"""Of a GPU's memory, what all models and the weights with the adapter inside may take together."""

Folds = Mapping[torch.nn.Parameter, Callable[[], torch.Tensor]]
"""Weight → a function that makes another one for it, one adapter folded in."""


@contextlib.contextmanager
def merged(backbone: Backbone, role: str) -> Iterator[float | None]:
    """Inside, `role` forwards with as few products as its adapter allows; no other role may, and nothing can be learned.

    On a CPU in float32 the weights W + scaling · B A are made one by one and packed. Elsewhere each adapted linear layer points
    at such a tensor, and afterwards at its own again, the same memory: weights that are merged and unmerged by subtraction drift.
    In half precision the sum of float32 is rounded; yields the share of the adapter that this leaves, else None. Most of a young
    one's B A is less than half a step of W's own numbers: then it stays beside its layers, as two thin products. It stays as
    it is where a weight is no plain one (quantised, DoRA). Weights that train in float32 are cast once, and not for every token.
    """
    backbone.activate(role)
    adapter, layers, dtype = backbone.active, _mergeable(backbone), backbone.compute_dtype
    packs, kept = dtype == torch.float32, None
    if not packs:
        kept = _kept(backbone, layers, adapter)
        layers = layers if kept is not None and kept >= KEPT else []
    apart = [] if layers or packs else [m for m in backbone.model.modules() if is_plain(m, adapter)]
    if layers:
        backbone.activate(BASE)
    folds: dict[torch.nn.Parameter, Callable[[], torch.Tensor]] = {_weight(m): partial(_folded, m, adapter) for m in layers}
    tokens = [m for m in backbone.model.modules() if isinstance(m, TrainableTokensLayer) and adapter in m.token_indices]
    folds |= {m.base_layer.weight: partial(torch.no_grad()(m.get_merged_weights), [adapter]) for m in tokens if layers}
    packable = {layer.weight for layer in backbone.model.modules() if packs and _can_pack(layer)}
    embedded = {m.base_layer.weight for m in tokens}  # tied ones are packed, and looked up
    rest = {weight: fold for weight, fold in folds.items() if weight not in packable or weight in embedded}
    if not packs and backbone.shards is None:
        rest = _casts(backbone.model, dtype) | rest
    forwards = {layer: _beside(layer, adapter, dtype) for layer in apart}
    with _swapped(rest), _forwarding(forwards), packed(backbone.model, folds) if packs else contextlib.nullcontext():
        yield kept


@contextlib.contextmanager
def packed(model: Any, folds: Folds) -> Iterator[None]:
    """Inside, the float32 linear layers of a model on a CPU multiply by packed copies of their weights, or of those of `folds`.

    By oneDNN, through the operator that torch.compile uses for frozen models; nothing can be learned through it. Elsewhere
    nothing changes, nor in adapters, which are off, where `folds` has one of them. The layers' own weights are not touched.
    """
    layers = [layer for name, layer in model.named_modules() if _can_pack(layer) and not (folds and ".lora_" in name)]
    weights = (folds[layer.weight]() if layer.weight in folds else layer.weight.detach() for layer in layers)
    copies = (torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) for weight in weights)
    with _forwarding({layer: partial(_multiply, copy, layer.bias) for layer, copy in zip(layers, copies, strict=True)}):
        yield


@contextlib.contextmanager
def _forwarding(forwards: Mapping[torch.nn.Module, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Inside, these modules forward by these functions."""
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward  # on the instance, where it comes before the method of its class
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _can_pack(layer: torch.nn.Module) -> bool:
    """Is it a float32 linear layer on a CPU, and has torch oneDNN?"""
    if type(layer) is not torch.nn.Linear or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.no_grad()
def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@contextlib.contextmanager
def _swapped(folds: Folds) -> Iterator[None]:
    originals = {weight: weight.data for weight in folds}
    try:
        for weight, fold in folds.items():
            weight.data = fold()
        yield
    finally:
        for weight, original in originals.items():
            weight.data = original


def _mergeable(backbone: Backbone) -> list[Any]:
    """The layers that the active role's adapter changes; none where one of them cannot be merged."""
    role = backbone.active
    layers = [m for m in backbone.model.modules() if isinstance(m, LoraLayer) and role in (*m.lora_A, *m.lora_embedding_A)]
    plain = all(
        (type(m) is ParamWrapper or (type(m) in (Linear, LoraLinear) and type(m.base_layer) in (torch.nn.Linear, Conv1D)))
        and _weight(m).dtype == backbone.compute_dtype
        and role not in m.lora_variant
        and not m.lora_bias[role]
        for m in layers
    )
    return layers if plain else []


def _weight(layer: Any) -> torch.nn.Parameter:
    """What a layer's adapter changes."""
    found: torch.nn.Parameter = layer.get_param() if type(layer) is ParamWrapper else layer.base_layer.weight
    return found


@torch.no_grad()
def _folded(layer: Any, adapter: str | None) -> torch.Tensor:
    """W + scaling · B A, in W's dtype of a sum in float32."""
    delta: torch.Tensor = layer.get_delta_weight(adapter)  # with PEFT's own scaling and orientation
    return delta.float().add_(_weight(layer)).to(_weight(layer).dtype)


@torch.no_grad()
def _kept(backbone: Backbone, layers: list[Any], adapter: str | None) -> float | None:
    """1 − ‖what rounding takes off scaling · B A, or adds to it‖ / ‖scaling · B A‖, of all layers together.

    None where the device has no room for a second copy of them: by all its memory, so that a resumed run does the same.
    """
    needed = sum(p.nbytes for host in backbone.hosts for p in host.model.parameters()) + sum(_weight(m).nbytes for m in layers)
    if not layers or backbone.shards or (backbone.device.type != "cpu" and needed > COPIES * gpu_memory(backbone.device)[1]):
        return None
    norms = []
    for layer in layers:
        delta = layer.get_delta_weight(adapter).float()
        norms.append(torch.stack(((_weight(layer) + delta - _folded(layer, adapter)).norm(), delta.norm())))
    lost, whole = torch.stack(norms).norm(dim=0).tolist()
    return 1 - lost / whole if whole else 1.0


@torch.no_grad()
def _beside(layer: Any, adapter: str | None, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The layer's own output + x Aᵀ (scaling · Bᵀ): three kernels, and the sum is rounded once."""
    a, b = layer.lora_A[adapter].weight.to(dtype), (layer.scaling[adapter] * layer.lora_B[adapter].weight.T).to(dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer.base_layer(x).to(dtype)
        found.view(-1, b.shape[1]).addmm_(F.linear(x.to(dtype), a).view(-1, len(b)), b)
        return found

    return forward


def _casts(model: Any, dtype: torch.dtype) -> dict[torch.nn.Parameter, Callable[[], torch.Tensor]]:
    """Casts of what autocast would cast for every token: of linear layers, but for those that are looked up too."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    layers = [m for name, m in model.named_modules() if type(m) in (torch.nn.Linear, Conv1D) and ".lora_" not in name]
    own = (p for layer in layers for p in layer.parameters(recurse=False) if id(p) not in embedded)
    return {p: partial(p.detach().to, dtype) for p in own if p.dtype == torch.float32}
