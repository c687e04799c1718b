"""Prompts with branches: the one batch layout of every stage, and how it is packed into forward passes.

A tree is a prompt and the responses that branch off it: one for SFT, two for a pair, K for a ranking. Whole trees are laid
into rows without padding between them; `visible` says which token sees which.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from rlhf_cli.data.records import Facts, step_spans

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
    member: int | None = None  # of an ensemble, the only one that learns from it; None: all


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


SHARED_FROM = 16  # tokens with which all prompts begin, from which on they are computed once a row: a system prompt, say

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
    member: int | None = None  # of an ensemble, the one that its trees are for; None: all

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        move = partial(torch.Tensor.to, device=device, non_blocking=device.type == "cuda")  # MPS would read what is freed since
        tensors = {name: move(value) for name, value in vars(self).items() if torch.is_tensor(value)}
        recorded = self.recorded and Recorded(*map(move, self.recorded))
        return Batch(**(vars(self) | tensors | {"recorded": recorded}))


def tree_length(tree: Tree) -> int:
    """Tokens of the prompt and of all responses."""
    return len(tree.prompt) + sum(map(len, tree.responses))


def span(tree: Tree) -> int:
    """Tokens of the prompt and of the longest response: what max_length counts."""
    return len(tree.prompt) + max(map(len, tree.responses), default=0)


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
    return _Unit([[Piece(index, (b,))] for b in range(len(tree.responses))], span(tree))


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


def located(tree: Tree, tokenizer: Any, separator: str | None) -> Tree:
    """With where the steps of its responses end: at the last token that holds a character of the step. None: every token is one.

    Found in the tokens alone: a policy may write a text in other ones than the tokenizer would. Such a token may hold some of
    the separator too; control tokens are no text. A response without text is one step, which ends with its last token.
    """
    decode = tokenizer.backend_tokenizer.decode

    def behind(ids: list[int]) -> Iterator[int]:
        text = decode(ids)
        for start in (text[:end] for _, end in step_spans(text, separator or "")):
            # Not before all bytes of a character are there do the first tokens begin as the text does.
            yield len(ids) - 1 - bisect_left(range(len(ids)), True, key=lambda k: decode(ids[: k + 1]).startswith(start))

    ends = tuple(tuple(behind(r.tolist())) or (0,) if separator is not None else (*range(len(r)),)[::-1] for r in tree.responses)
    return tree._replace(facts=tree.facts._replace(ends=ends))


def at_steps(batch: Batch) -> Batch:
    """With the last tokens of steps, (S,), and the number of each tree's, where its trees know them; else as it is."""
    if not (ends := [own for facts in batch.facts for own in facts.ends or ()]):
        return batch
    places = [last - behind for last, own in zip(batch.last.tolist(), ends, strict=True) for behind in own]
    counts = tuple(sum(map(len, facts.ends or ())) for facts in batch.facts)
    return replace(batch, last=batch.last.new_tensor(places), counts=counts)


@dataclass
class _PassBuilder:
    """What grows while pieces are laid into the rows of a pass; indices and arrays are flat, (R·L,)."""

    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    tree: np.ndarray
    supervised: list[np.ndarray] = field(default_factory=list)  # (3, n) each: source, target and owner
    reference: list[np.ndarray] = field(default_factory=list)
    recorded: list[Recorded[np.ndarray]] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def supervise(self, source: np.ndarray, target: np.ndarray, reference: np.ndarray | None) -> None:
        self.supervised.append(np.stack([source, target, np.full(len(target), len(self.last))]))
        if reference is not None:
            self.reference.append(reference)

    def lay(self, tree: Tree, piece: Piece, number: int, start: int, beginning: range) -> int:
        """The piece from index `start`, less what `beginning` already holds of its prompt; where it ends."""
        prompt, shared = len(tree.prompt), len(beginning)
        at = start + prompt - shared
        self.ids[start:at] = tree.prompt[shared:]
        self.positions[start:at] = np.arange(shared, prompt)
        if 0 in piece.branches:
            before = np.flatnonzero(tree.supervised[1:])
            unknown = None if tree.reference is None else np.full(len(before), np.nan, np.float32)
            self.supervise(before + np.where(before < shared, beginning.start, start - shared), tree.prompt[before + 1], unknown)
        first = 0 if prompt else 1  # nothing predicts a text's first token
        for k, b in enumerate(piece.branches, 1):
            response = tree.responses[b]
            end = at + len(response)
            self.ids[at:end] = response
            self.branch[at:end] = k
            self.positions[at:end] = np.arange(prompt, prompt + len(response))
            source = np.arange(at - 1, end - 1)
            source[:1] = start + prompt - shared - 1
            self.supervise(source[first:], response[first:], None if tree.reference is None else tree.reference[b][first:])
            if tree.recorded is not None:
                self.recorded.append(Recorded(*(values[first:] for values in tree.recorded[b])))
            self.last.append(end - 1)
            at = end
        self.tree[start:at] = number
        return at


