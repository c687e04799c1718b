"""Gold of two series of models where they are equally far from the policy that both start from, in KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli.evaluation.intervals import interval
from rlhf_cli.figures import Interval

CELLS = 64  # of the common range in √KL, for the mean over it; after each quarter of them both series are read off

Tables = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Model → (P,) mean log π − log π_start and (P,) mean gold of each prompt's responses; the start is one of them, at 0."""


@dataclass(frozen=True)
class Reached:
    """How far models went from the start, and what they are worth: the means of those whose KL cannot be told apart."""

    models: list[str]
    kl: Interval  # nats
    gold: Interval


@dataclass(frozen=True)
class Series:
    """One line of gold over KL."""

    name: str  # the names in the recipe together
    points: list[Reached]  # the nearest first


@dataclass(frozen=True)
class Matched:
    """Both series at one KL."""

    kl: Interval
    a: Interval
    b: Interval
    difference: Interval  # a less b


@dataclass(frozen=True)
class AtKl:
    """What is found where both series are; without a common range, `mean` is None and nothing is matched."""

    a: Series
    b: Series
    matched: list[Matched]  # at a quarter, a half, three quarters and the end of the common range in √KL
    mean: Interval | None  # of a less b over the common range, uniform in √KL

    @property
    def shorter(self) -> Series:
        """The one whose last point ends the common range."""
        return min((self.a, self.b), key=lambda series: series.points[-1].kl.mean)


def compare_at_kl(names: Sequence[str], tables: Sequence[Tables], counts: np.ndarray) -> AtKl:
    """Series a and b, piecewise linear in √KL, at shares of the range that both cover; nothing is extrapolated.

    counts: (B, P) of `resamples`. In every draw of prompts the KL and gold of each point, and with them the end of the range,
    are found anew, so that an interval has the uncertainty of the KL too: a matched KL is a share of the range, not a number
    of nats. √KL, because gains begin as a multiple of it (Gao, Schulman & Hilton 2023): over KL itself the line from the
    start would lie far below the curve. A KL that is estimated below 0 counts as 0. Neighbours whose KL cannot be told from
    the furthest of them are one point: with that one alone the range would end where noise is largest. There is no range
    if a series has one point, since the start is in it.
    """
    prompts = counts.shape[1]
    weights = np.concatenate([np.ones((1, prompts)), counts]) / prompts  # all prompts once, then the draws

    def found(values: np.ndarray) -> Interval:
        return interval(float(values[0]), values[1:], prompts)

    series, lines = [], []
    for name, own in zip(names, tables, strict=True):
        kls, worths = (weights @ np.array(column).T for column in zip(*own.values(), strict=True))
        points: list[list[int]] = []
        for k in sorted(range(len(own)), key=lambda k: -kls[0, k]):
            if points and found(kls[:, points[0][0]] - kls[:, k]).low <= 0:
                points[0].append(k)
            else:
                points.insert(0, [k])
        kl, gold = (np.array([of[:, point].mean(1) for point in points]).T for of in (kls, worths))  # (1 + B, points)
        called = [[list(own)[k] for k in sorted(point)] for point in points]
        series.append(Series(name, [Reached(each, found(kl[:, k]), found(gold[:, k])) for k, each in enumerate(called)]))
        order = kl.argsort(1)  # a draw may have two points the other way around
        lines.append([np.take_along_axis(of, order, 1) for of in (np.sqrt(np.maximum(kl, 0.0)), gold)])
    if any(len(own.points) == 1 for own in series):
        return AtKl(series[0], series[1], [], None)
    across = np.minimum(*(roots[:, -1:] for roots, _ in lines)) * np.linspace(0, 1, CELLS + 1)
    up = [np.array(list(map(np.interp, across, *line))) for line in lines]
    apart, quarters = up[0] - up[1], range(CELLS // 4, CELLS + 1, CELLS // 4)
    matched = [Matched(*(found(table[:, cell]) for table in (across**2, *up, apart))) for cell in quarters]
    return AtKl(series[0], series[1], matched, found((apart[:, 1:] + apart[:, :-1]).mean(1) / 2))
