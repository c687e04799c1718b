"""How models compare by whose responses are better: win rates, also with length taken out, and Elo ratings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlhf_cli.evaluation.intervals import NORMAL_95, interval, jeffreys, within_shares
from rlhf_cli.figures import Interval

SAME_SCORE = 1e-5  # scores this close are a tie: a model's scores of the same text, in other batches, differ by less
RIDGE = (1e-6, 1e-3)
"""λ of ½λ·(coefficient)², of the intercept and of the slope, in comparisons. Separable data have a maximum with it; where
length and intercept cannot be told apart, the slope is the one that gives way."""
TOLERANCE = 1e-8
STEPS = 200
CELLS = 2**20  # numbers of a (draws, comparisons) table that are held at a time
ELO = 400 / math.log(10)  # Elo points of one unit of strength: 400 points are odds of 10 to 1
MIDDLE = 1000.0


def outcomes(own: np.ndarray, other: np.ndarray, same: np.ndarray) -> np.ndarray:
    """(P, K) in {0, ½, 1}: does the own response win, by its score?

    `own`, `other`: (P, K) scores. `same`: (P, K) bool, whether the texts are equal: a tie, as scores within SAME_SCORE are.
    Where a score is NaN the outcome is, but for equal texts.
    """
    difference = np.where(same, 0.0, own - other)
    won: np.ndarray = (np.sign(np.where(np.abs(difference) <= SAME_SCORE, 0.0, difference)) + 1) / 2
    return won


@dataclass(frozen=True)
class WinRate:
    """The share of comparisons that a model wins, ties counted half, with its 95 % interval."""

    mean: float
    low: float
    high: float
    ties: float  # share of the comparisons
    n: int  # comparisons
    length_controlled: Interval

    @property
    def rate(self) -> Interval:
        return Interval(self.mean, self.low, self.high)


def win_rate(outcome: np.ndarray, longer: np.ndarray, counts: np.ndarray) -> WinRate:
    """Win rate over all comparisons, and what is left of it between responses of equal length.

    `outcome`: (P, K) from 0 to 1, NaN where nothing was judged. `longer`: (P, K) tokens of the own response less those of
    the other. `counts`: (B, P) of `resamples`. All comparisons weigh the same. Bootstrap over prompts, so that both models'
    responses to a prompt stay together, with `jeffreys` in each draw: the interval has a width also where every prompt is
    won, or every one a tie. The rates themselves are without prior.

    ValueError: fewer than 2 prompts were judged.
    """
    raw, prior = win_share(outcome, counts)
    known = ~np.isnan(outcome)
    (prompt, _), won, longer = np.nonzero(known), outcome[known], longer[known]
    spread = float(longer.std())
    # tanh(Δ/std Δ); its limit, the sign, where all differ in length by the same.
    length = np.tanh(longer / spread) if spread else np.sign(longer)
    controlled = _length_controlled(won, length, counts, prompt, prior, len(np.unique(prompt)))
    return WinRate(*raw, float((won == 0.5).mean()), len(won), controlled)


def win_share(outcome: np.ndarray, counts: np.ndarray) -> tuple[Interval, np.ndarray]:
    """The win rate alone, and the (B, 2) comparisons that the prior adds to each draw. See `win_rate`."""
    known = ~np.isnan(outcome)
    prompts = int(known.any(1).sum())
    if prompts < 2:
        raise ValueError(f"a win rate needs at least 2 judged prompts, not {prompts}")
    prior = known.sum() / prompts * jeffreys(len(counts))[:, 0]
    wins = counts @ np.where(known, outcome, 0.0).sum(1) + prior[:, 0]
    draws = wins / (counts @ known.sum(1) + prior.sum(1))
    return within_shares(interval(float(outcome[known].mean()), draws, prompts)), prior


def exploitability(outcomes: Mapping[tuple[str, str], np.ndarray], counts: np.ndarray) -> dict[str, dict[str, float]]:
    """max(0, max_b P(b ≻ a) − ½) of every model a, over the other models b, with a 95 % interval; empty unless all pairs met.

    The bounds are the largest of the bs' bounds, below with an error of 5 % for all bs together: the distance to the mean is
    longer by the ratio of normal quantiles at 1 − 0.025/m and at 0.975. The largest of m means is above the largest of the
    true ones by chance, where several bs are alike.
    """
    both = dict(outcomes) | {(other, one): 1 - outcome for (one, other), outcome in outcomes.items()}
    names = list(dict.fromkeys(name for pair in both for name in pair))
    if len(both) < len(names) * (len(names) - 1):
        return {}
    longer, found = NormalDist().inv_cdf(1 - 0.025 / max(len(names) - 1, 1)) / NORMAL_95, {}
    for a in names:
        own = [win_share(both[b, a], counts)[0] for b in names if b != a]
        lows = [rate.mean - longer * (rate.mean - rate.low) for rate in own]
        best = {"value": max(rate.mean for rate in own), "low": max(lows), "high": max(rate.high for rate in own)}
        found[a] = {name: max(0.0, each - 0.5) for name, each in best.items()}
    return found


def _length_controlled(
    won: np.ndarray, length: np.ndarray, counts: np.ndarray, prompt: np.ndarray, prior: np.ndarray, prompts: int
) -> Interval:
    """σ(intercept) of the regression of N outcomes on their (N,) `length`, a win rate between responses of equal length.

    Dubois et al. 2024, "Length-Controlled AlpacaEval". Deviations: no term of the instruction's difficulty, which takes many
    models to estimate; the weight of length is not tuned but fitted, with RIDGE. The standard deviation that lengths are
    divided by is that of all comparisons, also in resamples. `prompt`: (N,) of each outcome. `prior`: (B, 2) comparisons
    won and lost at equal length in each draw: where one model's responses are always the longer ones, little but the prior
    tells of equal length, and the interval is wide.
    """
    point = logistic(length, won, np.ones(len(won)))
    length, won = np.append(length, [0.0, 0.0]), np.append(won, [1.0, 0.0])
    rows = max(1, CELLS // len(won))
    intercepts = [
        logistic(length, won, np.concatenate([counts[at : at + rows, prompt], prior[at : at + rows]], 1))[:, 0]
        for at in range(0, len(counts), rows)
    ]
    return within_shares(interval(float(_sigmoid(point[0])), _sigmoid(np.concatenate(intercepts)), prompts))


def logistic(feature: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(..., 2) intercept and slope of the largest penalised likelihood of N outcomes in [0, 1], for each of the `weights`.

    `feature`, `outcome`: (N,). `weights`: (..., N), at least 0. Maximises Σ w·(y·log μ + (1−y)·log(1−μ)) − Σ ½·RIDGE·b².
    Newton steps shortened to log(1+r)/r, r being how far a logit moves at most, which always ascend: Sun & Tran-Dinh 2019,
    "Generalized Self-Concordant Functions", for features in [−1, 1].
    """
    found = np.zeros((*weights.shape[:-1], 2))
    for _ in range(STEPS):
        chance = _sigmoid(found[..., :1] + found[..., 1:] * feature)
        surprise, curve = weights * (outcome - chance), weights * chance * (1 - chance)
        uphill = np.stack([surprise.sum(-1), surprise @ feature], -1) - RIDGE * found
        first, mixed, second = curve.sum(-1) + RIDGE[0], curve @ feature, curve @ feature**2 + RIDGE[1]
        step = np.stack([second * uphill[..., 0] - mixed * uphill[..., 1], first * uphill[..., 1] - mixed * uphill[..., 0]], -1)
        step /= (first * second - mixed**2)[..., None]
        moved = np.abs(step).sum(-1, keepdims=True)
        found = found + step * shortened(moved)
        if moved.max() < TOLERANCE:
            break
    return found


