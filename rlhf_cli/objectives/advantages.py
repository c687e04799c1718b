"""What a rollout's rewards say about its tokens: advantages, value targets, and the sums and means they are made of.

Everything is float64. The tokens of M responses lie one after the other in (N,) arrays; `lengths` (M,), each at least 1, cuts
them.
"""

from __future__ import annotations

import math

import numpy as np

from rlhf_cli.objectives.policy_gradient import Experience

WHITEN_EPSILON = 1e-8  # added to a variance before its root is taken: equal values become 0
MOST_WEIGHT = 2.0  # of a token that another engine drew


def token_rewards(experience: Experience, kl_coef: float) -> np.ndarray:
    """r_t = −κ(log π_old − log π_ref), and the score at the last token of each response, (N,); Ziegler et al. 2019, eq. 2.

    What is `dense` of the score comes at its own tokens instead.
    """
    rewards: np.ndarray = -kl_coef * (experience.old - experience.reference)
    dense = np.zeros(len(rewards)) if experience.dense is None else experience.dense
    rewards[np.cumsum(experience.lengths) - 1] += experience.scores - np.add.reduceat(dense, first_tokens(experience.lengths))
    rewards += dense
    return rewards


def response_returns(experience: Experience, kl_coef: float) -> np.ndarray:
    """R = Σ_t r_t of every response, (M,)."""
    return np.add.reduceat(token_rewards(experience, kl_coef), first_tokens(experience.lengths))


def first_tokens(lengths: np.ndarray) -> np.ndarray:
    """Index of the first token of every response, (M,)."""
    first: np.ndarray = np.cumsum(lengths) - lengths
    return first


def gae(rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantages and what V is to become, (N,) each; Schulman et al. 2016, eq. 16.

    δ_t = r_t + γ V_{t+1} − V_t, A_t = Σ_k (γλ)^k δ_{t+k}, target A_t + V_t. `values`: V before each token; after a response's
    last token there is none.
    """
    inside = np.arange(lengths.max()) < lengths[:, None]
    # Zeros stand for what follows a response, so that its last token sees no value and no advantage after it.
    padded = np.zeros((2, *inside.shape))
    padded[:, inside] = values, rewards
    before, sums = padded
    sums -= before
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
    means: np.ndarray = np.bincount(prompt, values)[prompt] / np.bincount(prompt)[prompt]
    return means


def is_tied(values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """For every response whether all of its prompt's are equal, (M,) bool."""
    start = np.flatnonzero(np.diff(prompt, prepend=-1))
    spread = np.maximum.reduceat(values, start) - np.minimum.reduceat(values, start)
    tied: np.ndarray = np.repeat(spread == 0, np.diff(start, append=len(values)))
    return tied


def truncated_weights(gap: np.ndarray) -> np.ndarray:
    """min(π/π_engine, 2) of every token, (N,), from log π − log π_engine, (N,): what its policy gradient is multiplied by.

    Truncated importance sampling where another engine draws than the one that learns; Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training". On advantages, to which all losses of policies are proportional.
    """
    weights: np.ndarray = np.exp(np.minimum(gap, MOST_WEIGHT)).clip(max=MOST_WEIGHT)  # e² is more than 2, and no infinity
    return weights


def explained_variance(values: np.ndarray, targets: np.ndarray) -> float:
    """1 − Var(target − V)/Var(target) over the tokens that have a target; 0 where all targets are equal."""
    learned = np.isfinite(targets)
    targets, values = targets[learned], values[learned]
    if np.ptp(targets) == 0:
        return 0.0
    return float(1 - np.var(targets - values) / np.var(targets))
