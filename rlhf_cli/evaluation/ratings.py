"""Elo ratings of models from comparisons of their responses, by the Bradley–Terry model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_cli.evaluation.intervals import interval, jeffreys
from rlhf_cli.evaluation.winrate import STEPS, TOLERANCE, shortened
from rlhf_cli.figures import Interval

ELO = 400 / math.log(10)
"""Elo points of one unit of strength: 400 points are odds of 10 to 1."""
MIDDLE = 1000.0


def ratings(
    names: Sequence[str], outcomes: Mapping[tuple[int, int], np.ndarray], anchor: int | None, counts: np.ndarray
) -> dict[str, Interval]:
    """Bradley–Terry strengths on the Elo scale with 95 % intervals, fitted to all comparisons at once, not one by one.

    `outcomes`: (i, j) → (P, K) in {0, ½, 1} of model i against j, NaN where nothing was judged; pairs that never met are
    absent. `anchor`: the model whose rating is 1000, without interval; None: the mean of all is. `counts`: (B, P) of
    `resamples`.

    A prompt's K comparisons together are one win or loss. To those of each pair that met half a win each way is added,
    Jeffreys' prior of their share, so that the ratings are finite when one model always wins; in the bootstrap draws the
    halves vary as `jeffreys` says. The order of the models has no effect.

    Raises:
        ValueError: models that no chain of comparisons connects; fewer than 2 judged prompts.
    """
    tables = {}
    for (one, other), outcome in outcomes.items():
        if not np.isnan(outcome).all():
            won, lost = (np.nansum(side, 1) / outcome.shape[1] for side in (outcome, 1 - outcome))
            in_order = names[one] < names[other]
            tables[(one, other) if in_order else (other, one)] = np.stack([won, lost] if in_order else [lost, won], 1)
    pairs = sorted(tables, key=lambda pair: (names[pair[0]], names[pair[1]]))
    _check_connected(names, pairs)
    if not pairs:
        return {name: Interval(MIDDLE, MIDDLE, MIDDLE) for name in names}
    met = np.stack([tables[pair] for pair in pairs], 1)
    point = _elo(met.sum(0) + 0.5, pairs, len(names), anchor)
    draws = _elo(np.tensordot(counts, met, 1) + jeffreys(len(counts), len(pairs)), pairs, len(names), anchor)
    prompts = int(met.any((1, 2)).sum())
    return {name: interval(float(point[at]), draws[:, at], prompts) for at, name in enumerate(names)}


def _elo(scores: np.ndarray, pairs: Sequence[tuple[int, int]], models: int, anchor: int | None) -> np.ndarray:
    """(..., M) from the (..., pairs, 2) wins of a pair's first and second model."""
    first, second = np.array(pairs).T
    wins = np.zeros((*scores.shape[:-2], models, models))
    wins[..., first, second], wins[..., second, first] = scores[..., 0], scores[..., 1]
    found = strengths(wins)
    return MIDDLE + ELO * (found if anchor is None else found - found[..., anchor, None])


def strengths(wins: np.ndarray) -> np.ndarray:
    """(..., M) Bradley–Terry strengths θ of maximum likelihood, their mean 0: i beats j with probability σ(θ_i − θ_j).

    `wins`: (..., M, M), how often i beat j, a tie half to each, not necessarily whole; the diagonal is 0. Bradley & Terry
    1952; Newton steps on all leading axes at once, shortened as those of `winrate.logistic` are.

    Raises:
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


def _check_connected(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> None:
    edges = np.zeros((len(names), len(names)), bool)
    for one, other in pairs:
        edges[one, other] = edges[other, one] = True
    near = _chains(edges)[0]
    if not near.all():
        apart = [", ".join(name for name, here in zip(names, near, strict=True) if here == side) for side in (True, False)]
        raise ValueError(f"ratings need a chain of comparisons between all models: none connects {apart[0]} with {apart[1]}")
