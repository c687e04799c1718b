"""What the keys of a label recipe must agree on among themselves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from rlhf_cli.recipe.checks import ENV, Check, Finding, hub_keys, no_effect
from rlhf_cli.recipe.recipes import LabelRecipe, Reading, is_pattern

READING = tuple(own.name for own in dataclasses.fields(Reading))


def _sources(recipe: LabelRecipe) -> Iterator[Finding]:
    given = [name for name in ("rows", "models", "samples") if vars(recipe)[name]]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield given[1] if given else "rows", f"expected one of rows, models and samples, found {found}. give one"
    elif not recipe.models:
        why = "without models, which it is for. remove it"
        yield from no_effect(recipe, "", ("prompts", "rollout", *READING), why)
    elif recipe.prompts is None:
        yield "prompts", "there is nothing that the models could respond to. name some"
    for name, sources in {"rows": recipe.rows, "prompts": recipe.prompts, "judge.people.gold": recipe.judge.people.gold}.items():
        for index, source in enumerate(sources or ()):
            yield from hub_keys(f"{name}.{index}", source)


def _drawn(recipe: LabelRecipe) -> Iterator[Finding]:
    yield from no_effect(recipe.rollout, "rollout.", ("missing_eos_penalty",), "without a reward. remove it")
    several = len(recipe.models) > 1 or any(map(is_pattern, recipe.models.values()))
    if recipe.models and recipe.rollout.responses_per_prompt < 2 and not several:
        yield "rollout.responses_per_prompt", "one response to a prompt cannot be compared. set it to 2 or more, or add a model"


def _people(recipe: LabelRecipe) -> Iterator[Finding]:
    key, people = "judge.people", recipe.judge.people
    if not people.annotators:
        yield f"{key}.annotators", "there is nobody. give a name"
    if len(set(people.annotators)) < len(people.annotators):
        yield f"{key}.annotators", "a name is there twice. give each another one"
    for name in people.annotators:
        if not re.fullmatch(r"[\w.@-]{1,40}", name):
            yield f"{key}.annotators", f"'{name}' is no name: one word of letters, digits and . @ _ -. give another one"
    if len(people.annotators) == 1:
        yield from no_effect(people, f"{key}.", ("overlap",), "where one annotator sees every row. remove it")


LABELS = (
    ENV,
    Check(("rows", "models", "samples", "prompts", "rollout", "judge", *READING), _sources),
    Check(("rollout", "models"), _drawn),
    Check(("judge",), _people),
)
