"""A role's adapter folded into copies of the base's weights while it samples; the originals stay and are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.packed import Folds, can_pack, packed


@contextlib.contextmanager
def merged(backbone: Backbone, role: str) -> Iterator[None]:
    """Inside, `role` forwards without its adapter's extra products; no other role may, and nothing can be learned.

    On a CPU in float32 the weights W + scaling · B A are made one by one and packed. Elsewhere each adapted linear layer points
    at such a tensor, and afterwards at its own again, the same memory: weights that are merged and unmerged by subtraction drift.
    The adapter stays as it is where a layer is no plain linear one (quantised, DoRA), or in half precision: most of a young
    adapter's B A is less than half a step of W's own numbers, and would be rounded away. A role without one needs nothing.
    """
    backbone.activate(role)
    adapter, layers = backbone.active, _mergeable(backbone)
    if layers:
        backbone.activate(BASE)
    folds = {layer.base_layer: partial(_folded, layer, adapter) for layer in layers}
    if backbone.compute_dtype != torch.float32:
        with _swapped(folds):
            yield
        return
    rest = {layer: fold for layer, fold in folds.items() if not can_pack(layer)}
    with _swapped(rest), packed(backbone.model, folds):
        yield


@contextlib.contextmanager
def _swapped(folds: Folds) -> Iterator[None]:
    originals = {layer: layer.weight.data for layer in folds}
    try:
        for layer, fold in folds.items():
            layer.weight.data = fold()
        yield
    finally:
        for layer, original in originals.items():
            layer.weight.data = original


def _mergeable(backbone: Backbone) -> list[Any]:
    """The layers that the active role's adapter changes; none where one of them cannot be merged."""
    role = backbone.active
    layers = [m for m in backbone.model.modules() if isinstance(m, LoraLayer) and role in (*m.lora_A, *m.lora_embedding_A)]
    plain = all(
        type(m) is Linear
        and type(m.base_layer) in (torch.nn.Linear, Conv1D)
        and m.base_layer.weight.dtype == torch.float32
        and role not in m.lora_variant
        and not m.lora_bias[role]
        for m in layers
    )
    return layers if plain else []


@torch.no_grad()
def _folded(layer: Any, adapter: str | None) -> torch.Tensor:
    """W + scaling · B A."""
    delta: torch.Tensor = layer.get_delta_weight(adapter)  # with PEFT's own scaling and orientation
    return delta.add_(layer.base_layer.weight)
