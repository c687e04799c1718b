"""A role's adapter folded into copies of the base's weights while it samples, and weights packed for many small products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.backbone import BASE, Backbone

ROWS = 8
"""How many rows the packing is chosen for; the same one serves 3 to 64 rows 1.3 to 2.4 × as fast as F.linear, which packs anew
for every product (576 × 1536 in float32, AVX-512)."""

Folds = Mapping[torch.nn.Parameter, Callable[[], torch.Tensor]]
"""Weight → a function that makes another one for it, one adapter folded in."""


@contextlib.contextmanager
def merged(backbone: Backbone, role: str) -> Iterator[None]:
    """Inside, `role` forwards without its adapter's extra products; no other role may, and nothing can be learned.

    On a CPU in float32 the weights W + scaling · B A are made one by one and packed. Elsewhere each adapted linear layer points
    at such a tensor, and afterwards at its own again, the same memory: weights that are merged and unmerged by subtraction drift.
    The adapter stays as it is where a weight is no plain one (quantised, DoRA), or in half precision: most of a young
    adapter's B A is less than half a step of W's own numbers, and would be rounded away. A role without one needs nothing.
    """
    backbone.activate(role)
    adapter, layers = backbone.active, _mergeable(backbone)
    if layers:
        backbone.activate(BASE)
    folds = {_weight(layer): partial(_folded, layer, adapter) for layer in layers}
    tokens = [m for m in backbone.model.modules() if isinstance(m, TrainableTokensLayer) and adapter in m.token_indices]
    folds |= {m.base_layer.weight: partial(torch.no_grad()(m.get_merged_weights), [adapter]) for m in tokens if layers}
    packs = backbone.compute_dtype == torch.float32
    packable = {layer.weight for layer in backbone.model.modules() if packs and _can_pack(layer)}
    embedded = {m.base_layer.weight for m in tokens}  # tied ones are packed, and looked up
    rest = {weight: fold for weight, fold in folds.items() if weight not in packable or weight in embedded}
    with _swapped(rest), packed(backbone.model, folds) if packs else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def packed(model: Any, folds: Folds) -> Iterator[None]:
    """Inside, the float32 linear layers of a model on a CPU multiply by packed copies of their weights, or of those of `folds`.

    By oneDNN, through the operator that torch.compile uses for frozen models; nothing can be learned through it. Elsewhere
    nothing changes, nor in adapters, which are off, where `folds` has one of them. The layers' own weights are not touched.
    """
    layers = [layer for name, layer in model.named_modules() if _can_pack(layer) and not (folds and ".lora_" in name)]
    try:
        for layer in layers:
            weight = folds[layer.weight]() if layer.weight in folds else layer.weight.detach()
            copy = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            # On the instance, where it comes before the method of its class.
            vars(layer)["forward"] = partial(_multiply, copy, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


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
        (type(m) is ParamWrapper or (type(m) is Linear and type(m.base_layer) in (torch.nn.Linear, Conv1D)))
        and _weight(m).dtype == torch.float32
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
    """W + scaling · B A."""
    delta: torch.Tensor = layer.get_delta_weight(adapter)  # with PEFT's own scaling and orientation
    return delta.add_(_weight(layer))
