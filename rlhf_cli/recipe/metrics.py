"""The metrics of a run's lines: what can be watched, and what a report shows."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.policy_gradient import PolicyGradient
from rlhf_cli.recipe.recipes import PpoRecipe, TrainingRecipe
from rlhf_cli.recipe.rewards import name_of

_PAIRS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/saturated",
    "logps/chosen",
    "logps/rejected",
    "logratio/mean",
)

_DRAWN = ("objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate")

METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "token_accuracy"),
    "train-rm": ("loss", "accuracy", "margin", "score_mean", "score_std"),
    "dpo": _PAIRS,
    "ipo": (*_PAIRS, "margin/target", "margin/logratio"),
    "kto": (
        "loss",
        "rewards/desirable",
        "rewards/undesirable",
        "rewards/margins",
        "logps/desirable",
        "logps/undesirable",
        "logratio/mean",
        "kl",
    ),
    "ppo": (
        "loss",
        "loss/policy",
        "loss/value",
        "loss/ptx",
        "kl_coef",
        "policy/clipfrac",
        "policy/approxkl",
        "policy/ratio",
        "value/explained_variance",
        "grad_norm/value",
        "learning_rate/value",
    ),
}
"""Stage → the metrics of its training lines; those of its held-out lines too where it learns from the responses of its data."""

LACKS: dict[str, Callable[[TrainingRecipe], bool]] = {
    "logratio/mean": lambda recipe: not recipe.objective.reference,
    "rewards/saturated": lambda recipe: not recipe.objective.saturates,
    "kl": lambda recipe: not recipe.objective.mismatches,
    "loss/value": lambda recipe: not learns_values(recipe.objective),
    "value/explained_variance": lambda recipe: not learns_values(recipe.objective),
    "learning_rate/value": lambda recipe: not learns_values(recipe.objective),
    "grad_norm/value": lambda recipe: not learns_values(recipe.objective),
    "loss/ptx": lambda recipe: not (isinstance(recipe, PpoRecipe) and recipe.ptx is not None),
}
"""Metric → does a recipe of its stages not have it?"""

_TIMES = ("time/rollout", "time/score", "time/update")

TRAINING_METRICS = ("grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch")
"""What training lines of every stage have beside them; `stop_if` can watch all."""


def learns_values(objective: Objective) -> bool:
    """Does it learn a value beside the policy?"""
    return isinstance(objective, PolicyGradient) and objective.values


def metrics_of(recipe: TrainingRecipe) -> tuple[str, ...]:
    """The metrics of a recipe's held-out lines, what `keep_best` can watch; those that its kind does not have left out."""
    return _drawn_metrics(recipe) if recipe.draws else _own_metrics(recipe)


def training_metrics_of(recipe: TrainingRecipe) -> tuple[str, ...]:
    """The metrics of a recipe's training lines, what `stop_if` can watch. Those of drawn responses stand where some are drawn."""
    drawn = (*_drawn_metrics(recipe), *_TIMES) if recipe.draws else ()
    return (*_own_metrics(recipe), *drawn, *TRAINING_METRICS)


def _own_metrics(recipe: TrainingRecipe) -> tuple[str, ...]:
    return tuple(name for name in METRICS[recipe.stage] if name not in LACKS or not LACKS[name](recipe))


def _drawn_metrics(recipe: TrainingRecipe) -> tuple[str, ...]:
    """What is measured of the responses that are drawn from the policy."""
    rewards, golds = recipe.judges
    penalised = ("objective/rlhf_reward",) if recipe.stage == "ppo" else ()
    return (*_DRAWN, *penalised, *(f"reward/{name_of(term)}" for term in rewards), *(f"gold/{name_of(term)}" for term in golds))
