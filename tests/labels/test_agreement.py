"""Agreement beyond chance equals what statsmodels and krippendorff say of the same tables; biases are found where they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.labels.agreement import COEFFICIENTS, agreement, coin

GOLDEN = json.loads(Path(__file__).with_name("agreement.json").read_text())
RANDOM = json.loads(Path(__file__).with_name("random_agreement.json").read_text())  # of make_random_agreement.py
NAMES = {
    "cohen (raters 0 and 1)": "cohen",
    "fleiss": "fleiss",
    "krippendorff nominal": "krippendorff",
    "krippendorff ordinal": "krippendorff_ordinal",
}


def value(name: str, ratings: np.ndarray, categories: int) -> float | None:
    found = agreement(name, ratings[:, :2] if name == "cohen" else ratings, categories, np.arange(len(ratings)))
    assert found is None or -1 <= found.low <= found.mean <= found.high <= 1
    return None if found is None else found.mean


@pytest.mark.parametrize(
    ("case", "expected"), zip(GOLDEN["inputs"], GOLDEN["expected"], strict=True), ids=lambda it: it.get("case")
)
def test_small_and_degenerate_tables(case: dict[str, Any], expected: dict[str, float | None]) -> None:
    ordered, raters = case["categories"], max(map(len, case["ratings"]), default=2)
    codes = [[-1 if own is None else ordered.index(own) for own in row] for row in case["ratings"]]
    ratings = np.array(codes, int).reshape(-1, raters)
    found = {told: value(name, ratings, len(ordered)) for told, name in NAMES.items()}
    assert {name for name, own in found.items() if own is None} == {name for name, own in expected.items() if own is None}
    assert [own for own in found.values() if own is not None] == pytest.approx(
        [own for own in expected.values() if own is not None], abs=1e-9
    )


def test_random_tables_as_other_libraries_have_them() -> None:
    """Those with gaps by Krippendorff's coefficient alone."""
    compared = 0
    for table in RANDOM:
        for name, expected in table["expected"].items():
            assert value(name, np.array(table["ratings"]), table["categories"]) == pytest.approx(expected, abs=1e-9)
            compared += 1
    assert compared == 12 * 4 + 12 * 2


def test_more_than_two_raters_have_the_mean_of_their_pairs() -> None:
    ratings = np.array(next(table["ratings"] for table in RANDOM if len(table["ratings"][0]) == 3))
    each = [value("cohen", ratings[:, pair], 5) for pair in ([0, 1], [0, 2], [1, 2])]
    found = agreement("cohen", ratings, 5, np.arange(len(ratings)))
    assert found is not None
    assert found.mean == pytest.approx(np.mean([own for own in each if own is not None]), abs=1e-12)


def test_intervals_cover_what_many_items_say() -> None:
    """Two raters who are right in 80 % of the cases: of 100 samples of 60 items, 95 % cover it, less 3 standard errors."""
    rng, hits = np.random.default_rng(3), 0

    def sample(items: int) -> np.ndarray:
        truth = rng.integers(3, size=(items, 1))
        return np.where(rng.random((items, 2)) < 0.8, truth, rng.integers(3, size=(items, 2)))

    large = sample(200_000)
    truth = value_of_all(large)
    for _ in range(100):
        found = agreement("krippendorff", sample(60), 3, np.arange(60))
        assert found is not None
        hits += found.low <= truth <= found.high
    assert hits >= 95 - 3 * math.sqrt(100 * 0.95 * 0.05)


def value_of_all(ratings: np.ndarray) -> float:
    collect, coefficient = COEFFICIENTS["krippendorff"]
    return float(coefficient(collect(ratings, 3).sum(0))[0])


def test_items_of_one_group_are_drawn_together() -> None:
    """The same table thrice, each copy in the group of its first, has the interval of one."""
    ratings = np.array(RANDOM[0]["ratings"])
    once = agreement("krippendorff_ordinal", ratings, 5, np.arange(len(ratings)))
    thrice = agreement("krippendorff_ordinal", np.tile(ratings, (3, 1)), 5, np.tile(np.arange(len(ratings)), 3))
    apart = agreement("krippendorff_ordinal", np.tile(ratings, (3, 1)), 5, np.arange(3 * len(ratings)))
    assert once is not None and thrice is not None and apart is not None
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.02)
    assert apart.high - apart.low < 0.75 * (once.high - once.low)


def test_a_coins_p_value_is_exact() -> None:
    for tosses in (1, 2, 7, 20, 61):
        for heads in range(tosses + 1):
            least = math.comb(tosses, heads)
            exact = sum(math.comb(tosses, k) for k in range(tosses + 1) if math.comb(tosses, k) <= least) / 2**tosses
            assert coin(heads, tosses) == pytest.approx(exact, rel=1e-9)


def test_a_fair_coin_is_rarely_accused_and_an_unfair_one_is() -> None:
    """At p < 0.05: of fair coins at most 5 %, for the test is exact; of 0.7 in 100 tosses nearly all."""
    rng = np.random.default_rng(5)
    fair, unfair = (np.mean([coin(int(heads), 100) < 0.05 for heads in rng.binomial(100, share, 4000)]) for share in (0.5, 0.7))
    assert fair <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    assert fair > 0.02
    assert unfair > 0.97
