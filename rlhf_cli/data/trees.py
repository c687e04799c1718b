"""Prompts with branches: the one batch layout of every stage, and how it is packed into forward passes.

A tree is a prompt and the responses that branch off it: one for SFT, two for a pair, K for a ranking. Whole trees are laid
into rows without padding between them; `visible` says which token sees which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from rlhf_cli.data.records import Facts

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class Recorded(NamedTuple, Generic[Array]):
    """What a rollout recorded of each of N tokens, before any update; (N,) float32 each."""

    old: Array  # log π_old at the rollout's temperature
    reference: Array  # log π_ref at the rollout's temperature
    advantage: Array
    value: Array  # V before the token; NaN for kinds without a value
    target: Array  # what V is to become; NaN where no value is learned


class Tree(NamedTuple):
    """A prompt and the responses that branch off it, as token ids.

    The prompt "2+2?" with the answers "4" and "5" is
    Tree(prompt=[9, 2, 9], supervised=[False] * 3, responses=([4, 1], [5, 1]), row=0), 1 being the end-of-turn.
    """

    prompt: np.ndarray  # (P,) int32
    supervised: np.ndarray  # (P,) bool: tokens of earlier assistant turns that are trained on
    responses: tuple[np.ndarray, ...]  # each (T,) int32, its end-of-turn included unless it was cut off
    row: int  # index of the record it came from
    facts: Facts = Facts()
    reference: tuple[np.ndarray, ...] | None = None  # the reference's log-probability of every token, as `responses`, float32
    recorded: tuple[Recorded[np.ndarray], ...] | None = None  # of every response's tokens


class Piece(NamedTuple):
    """A tree's place in a row: its prompt and some of its branches."""

    tree: int
    branches: tuple[int, ...]


class Segment(NamedTuple):
    """Where a piece lies: `prompt` tokens from `start` in `row`, then the branches, one after the other."""

    row: int
    start: int
    prompt: int
    branches: tuple[int, ...]  # lengths
    shared: int = 0  # tokens before `prompt` that stand in the row's first tree alone


SHARED_FROM = 16
"""Beginnings of prompts that are at least so long are computed once a row: a system prompt, or the same prompt again."""

PackedRow = list[Piece]
Layout = Literal["long", "packed", "alone"]
"""long: rows as long as the budget (kernels that skip what is masked); packed: rows about as long as the longest tree
(kernels that compute the masked part too); alone: each response in a row of its own, its prompt repeated (models that take
no mask)."""


@dataclass(frozen=True)
class Batch:
    """The trees of one forward pass, R rows of L tokens.

    One row with the tree of the example above is ids [9 2 9 4 1 5 1], positions [0 1 2 3 4 3 4], branch [0 0 0 1 1 2 2],
    source [2 3 2 5], target [4 1 5 1], owner [0 0 1 1].
    """

    ids: torch.Tensor  # (R, L) int64
    positions: torch.Tensor  # (R, L) int64: a response's positions continue its prompt's
    tree: torch.Tensor  # (R, L) int64: which tree of the pass; -1 for padding
    branch: torch.Tensor  # (R, L) int64: 0 for the prompt, k for the k-th response of the piece
    source: torch.Tensor  # (N,) int64: flat index of the token whose hidden state predicts a supervised token
    target: torch.Tensor  # (N,) int64: that token's id
    owner: torch.Tensor  # (N,) int64: its response, counted through the pass; earlier turns belong to their tree's first
    last: torch.Tensor  # (M,) int64: flat index of the last token of each of the pass's responses, in the order of `owner`
    reference: torch.Tensor | None  # (N,) float32: the reference's log-probabilities, where the trees bring them
    recorded: Recorded[torch.Tensor] | None  # of the N tokens, where the trees bring it
    shared: torch.Tensor  # (R,) int64: the first so many tokens of a row begin the prompts of all its trees
    segments: tuple[Segment, ...]
    trees: tuple[int, ...]  # the trees of the pass, as indices into the global batch; their responses follow each other
    counts: tuple[int, ...]  # responses of each tree
    facts: tuple[Facts, ...]  # of each tree
    tokens: int  # without padding
    padded: bool  # alone layout: plain rows with padding at their right end

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if torch.is_tensor(value)}
        recorded = self.recorded and Recorded(*(value.to(device, non_blocking=True) for value in self.recorded))
        return Batch(**(vars(self) | tensors | {"recorded": recorded}))


