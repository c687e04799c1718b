"""What reads prompts and appends tokens: a decoder for each kind of model, and how it is chosen; graphs of steps on a GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from rlhf_cli.console import Console
from rlhf_cli.models.attention import LAYER_TYPES, PLAIN
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.body import PROBE_TOLERANCE
from rlhf_cli.models.fused import BROKEN
from rlhf_cli.models.kv_cache import RowCache
from rlhf_cli.models.memory import is_out_of_memory

PROMPT_TOKENS = 4096
"""Tokens of a forward pass over prompts, padding included; a longer prompt has one of its own."""
PASS_COST = 32
"""Padding tokens that are cheaper than another pass over prompts."""
CACHE_NAMES = ("past_key_values", "cache_params")
"""What models call the cache that they take and return; the second one's have no attention."""

_warn = cache(lambda message: Console().warn(message))  # once


class Aligned:
    """Rows whose prompts end in one column, of every length: for attention that takes a mask."""

    @staticmethod
    def apart(order: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Prompts that cannot share a wave: none."""
        return [order]

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], copies: Sequence[int], more: int) -> None:
        """`prompts`: the longest first; `copies`: rows of each; `more`: tokens that may follow."""
        self.backbone, self.prompts, self.copies = backbone, prompts, copies
        width = len(prompts[0])
        self.cache = RowCache(sum(copies), width, more, backbone.device)
        self.columns = torch.arange(width + more, device=backbone.device)
        first = np.repeat([width - len(prompt) for prompt in prompts], copies)
        self.start = torch.from_numpy(first).to(backbone.device)  # first column of each row

    def begin(self) -> torch.Tensor:
        """Read all prompts; the last state of every row, (rows, D)."""
        states = []
        for part in cut_prompts([len(prompt) for prompt in self.prompts]):
            some, copies = self.prompts[part], self.copies[part]
            width = len(some[0])
            ids = np.zeros((len(some), width), np.int64)
            for row, prompt in zip(ids, some, strict=True):
                row[width - len(prompt) :] = prompt
            start = torch.tensor([width - len(prompt) for prompt in some], device=self.backbone.device)
            columns = self.columns[:width]
            with self.cache.prompts(copies) as rows:
                states.append(self._forward(torch.from_numpy(ids).to(start.device), start, columns, columns)[rows])
        return torch.cat(states)

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """The states of one more token (rows,) of each row, (rows, D)."""
        states = self._step(tokens)
        self.cache.advance()
        return states

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the first rows, as many as there are tokens (rows,)."""
        place = self.cache.place
        return self._forward(tokens[:, None], self.start[: len(tokens)], place.at, self.columns[: place.seen])

    def keep(self, live: np.ndarray) -> np.ndarray:
        """Drop rows; those that are left, in their new order."""
        order = self.cache.keep(live)
        self.start[: len(order)] = self.start[torch.from_numpy(order).to(self.start.device)]
        return order

    def _forward(self, ids: torch.Tensor, start: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Last states of ids (rows, L) in the columns `query` (L,), which see those of `key`; a row begins at `start` (rows,)."""
        age = query[:, None] - key
        seen = (age >= 0) & (key >= start[:, None, None])
        with self.backbone.autocast():
            out = self.backbone.body(
                input_ids=ids,
                position_ids=(query - start[:, None]).clamp_min(0),
                attention_mask=self._masks(seen[:, None], age),
                past_key_values=self.cache,
                use_cache=True,
            )
        states: torch.Tensor = out.last_hidden_state[:, -1]
        return states

    def _masks(self, seen: torch.Tensor, age: torch.Tensor) -> Any:
        """What the model takes: one additive mask, or a dict of them by kind of layer."""
        kinds, window = self.backbone.layer_types, self.backbone.window

        def mask(limit: int | None) -> torch.Tensor:
            hidden = ~seen if limit is None else ~seen | (age >= limit)
            empty = torch.zeros_like(hidden, dtype=self.backbone.compute_dtype)
            return empty.masked_fill_(hidden, torch.finfo(empty.dtype).min)

        if len(kinds) > 1:
            return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return mask(None if kinds == ("full_attention",) else window)


def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    """The step as a CUDA graph, which gives the same tensor each time; None, and once a warning, where it cannot be recorded."""
    try:
        step()  # libraries set themselves up, which no graph may hold
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    except RuntimeError as error:
        _warn(f"tokens are drawn without CUDA graphs, which takes longer ({str(error).splitlines()[0]})")
        return None

    def replay() -> torch.Tensor:
        graph.replay()
        return found

    return replay


class Graphed(Aligned):
    """The same with steps that are recorded for a power of two of rows, those that have ended among them, and replayed."""

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], copies: Sequence[int], more: int) -> None:
        super().__init__(backbone, prompts, copies, more)
        self.tokens = torch.zeros_like(self.start)
        self.steps: dict[tuple[int, int], Callable[[], torch.Tensor] | None] = {}  # by rows and columns; None: not to be recorded

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        place, live = self.cache.place, len(tokens)
        place.live = rows = min(place.rows, 1 << (live - 1).bit_length())
        self.tokens[:live] = tokens
        step = partial(super()._step, self.tokens[:rows])
        if (rows, place.seen) not in self.steps:
            self.steps[rows, place.seen] = record(step)
        states = (self.steps[rows, place.seen] or step)()[:live]
        place.live = live
        return states


class Alike:
    """The same for rows whose prompts are equally long, with the model's own cache: for models that take no mask."""

    @staticmethod
    def apart(order: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Prompts that can share a wave: of one length, and read in one pass."""
        for length in dict.fromkeys(lengths[order].tolist()):
            same = order[lengths[order] == length]
            yield from np.array_split(same, math.ceil(len(same) * length / max(length, PROMPT_TOKENS)))

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], copies: Sequence[int], more: int) -> None:
        self.backbone = backbone
        self.ids = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(backbone.device)
        self.copies = copies
        self.cache: dict[str, Any] = {}
        # Not every model counts what its cache holds: some would begin at position 0 again.
        self.takes_positions = "position_ids" in inspect.signature(backbone.body.forward).parameters

    def begin(self) -> torch.Tensor:
        states = self._forward(self.ids)
        rows = torch.from_numpy(np.repeat(np.arange(len(states)), self.copies))
        return states[self._select(rows.to(states.device))]

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat((self.ids, tokens[:, None]), 1)
        return self._forward(tokens[:, None])

    def keep(self, live: np.ndarray) -> np.ndarray:
        order = np.flatnonzero(live)
        self._select(torch.from_numpy(order).to(self.backbone.device))
        return order

    def _select(self, rows: torch.Tensor) -> torch.Tensor:
        self.ids = self.ids[rows]
        for own in self.cache.values():
            own.reorder_cache(rows)
        return rows

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.ids.shape[1], device=ids.device)[-ids.shape[1] :].expand_as(ids)
        arguments = self.cache | ({"position_ids": places} if self.takes_positions else {})
        with self.backbone.autocast():
            out = self.backbone.body(input_ids=ids, use_cache=True, **arguments)
        self.cache = {name: out[name] for name in CACHE_NAMES if name in out}
        states: torch.Tensor = out.last_hidden_state[:, -1]
        return states


class Anew(Alike):
    """The same without a cache, every row read anew for each of its tokens: for models whose cache cannot be relied on."""

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with self.backbone.autocast():
            states: torch.Tensor = self.backbone.body(input_ids=self.ids, use_cache=False).last_hidden_state[:, -1]
        return states


Decoder = type[Aligned] | type[Alike]


@torch.no_grad()
def choose_decoder(backbone: Backbone) -> Decoder:
    """The first whose states are those of whole sequences."""
    graphs = backbone.device.type == "cuda" and torch.cuda.is_available()
    takes_masks = backbone.kernel.name != PLAIN and LAYER_TYPES.issuperset(backbone.layer_types)
    backbone.activate(BASE)
    backbone.train(False)
    with backbone.plain_attention():
        decoders: tuple[Decoder, ...] = ((Graphed,) * graphs + (Aligned,)) * takes_masks + (Alike,)
        for decoder in decoders:
            # What a model does with a cache that it does not know, or with one of its own, is its own affair.
            try:
                if _is_right(decoder, backbone):
                    return decoder
            except (*BROKEN, AttributeError) as error:
                if is_out_of_memory(error):  # not the cache's fault
                    raise
    return Anew


def _is_right(decoder: Decoder, backbone: Backbone) -> bool:
    """Does it give what whole sequences give, when prompts are copied, tokens appended and rows dropped?"""
    random, found, wanted = np.random.default_rng(0), [], []
    prompts = [random.integers(0, backbone.model.config.get_text_config().vocab_size, length) for length in (9, 6, 6)]
    for together in decoder.apart(np.arange(3), np.array([9, 6, 6])):
        rows = [prompts[number] for number in together for _ in range(2)]
        running = decoder(backbone, [prompts[number] for number in together], [2] * len(together), 3)
        states = running.begin()
        for dropped in (1, 0, 0):
            order = running.keep(np.arange(len(rows)) >= dropped)
            more = (np.arange(len(order)) * 7 + len(rows[0])) % 5
            rows = [np.append(rows[old], token) for old, token in zip(order, more, strict=True)]
            states = running.append(torch.from_numpy(more).to(backbone.device))
        found.append(states.float())
        with backbone.autocast():
            whole = [backbone.body(input_ids=torch.from_numpy(row[None]).to(backbone.device), use_cache=False) for row in rows]
        wanted += [out.last_hidden_state[0, -1].float() for out in whole]
    target = torch.stack(wanted)
    return bool((torch.cat(found) - target).norm() <= PROBE_TOLERANCE[backbone.compute_dtype] * target.norm())


@torch.no_grad()
def cache_bytes(backbone: Backbone) -> tuple[float, float]:
    """What a row of the model's own cache takes: bytes whatever its length, and bytes a token; measured on short prompts."""
    sizes = []
    for length in (4, 8):
        decoder = Alike(backbone, [np.zeros(length, np.int32)], [1], 0)
        with backbone.plain_attention():
            decoder.begin()
        held = [value for cache in decoder.cache.values() for layer in cache.layers for value in vars(layer).values()]
        held += [value for several in held if isinstance(several, dict) for value in several.values()]
        sizes.append(sum(value.nbytes for value in held if torch.is_tensor(value)))
    per_token = (sizes[1] - sizes[0]) / 4
    return sizes[0] - 4 * per_token, per_token


def cut_prompts(lengths: Sequence[int]) -> list[slice]:
    """Prompts, the longest first, as forward passes of at most PROMPT_TOKENS and with little padding."""
    cuts = [0]
    padding = 0
    for number, length in enumerate(lengths):
        longest = lengths[cuts[-1]]
        padding += longest - length
        if padding > PASS_COST or (number + 1 - cuts[-1]) * longest > max(longest, PROMPT_TOKENS):
            cuts.append(number)
            padding = 0
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]
