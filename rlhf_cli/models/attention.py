"""Attention over packed trees: one kernel call per prompt and per branch, so that no masked pair is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from rlhf_cli.data.trees import Batch, Layout, Segment, sees, visible

TREES = "rlhf_trees"  # under which transformers finds `tree_attention`; it hands on the model's keyword `segments`

PLAIN = "plain"


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Exact attention of the tree layout; query (R, H, L, D), key and value (R, H_kv, L, D) → (R, L, H, D).

    Equal to a dense softmax under `visible`, at the cost of the visible part alone. Padding gets zeros. It has ten arguments
    because transformers calls it so, as it does every attention. Raises NotImplementedError for attention with dropout or a
    softcap: the caller falls back to a mask.
    """
    if dropout or softcap is not None:
        raise NotImplementedError("tree attention has neither dropout nor softcap")
    rows = []
    for row in range(query.shape[0]):
        mine = [segment for segment in segments if segment.row == row]
        shared = mine[-1].shared if mine else 0
        sizes = [[*_sizes(segment)] for segment in mine]
        if shared:
            sizes[0][0] -= shared
            sizes.insert(0, [shared])
        used = [size for own in sizes for size in own]
        rest = query.shape[2] - sum(used)
        # split and not slices: its backward is one concatenation, where every slice's would fill a tensor of the whole row.
        split = zip(*(torch.split(x[row : row + 1], [*used, rest], 2) for x in (query, key, value)), strict=True)
        begins = next(split) if shared else None
        parts: list[torch.Tensor] = []
        for segment in mine:
            prompt, *branches = (next(split) for _ in _sizes(segment))
            # What all prompts begin with is computed again for every tree, so that the kernel has a plain causal sequence.
            q, k, v = prompt if begins is None else (torch.cat(pair, 2) for pair in zip(begins, prompt, strict=True))
            parts.append(_causal(q, k, v, scaling, sliding_window)[segment.shared :])
            for q, own_k, own_v in branches:
                parts.append(_causal(q, torch.cat((k, own_k), 2), torch.cat((v, own_v), 2), scaling, sliding_window))
        if rest:
            parts.append(query.new_zeros(rest, query.shape[1], value.shape[3]))
        rows.append(torch.cat(parts))
    return torch.stack(rows) if len(rows) > 1 else rows[0][None], None


def _sizes(segment: Segment) -> tuple[int, ...]:
    """Prompt and branches; a prompt with a single branch is one causal sequence."""
    return (segment.prompt, *segment.branches) if len(segment.branches) > 1 else (segment.prompt + segment.branches[0],)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
    """(length, H, D): the last len(q) tokens of a sequence of len(k) attend causally."""
    tokens, context = q.shape[2], k.shape[2]
    mask = None
    if tokens != context or (window is not None and window < context):
        age = torch.arange(context - tokens, context, device=q.device)[:, None] - torch.arange(context, device=q.device)
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def additive_mask(batch: Batch, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """`visible` as eager attention takes it: 0, and the lowest number of the dtype."""
    seen = visible(batch, window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def block_mask(batch: Batch, window: int | None, dtype: torch.dtype) -> Any:
    """`visible` as flex attention's BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = batch.ids.shape
    return create_block_mask(sees(batch, window), rows, None, length, length, device=batch.ids.device)


@dataclass(frozen=True)
class Kernel:
    """How attention runs: its name in transformers (PLAIN: what the model was loaded with), and the layout that suits it."""

    name: str
    layout: Layout
    mask: Callable[[Batch, int | None, torch.dtype], Any] | None  # of a batch, under a window, in a dtype

    def arguments(self, batch: Batch, layer_types: Sequence[str], window: int | None, dtype: torch.dtype) -> dict[str, Any]:
        """What a model's forward takes beside the ids. `window`: of its sliding layers or, where it names no kinds, of all."""
        if self.layout == "alone":
            return {}
        if self.mask is None:
            return {"position_ids": batch.positions, "segments": batch.segments}
        windows = {kind: window if kind == "sliding_attention" else None for kind in layer_types} or {"": window}
        masks = {kind: self.mask(batch, limit, dtype) for kind, limit in windows.items()}
        # Models with one kind of layer take one mask, models with two a dict of them.
        return {"position_ids": batch.positions, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


KERNELS = {
    "trees": Kernel(TREES, "long", None),
    "sdpa": Kernel("sdpa", "packed", lambda batch, window, _: visible(batch, window)),
    "eager": Kernel("eager", "packed", additive_mask),
    "flex": Kernel("flex_attention", "long", block_mask),
    "flash": Kernel("flash_attention_2", "alone", None),
    "alone": Kernel(PLAIN, "alone", None),
}
"""Setting → kernel. trees and alone are not settings: `auto` chooses trees on a CPU, where one call per tree costs less than
the masked part, and alone is what remains for a model that takes no mask."""

CANDIDATES = {
    "auto": ("sdpa", "eager", "alone"),
    "sdpa": ("sdpa", "alone"),
    "eager": ("eager", "alone"),
    "flex": ("flex", "alone"),
    "flash": ("flash",),
}
"""Setting → kernels in the order in which they are tried."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose mask `visible` can give; models with others get each response in a row of its own."""

AttentionInterface.register(TREES, tree_attention)
