"""A key-value cache in memory that is allocated once: every row's next token lies in the same column."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Place:
    """Where all layers write."""

    rows: int
    width: int
    live: int = 0  # rows in use, the first ones
    column: int = 0  # of the next token
    copies: torch.Tensor | None = None  # while prompts are read: how many rows each of them is written to, after the live ones


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
                rows = new.repeat_interleave(place.copies, 0)
                kept[place.live : place.live + len(rows), :, place.column - new.shape[2] : place.column] = rows
            return key_states, value_states
        seen = place.column + 1
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[: place.live, :, place.column : seen] = new
        return self.keys[: place.live, :, :seen], self.values[: place.live, :, :seen]

    def get_seq_length(self) -> int:
        return self.place.column

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.column + query_length, 0

    def get_max_length(self) -> int:
        return self.place.width


class RowCache(Cache):  # type: ignore[misc]
    """Rows whose prompts end in one column, `prompt` - 1; what follows is appended to all of them at once."""

    def __init__(self, rows: int, prompt: int, more: int) -> None:
        """`prompt`: tokens of the longest prompt; `more`: tokens that may follow it."""
        self.place = _Place(rows, prompt + more, column=prompt)
        super().__init__(layer_class_to_replicate=lambda: _Layer(self.place))

    @property
    def column(self) -> int:
        """Of the next token."""
        return self.place.column

    @contextmanager
    def prompts(self, copies: torch.Tensor) -> Iterator[None]:
        """What the model reads inside are prompts that see themselves alone; prompt i becomes the next `copies[i]` rows."""
        self.place.copies = copies
        yield
        self.place.copies = None
        self.place.live += int(copies.sum())

    def advance(self) -> None:
        """One token was appended to every live row."""
        self.place.column += 1

    def keep(self, live: torch.Tensor) -> torch.Tensor:
        """Drop the rows where `live` (rows,) is False; returns those left in their new order: the last ones fill the gaps."""
        left = int(live.sum())
        order = torch.arange(left, device=live.device)
        gaps = torch.nonzero(~live[:left])[:, 0]
        if len(gaps):
            last = left + torch.nonzero(live[left:])[:, 0]
            order[gaps] = last
            for layer in self.layers:
                for kept in (layer.keys, layer.values):
                    kept[gaps, :, : self.column] = kept[last, :, : self.column]
        self.place.live = left
        return order
