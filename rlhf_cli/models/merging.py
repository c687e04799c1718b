"""A role's adapter folded into copies of the base's weights while it samples; the originals stay and are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from transformers.pytorch_utils import Conv1D

from rlhf_cli.models.backbone import BASE, Backbone


@contextlib.contextmanager
def merged(backbone: Backbone, role: str) -> Iterator[None]:
    """Inside, `role` forwards without its adapter's extra products; no other role may.

    Each adapted linear layer points at a new tensor W + scaling · B A, computed in float32, and afterwards at its own again, the
    same memory: weights that are merged and unmerged by subtraction drift. Where a layer is no plain linear one (quantised, DoRA)
    the adapter stays as it is; a role without an adapter needs nothing.
    """
    backbone.activate(role)
    adapter = backbone.active
    layers = _mergeable(backbone)
    if not layers:
        yield
        return
    originals = [layer.base_layer.weight.data for layer in layers]
    backbone.activate(BASE)
    try:
        for layer, original in zip(layers, originals, strict=True):
            layer.base_layer.weight.data = _folded(layer, adapter, original)
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.base_layer.weight.data = original


def _mergeable(backbone: Backbone) -> list[Any]:
    """The layers that the active role's adapter changes; none where one of them cannot be merged."""
    role = backbone.active
    layers = [m for m in backbone.model.modules() if isinstance(m, LoraLayer) and role in (*m.lora_A, *m.lora_embedding_A)]
    plain = all(
        type(m) is Linear
        and type(m.base_layer) in (torch.nn.Linear, Conv1D)
        and role not in m.lora_variant
        and not m.lora_bias[role]
        for m in layers
    )
    return layers if plain else []


@torch.no_grad()
def _folded(layer: Any, adapter: str | None, weight: torch.Tensor) -> torch.Tensor:
    delta: torch.Tensor = layer.get_delta_weight(adapter)  # with PEFT's own scaling and orientation, in float32
    return delta.add_(weight).to(weight.dtype)