def shortened(moved: np.ndarray) -> np.ndarray:
    """log(1+r)/r, 1 at 0."""
    factor: np.ndarray = np.log1p(moved) / np.where(moved > 0, moved, 1.0) + (moved == 0)
    return factor


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    chance: np.ndarray = (1 + np.tanh(logit / 2)) / 2
    return chance


def ratings(
    names: Sequence[str], outcomes: Mapping[tuple[str, str], np.ndarray], anchor: str, counts: np.ndarray
) -> dict[str, Interval]:
    """Bradley–Terry strengths on the Elo scale with 95 % intervals, fitted to all comparisons at once, not one by one.

    `outcomes`: (one, other) → (P, K) in {0, ½, 1} of the one against the other, NaN where nothing was judged; pairs that
    never met are absent. `anchor`: the model whose rating is 1000, without interval. `counts`: (B, P) of `resamples`.

    A prompt's K comparisons together are one win or loss. To those of each pair that met half a win each way is added,
    Jeffreys' prior of their share, so that the ratings are finite when one model always wins; in the bootstrap draws the
    halves vary as `jeffreys` says. The order of the models has no effect.

    ValueError: models that no chain of comparisons connects; fewer than 2 judged prompts.
    """
    tables = {}
    for (one, other), outcome in outcomes.items():
        if not np.isnan(outcome).all():
            won, lost = (np.nansum(side, 1) / outcome.shape[1] for side in (outcome, 1 - outcome))
            tables[min(one, other), max(one, other)] = np.stack([won, lost] if one < other else [lost, won], 1)
    pairs = [(names.index(one), names.index(other)) for one, other in sorted(tables)]
    edges = np.zeros((len(names), len(names)), bool)
    for first, second in pairs:
        edges[first, second] = edges[second, first] = True
    near = _chains(edges)[0]
    if not near.all():
        apart = [", ".join(name for name, here in zip(names, near, strict=True) if here == side) for side in (True, False)]
        raise ValueError(f"ratings need a chain of comparisons between all models: none connects {apart[0]} with {apart[1]}")
    if not pairs:
        return {name: Interval(MIDDLE, MIDDLE, MIDDLE) for name in names}
    met, fixed = np.stack([tables[pair] for pair in sorted(tables)], 1), names.index(anchor)
    point = _elo(met.sum(0) + 0.5, pairs, len(names), fixed)
    draws = _elo(np.tensordot(counts, met, 1) + jeffreys(len(counts), len(pairs)), pairs, len(names), fixed)
    prompts = int(met.any((1, 2)).sum())
    return {name: interval(float(point[at]), draws[:, at], prompts) for at, name in enumerate(names)}


