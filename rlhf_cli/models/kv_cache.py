"""A key-value cache in memory that is allocated once: every row's next token lies in the same column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

STEP = 256
"""By how many columns what is attended to grows on a GPU."""


@dataclass
class _Place:
    """Where all layers write."""

    rows: int
    width: int
    column: int  # of the next token
    at: torch.Tensor  # the same on the device, (1,) int64
    live: int = 0  # rows in use, the first ones
    copies: torch.Tensor | None = None  # while prompts are read: which of them each of the rows after the live ones is

    @property
    def seen(self) -> int:
        """The first so many columns are attended to: on a GPU more than are filled, lest every token have its own shapes."""
        step = 1 if self.at.device.type == "cpu" else STEP
        return min(self.width, -(-(self.column + 1) // step) * step)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one attention layer, (rows, heads, width, D) each."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros: a masked column has weight 0, and 0 · NaN would not be 0.
        self.keys, self.values = (
            new.new_zeros(self.place.rows, new.shape[1], self.place.width, new.shape[3]) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what is new; returns all that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        if place.copies is not None:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                rows = new[place.copies]
                kept[place.live : place.live + len(rows), :, place.column - new.shape[2] : place.column] = rows
            return key_states, value_states
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[: place.live].index_copy_(2, place.at, new)
        return self.keys[: place.live, :, : place.seen], self.values[: place.live, :, : place.seen]

    def get_seq_length(self) -> int:
        return self.place.column

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.column + query_length, 0

    def get_max_length(self) -> int:
        return self.place.width


class RowCache(Cache):  # type: ignore[misc]
    """Rows whose prompts end in one column, `prompt` - 1; what follows is appended to all of them at once."""

    def __init__(self, rows: int, prompt: int, more: int, device: torch.device) -> None:
        """`prompt`: tokens of the longest prompt; `more`: tokens that may follow it."""
        self.place = _Place(rows, prompt + more, prompt, torch.full((1,), prompt, device=device))
        super().__init__(layer_class_to_replicate=lambda: _Layer(self.place))

    @contextmanager
    def prompts(self, copies: Sequence[int]) -> Iterator[torch.Tensor]:
        """Inside are read prompts that see themselves alone, the i-th for `copies[i]` rows; yields which each new row has."""
        self.place.copies = torch.from_numpy(np.repeat(np.arange(len(copies)), copies)).to(self.place.at.device)
        yield self.place.copies
        self.place.copies = None
        self.place.live += sum(copies)

    def advance(self) -> None:
        """One token was appended to every live row."""
        self.place.column += 1
        self.place.at += 1

    def keep(self, live: np.ndarray) -> np.ndarray:
        """Drop the rows where `live` (rows,) is False; returns those left in their new order: the last ones fill the gaps."""
        left, column = int(live.sum()), self.place.column
        order = np.arange(left)
        gaps = np.flatnonzero(~live[:left])
        order[gaps] = left + np.flatnonzero(live[left:])
        if len(gaps):
            to, last = (torch.from_numpy(rows).to(self.place.at.device) for rows in (gaps, order[gaps]))
            for layer in self.layers:
                for kept in (layer.keys, layer.values):
                    kept[to, :, :column] = kept[last, :, :column]
        self.place.live = left
        return order
