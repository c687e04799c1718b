"""Responses drawn from the policy: an own token loop, in which every draw is a function of seed, prompt, sample and position.

Prompts are read once each, sorted by length; rows that ended cost nothing more. How prompts are batched, cut into waves or
dealt to ranks changes no response as long as the logits are equal.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.attention import LAYER_TYPES, PLAIN
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.body import PROBE_TOLERANCE
from rlhf_cli.models.kv_cache import RowCache
from rlhf_cli.models.memory import gpu_memory, is_out_of_memory
from rlhf_cli.models.merging import merged
from rlhf_cli.rollout.next_token import choose, draw_uniforms, warp
from rlhf_cli.sections import Warping
from rlhf_cli.signals import Pause, no_pause

PROMPT_TOKENS = 4096
"""Tokens of a forward pass over prompts, padding included; a longer prompt has one of its own."""
PASS_COST = 32
"""Padding tokens that are cheaper than another pass over prompts."""
CPU_CACHE = 2 * 2**30
"""Bytes that the keys, values and logits of a wave may take on a CPU."""
GPU_SHARE = 0.2
"""The same on a GPU, as a share of all its memory: of what is free a resumed run would find another one, and cut other waves."""
LOGITS = 4
"""Vectors of the vocabulary's length, in float32, that a row takes while its next token is chosen."""
READ_EVERY = 16
"""Tokens after which a GPU is asked which rows have ended; what these draw beyond their end is dropped."""
WARPED = 10
"""As many more where the distribution is warped: tokens in order are longer numbers."""
CACHE_NAMES = ("past_key_values", "cache_params")
"""What models call the cache that they take and return; the second one's have no attention."""


class Response(NamedTuple):
    """One response."""

    ids: np.ndarray  # (T,) int32, its end-of-turn included where it ended
    ended: bool
    logps: np.ndarray | None = None  # (T,) log-probabilities that another engine drew them with, see `Sampler.raw`


@dataclass(frozen=True)
class Request:
    """What to draw, and all that the draws depend on beside the weights."""

    prompts: Sequence[np.ndarray]  # token ids, at least one each
    numbers: Sequence[int]  # of each prompt in the whole batch, over all ranks
    samples: int  # responses per prompt
    max_new_tokens: int
    temperature: float  # 0: greedy
    ends: Sequence[int]  # ids that end a response
    seed: int  # of this draw alone: it says which step it is, too
    warping: Warping = field(default_factory=Warping)

    def __post_init__(self) -> None:
        """UsageError: a prompt is empty."""
        if not all(map(len, self.prompts)):
            raise UsageError("an empty prompt: there is no token to continue; give every prompt at least one")


Tell = Callable[[np.ndarray, np.ndarray], None]
"""What is told of tokens as soon as they are drawn: the (prompt, sample) of each row, (rows, 2), and its token, (rows,)."""


class Engine(Protocol):
    """What draws responses."""

    kept: float | None  # of the last draw: the share of the adapter that is left in the rounded weights that drew, or would have

    def generate(self, request: Request, pause: Pause = no_pause) -> list[list[Response]]:
        """The responses, [prompt][sample]; pauses where it can be left, such as between two tokens."""
        ...


