"""Many trees in a few arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np

from rlhf_cli.data.cache import MAPPED_FROM
from rlhf_cli.data.records import Facts, Record
from rlhf_cli.data.trees import Tree

BLOCK = 10_000  # trees that are counted at a time: a running total of all tokens takes eight times their memory


@dataclass(frozen=True, eq=False)
class Trees(Sequence[Tree]):
    """Trees in flat arrays, so that they are cheap to keep, to send and to store.

    Tree i's parts, its prompt and then its responses, are the segments first[i] … first[i + 1] − 1; segment s is
    ids[segments[s] : segments[s + 1]].
    """

    ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool: all of a response, and earlier assistant turns in a prompt
    segments: np.ndarray  # (S + 1,) int64
    first: np.ndarray  # (N + 1,) int64
    rows: np.ndarray  # (N,) int64: indices of the records
    locations: tuple[str, ...]  # (N,) file and line
    facts: tuple[Facts, ...]  # (N,)
    reference: np.ndarray | None = None  # (T,) float32: the reference's log-probability of each token of a response, else NaN

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        bounds = self.segments[self.first[at] : self.first[at + 1] + 1]
        prompt, *responses = (slice(a, b) for a, b in pairwise(bounds))
        texts = tuple(self.ids[part] for part in responses)
        reference = None if self.reference is None else tuple(self.reference[part] for part in responses)
        return Tree(self.ids[prompt], self.supervised[prompt], texts, int(self.rows[at]), self.facts[at], reference)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of the prompt and of all responses."""
        return np.asarray(np.diff(self.segments[self.first]))

    @property
    def supervised_counts(self) -> np.ndarray:
        """(N,) tokens that can be predicted: where there is no prompt, nothing comes before a response's first token."""
        bounds, counted = self.segments[self.first], np.zeros(len(self), np.int64)
        for a in range(0, len(self), BLOCK):
            own = bounds[a : a + BLOCK + 1]
            totals = np.concatenate([[0], np.cumsum(self.supervised[own[0] : own[-1]])])
            counted[a : a + BLOCK] = np.diff(totals[own - own[0]])
        prompts = np.diff(self.segments)[self.first[:-1]]
        return np.asarray(counted - np.where(prompts == 0, np.diff(self.first) - 1, 0))


def regroup(
    trees: Trees,
    origin: np.ndarray,
    counts: np.ndarray,
    parts: np.ndarray,
    facts: Sequence[Facts],
    lengths: np.ndarray | None = None,
) -> Trees:
    """Other trees of the same segments.

    origin: (N',) the trees whose row and place the new ones have; counts: (N',) segments of each; parts: (sum of counts,) the
    segments, each tree's prompt first; lengths: (sum of counts,) how many of their tokens are taken, all of them by default.
    """
    starts = trees.segments[parts]
    sizes = np.diff(trees.segments)[parts] if lengths is None else lengths
    segments = np.concatenate([[0], np.cumsum(sizes)])
    taken = np.arange(segments[-1]) + np.repeat(starts - segments[:-1], sizes)
    return Trees(
        ids=trees.ids[taken],
        supervised=trees.supervised[taken],
        segments=segments,
        first=np.concatenate([[0], np.cumsum(counts)]),
        rows=trees.rows[origin],
        locations=tuple(trees.locations[i] for i in origin),
        facts=tuple(facts),
        reference=None if trees.reference is None else trees.reference[taken],
    )


def select(trees: Trees, indices: np.ndarray) -> Trees:
    """Some of the trees, in that order."""
    counts = np.diff(trees.first)[indices]
    ends = np.cumsum(counts)
    parts = np.arange(counts.sum()) + np.repeat(trees.first[indices] - (ends - counts), counts)
    return regroup(trees, indices, counts, parts, [trees.facts[i] for i in indices])


def flatten(trees: Sequence[Tree], records: Sequence[Record]) -> Trees:
    """Copies the trees, which name their records by `row`, into flat arrays."""
    locations = tuple(records[tree.row].where for tree in trees)
    return Trees(**flat_arrays(trees), locations=locations, facts=tuple(tree.facts for tree in trees))


def flat_arrays(trees: Sequence[Tree]) -> dict[str, np.ndarray]:
    """The arrays of `Trees`, less what is said of them."""
    parts = [part for tree in trees for part in (tree.prompt, *tree.responses)]
    in_response = [part for tree in trees for part in (False, *(True for _ in tree.responses))]
    own = np.repeat(np.array(in_response, bool), np.array([*map(len, parts)], np.int64))
    own[~own] = np.concatenate([np.zeros(0, bool), *(tree.supervised for tree in trees)])
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *parts]),
        "supervised": own,
        "segments": np.cumsum([0, *map(len, parts)], dtype=np.int64),
        "first": np.cumsum([0, *(1 + len(tree.responses) for tree in trees)], dtype=np.int64),
        "rows": np.array([tree.row for tree in trees], np.int64),
    }


class Flattener:
    """The arrays of `Trees` of many chunks, one after the other. Tokens wait in files: in memory they would be there twice."""

    def __init__(self) -> None:
        self.spools = {name: tempfile.SpooledTemporaryFile(max_size=MAPPED_FROM) for name in ("ids", "supervised")}  # noqa: SIM115
        self.chunks: list[dict[str, np.ndarray]] = [flat_arrays([])]

    def add(self, trees: Sequence[Tree]) -> None:
        arrays = flat_arrays(trees)
        for name, spool in self.spools.items():
            spool.write(arrays.pop(name).data)
        self.chunks.append(arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of all chunks; of the tokens of a large number of trees, mapped from their files."""
        found = {name: _read_spool(spool, self.chunks[0][name].dtype) for name, spool in self.spools.items()}
        found["rows"] = np.concatenate([chunk["rows"] for chunk in self.chunks])
        for name in ("segments", "first"):
            found[name] = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(chunk[name]) for chunk in self.chunks)]))
        return found


def _read_spool(spool: tempfile.SpooledTemporaryFile[bytes], dtype: np.dtype[Any]) -> np.ndarray:
    size = spool.tell()
    if size < MAPPED_FROM:
        spool.seek(0)
        return np.frombuffer(spool.read(), dtype)
    spool.flush()
    return np.asarray(np.memmap(spool, dtype, "r", shape=(size // dtype.itemsize,)))