def tree_length(tree: Tree) -> int:
    """Tokens of the prompt and of all responses."""
    return len(tree.prompt) + sum(map(len, tree.responses))


def supervised_tokens(tree: Tree) -> int:
    """Tokens that have a loss: responses and earlier assistant turns, less a first token that nothing predicts."""
    unpredicted = len(tree.responses) if len(tree.prompt) == 0 else int(tree.supervised[0])
    return int(tree.supervised.sum()) + sum(map(len, tree.responses)) - unpredicted


def plan_passes(trees: Sequence[Tree], ranks: int, budget: int, layout: Layout) -> list[list[list[PackedRow]]]:
    """Deal the global batch to ranks and cut each share into forward passes of at most `budget` tokens: [rank][pass][row].

    Padding counts towards the budget; a tree longer than the budget has a pass of its own. The same on every rank.
    """
    lengths = [tree_length(tree) for tree in trees]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(trees)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    if layout == "alone":
        return [_cut([_alone(trees[i], i) for i in share], budget) for share in shares]
    capacity = budget if layout == "long" else min(budget, max(lengths, default=budget))
    shared = _shared(trees)
    return [_cut(_fill_rows(share, trees, lengths, shared, capacity), budget) for share in shares]


def _shared(trees: Sequence[Tree]) -> int:
    """Tokens with which all prompts begin, but for the last of any; 0 where that is not worth a row's while."""
    if len(trees) < 2:
        return 0
    first = trees[0].prompt[: max(0, min(len(tree.prompt) for tree in trees) - 1)]
    for tree in trees[1:]:
        differs = np.flatnonzero(tree.prompt[: len(first)] != first)
        if len(differs):
            first = first[: differs[0]]
    return len(first) if len(first) >= SHARED_FROM else 0


class _Unit(NamedTuple):
    """Rows that must share a pass, and the width of the widest."""

    rows: list[PackedRow]
    width: int


def _alone(tree: Tree, index: int) -> _Unit:
    width = len(tree.prompt) + max(map(len, tree.responses))
    return _Unit([[Piece(index, (b,))] for b in range(len(tree.responses))], width)


def _fill_rows(share: Sequence[int], trees: Sequence[Tree], lengths: Sequence[int], shared: int, capacity: int) -> list[_Unit]:
    """First fit, longest first (`share` comes in that order); the `shared` beginning of all counts once a row."""
    rows: list[PackedRow] = []
    used: list[int] = []
    for index in share:
        piece = Piece(index, tuple(range(len(trees[index].responses))))
        more = lengths[index] - shared
        place = next((r for r, u in enumerate(used) if u + more <= capacity), None)
        if place is None:
            rows.append([piece])
            used.append(lengths[index])
        else:
            rows[place].append(piece)
            used[place] += more
    return [_Unit([row], width) for row, width in zip(rows, used, strict=True)]


def _cut(units: list[_Unit], budget: int) -> list[list[PackedRow]]:
    passes: list[list[PackedRow]] = []
    width = 0
    for unit in sorted(units, key=lambda u: -u.width):
        if passes and (len(passes[-1]) + len(unit.rows)) * width <= budget:
            passes[-1].extend(unit.rows)
        else:
            passes.append(list(unit.rows))
            width = unit.width
    return passes


