"""The layout of prompts with branches, by hand and by brute force; what a pass holds."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import (
    Batch,
    Layout,
    Piece,
    Segment,
    Tree,
    build_batch,
    plan_passes,
    supervised_tokens,
    tree_length,
    visible,
)


def tree(prompt: list[int], *responses: list[int], supervised: tuple[int, ...] = ()) -> Tree:
    mask = np.isin(np.arange(len(prompt)), supervised)
    return Tree(np.array(prompt, np.int32), mask, tuple(np.array(r, np.int32) for r in responses), 0)


SUM = tree([9, 2, 9], [4, 1], [5, 1])


def test_the_example_of_the_docstring() -> None:
    batch = build_batch([SUM], [[Piece(0, (0, 1))]])
    assert batch.ids.tolist() == [[9, 2, 9, 4, 1, 5, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert batch.tree.tolist() == [[0] * 7]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert batch.source.tolist() == [2, 3, 2, 5]
    assert batch.target.tolist() == [4, 1, 5, 1]
    assert batch.owner.tolist() == [0, 0, 1, 1]
    assert batch.last.tolist() == [4, 6]
    assert (batch.counts, batch.facts, batch.reference) == ((2,), (Facts(),), None)
    assert batch.segments == (Segment(0, 0, 3, (2, 2)),)
    assert (batch.trees, batch.tokens) == ((0,), 7)


def test_two_rows_with_padding() -> None:
    """The second tree stands first; the flat index of row 1's first token is 7."""
    batch = build_batch([SUM, tree([7, 8], [3])], [[Piece(1, (0,))], [Piece(0, (0, 1))]])
    assert batch.ids.tolist() == [[7, 8, 3, 0, 0, 0, 0], [9, 2, 9, 4, 1, 5, 1]]
    assert batch.tree.tolist() == [[0, 0, 0, -1, -1, -1, -1], [1] * 7]
    assert batch.positions.tolist()[0] == [0, 1, 2, 0, 1, 2, 3]
    assert batch.source.tolist() == [1, 9, 10, 9, 12]
    assert batch.owner.tolist() == [0, 1, 1, 2, 2]
    assert batch.last.tolist() == [2, 11, 13]
    assert batch.counts == (1, 2)
    assert (batch.trees, batch.tokens) == ((1, 0), 10)


def test_two_trees_in_one_row() -> None:
    batch = build_batch([tree([7, 8], [3]), SUM], [[Piece(0, (0,)), Piece(1, (0, 1))]])
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 3, 4]]
    assert batch.tree.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
    assert batch.branch.tolist() == [[0, 0, 1, 0, 0, 0, 1, 1, 2, 2]]
    assert batch.source.tolist() == [1, 5, 6, 5, 8]
    assert batch.segments == (Segment(0, 0, 2, (1,)), Segment(0, 3, 3, (2, 2)))


def test_earlier_turns_have_a_loss_once() -> None:
    """Tokens 2 and 3 of the prompt are an assistant's; they count for the first response, also where branches lie apart."""
    chat = tree([9, 5, 6, 1, 9], [4, 1], [3], supervised=(2, 3))
    together = build_batch([chat], [[Piece(0, (0, 1))]])
    assert together.target.tolist() == [6, 1, 4, 1, 3]
    assert together.source.tolist() == [1, 2, 4, 5, 4]
    assert together.owner.tolist() == [0, 0, 0, 0, 1]
    apart = build_batch([chat], [[Piece(0, (0,))], [Piece(0, (1,))]])
    assert apart.target.tolist() == [6, 1, 4, 1, 3]
    assert apart.source.tolist() == [1, 2, 4, 5, 11]
    assert apart.trees == (0,)
    assert supervised_tokens(chat) == 5


def test_nothing_predicts_a_first_token() -> None:
    empty = tree([], [4, 5, 1], [6, 1])
    batch = build_batch([empty], [[Piece(0, (0, 1))]])
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.source.tolist() == [0, 1, 3]
    assert batch.target.tolist() == [5, 1, 1]
    assert batch.owner.tolist() == [0, 0, 1]
    assert supervised_tokens(empty) == 3
    begins = tree([4, 5], [6], supervised=(0, 1))
    assert build_batch([begins], [[Piece(0, (0,))]]).target.tolist() == [5, 6]
    assert supervised_tokens(begins) == 2


def _random_trees(count: int, seed: int) -> list[Tree]:
    random = np.random.default_rng(seed)
    ids = lambda low, high: random.integers(1, 99, random.integers(low, high)).tolist()  # noqa: E731
    return [tree(ids(0, 8), *(ids(1, 7) for _ in range(random.integers(1, 5)))) for _ in range(count)]


