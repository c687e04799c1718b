"""The metrics of a run's lines: what can be watched, and what a report shows."""

from __future__ import annotations

from rlhf_cli.recipe.recipes import TrainingRecipe
from rlhf_cli.recipe.rewards import name_of

_DRAWN = ("objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate")

_TIMES = ("time/rollout", "time/score", "time/update")

TRAINING_METRICS = ("grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch")
"""What training lines of every stage have beside them; `stop_if` can watch all."""


def metrics_of(recipe: TrainingRecipe) -> tuple[str, ...]:
    """The metrics of a recipe's held-out lines, what `keep_best` can watch; those that its kind does not have left out."""
    return _drawn_metrics(recipe) if recipe.draws else recipe.metric_names


def training_metrics_of(recipe: TrainingRecipe) -> tuple[str, ...]:
    """The metrics of a recipe's training lines, what `stop_if` can watch. Those of drawn responses stand where some are drawn."""
    drawn = (*_drawn_metrics(recipe), *_TIMES) if recipe.draws else ()
    return (*recipe.metric_names, *drawn, *TRAINING_METRICS)


def _drawn_metrics(recipe: TrainingRecipe) -> tuple[str, ...]:
    """What is measured of the responses that are drawn from the policy."""
    rewards, golds = recipe.terms
    penalised = ("objective/rlhf_reward",) if recipe.stage == "ppo" else ()
    return (*_DRAWN, *penalised, *(f"reward/{name_of(term)}" for term in rewards), *(f"gold/{name_of(term)}" for term in golds))
