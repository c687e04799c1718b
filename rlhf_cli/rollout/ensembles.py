"""Several reward models as one: their scores in one unit, what is made of them, and how far they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rlhf_cli.models.passes import parts
from rlhf_cli.sections import Bound

Combine = Literal["mean", "min"] | Bound
"""How members make one score: mean, min, mean − k·std or mean + k·std over them, the population's (Coste et al. 2024,
"Reward model ensembles help mitigate overoptimization"; Eisenstein et al. 2023, "Helping or herding?")."""


class Scale(NamedTuple):
    """What a reward model's scores are normalised with; 0 and 1 leave them as they are."""

    mean: float
    std: float


AS_THEY_ARE = Scale(0.0, 1.0)


def normalised(scores: np.ndarray, scales: Sequence[Scale]) -> np.ndarray:
    """(K, M) scores of K members, each less its own mean and over its own deviation, where it has one."""
    mean, std = np.array(scales, np.float64).T[:, :, None]
    found: np.ndarray = (scores - mean) / np.where(std == 0, 1, std)
    return found


def combine(scores: np.ndarray, how: Combine) -> np.ndarray:
    """(M,) of (K, M) normalised scores."""
    found: np.ndarray
    if isinstance(how, Bound):
        found = scores.mean(0) + ((how.ucb or 0.0) - (how.lcb or 0.0)) * scores.std(0)
    else:
        found = scores.mean(0) if how == "mean" else scores.min(0)
    return found


def in_words(how: Combine) -> str:
    """
    >>> in_words("mean"), in_words(Bound(lcb=1.5))
    ('mean', 'mean less 1.5 deviations')
    """
    if isinstance(how, Bound):
        return f"mean less {how.lcb:g} deviations" if how.ucb is None else f"mean and {how.ucb:g} deviations"
    return how if how == "mean" else "minimum"


def as_one(scores: np.ndarray, scales: Sequence[Scale], how: Combine) -> np.ndarray:
    """(M,) of (K, M) raw scores, in their own unit on average: a margin of one that combines them still is one of log-odds."""
    return combine(normalised(scores, scales), how) * float(np.mean([scale.std for scale in scales]))


def mean_of_members(members: Sequence[list[np.ndarray]], scales: Sequence[Scale]) -> list[np.ndarray]:
    """(K,) of every tree, as each of the members gives them; a single member's own."""
    if len(members) == 1:
        return members[0]
    return parts(as_one(np.stack([*map(flat, members)]), scales, "mean"), [*map(len, members[0])])


def flat(scores: Sequence[np.ndarray]) -> np.ndarray:
    """(M,) of all trees."""
    return np.concatenate([np.zeros(0), *scores])


def centred(scores: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(M, K) of (K, M) scores: each member's less its mean over the responses of the prompt, so many in `counts`.

    Bradley–Terry leaves every member a constant of its own for each prompt; what is left are differences that compare.
    """
    starts = np.cumsum([0, *counts])[:-1]
    means = np.add.reduceat(scores, starts, axis=1) / np.array(counts)
    found: np.ndarray = (scores - np.repeat(means, counts, axis=1)).T
    return found