def _visible_by_hand(batch: Batch, window: int | None) -> list[list[list[bool]]]:
    def sees(r: int, i: int, j: int) -> bool:
        same = int(batch.tree[r, i]) == int(batch.tree[r, j])
        reachable = int(batch.branch[r, j]) in (0, int(batch.branch[r, i]))
        near = window is None or int(batch.positions[r, i]) - int(batch.positions[r, j]) < window
        return same and reachable and j <= i and near

    rows, length = batch.ids.shape
    return [[[sees(r, i, j) for j in range(length)] for i in range(length)] for r in range(rows)]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible(window: int | None) -> None:
    trees = _random_trees(5, seed=0)
    rows = plan_passes(trees, 1, 10**6, "packed")[0][0]
    batch = build_batch(trees, rows)
    seen = visible(batch, window)
    assert seen.shape == (batch.ids.shape[0], 1, batch.ids.shape[1], batch.ids.shape[1])
    assert seen[:, 0].tolist() == _visible_by_hand(batch, window)
    assert bool(seen.any(-1).all())


def test_a_window_counts_positions_and_not_places_in_the_row() -> None:
    """The second branch's first token, position 3, stands behind the first branch; it still sees the prompt's last one."""
    seen = visible(build_batch([SUM], [[Piece(0, (0, 1))]]), window=2)[0, 0]
    assert [j for j in range(7) if seen[5, j]] == [2, 5]
    assert [j for j in range(7) if seen[6, j]] == [5, 6]


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("budget", [1, 30, 200, 10**6])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_response_has_one_place(ranks: int, budget: int, layout: Layout) -> None:
    trees = _random_trees(23, seed=ranks)
    plan = plan_passes(trees, ranks, budget, layout)
    assert len(plan) == ranks
    places = Counter((piece.tree, b) for share in plan for rows in share for row in rows for piece in row for b in piece.branches)
    assert places == Counter((i, b) for i, t in enumerate(trees) for b in range(len(t.responses)))
    passes_of_tree = {
        (piece.tree, n, r) for r, share in enumerate(plan) for n, rows in enumerate(share) for row in rows for piece in row
    }
    assert len(passes_of_tree) == len(trees)
    for share in plan:
        for rows in share:
            batch = build_batch(trees, rows)
            assert layout != "alone" or all(len(row) == 1 and len(row[0].branches) == 1 for row in rows)
            assert batch.ids.numel() <= budget or len(batch.trees) == 1
            assert batch.tokens >= batch.ids.shape[1]
            assert len(batch.target) == sum(supervised_tokens(trees[i]) for i in batch.trees)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_equal_shares(ranks: int) -> None:
    trees = _random_trees(40, seed=7)
    plan = plan_passes(trees, ranks, 60, "packed")
    loads = [sum(tree_length(trees[piece.tree]) for rows in share for row in rows for piece in row) for share in plan]
    assert sum(loads) == sum(map(tree_length, trees))
    assert max(loads) - min(loads) <= max(map(tree_length, trees))


def test_more_ranks_than_trees_leave_some_idle() -> None:
    assert plan_passes([SUM, SUM], 3, 100, "long") == [[[[Piece(0, (0, 1))]]], [[[Piece(1, (0, 1))]]], []]


def test_a_tree_beyond_the_budget_has_a_pass_of_its_own() -> None:
    short = tree([1], [2])
    assert plan_passes([short, SUM, short], 1, 4, "packed") == [[[[Piece(1, (0, 1))]], [[Piece(0, (0,)), Piece(2, (0,))]]]]


def test_long_rows_fill_the_budget_and_packed_rows_the_longest_tree() -> None:
    trees = [tree([1, 2], [3, 4])] * 6
    shapes = {
        name: [build_batch(trees, rows).ids.shape for rows in plan_passes(trees, 1, 12, name)[0]] for name in get_args(Layout)
    }
    assert shapes == {"long": [(1, 12)] * 2, "packed": [(3, 4)] * 2, "alone": [(3, 4)] * 2}


def _known(number: int, one: Tree) -> Tree:
    """The tree with a label of its own, and log-probabilities of the reference that tell every token apart."""
    values = tuple(np.float32(1000 * number + 100 * b) + np.arange(len(r), dtype=np.float32) for b, r in enumerate(one.responses))
    return one._replace(facts=Facts(subset=str(number)), reference=values)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("budget", [20, 10**6])
