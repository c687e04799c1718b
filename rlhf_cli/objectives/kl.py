"""Estimates of KL(π‖π_ref) from samples of π, and the coefficient that follows a measured KL. k1 is in the reward alone."""

from __future__ import annotations

from rlhf_cli.objectives.base import Tensor


def k2(logps: Tensor, reference: Tensor) -> Tensor:
    """½(log π − log π_ref)² of every token: biased, but on π's own samples its mean gradient is exactly that of KL(π‖π_ref).

    Of each token's own KL, that is: what a token does to the KL of later ones is seen in the reward alone (k1).
    """
    return (logps - reference) ** 2 / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π) of every token: unbiased and never below 0, but as a loss it descends KL(π_ref‖π).

    Schulman 2020, "Approximating KL divergence", whose names these are.
    """
    difference = reference - logps
    return difference.expm1() - difference


def next_coef(coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """κ(1 + clip(KL/target − 1, −0.2, 0.2) · episodes/horizon); Ziegler et al. 2019, section 2.2.

    `kl`: the mean over `episodes` responses of Σ_t (log π − log π_ref), in nats.

    >>> next_coef(0.1, 20.0, 6.0, 10000, 256)
    0.100512
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)