def build_batch(trees: Sequence[Tree], rows: Sequence[PackedRow]) -> Batch:
    """Lay the pieces of one pass into tensors; `rows` index into `trees`."""
    shares = [_shared([trees[p.tree] for p in row]) for row in rows]
    length = max(
        sum(_piece_length(trees[p.tree], p) for p in row) - shared * (len(row) - 1)
        for row, shared in zip(rows, shares, strict=True)
    )
    shape = (len(rows), length)
    ids, positions, branch = (np.zeros(shape, np.int64) for _ in range(3))
    tree_of = np.full(shape, -1, np.int64)
    source: list[np.ndarray] = []
    target: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    reference: list[np.ndarray] = []
    recorded: list[Recorded[np.ndarray]] = []
    last: list[int] = []
    segments: list[Segment] = []
    numbers = {index: n for n, index in enumerate(dict.fromkeys(p.tree for row in rows for p in row))}
    counts = dict.fromkeys(numbers, 0)

    def supervise(sources: np.ndarray, targets: np.ndarray, known: np.ndarray | None) -> None:
        source.append(sources)
        target.append(targets)
        owner.append(np.full(len(targets), len(last)))
        if known is not None:
            reference.append(known)

    for r, row in enumerate(rows):
        start = 0
        for place, piece in enumerate(row):
            tree = trees[piece.tree]
            shared = shares[r] if place else 0
            prompt = len(tree.prompt)
            end = start + _piece_length(tree, piece) - shared
            tree_of[r, start:end] = numbers[piece.tree]
            at = start + prompt - shared
            ids[r, start:at] = tree.prompt[shared:]
            positions[r, start:at] = np.arange(shared, prompt)
            if 0 in piece.branches:
                earlier = np.flatnonzero(tree.supervised)
                earlier = earlier[earlier > 0]
                unknown = None if tree.reference is None else np.full(len(earlier), np.nan, np.float32)
                before = earlier - 1
                supervise(r * length + before + (start - shared) * (before >= shared), tree.prompt[earlier], unknown)
            for k, b in enumerate(piece.branches, 1):
                response = tree.responses[b]
                here = slice(at, at + len(response))
                ids[r, here] = response
                branch[r, here] = k
                positions[r, here] = prompt + np.arange(len(response))
                sources = np.arange(at - 1, at + len(response) - 1) + r * length
                if prompt:
                    sources[:1] = r * length + start + prompt - shared - 1
                first = 0 if prompt else 1
                known = None if tree.reference is None else tree.reference[b][first:]
                supervise(sources[first:], response[first:], known)
                if tree.recorded is not None:
                    recorded.append(Recorded(*(values[first:] for values in tree.recorded[b])))
                at += len(response)
                last.append(r * length + at - 1)
            counts[piece.tree] += len(piece.branches)
            branches = tuple(len(tree.responses[b]) for b in piece.branches)
            segments.append(Segment(r, start, prompt - shared, branches, shared))
            start = end
        positions[r, start:] = np.arange(length - start)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        tree=torch.from_numpy(tree_of),
        branch=torch.from_numpy(branch),
        source=_join(source),
        target=_join(target),
        owner=_join(owner),
        last=torch.tensor(last),
        reference=torch.from_numpy(np.concatenate(reference)) if reference else None,
        recorded=Recorded(*(torch.from_numpy(np.concatenate(own)) for own in zip(*recorded, strict=True))) if recorded else None,
        shared=torch.tensor(shares),
        segments=tuple(segments),
        trees=tuple(numbers),
        counts=tuple(counts.values()),
        facts=tuple(trees[index].facts for index in numbers),
        tokens=int((tree_of >= 0).sum()),
        padded=all(len(row) == 1 and len(row[0].branches) == 1 for row in rows),
    )


def _join(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _piece_length(tree: Tree, piece: Piece) -> int:
    return len(tree.prompt) + sum(len(tree.responses[b]) for b in piece.branches)


def visible(batch: Batch, window: int | None = None) -> torch.Tensor:
    """(R, 1, L, L) bool: token i sees token j of the same tree, j not after i, in the prompt or in i's own branch.

    What begins all prompts of a row belongs to each of its trees.

    `window` limits the distance in positions, not in row indices. Padding sees padding, so that no row of the softmax is empty.
    """
    index = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    begins_all = (index < batch.shared[:, None])[:, None, :] & (batch.tree >= 0)[:, :, None]
    same_tree = (batch.tree[:, :, None] == batch.tree[:, None, :]) | begins_all
    reachable = (batch.branch[:, None, :] == 0) | (batch.branch[:, None, :] == batch.branch[:, :, None])
    seen = same_tree & reachable & (index[None, :] <= index[:, None])
    if window is not None:
        seen &= batch.positions[:, :, None] - batch.positions[:, None, :] < window
    return seen[:, None]