def test_what_is_said_of_responses_lies_beside_them(budget: int, layout: Layout, earlier: bool) -> None:
    """Where there is no prompt, the first token is not predicted; earlier turns have no known log-probability."""
    random = np.random.default_rng(3)
    trees = [t._replace(supervised=earlier & (random.random(len(t.prompt)) < 0.5)) for t in _random_trees(20, seed=5)]
    trees = [_known(number, t) for number, t in enumerate(trees)]
    assert {len(t.prompt) == 0 for t in trees} == {True, False}
    for rows in plan_passes(trees, 1, budget, layout)[0]:
        batch = build_batch(trees, rows)
        assert batch.counts == tuple(len(trees[i].responses) for i in batch.trees)
        assert [facts.subset for facts in batch.facts] == [str(i) for i in batch.trees]
        named = [(i, b) for i in batch.trees for b in range(len(trees[i].responses))]
        assert len(batch.last) == len(named)
        assert batch.reference is not None and batch.reference.shape == batch.target.shape
        for number, (i, b) in enumerate(named):
            one, response = trees[i], trees[i].responses[b]
            at = int(batch.last[number])
            assert int(batch.ids.flatten()[at]) == response[-1]
            assert int(batch.positions.flatten()[at]) == len(one.prompt) + len(response) - 1
            assert int(batch.tree.flatten()[at]) == batch.trees.index(i)
            first = 1000 * i + 100 * b + (len(one.prompt) == 0)
            unknown = (
                supervised_tokens(one._replace(responses=(response,))) - len(response) + (len(one.prompt) == 0) if b == 0 else 0
            )
            values = batch.reference[batch.owner == number]
            assert values[:unknown].isnan().all()
            assert values[unknown:].tolist() == list(range(first, 1000 * i + 100 * b + len(response)))
            assert (
                batch.target[batch.owner == number][unknown:].tolist()
                == response[len(response) - len(values) + unknown :].tolist()
            )


def test_a_batch_moves_as_a_whole() -> None:
    moved = build_batch([_known(0, SUM)], [[Piece(0, (0, 1))]]).to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if torch.is_tensor(value)} == {"meta"}
    assert moved.reference is not None and moved.last.shape == (2,)
    assert moved.segments == (Segment(0, 0, 3, (2, 2)),)


def test_what_begins_all_prompts_of_a_row_stands_in_its_first_tree() -> None:
    """16 tokens 1 … 16 begin both prompts: [1 … 16 40 | 50 51] and then [41 42 | 52], by hand."""
    begin = list(range(1, 17))
    tree = lambda prompt, *responses: Tree(  # noqa: E731
        np.array([*begin, *prompt], np.int32),
        np.array([False] * 3 + [True] + [False] * (12 + len(prompt))),
        tuple(np.array(response, np.int32) for response in responses),
        0,
    )
    batch = build_batch([tree([40], [50, 51]), tree([41, 42], [52])], [[Piece(0, (0,)), Piece(1, (0,))]])
    assert batch.ids.tolist() == [[*begin, 40, 50, 51, 41, 42, 52]]
    assert batch.positions.tolist() == [[*range(16), 16, 17, 18, 16, 17, 18]]
    assert batch.tree.tolist() == [[0] * 19 + [1] * 3]
    assert batch.shared.tolist() == [16]
    assert batch.segments == (Segment(0, 0, 17, (2,)), Segment(0, 19, 2, (1,), 16))
    # The supervised token 4 of the beginning belongs to each of the two trees.
    assert batch.source.tolist() == [2, 16, 17, 2, 20]
    assert batch.target.tolist() == [4, 50, 51, 4, 52]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1]
    assert (batch.last.tolist(), batch.tokens) == ([18, 21], 22)
    seen = visible(batch)[0, 0]
    assert seen[19].nonzero()[:, 0].tolist() == [*range(16), 19]
    assert seen[21].nonzero()[:, 0].tolist() == [*range(16), 19, 20, 21]


def test_short_beginnings_are_not_shared() -> None:
    prompts = [np.arange(size, dtype=np.int32) for size in (16, 17, 30)]
    trees = [Tree(prompt, np.zeros(len(prompt), bool), (np.array([1], np.int32),), 0) for prompt in prompts]
    pieces = [Piece(i, (0,)) for i in range(3)]
    assert build_batch(trees, [pieces]).shared.tolist() == [0]  # 15 tokens: of the shortest prompt, the last stays its own
    assert build_batch(trees, [pieces[1:]]).shared.tolist() == [16]
