"""What a reader of an evaluation's report must know and cannot see in its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_cli import sections
from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.rows import SECTIONS
from rlhf_cli.recipe import recipes
from rlhf_cli.runs.resume import recorded_recipe


def comparability(recipe: recipes.EvalRecipe, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """Between which models what is not comparable."""
    if recipe.prompts is not None and recipe.rollout.temperature != 1:
        yield (
            f"Responses were drawn at temperature {recipe.rollout.temperature:g}, and log-probabilities are those at 1: the "
            "KL is that of what was drawn, not of the policies."
        )
    reference = next((each for each in models if each.name == recipe.reference), None)
    if reference is not None:
        others = [each.name for each in models if not each.is_reward_model and each.tokenisation != reference.tokenisation]
        if others:
            yield (
                f"{', '.join(others)}: other tokens or another chat template than {reference.name}: no KL can be measured, and "
                "their lengths and perplexities are not comparable."
            )
        strangers = {each.series for each in models if each.series and each.origin not in (None, reference.as_origin)}
        if strangers:
            yield (
                f"{', '.join(sorted(strangers))}: that run did not start from {reference.name}, so the point at KL 0 is where "
                "distances are measured from, not where the run began."
            )


def trained_on(recipe: recipes.EvalRecipe, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """Which models were trained on rows that they are measured on, as far as their runs record it."""
    for section in SECTIONS:
        for source in vars(recipe)[section] or ():
            names = [each.name for each in models if _saw(each, source, recipe.seed)]
            if names:
                yield (
                    f"{', '.join(names)} may have been trained on rows of {source.path}, {section} here: another holdout or seed "
                    "than that of the training keeps other rows."
                )


def _saw(model: EvaluatedModel, source: sections.EvalSource, seed: int) -> bool:
    """Did its run train on this source, and hold out other rows than these?"""
    place = Path(model.path)
    trained = next((found for path in (place, place.parent, place.parent.parent) if (found := recorded_recipe(path))), {})
    sources = trained.get("data", {}).get("train", [])
    same = any(isinstance(other, dict) and other.get("path") == source.path for other in sources)
    return same and (trained["data"].get("holdout"), trained.get("seed")) != (source.holdout, seed)
