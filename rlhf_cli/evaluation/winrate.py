"""How often one model's responses are better than another's to the same prompts, also with length taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_cli.evaluation.intervals import interval, jeffreys, within_shares
from rlhf_cli.figures import Interval

SAME_SCORE = 1e-5
"""Scores this close are a tie: a model's scores of the same text, in other batches, differ by less."""
RIDGE = (1e-6, 1e-3)
"""λ of ½λ·(coefficient)², of the intercept and of the slope, in comparisons. Separable data have a maximum with it; where
length and intercept cannot be told apart, the slope is the one that gives way."""
TOLERANCE = 1e-8
STEPS = 200
CELLS = 2**20
"""Numbers of a (draws, comparisons) table that are held at a time."""


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

    `outcome`: (P, K) in {0, ½, 1}, NaN where nothing was judged. `longer`: (P, K) tokens of the own response less those of
    the other. `counts`: (B, P) of `resamples`. All comparisons weigh the same. Bootstrap over prompts, so that both models'
    responses to a prompt stay together, with `jeffreys` in each draw: the interval has a width also where every prompt is
    won, or every one a tie. The rates themselves are without prior.

    Raises:
        ValueError: fewer than 2 prompts were judged.
    """
    known = ~np.isnan(outcome)
    prompt, _ = np.nonzero(known)
    won, prompts = outcome[known], int(known.any(1).sum())
    if prompts < 2:
        raise ValueError(f"a win rate needs at least 2 judged prompts, not {prompts}")
    prior = len(won) / prompts * jeffreys(len(counts))[:, 0]
    wins = counts @ np.where(known, outcome, 0.0).sum(1) + prior[:, 0]
    draws = wins / (counts @ known.sum(1) + prior.sum(1))
    raw = within_shares(interval(float(won.mean()), draws, prompts))
    longer = longer[known]
    spread = float(longer.std())
    # tanh(Δ/std Δ); its limit, the sign, where all differ in length by the same.
    length = np.tanh(longer / spread) if spread else np.sign(longer)
    return WinRate(*raw, float((won == 0.5).mean()), len(won), _length_controlled(won, length, counts, prompt, prior, prompts))


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
