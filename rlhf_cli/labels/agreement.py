"""How far raters agree beyond chance, with intervals; whether a share is that of a fair coin; verdicts that go in circles.

Ratings are (N, R) whole numbers: of N items the category, from 0, that each of R raters chose, −1 where one chose none. All
that a coefficient needs of an item is a table of (C, C) numbers, so that a bootstrap over items adds tables up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np

from rlhf_cli.evaluation.intervals import interval, resamples
from rlhf_cli.figures import Interval

Coefficient = Callable[[np.ndarray], np.ndarray]


def _chosen(ratings: np.ndarray, categories: int) -> np.ndarray:
    """(N, R, C): 1 where a rater chose the category."""
    return np.asarray(ratings[..., None] == np.arange(categories), np.float64)


def confusions(ratings: np.ndarray, categories: int) -> np.ndarray:
    """(N, P, C, C): for each pair of raters, what they chose for an item that both have rated."""
    chosen = _chosen(ratings, categories)
    pairs = list(combinations(range(ratings.shape[1]), 2))
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return np.asarray(chosen[:, first, :, None] * chosen[:, second, None, :])


def coincidences(ratings: np.ndarray, categories: int) -> np.ndarray:
    """(N, 1, C, C): ordered pairs of different raters of an item over its m − 1, m being its ratings; 0 where m is below 2."""
    counts = _chosen(ratings, categories).sum(1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(categories)
    return np.asarray(pairs / np.maximum(counts.sum(1) - 1, 1)[:, None, None])[:, None]


def _of_equal_numbers(ratings: np.ndarray, categories: int) -> np.ndarray:
    """`coincidences`; all 0 where items differ in their number of ratings, for which Fleiss' κ has no meaning."""
    rated = (ratings >= 0).sum(1)
    return coincidences(ratings, categories) * float(len(set(rated.tolist())) == 1)


def cohen(tables: np.ndarray) -> np.ndarray:
    """(…, C, C) of `confusions` → κ = (p_o − p_e)/(1 − p_e), p_e from each rater's own shares; Cohen 1960."""
    shares = tables / tables.sum((-2, -1), keepdims=True)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    return np.asarray((np.trace(shares, axis1=-2, axis2=-1) - expected) / (1 - expected))


def fleiss(tables: np.ndarray) -> np.ndarray:
    """(…, C, C) of `coincidences` → κ, p_e from the shares of all raters together; Fleiss 1971."""
    shares = tables / tables.sum((-2, -1), keepdims=True)
    expected = (shares.sum(-1) ** 2).sum(-1)
    return np.asarray((np.trace(shares, axis1=-2, axis2=-1) - expected) / (1 - expected))


def krippendorff(tables: np.ndarray, *, ordinal: bool = False) -> np.ndarray:
    """(…, C, C) of `coincidences` → α = 1 − D_o/D_e; Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".

    `ordinal`: the distance of two categories is the squared number of ratings between their middles, of those that count.
    """
    counts = tables.sum(-1)
    total = counts.sum(-1)
    middles = counts.cumsum(-1) - counts / 2
    distance = (middles[..., :, None] - middles[..., None, :]) ** 2 if ordinal else 1 - np.eye(counts.shape[-1])
    observed = (tables * distance).sum((-2, -1))
    expected = (counts[..., :, None] * counts[..., None, :] * distance).sum((-2, -1))
    return np.asarray(1 - (total - 1) * observed / expected)


COEFFICIENTS: Mapping[str, tuple[Callable[[np.ndarray, int], np.ndarray], Coefficient]] = {
    "cohen": (confusions, cohen),
    "fleiss": (_of_equal_numbers, fleiss),
    "krippendorff": (coincidences, krippendorff),
    "krippendorff_ordinal": (coincidences, lambda tables: krippendorff(tables, ordinal=True)),
}
"""Name → what it needs of an item, and the coefficient itself."""


def agreement(name: str, ratings: np.ndarray, categories: int, groups: np.ndarray, seed: int = 0) -> Interval | None:
    """A coefficient with its 95 % bootstrap interval, or None where it has no value: nobody varies, nothing is rated twice.

    `groups`: (N,) whole numbers; the items of one group, such as the pairs of one prompt, are drawn together. Cohen's κ of more
    than two raters is the mean of all pairs of them that have one (Light 1971). Draws without a value are left out. With one
    group nothing is known of how much others differ: the interval is all that the coefficient can be.
    """
    collect, coefficient = COEFFICIENTS[name]
    if not ratings.size:
        return None
    own = collect(ratings, categories)
    tables = np.zeros((int(groups.max()) + 1, *own.shape[1:]))
    np.add.at(tables, groups, own)
    tables = tables[tables.any((1, 2, 3))]

    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            each = coefficient(sums)
            known = np.isfinite(each)
            return np.asarray(np.where(known, each, 0.0).sum(-1) / known.sum(-1))

    point = float(value(tables.sum(0)))
    if math.isnan(point):
        return None
    draws = value(np.tensordot(resamples(len(tables), seed), tables, 1)) if len(tables) > 1 else np.array([])
    draws = draws[~np.isnan(draws)]
    found = interval(point, draws, len(tables)) if len(draws) else Interval(point, -1.0, 1.0)
    return Interval(point, max(found.low, -1.0), min(found.high, 1.0))


def coin(heads: int, tosses: int) -> float:
    """Exact two-sided p-value of so many heads of a fair coin.

    >>> coin(1, 5), coin(5, 10)
    (0.375, 1.0)
    """
    fewer = min(heads, tosses - heads)
    each = (math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1) for k in range(fewer + 1))
    below = math.fsum(math.exp(own - tosses * math.log(2)) for own in each)
    return round(min(1.0, 2 * below), 12)


def circles(better: Mapping[tuple[int, int], float]) -> tuple[int, int]:
    """Of verdicts on pairs (i, j), i < j, 1 where i is better, −1 where j is: triples that go in a circle, and all without a tie.

    >>> circles({(0, 1): 1, (1, 2): 1, (0, 2): -1})
    (1, 1)
    """
    names = sorted({name for pair in better for name in pair})
    sides = [[better.get(pair, 0.0) for pair in ((i, j), (j, k), (i, k))] for i, j, k in combinations(names, 3)]
    decided = [own for own in sides if all(own)]
    return sum(own[0] == own[1] != own[2] for own in decided), len(decided)
