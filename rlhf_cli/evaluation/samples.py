"""What models said to the same prompts: one line of samples.jsonl for each response, and tables of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from rlhf_cli.data.records import PlainPrompt


@dataclass(frozen=True)
class Sample:
    """One response of a model to a prompt, and what it is worth: a line of samples.jsonl."""

    model: str
    row: int  # the prompt's number, the same for every model
    number: int  # of the response among the model's to this prompt
    where: str  # file and line of the prompt
    prompt: PlainPrompt  # a text, or a conversation
    response: str
    ended: bool  # False: cut off at rollout.max_new_tokens
    tokens: int  # its end included
    logp: float  # Σ log π at temperature 1, nats
    reference_logp: float | None  # Σ log π_ref of the same tokens; None: no reference, or one with other tokens
    terms: dict[str, float] = field(default_factory=dict)  # reward/NAME and gold/NAME → before its weight
    score: float | None = None  # all terms of the reward together, penalties taken off


@dataclass(frozen=True)
class Samples:
    """K responses of one model to each of P prompts, in the order of the prompts."""

    model: str
    own: tuple[tuple[Sample, ...], ...]  # (P)(K)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.own), len(self.own[0])

    def first(self, count: int) -> Samples:
        """The first `count` responses to each prompt."""
        return Samples(self.model, tuple(responses[:count] for responses in self.own))

    def table(self, read: Callable[[Sample], float]) -> np.ndarray:
        """(P, K) float64 of a number of each response."""
        return np.array([[read(sample) for sample in responses] for responses in self.own], np.float64)

    def texts(self) -> list[list[str]]:
        """(P)(K) responses."""
        return [[sample.response for sample in responses] for responses in self.own]


def grouped(samples: Iterable[Sample]) -> Samples:
    """All samples of one model, in any order, as a table.

    ValueError: there are none, of several models, or not as many to each prompt.
    """
    ordered = sorted(samples, key=lambda sample: (sample.row, sample.number))
    own = tuple(tuple(responses) for _, responses in groupby(ordered, key=lambda sample: sample.row))
    models = {sample.model for sample in ordered}
    if len(models) != 1 or len({len(responses) for responses in own}) != 1:
        raise ValueError("expected the samples of one model, as many to each prompt")
    return Samples(models.pop(), own)


def same_texts(one: Samples, other: Samples) -> np.ndarray:
    """(P, K) bool: do both say the same?"""
    pairs = zip(one.own, other.own, strict=True)
    return np.array([[a.response == b.response for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])
