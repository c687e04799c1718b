"""What a rollout's rewards say about its tokens: advantages, value targets, and the sums and means they are made of.

Everything is float64. The tokens of M responses lie one after the other in (N,) arrays; `lengths` (M,), each at least 1, cuts
them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from rlhf_cli.objectives.policy_gradient import Experience

WHITEN_EPSILON = 1e-8
"""Added to a variance before its root is taken: equal values become 0."""


def token_rewards(experience: Experience, kl_coef: float) -> np.ndarray:
    """r_t = −κ(log π_old − log π_ref), and the score at the last token of each response, (N,); Ziegler et al. 2019, eq. 2."""
    import numpy as np

    rewards: np.ndarray = -kl_coef * (experience.old - experience.reference)
    rewards[np.cumsum(experience.lengths) - 1] += experience.scores
    return rewards


def response_returns(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """R = Σ_t r_t of every response, (M,).

    >>> response_returns(np.array([1.0, 2.0, 4.0]), np.array([2, 1]))
    array([3., 4.])
    """
    import numpy as np

    return np.add.reduceat(rewards, first_tokens(lengths))


def first_tokens(lengths: np.ndarray) -> np.ndarray:
    """Index of the first token of every response, (M,)."""
    import numpy as np

    first: np.ndarray = np.cumsum(lengths) - lengths
    return first


def spread(per_response: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A response's number at each of its tokens, (N,)."""
    import numpy as np

    return np.repeat(per_response, lengths)


def gae(rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantages and what V is to become, (N,) each; Schulman et al. 2016, eq. 16.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = Σ_k (γλ)^k δ_{t+k}, target A_t + V_t. `values`: V before each token; after a response's
    last token there is none.
    """
    import numpy as np

    inside = np.arange(lengths.max()) < lengths[:, None]

    def padded(flat: np.ndarray) -> np.ndarray:
        table = np.zeros(inside.shape)
        table[inside] = flat
        return table

    before = padded(values)
    # Zeros stand for what follows a response, so that its last token sees no value and no advantage after it.
    sums = padded(rewards) - before
    sums[:, :-1] += gamma * before[:, 1:]
    for t in reversed(range(sums.shape[1] - 1)):
        sums[:, t] += gamma * lam * sums[:, t + 1]
    advantages = sums[inside]
    return advantages, advantages + values


def whiten(values: np.ndarray) -> np.ndarray:
    """Values with mean 0 and population variance 1."""
    white: np.ndarray = (values - values.mean()) / math.sqrt(values.var() + WHITEN_EPSILON)
    return white


def prompt_means(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """For every response the mean over its prompt's responses, its own included, (M,)."""
    import numpy as np

    means: np.ndarray = np.bincount(prompt, values)[prompt] / np.bincount(prompt)[prompt]
    return means


def means_of_others(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """For every response the mean over its prompt's other responses, of which there is at least one, (M,)."""
    import numpy as np

    means: np.ndarray = (np.bincount(prompt, values)[prompt] - values) / (np.bincount(prompt)[prompt] - 1)
    return means


def explained_variance(values: np.ndarray, targets: np.ndarray) -> float:
    """1 − Var(target − V)/Var(target) over the tokens that have a target; 0 where all targets are equal."""
    import numpy as np

    learned = np.isfinite(targets)
    targets, values = targets[learned], values[learned]
    if np.ptp(targets) == 0:
        return 0.0
    return float(1 - np.var(targets - values) / np.var(targets))
