"""Over-optimisation of a reward: what is really wanted (gold), and what stands for it (proxy), against the KL from the start.

Of a run by its checkpoints, and of choosing the best of n responses of the starting policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_cli.evaluation.intervals import NORMAL_95, interval, student
from rlhf_cli.evaluation.samples import mean_interval
from rlhf_cli.figures import Interval

BEST_OF_N = "best of n"  # the series of choosing among responses of the starting policy
TINY_KL = 1e-6  # nats; a point that is no farther from the start does not enter a fit
ROUNDING = 1e-24  # a sum of squares below this share of another is rounding


def best_of(scores: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """(P,) mean gold of the response with the best score, over all subsets of n of a prompt's N responses.

    scores, gold: (P, N). The unbiased estimate of best of n (Nakano et al. 2021): the response with the i-th
    lowest score is the best of C(i−1, n−1) of the C(N, n) subsets. Equal scores share their subsets equally, as if the best
    were drawn among them.

    ValueError: n is not from 1 to N.
    """
    rows, size = scores.shape
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} needs from 1 to {size} responses to choose from")
    order = np.argsort(scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    first = np.ones((rows, size), bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    tie = first.cumsum() - 1
    shared = np.bincount(tie, np.take_along_axis(gold, order, axis=1).ravel()) / np.bincount(tie)
    # C(i−1, n−1) / C(N, n) for i = 1 … N, by the quotients of neighbours: none of the factors is above 1.
    rank = np.arange(size, n, -1)  # N … n + 1; lower ones are the best of no subset
    shares = np.zeros(size)
    shares[n - 1 :] = np.cumprod([n / size, *((rank - n) / (rank - 1))])[::-1]
    chosen: np.ndarray = shared[tie].reshape(rows, size) @ shares
    return chosen


def best_of_kl(n: int) -> float:
    """log n − (n − 1) / n, nats: KL of best of n from the policy it chooses from.

    An upper bound (Beirami et al. 2024), met in the limit where no response is likely and no two have the same score; far
    above the truth for prompts that leave little to say.
    """
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class Point:
    """How far a policy went from the start, and what it is worth by the proxy and by gold."""

    series: str
    model: str
    step: int | None  # of a run; 0: its start
    n: int | None  # of best of n; 1: its start
    kl: Interval  # from the start, nats
    proxy: Interval
    gold: Interval | None
    prompt_gold: np.ndarray | None = field(default=None, repr=False, compare=False)  # (P,) mean gold of each prompt
    prompt_proxy: np.ndarray | None = field(default=None, repr=False, compare=False)  # (P,) the same of the proxy

    @property
    def place(self) -> int:
        """In the order of its series."""
        return (self.step if self.n is None else self.n) or 0

    def to_json(self) -> dict[str, Any]:
        """As in "overoptimisation" of eval.json; without gold, `gold` and its interval are null."""
        own = {"kl": self.kl, "proxy": self.proxy, "gold": self.gold}
        return {
            **{name: value for name, value in vars(self).items() if not name.startswith("prompt_")},
            **{name: value and value.mean for name, value in own.items()},
            "intervals": {name: value and [value.low, value.high] for name, value in own.items()},
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Point:
        known: dict[str, Any] = {name: bounds and Interval(entry[name], *bounds) for name, bounds in entry["intervals"].items()}
        return cls(entry["series"], entry["model"], entry["step"], entry["n"], **known)


def run_point(
    series: str,
    model: str,
    step: int,
    log_ratios: np.ndarray | None,
    scores: np.ndarray,
    gold: np.ndarray | None,
    counts: np.ndarray,
) -> Point:
    """A checkpoint of a run by its responses' log π − log π_start, scores and gold, (P, K) each.

    log_ratios None: the starting policy itself, whose KL is 0; every series begins with it, at step 0. counts: (B, P).
    """
    kl = Interval(0.0, 0.0, 0.0) if log_ratios is None else mean_interval(log_ratios, counts)
    return Point(series, model, step, None, kl, *_worth(scores.mean(1), None if gold is None else gold.mean(1), counts))


def best_of_points(model: str, scores: np.ndarray, gold: np.ndarray | None, ns: Iterable[int], counts: np.ndarray) -> list[Point]:
    """Best of each n of `ns`, ascending, after n = 1; scores, gold: (P, N); counts: (B, P). ValueError: an n not from 1 to N."""
    points = []
    for n in sorted({1, *ns}):
        kl = best_of_kl(n)
        worth = _worth(best_of(scores, scores, n), None if gold is None else best_of(scores, gold, n), counts)
        points.append(Point(BEST_OF_N, model, None, n, Interval(kl, kl, kl), *worth))
    return points


def _worth(
    prompt_proxy: np.ndarray, prompt_gold: np.ndarray | None, counts: np.ndarray
) -> tuple[Interval, Interval | None, np.ndarray | None, np.ndarray]:
    """The last four fields of a point, from (P,) means of each prompt."""
    gold = None if prompt_gold is None else mean_interval(prompt_gold[:, None], counts)
    return mean_interval(prompt_proxy[:, None], counts), gold, prompt_gold, prompt_proxy


@dataclass(frozen=True)
class Fit:
    """A form of Gao, Schulman & Hilton (2023) by least squares."""

    alpha: float
    beta: float
    r2: float  # 1 − Σ residual² / Σ (gain − mean gain)²; of gains that are all the same, 1 if met, else 0
    alpha_low: float | None = None  # 95 %, over draws of prompts, at the KLs as they are
    alpha_high: float | None = None
    beta_low: float | None = None
    beta_high: float | None = None
    preferred: float | None = None  # share of the draws in which this form leaves less unexplained than the other


@dataclass(frozen=True)
class Fits:
    """Both forms, for gains R(d) over the start at d = √KL; None: fewer than three points, or all at one KL."""

    bon: Fit | None  # d (α − β d), found for best of n
    rl: Fit | None  # d (α − β log d), found for reinforcement learning


def fit(kl: Sequence[float], values: Sequence[float], draws: np.ndarray | None = None, prompts: int = 0) -> Fits:
    """Both forms of Gao, Schulman & Hilton (2023) to a series of K points, the first being its start.

    Linear in α and β, each point having the same weight. A KL that is estimated below 0 counts as 0, and points at 0 say
    nothing, as both forms are 0 there. `draws`: (B, K) the values in bootstrap draws of so many prompts, for the intervals and
    for which form is preferred.
    """
    squared = np.maximum(np.array(kl[1:], np.float64), 0)
    away = squared > TINY_KL
    gains, d = (np.array(values[1:], np.float64) - values[0])[away], np.sqrt(squared[away])
    both = [np.stack([d, -fall], axis=1) for fall in (d * d, d * np.log(d))]
    forms = [_least_squares(columns, gains) for columns in both]
    known = [form for form in forms if form is not None]
    if draws is None or len(known) < len(both):
        return Fits(*forms)
    drawn = (draws[:, 1:] - draws[:, :1])[:, away]
    found, left = [], []
    for form, columns in zip(known, both, strict=True):
        coefficients = drawn @ np.linalg.pinv(columns).T
        left.append(((drawn - coefficients @ columns.T) ** 2).sum(1))
        alpha, beta = (interval(point, own, prompts) for point, own in zip((form.alpha, form.beta), coefficients.T, strict=True))
        bounds = {"alpha_low": alpha.low, "alpha_high": alpha.high, "beta_low": beta.low, "beta_high": beta.high}
        found.append(dataclasses.replace(form, **bounds))
    share = float((left[0] < left[1]).mean() + (left[0] == left[1]).mean() / 2)
    return Fits(*(dataclasses.replace(form, preferred=own) for form, own in zip(found, (share, 1 - share), strict=True)))


def _least_squares(columns: np.ndarray, gains: np.ndarray) -> Fit | None:
    """gains ≈ columns · (α, β)."""
    if len(gains) < 3:
        return None
    coefficients, _, rank, _ = np.linalg.lstsq(columns, gains, rcond=None)
    if rank < 2:
        return None
    residual = float(((gains - columns @ coefficients) ** 2).sum())
    spread, rounding = float(((gains - gains.mean()) ** 2).sum()), ROUNDING * float((gains**2).sum())
    r2 = 1 - residual / spread if spread > rounding else float(residual <= rounding)
    return Fit(float(coefficients[0]), float(coefficients[1]), r2)


@dataclass(frozen=True)
class Peak:
    """Where gold was highest in a series, and how far it fell from there to the end."""

    model: str
    step: int | None
    n: int | None
    gold: float
    kl: float
    last: str  # the model of the last point
    fall: Interval  # gold of the peak less gold of the last point, by the same prompts


def peak(points: Sequence[Point], counts: np.ndarray) -> Peak | None:
    """The point of a series with the highest mean gold, the first of equals; None without gold. counts: (B, P).

    The peak is chosen by the same numbers that the fall is measured with: of a curve that is truly flat, the highest of
    several noisy points is above the last one by chance. So its interval is one that holds for the falls from all points at
    once: ± the 95 % quantile of max_k |t_k| times the standard error, over bootstrap draws of all of them (max-t; Westfall &
    Young 1993), lengthened for few prompts as `interval` is. The fall itself stays biased upwards.
    """
    ordered = sorted(points, key=lambda point: point.place)
    tables = [point.prompt_gold for point in ordered if point.prompt_gold is not None]
    if len(tables) < len(ordered):
        return None
    best = int(np.argmax([table.mean() for table in tables]))
    top = ordered[best]
    falls = np.array([table - tables[-1] for table in tables[:-1]]).reshape(-1, counts.shape[1])
    fall = _simultaneous(falls, counts)[best] if best < len(falls) else Interval(0.0, 0.0, 0.0)
    return Peak(top.model, top.step, top.n, float(tables[best].mean()), top.kl.mean, ordered[-1].model, fall)


def _simultaneous(values: np.ndarray, counts: np.ndarray) -> list[Interval]:
    """95 % intervals of the means of K quantities of P prompts, (K, P), that hold for all of them at once; counts: (B, P)."""
    means, prompts = values.mean(1), counts.shape[1]
    draws = counts @ values.T / prompts - means
    errors = draws.std(0)
    errors[errors <= math.sqrt(ROUNDING) * np.abs(values).max(1, initial=0.0)] = 0.0
    furthest = np.abs(np.divide(draws, errors, out=np.zeros_like(draws), where=errors > 0)).max(1, initial=0.0)
    reach = float(np.quantile(furthest, 0.95)) * student(prompts - 1) / NORMAL_95 * math.sqrt(prompts / (prompts - 1))
    return [Interval(mean, mean - reach * error, mean + reach * error) for mean, error in zip(means, errors, strict=True)]


@dataclass(frozen=True)
class SeriesFits:
    """What was fitted to a series; without gold, `gold` and `peak` are None."""

    proxy: Fits
    gold: Fits | None
    peak: Peak | None


def series_of(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points by series, each in its order."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.series, []).append(point)
    return {series: sorted(own, key=lambda point: point.place) for series, own in found.items()}


def fit_series(points: Iterable[Point], counts: np.ndarray) -> dict[str, SeriesFits]:
    """Series → what was fitted to it; counts: (B, P)."""
    found = {}
    for series, own in series_of(points).items():
        top, kl = peak(own, counts), [point.kl.mean for point in own]

        def fitted(tables: list[np.ndarray | None], kl: list[float] = kl) -> Fits:
            known = np.array([table for table in tables if table is not None])
            return fit(kl, known.mean(1).tolist(), counts @ known.T / counts.shape[1], counts.shape[1])

        proxy = fitted([point.prompt_proxy for point in own])
        found[series] = SeriesFits(proxy, fitted([point.prompt_gold for point in own]) if top else None, top)
    return found
