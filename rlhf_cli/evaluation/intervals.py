"""95 % intervals of figures of a model's responses, a prompt with all its responses being one observation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from rlhf_cli.figures import Interval

DRAWS = 2000
TAIL = 0.005
"""Quantiles of draws further out are not read off, they would rest on a handful of draws: 10 of 2000 are beyond this one."""
NORMAL_95 = 1.959963984540054  # 97.5 % of a standard normal lies below
PRIOR_SEED = 20240406  # other than a recipe's, so that the prior does not follow the draws


def resamples(prompts: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """(B, P) int: how often each of P prompts is in each of B bootstrap draws of P prompts with replacement.

    The same matrix for all models makes their comparisons paired.
    """
    counts: np.ndarray = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), draws)
    return counts


def interval(point: float, draws: np.ndarray, prompts: int) -> Interval:
    """Expanded percentile interval of an estimate from its (B,) bootstrap draws; contains `point`.

    Hesterberg 2015, "What Teachers Should Know About the Bootstrap": the quantiles at Φ(−√(n/(n−1))·t) and its complement,
    t being Student's 97.5 % quantile with n−1 degrees of freedom, make up for the bootstrap's variance being too small by
    (n−1)/n and estimated itself; for a mean the interval is about as wide as Student's. Deviation: with 7 prompts or fewer
    those quantiles lie beyond what resamples can tell (two prompts give three different means), so the quantile at TAIL is
    taken, and its distance to `point` lengthened in the ratio of the normal quantiles.

    ValueError: fewer than 2 prompts. One observation says nothing of how much others differ.
    """
    normal = NormalDist()
    reach = student(prompts - 1) * math.sqrt(prompts / (prompts - 1))
    level = max(normal.cdf(-reach), TAIL)
    longer = -reach / normal.inv_cdf(level)
    low, high = np.quantile(draws, (level, 1 - level)).tolist()
    return Interval(point, point + longer * min(low - point, 0.0), point + longer * max(high - point, 0.0))


def apart(found: Mapping[str, Interval], point: float) -> set[str]:
    """Those whose mean differs from `point` with an error of 5 % for all together, in either direction.

    Holm 1979: the k-th smallest of m two-sided p-values must be below 0.05/(m − k + 1), and all before it. A p-value is that of a
    normal whose 95 % interval reaches from the mean towards `point` as far as this one does.
    """
    reach = {name: own.mean - own.low if own.mean > point else own.high - own.mean for name, own in found.items()}
    normal, smallest = NormalDist(), dict[str, float]()
    for name, own in found.items():
        gap = abs(own.mean - point)
        smallest[name] = 2 * normal.cdf(-NORMAL_95 * gap / reach[name]) if reach[name] else float(not gap)
    certain: set[str] = set()
    for rank, name in enumerate(sorted(smallest, key=lambda name: smallest[name])):
        if smallest[name] > 0.05 / (len(smallest) - rank):
            break
        certain.add(name)
    return certain


def within_shares(found: Interval) -> Interval:
    """The interval of a share, which of few prompts may reach beyond all shares."""
    return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))


def ratio_interval(above: np.ndarray, below: np.ndarray, counts: np.ndarray) -> Interval:
    """Σ above / Σ below with its bootstrap interval: means, and figures per token.

    `above`, `below`: (P,) sums of each prompt. `counts`: (B, P) of `resamples`. Draws without any weight in `below` have no
    ratio and are left out; a prompt without weight is no observation. Where all prompts have the same ratio, both bounds are
    that ratio.

    ValueError: a weight in `below` is negative, or fewer than 2 prompts have weight.
    """
    if below.min() < 0:
        raise ValueError("expected weights of at least 0")
    has_weight = below > 0
    own = above[has_weight] / below[has_weight]
    if has_weight.sum() > 1 and own.min() == own.max() and not above[~has_weight].any():
        return Interval(*[float(own[0])] * 3)
    weights = counts @ below
    draws = (counts @ above)[weights > 0] / weights[weights > 0]
    return interval(float(above.sum() / below.sum()) if below.any() else math.nan, draws, int(has_weight.sum()))


def jeffreys(draws: int, shares: int = 1) -> np.ndarray:
    """(B, S, 2) prompts that were won, and lost, beside those of each bootstrap draw: Jeffreys' prior of S shares.

    Resamples of prompts that were all won are all won, an interval without width. Weights of independent Gamma(½), half a
    prompt each in the mean, make a share of 0 or 1 of n prompts vary as Beta(½, n) or its mirror image would, nearly the
    posterior under the prior Beta(½, ½) of a share, and add little where prompts differ. The same for all callers.
    """
    return np.random.default_rng(PRIOR_SEED).gamma(0.5, size=(draws, shares, 2))


def jackknife(point: float, left_out: np.ndarray) -> Interval:
    """Student's interval of an estimate from its (P,) values without one prompt each.

    Variance (P−1)/P · Σ (left_out − their mean)², Tukey 1958. For numbers of different things, which resamples would make
    smaller because they hold prompts twice. `point` is not corrected for bias: it is a figure of that many prompts.

    ValueError: fewer than 2 prompts.
    """
    prompts = len(left_out)
    reach = student(prompts - 1) * math.sqrt((prompts - 1) * float(left_out.var()))
    return Interval(point, point - reach, point + reach)


@functools.cache
def student(freedom: int) -> float:
    """97.5 % quantile of Student's t with a whole number of degrees of freedom, one less than there are prompts.

    The distribution function's finite sum in θ = atan(t/√ν), Abramowitz & Stegun 26.7.3 and 26.7.4, is inverted by bisection.

    >>> [round(student(freedom), 4) for freedom in (1, 2, 9)]
    [12.7062, 4.3027, 2.2622]
    """
    if freedom < 1:
        raise ValueError(f"an interval needs at least 2 prompts, not {freedom + 1}")
    odd = freedom % 2
    steps = np.arange(1, (freedom - odd) // 2)
    terms = np.cumprod(np.concatenate([[1.0], 2 * steps / (2 * steps + 1) if odd else (2 * steps - 1) / (2 * steps)]))

    def inside(angle: float) -> float:
        """Probability of |t| below √ν·tan(angle)."""
        powers = math.cos(angle) ** (2 * np.arange(len(terms)) + odd)
        total = math.sin(angle) * float(terms @ powers)
        if not odd:
            return total
        return 2 / math.pi * (angle + (total if freedom > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` observations; Wilson 1927.

    >>> [round(bound, 4) for bound in wilson(0.8, 10)]
    [0.4902, 0.9433]
    """
    spread = NORMAL_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return centre - reach, centre + reach