class TransformersEngine:
    """Draws with the backbone's own weights. While it draws, the backbone is its alone."""

    def __init__(self, backbone: Backbone, role: str) -> None:
        self.backbone, self.role = backbone, role
        self.kept: float | None = None
        if backbone not in _MEASURED:
            decoder = _choose_decoder(backbone)
            _MEASURED[backbone] = decoder, (0.0, 0.0) if decoder is _Anew else _cache_bytes(backbone)
        self.decoder, (self.fixed, self.per_token) = _MEASURED[backbone]

    @property
    def vocabulary(self) -> int:
        """Numbers of the logits."""
        return int(self.backbone.model.get_output_embeddings().weight.shape[0])

    @torch.no_grad()
    def generate(self, request: Request, pause: Pause = no_pause, tell: Tell | None = None) -> list[list[Response]]:
        """The responses, [prompt][sample]; pauses after every token, and leaves the backbone as it was also then.

        NumberError: the logits are not finite.
        """
        self.backbone.train(False)
        drawn = [[Response(np.empty(0, np.int32), False)] * request.samples for _ in request.prompts]
        with merged(self.backbone, self.role) as self.kept, self.backbone.plain_attention():
            for wave in self._waves(request):
                self._draw(request, wave, drawn, pause, tell)
        return drawn

    def _waves(self, request: Request) -> Iterator[np.ndarray]:
        """All rows of (prompt, sample), longest prompts first, cut into the fewest waves of about equal size that fit."""
        lengths = np.array([len(prompt) for prompt in request.prompts])
        logits = (LOGITS + WARPED * bool(request.warping.warps)) * 4 * self.vocabulary
        device, room = self.backbone.device, float(CPU_CACHE)
        if device.type != "cpu":
            room = GPU_SHARE * gpu_memory(device)[1]
        for together in self.decoder.apart(np.argsort(-lengths, kind="stable"), lengths):
            rows = np.stack((np.repeat(together, request.samples), np.tile(np.arange(request.samples), len(together))), 1)
            row = self.fixed + self.per_token * (lengths[together[0]] + request.max_new_tokens) + logits
            yield from np.array_split(rows, math.ceil(len(rows) / max(1, room // row)))

    def _draw(self, request: Request, wave: np.ndarray, drawn: list[list[Response]], pause: Pause, tell: Tell | None) -> None:
        """Fill in the responses of a wave."""
        copies = Counter(wave[:, 0].tolist())
        prompts = [request.prompts[number] for number in copies]
        decoder = self.decoder(self.backbone, prompts, list(copies.values()), request.max_new_tokens)
        uniforms = np.stack([draw_uniforms(request.seed, request.numbers[p], s, request.max_new_tokens) for p, s in wave])
        home = self.backbone.home
        chances = torch.from_numpy(uniforms).to(home)
        ids = np.zeros(uniforms.shape, np.int32)
        rows = np.arange(len(wave))  # of the wave, in the decoder's order
        live = np.ones(len(wave), bool)  # of these, those that have not ended
        every, unread = READ_EVERY if home.type == "cuda" and tell is None else 1, list[torch.Tensor]()
        states = decoder.begin()
        seen = torch.zeros(len(wave), self.vocabulary, dtype=torch.bool) if request.warping.warps else None
        if seen is not None:
            for own, (number, _) in zip(seen, wave, strict=True):
                own[request.prompts[number]] = True
            seen = seen.to(home)
        for t in range(request.max_new_tokens):
            logits = self.backbone.logits(states).to(home)
            if seen is not None:
                logits = warp(logits, request.temperature, request.warping, seen)
            unread.append(choose(logits, request.temperature, chances[:, t]))
            tokens = unread[-1].clamp_min(0)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            last = t + 1 == request.max_new_tokens
            pause()
            if last or len(unread) == every:
                first = t + 1 - len(unread)
                new = torch.stack(unread, 1).cpu().numpy()
                unread.clear()
                ids[rows, first : t + 1] = new
                ends = np.isin(new, request.ends)
                ended, length = live & ends.any(1), np.where(ends.any(1), ends.argmax(1) + 1, new.shape[1])
                if ((new < 0) & live[:, None] & (np.arange(new.shape[1]) < length[:, None])).any():
                    raise NumberError("the policy's logits are not finite while it samples; look at the last loss and grad_norm")
                if tell is not None:
                    tell(wave[rows], ids[rows, t])
                for row in np.flatnonzero(live if last else ended):
                    prompt, sample = wave[rows[row]]
                    drawn[prompt][sample] = Response(ids[rows[row], : first + length[row]], bool(ended[row]))
                live &= ~ended
                if last or not live.any():
                    return
                # On a GPU some more rows cost little, and other shapes much.
                if not live.all() and (every == 1 or 2 * live.sum() <= len(live)):
                    order = decoder.keep(live)
                    rows, live, places = rows[order], live[order], torch.from_numpy(order).to(home)
                    tokens, chances, seen = tokens[places], chances[places], None if seen is None else seen[places]
            states = decoder.append(tokens.to(self.backbone.device))


class _Aligned:
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
        place = self.cache.place
        states = self._forward(tokens[:, None], self.start, place.at, self.columns[: place.seen])
        self.cache.advance()
        return states

    def keep(self, live: np.ndarray) -> np.ndarray:
        """Drop rows; those that are left, in their new order."""
        order = self.cache.keep(live)
        self.start = self.start[torch.from_numpy(order).to(self.start.device)]
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
            empty = torch.zeros(hidden.shape, dtype=self.backbone.compute_dtype, device=seen.device)
            return empty.masked_fill_(hidden, torch.finfo(empty.dtype).min)

        if len(kinds) > 1:
            return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return mask(None if kinds == ("full_attention",) else window)


class _Alike:
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
        for cache in self.cache.values():
            cache.reorder_cache(rows)
        return rows

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.ids.shape[1], device=ids.device)[-ids.shape[1] :].expand_as(ids)
        arguments = self.cache | ({"position_ids": places} if self.takes_positions else {})
        with self.backbone.autocast():
            out = self.backbone.body(input_ids=ids, use_cache=True, **arguments)
        self.cache = {name: out[name] for name in CACHE_NAMES if name in out}
        states: torch.Tensor = out.last_hidden_state[:, -1]
        return states


class _Anew(_Alike):
    """The same without a cache, every row read anew for each of its tokens: for models whose cache cannot be relied on."""

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with self.backbone.autocast():
            states: torch.Tensor = self.backbone.body(input_ids=self.ids, use_cache=False).last_hidden_state[:, -1]
        return states


Decoder = type[_Aligned] | type[_Alike]

_MEASURED: WeakKeyDictionary[Backbone, tuple[Decoder, tuple[float, float]]] = WeakKeyDictionary()
"""Of every backbone: its decoder, and the bytes that `_cache_bytes` found."""


@torch.no_grad()
def _choose_decoder(backbone: Backbone) -> Decoder:
    """The first whose states are those of whole sequences."""
    takes_masks = backbone.kernel.name != PLAIN and LAYER_TYPES.issuperset(backbone.layer_types)
    backbone.activate(BASE)
    backbone.train(False)
    with backbone.plain_attention():
        for decoder in ((_Aligned,) if takes_masks else ()) + (_Alike,):
            # What a model does with a cache that it does not know, or with one of its own, is its own affair.
            try:
                if _is_right(decoder, backbone):
                    return decoder
            except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
                if is_out_of_memory(error):  # not the cache's fault
                    raise
    return _Anew


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
def _cache_bytes(backbone: Backbone) -> tuple[float, float]:
    """What a row of the model's own cache takes: bytes whatever its length, and bytes a token; measured on short prompts."""
    sizes = []
    for length in (4, 8):
        decoder = _Alike(backbone, [np.zeros(length, np.int32)], [1], 0)
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
