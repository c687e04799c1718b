"""Single judged responses, and whose response each of them is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_cli.data.flat import Trees, flatten
from rlhf_cli.data.records import Facts, Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.data.unpaired import mismatch, unpaired, with_mismatches
from rlhf_cli.errors import UsageError

Row = tuple[list[int], list[list[int]], Facts]


def make(*rows: Row) -> Trees:
    trees = [
        Tree(np.array(prompt, np.int32), np.zeros(len(prompt), bool), tuple(np.array(r, np.int32) for r in responses), i, facts)
        for i, (prompt, responses, facts) in enumerate(rows)
    ]
    return flatten(trees, [Record("", (), f"rows.jsonl:{i + 1}") for i in range(len(rows))])


def contents(trees: Trees) -> list[tuple[list[int], list[list[int]], Facts, int, str]]:
    return [
        (tree.prompt.tolist(), [r.tolist() for r in tree.responses], tree.facts, tree.row, trees.locations[i])
        for i, tree in enumerate(trees)
    ]


GOOD, BAD = Facts(label=True), Facts(label=False)


def test_a_pair_is_split_and_a_judged_response_stays() -> None:
    trees = make(
        ([1, 2], [[5, 6]], BAD),
        ([3], [[7], [8, 9]], Facts(subset="s", scores=(2.0, 1.0))),
        ([4], [[10], [11], [12]], Facts(ranks=(1.0, 1.0, 2.0))),
        ([], [[13, 14]], GOOD),
    )
    assert contents(unpaired(trees)) == [
        ([1, 2], [[5, 6]], BAD, 0, "rows.jsonl:1"),
        ([3], [[7]], Facts(label=True, subset="s"), 1, "rows.jsonl:2"),
        ([3], [[8, 9]], Facts(label=False, subset="s"), 1, "rows.jsonl:2"),
        ([4], [[10]], GOOD, 2, "rows.jsonl:3"),
        ([4], [[12]], BAD, 2, "rows.jsonl:3"),
        ([], [[13, 14]], GOOD, 3, "rows.jsonl:4"),
    ]
    assert unpaired(trees).supervised.astype(int).tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1]


def test_a_second_response_comes_from_another_tree_and_is_cut() -> None:
    trees = make(([1, 2, 3], [[4]], GOOD), ([5], [[6, 7, 8, 9, 10]], BAD))
    assert contents(with_mismatches(trees, seed=0, max_length=6)) == [
        ([1, 2, 3], [[4], [6, 7, 8]], GOOD, 0, "rows.jsonl:1"),
        ([5], [[6, 7, 8, 9, 10], [4]], BAD, 1, "rows.jsonl:2"),
    ]


def test_one_text_alone_leaves_nothing_to_compare() -> None:
    with pytest.raises(UsageError) as error:
        with_mismatches(make(([1], [[4]], GOOD), ([2], [[4]], BAD)), seed=0, max_length=9)
    assert str(error.value) == "all 2 responses are the same (rows.jsonl:1); KTO compares each with another one"


def largest(numbers: Sequence[int]) -> int:
    return max(Counter(numbers).values())


def draw(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts and prompts of 2 to 60 trees; few or many different ones, at least two texts, numbered from 0."""
    random = np.random.default_rng(case)
    count = int(random.integers(2, 61))
    texts = random.integers(0, random.integers(2, 2 * count + 1), count)
    texts[:2] = 0, 1
    if case % 4 == 0:
        texts[2:][random.random(count - 2) < 0.6] = 0
    prompts = np.arange(count) // 2 if case % 3 == 0 else random.integers(0, random.integers(1, 2 * count + 1), count)
    return np.unique(texts, return_inverse=True)[1], np.unique(prompts, return_inverse=True)[1]


@pytest.mark.parametrize("part", range(4))
def test_a_mismatch_has_another_text_and_another_prompt(part: int) -> None:
    """500 small data sets each; what must hold is told by counting texts and prompts."""
    permutations = guaranteed = 0
    for case in range(500 * part, 500 * (part + 1)):
        texts, prompts = draw(case)
        count = len(texts)
        sigma = mismatch(texts, prompts, seed=case)
        assert (texts != texts[sigma]).all()
        assert sigma.min() >= 0 and sigma.max() < count
        if 2 * largest(texts.tolist()) <= count:
            permutations += 1
            assert sorted(sigma.tolist()) == list(range(count))
        else:  # every other response is used, each about equally often
            used = Counter(sigma[texts == np.bincount(texts).argmax()].tolist())
            assert max(used.values()) - min(used.values()) <= 1
            assert set(np.flatnonzero(texts != np.bincount(texts).argmax())) == used.keys()
        if 4 * max(largest(texts.tolist()), largest(prompts.tolist())) <= count:
            guaranteed += 1
            assert (prompts != prompts[sigma]).all()
    assert 250 < permutations < 500 and guaranteed > 100


def best_by_enumeration(texts: np.ndarray, prompts: np.ndarray) -> int | None:
    """The fewest trees that keep their prompt under any permutation that gives all another text."""
    from itertools import permutations

    orders = np.array(list(permutations(range(len(texts)))))
    allowed = (texts[orders] != texts).all(1)
    kept = (prompts[orders] == prompts).sum(1)[allowed]
    return int(kept.min()) if len(kept) else None


def test_prompts_meet_themselves_hardly_more_often_than_they_must() -> None:
    """All permutations of up to seven trees, far below the size at which avoiding prompts is guaranteed."""
    possible = found = 0
    for case in range(200):
        random = np.random.default_rng(case)
        count = int(random.integers(2, 8))
        texts, prompts = random.integers(0, count, count), random.integers(0, count, count)
        texts[:2] = 0, 1
        if best_by_enumeration(texts, prompts) == 0:
            sigma = mismatch(np.unique(texts, return_inverse=True)[1], prompts, seed=0)
            possible += 1
            found += bool((prompts != prompts[sigma]).all())
    assert possible > 50
    assert found >= 0.9 * possible


def test_it_is_a_function_of_the_seed() -> None:
    texts = np.arange(1000)
    first = mismatch(texts, texts // 2, seed=1)
    assert mismatch(texts, texts // 2, seed=1).tolist() == first.tolist()
    assert (mismatch(texts, texts // 2, seed=2) != first).mean() > 0.9


def test_any_other_tree_is_about_equally_likely() -> None:
    """Over 6000 seeds each of the four other trees comes 1500 times, give or take 33.5 (one standard deviation)."""
    drawn = Counter(int(mismatch(np.arange(5), np.arange(5), seed)[0]) for seed in range(6000))
    assert drawn.keys() == {1, 2, 3, 4}
    assert all(abs(n - 1500) < 170 for n in drawn.values())


def test_any_tree_of_another_text_is_about_equally_likely() -> None:
    """Two texts with three trees each: 2000 times each, give or take 36.5."""
    drawn = Counter(int(mismatch(np.arange(6) % 2, np.arange(6), seed)[0]) for seed in range(6000))
    assert drawn.keys() == {1, 3, 5}
    assert all(abs(n - 2000) < 180 for n in drawn.values())


@pytest.mark.parametrize("groups", [2, 3])
def test_many_trees_of_few_prompts(groups: int) -> None:
    """Half of the trees start with their own prompt; swaps that can only be had among each other solve all."""
    texts = np.arange(20_000)
    sigma = mismatch(texts, texts % groups, seed=0)
    assert (texts % groups != sigma % groups).all()
    assert sorted(sigma.tolist()) == texts.tolist()