def _elo(scores: np.ndarray, pairs: Sequence[tuple[int, int]], models: int, anchor: int) -> np.ndarray:
    """(..., M) from the (..., pairs, 2) wins of a pair's first and second model."""
    first, second = np.array(pairs).T
    wins = np.zeros((*scores.shape[:-2], models, models))
    wins[..., first, second], wins[..., second, first] = scores[..., 0], scores[..., 1]
    found = strengths(wins)
    elo: np.ndarray = MIDDLE + ELO * (found - found[..., anchor, None])
    return elo


def strengths(wins: np.ndarray) -> np.ndarray:
    """(..., M) Bradley–Terry strengths θ of maximum likelihood, their mean 0: i beats j with probability σ(θ_i − θ_j).

    `wins`: (..., M, M), how often i beat j, a tie half to each, not necessarily whole; the diagonal is 0. Bradley & Terry
    1952; Newton steps on all leading axes at once, shortened as those of `logistic` are.

    ValueError: there is no maximum. Every model needs a chain of wins to every other (Ford 1957).
    """
    if not _chains(wins > 0).all():
        raise ValueError("strengths have no maximum: some models never beat the others")
    models, games = wins.shape[-1], wins + wins.swapaxes(-1, -2)
    found = np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        chance = (1 + np.tanh((found[..., :, None] - found[..., None, :]) / 2)) / 2
        curve = games * chance * chance.swapaxes(-1, -2)
        uphill = (wins - games * chance).sum(-1)
        laplacian = curve.sum(-1)[..., None] * np.eye(models) - curve
        step = np.linalg.solve(laplacian + 1 / models, uphill[..., None])[..., 0]
        moved = np.ptp(step, axis=-1, keepdims=True)
        found = found + step * shortened(moved)
        if moved.max() < TOLERANCE:
            break
    centred: np.ndarray = found - found.mean(-1, keepdims=True)
    return centred


def _chains(edges: np.ndarray) -> np.ndarray:
    """(..., M, M) bool: does a chain of edges lead from one to the other?"""
    models = edges.shape[-1]
    reach = edges | np.eye(models, dtype=bool)
    for _ in range(models.bit_length()):
        reach = reach @ reach
    return reach
