"""What step k sees, how many steps there are, and after which something is due."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from rlhf_cli.data.batches import DatasetSource, due_steps, total_steps
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree


def _source(
    sizes: tuple[int, ...], shares: tuple[float, ...], batch_size: int, *, seed: int = 0, shuffle: bool = True
) -> DatasetSource:
    count = sum(sizes)
    trees = [Tree(np.array([i], np.int32), np.zeros(1, bool), (np.array([i, 1], np.int32),), i) for i in range(count)]
    records = [Record(prompt="", responses=("",), where=f"rows.jsonl:{i + 1}") for i in range(count)]
    return DatasetSource(flatten(trees, records), sizes, shares, batch_size, seed, shuffle)


def _prompts(source: DatasetSource, step: int) -> list[int]:
    return [int(tree.prompt[0]) for tree in source.batch(step)]


def test_an_epoch_sees_every_row_once_and_ends_in_a_short_batch() -> None:
    source = _source((10,), (1.0,), 4)
    assert source.steps_per_epoch == 3
    epochs = [[_prompts(source, step) for step in range(first, first + 3)] for first in (1, 4)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        assert sorted(functools.reduce(operator.iadd, epoch, [])) == list(range(10))
    assert epochs[0] != epochs[1]


def test_a_step_is_a_function_of_seed_and_number() -> None:
    forwards, backwards = _source((10,), (1.0,), 4), _source((10,), (1.0,), 4)
    first = [_prompts(forwards, step) for step in range(1, 10)]
    assert [_prompts(backwards, step) for step in range(9, 0, -1)] == first[::-1]
    assert _prompts(_source((10,), (1.0,), 4, seed=1), 1) != first[0]


def test_a_run_comes_to_the_rows_of_its_steps() -> None:
    data = _source((10,), (1.0,), 4)
    for steps in (1, 2, 3, 50):
        seen = {int(k) for step in range(1, min(steps, 3) + 1) for k in data.indices(step)}
        assert set(np.flatnonzero(data.reached(steps)).tolist()) == seen
    assert data.reached(3).all() and data.reached(2).sum() == 8


def test_file_order_without_shuffling() -> None:
    source = _source((5,), (1.0,), 2, shuffle=False)
    assert [_prompts(source, step) for step in (1, 2, 3, 4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert source.locations(2) == ["rows.jsonl:3", "rows.jsonl:4"]


def test_shares_of_two_sources() -> None:
    """8 rows an epoch: 6 of the first source's 4 rows, so two of them twice, and 2 of the second's 4."""
    source = _source((4, 4), (0.75, 0.25), 8)
    rows = _prompts(source, 1)
    assert [sum(r < 4 for r in rows), sum(r >= 4 for r in rows)] == [6, 2]
    assert len(set(r for r in rows if r >= 4)) == 2
    assert set(r for r in rows if r < 4) == {0, 1, 2, 3}
    both = rows + _prompts(source, 2)
    assert sorted(both) == sorted([0, 1, 2, 3] * 3 + [4, 5, 6, 7])


@pytest.mark.parametrize(
    ("epochs", "steps", "per_epoch", "wanted"), [(1.0, None, 7, 7), (2.5, None, 10, 25), (0.01, None, 10, 1), (3.0, 4, 10, 4)]
)
def test_total_steps(epochs: float, steps: int | None, per_epoch: int, wanted: int) -> None:
    assert total_steps(epochs, steps, per_epoch) == wanted


@pytest.mark.parametrize(
    ("every", "steps", "wanted"),
    [
        (None, 7, {7}),
        (0.25, 8, {2, 4, 6, 8}),
        (0.25, 6, {2, 3, 4, 6}),  # 1.5, 3, 4.5 and 6, halves to the even number
        (0.25, 2, {1, 2}),
        (0.4, 10, {4, 8, 10}),
        (3, 7, {3, 6, 7}),
        (1, 3, {1, 2, 3}),
        (50, 7, {7}),
    ],
)
def test_due_steps(every: float | None, steps: int, wanted: set[int]) -> None:
    assert due_steps(every, steps) == wanted
