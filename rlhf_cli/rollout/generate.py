"""Responses drawn from the policy: an own token loop, in which every draw is a function of seed, prompt, sample and position.

Prompts are read once each, sorted by length; rows that ended cost nothing more. How prompts are batched, cut into waves or
dealt to ranks changes no response as long as the logits are equal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.memory import gpu_memory
from rlhf_cli.models.merging import merged
from rlhf_cli.rollout.decoders import Anew, Decoder, cache_bytes, choose_decoder
from rlhf_cli.rollout.next_token import choose, draw_uniforms, warp
from rlhf_cli.sections import Warping
from rlhf_cli.signals import Pause, no_pause

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
            decoder = choose_decoder(backbone)
            _MEASURED[backbone] = decoder, (0.0, 0.0) if decoder is Anew else cache_bytes(backbone)
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


_MEASURED: WeakKeyDictionary[Backbone, tuple[Decoder, tuple[float, float]]] = WeakKeyDictionary()
"""Of every backbone: its decoder, and the bytes that `cache_bytes` found."""
