"""What step k sees: a pure function of the data, the seed and k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

import numpy as np

from rlhf_cli.data.flat import Trees
from rlhf_cli.data.streams import DataStream
from rlhf_cli.data.trees import Tree


@dataclass(frozen=True, eq=False)
class StepBatches:
    """What one step, or several that follow each other, learn from."""

    first: int  # the step that the first of the batches is for
    batches: tuple[list[Tree], ...]
    locations: tuple[list[str], ...]  # file and line of every tree
    memory: dict[str, float] = field(default_factory=dict)  # the objective's own numbers after making them
    given: dict[str, float] = field(default_factory=dict)  # constants of the objective's terms
    metrics: dict[str, float] = field(default_factory=dict)  # of what was drawn; logged with the first step

    def serves(self, step: int) -> bool:
        return self.first <= step < self.first + len(self.batches)


def epoch_order(sizes: Sequence[int], shares: Sequence[float], seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The rows of an epoch (from 0) as indices into the concatenated sources, (sum(sizes),) int64; a pure function.

    Each source fills its share, rounded to whole rows. It is drawn without replacement; when it is exhausted, a fresh
    permutation of it begins, and goes on in the next epoch where this one ends. Without shuffling, the sources are
    interleaved evenly, each in file order. A source without rows leaves its share to the others.
    """
    counts = _apportion(sum(sizes), [share if size else 0.0 for size, share in zip(sizes, shares, strict=True)])
    starts = np.cumsum([0, *sizes])
    drawn = [starts[i] + _draw(size, counts[i], seed, i, epoch, shuffle) for i, size in enumerate(sizes)]
    rows = np.concatenate(drawn)
    if shuffle:
        return rows[np.random.default_rng([seed, DataStream.EPOCH, epoch]).permutation(len(rows))]
    position = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return rows[np.argsort(position, kind="stable")]


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole rows by largest remainder."""
    exact = [total * share / math.fsum(shares) for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(size: int, count: int, seed: int, source: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Rows epoch·count … (epoch+1)·count of the endless sequence of a source's permutations, (count,)."""
    begin, end = epoch * count, (epoch + 1) * count
    pieces = [np.empty(0, dtype=np.int64)]
    for cycle in range(begin // size, -(-end // size)) if count else ():
        order = np.random.default_rng([seed, DataStream.SOURCE, source, cycle]).permutation(size) if shuffle else np.arange(size)
        pieces.append(order[max(begin - cycle * size, 0) : end - cycle * size])
    return np.concatenate(pieces)


_epoch_order = lru_cache(4)(epoch_order)


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Global batches drawn from encoded data, epoch by epoch; a short last batch is a step of its own."""

    trees: Trees
    sizes: tuple[int, ...]  # trees per data source, in their order
    shares: tuple[float, ...]  # share of an epoch per data source
    batch_size: int
    seed: int
    shuffle: bool
    sample: np.ndarray | None = None  # (rows,) the trees, some several times and others not at all; None: each once
    member: int | None = None  # of an ensemble, whose trees they are

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(self.sizes) / self.batch_size)

    def indices(self, step: int) -> np.ndarray:
        """The trees of optimiser step `step`, counted from 1."""
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        order = _epoch_order(self.sizes, self.shares, self.seed, epoch, self.shuffle)
        rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return rows if self.sample is None else self.sample[rows]

    def reached(self, steps: int) -> np.ndarray:
        """(T,) bool: the trees that a run of so many steps comes to."""
        seen = np.zeros(len(self.trees), bool)
        for step in range(1, steps + 1):
            seen[self.indices(step)] = True
            if step % self.steps_per_epoch == 0 and seen.all():
                break
        return seen

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """The batch of `step`, as every source gives it."""
        return StepBatches(step, (self.batch(step),), (self.locations(step),), dict(memory))

    def batch(self, step: int) -> list[Tree]:
        return [self.trees[int(i)]._replace(member=self.member) for i in self.indices(step)]

    def locations(self, step: int) -> list[str]:
        """File and line of every tree of a step, in the order of `batch`."""
        return [self.trees.locations[int(i)] for i in self.indices(step)]


def member_seed(seed: int, member: int) -> int:
    """The seed of an ensemble's member, of its first weights, its sample and its order of rows; the first one has the run's."""
    return int(np.random.default_rng([seed, DataStream.MEMBER, member]).integers(2**32)) if member else seed


@dataclass(frozen=True, eq=False)
class EnsembleSource:
    """The batches of several members side by side; each goes through a bootstrap sample of the prompts as if it were alone."""

    members: tuple[DatasetSource, ...]
    steps_per_epoch: int

    @classmethod
    def draw(cls, source: DatasetSource, members: int, prompts: np.ndarray) -> Self:
        """As many prompts as there are, drawn with replacement, each with all its rows.

        `prompts`: (rows,), of each tree, equal for one prompt.
        """
        _, prompt_of = np.unique(prompts, return_inverse=True)
        count, bounds = prompt_of.max() + 1, np.cumsum((0, *source.sizes))

        def of(member: int) -> DatasetSource:
            seed = member_seed(source.seed, member)
            drawn = np.random.default_rng([seed, DataStream.BOOTSTRAP]).integers(count, size=count)
            sample = np.repeat(np.arange(len(prompt_of)), np.bincount(drawn, minlength=count)[prompt_of])
            sizes = np.histogram(sample, bounds)[0].tolist()
            return replace(source, sizes=tuple(sizes), seed=seed, sample=sample, member=member)

        return cls(tuple(map(of, range(members))), source.steps_per_epoch)

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        trees = [tree for own in self.members for tree in own.batch(step)]
        return StepBatches(step, (trees,), ([where for own in self.members for where in own.locations(step)],), dict(memory))


def total_steps(epochs: float, steps: int | None, steps_per_epoch: int) -> int:
    """Optimiser steps of a run: `steps` if given, else `epochs` rounded to whole steps, at least one."""
    return steps if steps is not None else max(1, round(epochs * steps_per_epoch))


def due_steps(every: float | None, steps: int) -> frozenset[int]:
    """Steps after which something happens, and the last: below 1 a share of the run, else a number of steps, null: no others."""
    if every is None:
        return frozenset({steps})
    if every >= 1:
        return frozenset(range(int(every), steps + 1, int(every))) | {steps}
    return frozenset(max(1, round(i * every * steps)) for i in range(1, math.floor(1 / every) + 1)) | {steps}
