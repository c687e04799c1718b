"""Attention over packed trees: a kernel call per prompt and per branch, or one for all, so that no masked pair is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from rlhf_cli.data.trees import Batch, Layout, Segment, sees, visible

TREES, VARLEN = "rlhf_trees", "rlhf_varlen"
"""Under which transformers finds `tree_attention`, by calls and at once; it hands on the model's keyword `segments`."""

PLAIN = "plain"


class Sequences(NamedTuple):
    """A pass as sequences whose last tokens alone ask: each prompt, and each branch behind what it sees of its tree."""

    queries: torch.Tensor  # (S + 1,) int32: where the tokens of each begin, in the flat rows, and where the last one's end
    keys: torch.Tensor  # (S + 1,) int32: the same of all that each consists of
    places: torch.Tensor  # (K,) int64: which tokens of the flat rows those are
    longest: tuple[int, int]  # numbers of asking tokens, and of all


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment] | Sequences,
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
    if isinstance(segments, Sequences):
        return _at_once(query, key, value, segments, scaling, sliding_window), None
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


def lay_sequences(batch: Batch) -> Sequences:
    """Of a pass, on its device; padding is a sequence of its own."""
    length, asking, seen = batch.ids.shape[1], list[int](), list[np.ndarray]()
    for row in range(len(batch.ids)):
        at = row * length
        for segment in (segment for segment in batch.segments if segment.row == row):
            before = np.arange(row * length, row * length + segment.shared)
            for number, size in enumerate(_sizes(segment)):
                asking.append(size)
                seen.append(np.concatenate((before, np.arange(at, at + size))))
                before, at = before if number else seen[-1], at + size
        asking.append((row + 1) * length - at)
        seen.append(np.arange(at, at + asking[-1]))
    sizes = np.array([(new, len(all_of_it)) for new, all_of_it in zip(asking, seen, strict=True) if new], np.int32)
    parts = *np.concatenate((np.zeros((1, 2), np.int32), sizes.cumsum(0, np.int32))).T, np.concatenate(seen)
    queries, keys, places = (torch.tensor(part).to(batch.ids.device, non_blocking=True) for part in parts)
    return Sequences(queries, keys, places, (int(sizes[:, 0].max()), int(sizes[:, 1].max())))


def _at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Sequences, scale: float | None, window: int | None
) -> torch.Tensor:
    """(R, L, H, D), by torch's flash kernel, which a GPU has for half precision; raises what that raises."""
    from torch.nn.attention import varlen

    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    k, v = k.index_select(0, of.places), v.index_select(0, of.places)
    seen = -1 if window is None else window - 1, 0  # so many before a token, none behind it
    grouped = q.shape[1] != k.shape[1]
    out: Any = varlen.varlen_attn(q, k, v, of.queries, of.keys, *of.longest, scale=scale, window_size=seen, enable_gqa=grouped)
    found: torch.Tensor = out.view(len(query), -1, *out.shape[1:])
    return found


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
            segments = lay_sequences(batch) if self.name == VARLEN else batch.segments
            return {"position_ids": batch.positions, "segments": segments}
        windows = {kind: window if kind == "sliding_attention" else None for kind in layer_types} or {"": window}
        masks = {kind: self.mask(batch, limit, dtype) for kind, limit in windows.items()}
        # Models with one kind of layer take one mask, models with two a dict of them.
        return {"position_ids": batch.positions, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


KERNELS = {
    "varlen": Kernel(VARLEN, "long", None),
    "trees": Kernel(TREES, "long", None),
    "sdpa": Kernel("sdpa", "packed", lambda batch, window, _: visible(batch, window)),
    "eager": Kernel("eager", "packed", additive_mask),
    "flex": Kernel("flex_attention", "long", block_mask),
    "flash": Kernel("flash_attention_2", "alone", None),
    "alone": Kernel(PLAIN, "alone", None),
}
"""Setting → kernel. varlen, trees and alone are not settings, but what `auto` may choose: trees on a CPU, where one call per tree
costs less than the masked part, and alone for a model that takes no mask."""

CANDIDATES = {
    "auto": ("sdpa", "eager", "alone"),
    "auto, cpu": ("trees", "sdpa", "eager", "alone"),
    "auto, cuda": ("varlen", "sdpa", "eager", "trees", "alone"),
    "sdpa": ("sdpa", "alone"),
    "eager": ("eager", "alone"),
    "flex": ("flex", "alone"),
    "flash": ("flash",),
}
"""Setting, where it matters with the type of device → kernels in the order in which they are tried; of auto on CUDA the fastest
comes first, where that can be measured."""


def find_candidates(setting: str, device: str) -> tuple[str, ...]:
    """The kernels that may run on a type of device, in order. `setting`: a recipe's, or the name of a kernel that is to stay."""
    if setting != "auto" and setting in CANDIDATES:
        return CANDIDATES[setting]
    kept = (key for key, kernel in KERNELS.items() if setting == kernel.name)
    return *kept, *CANDIDATES.get(f"auto, {device}", CANDIDATES["auto"])


LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose mask `visible` can give; models with others get each response in a row of its own."""

for _name in (TREES, VARLEN):
    AttentionInterface.register(_name, tree_attention)