def build_batch(trees: Sequence[Tree], rows: Sequence[PackedRow]) -> Batch:
    """Lay the pieces of one pass into tensors; `rows` index into `trees`."""
    sizes = [[[len(trees[i].prompt), *(len(trees[i].responses[b]) for b in branches)] for i, branches in row] for row in rows]
    shares = [_shared([trees[piece.tree] for piece in row]) for row in rows]
    length = max(sum(map(sum, own)) - shared * (len(own) - 1) for own, shared in zip(sizes, shares, strict=True))
    layout = np.zeros((4, len(rows) * length), np.int64)
    laid = _PassBuilder(*layout)
    laid.tree[:] = -1
    segments: list[Segment] = []
    numbers = {index: n for n, index in enumerate(dict.fromkeys(piece.tree for row in rows for piece in row))}
    counts = dict.fromkeys(numbers, 0)
    for r, row in enumerate(rows):
        start = row_start = r * length
        beginning = range(row_start, row_start)
        for piece, (prompt, *branches) in zip(row, sizes[r], strict=True):
            shared = len(beginning)
            segments.append(Segment(r, start - row_start, prompt - shared, tuple(branches), shared))
            start = laid.lay(trees[piece.tree], piece, numbers[piece.tree], start, beginning)
            counts[piece.tree] += len(branches)
            beginning = range(row_start, row_start + shares[r])
        laid.positions[start : row_start + length] = np.arange(row_start + length - start)
    ids, positions, branch, tree = torch.from_numpy(layout.reshape(4, len(rows), length))
    source, target, owner = torch.from_numpy(np.concatenate(laid.supervised, 1))
    recorded = [torch.from_numpy(np.concatenate(values)) for values in zip(*laid.recorded, strict=True)]
    return Batch(
        ids=ids,
        positions=positions,
        tree=tree,
        branch=branch,
        source=source,
        target=target,
        owner=owner,
        last=torch.tensor(laid.last),
        reference=torch.from_numpy(np.concatenate(laid.reference)) if laid.reference else None,
        recorded=Recorded(*recorded) if recorded else None,
        shared=torch.tensor(shares),
        segments=tuple(segments),
        trees=tuple(numbers),
        counts=tuple(counts.values()),
        facts=tuple(trees[index].facts for index in numbers),
        tokens=int((laid.tree >= 0).sum()),
        member=trees[next(iter(numbers))].member,
    )


def idle_batch(trees: Sequence[Tree]) -> Batch:
    """A pass of two tokens in which nothing is learned or read, with the fields that passes over `trees` have."""
    nothing = Tree(np.zeros(1, np.int32), np.zeros(1, bool), (np.zeros(1, np.int32),), 0)
    batch, none, values = build_batch([nothing], [[Piece(0, (0,))]]), torch.empty(0, dtype=torch.int64), torch.empty(0)
    first = trees[0] if trees else nothing
    return replace(
        batch,
        source=none,
        target=none,
        owner=none,
        last=none,
        reference=None if first.reference is None else values,
        recorded=None if first.recorded is None else Recorded(values, values, values, values, values),
        trees=(),
        counts=(),
        facts=(),
        tokens=0,
        member=first.member,
    )


def sees(batch: Batch, window: int | None = None) -> Callable[..., torch.Tensor]:
    """(row, head, i, j) → bool: token i sees token j of the same tree, j not after i, in the prompt or in i's own branch.

    What begins all prompts of a row belongs to each of its trees. `window` limits the distance in positions, not in row
    indices. Padding sees padding, so that no row of the softmax is empty.
    """
    tree, branch, positions, shared = batch.tree, batch.branch, batch.positions, batch.shared

    def rule(row: torch.Tensor, _: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        same_tree = (tree[row, i] == tree[row, j]) | ((j < shared[row]) & (tree[row, i] >= 0))
        reachable = (branch[row, j] == 0) | (branch[row, j] == branch[row, i])
        seen = same_tree & reachable & (i >= j)
        return seen if window is None else seen & (positions[row, i] - positions[row, j] < window)

    return rule


def visible(batch: Batch, window: int | None = None) -> torch.Tensor:
    """(R, 1, L, L) bool: `sees` of every two tokens of a row."""
    rows, index = (torch.arange(n, device=batch.ids.device) for n in batch.ids.shape)
    row = rows[:, None, None, None]
    return sees(batch, window)(row, row, index[:, None], index)
