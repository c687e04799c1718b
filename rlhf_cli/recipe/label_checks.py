"""What the keys of a label recipe must agree on among themselves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from rlhf_cli.recipe.checks import ENV, Check, Finding, hub_keys, no_effect
from rlhf_cli.recipe.evaluations import Reading, is_pattern
from rlhf_cli.recipe.labels import LabelRecipe, Revise
from rlhf_cli.recipe.rewards import KINDS, check_judge
from rlhf_cli.sections import Judge

READING = tuple(own.name for own in dataclasses.fields(Reading))
LOADING = ("dtype", "attention", "trust_remote_code")
"""Those that say how weights are loaded, whatever for."""


def _revised(recipe: LabelRecipe, revise: Revise) -> Iterator[Finding]:
    """What a revision needs, and what has no effect on it."""
    local = revise.endpoint is None
    if local and revise.model is None:
        yield "revise", "nobody writes. name a model, or an endpoint"
    if recipe.prompts is None:
        yield "prompts", "there is nothing to answer. name some"
    names = [own for own in ("rows", "models", "samples", "judge", "select", *READING) if not (local and own in LOADING)]
    yield from no_effect(recipe, "beside revise. remove it", *names)
    drawn = ["missing_eos_penalty", "responses_per_prompt", *([] if local else ["top_k", "min_p", "repetition_penalty"])]
    where = f"on {'a revision' if local else 'an endpoint'}. remove it"
    yield from no_effect(recipe, where, *(f"rollout.{name}" for name in drawn))
    if local:
        yield from no_effect(recipe, "on a local model. remove it", "revise.timeout", "revise.retries", "revise.parallel")


def _sources(recipe: LabelRecipe) -> Iterator[Finding]:
    named = {"rows": recipe.rows, "prompts": recipe.prompts, "judge.people.gold": recipe.judge.people.gold}
    named |= {"select.labelled": recipe.select.labelled} if recipe.select is not None else {}
    for name, sources in named.items():
        for index, source in enumerate(sources or ()):
            yield from hub_keys(recipe, f"{name}.{index}", source)
    if recipe.revise is not None:
        yield from _revised(recipe, recipe.revise)
        return
    given = [name for name in ("rows", "models", "samples") if vars(recipe)[name]]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield given[1] if given else "rows", f"expected one of rows, models and samples, found {found}. give one"
    elif not recipe.models:
        loading = (*LOADING, "tokens_per_device") if recipe.judge.path or (recipe.select and recipe.select.ensemble) else ()
        names = [name for name in ("prompts", "rollout", *READING) if name not in loading]
        yield from no_effect(recipe, "without models, which it is for. remove it", *names)
    elif recipe.prompts is None:
        yield "prompts", "there is nothing that the models could respond to. name some"


def _drawn(recipe: LabelRecipe) -> Iterator[Finding]:
    yield from no_effect(recipe, "without a reward. remove it", "rollout.missing_eos_penalty")
    several = len(recipe.models) > 1 or any(map(is_pattern, recipe.models.values()))
    if recipe.models and recipe.rollout.responses_per_prompt < 2 and not several:
        yield "rollout.responses_per_prompt", "one response to a prompt cannot be compared. set it to 2 or more, or add a model"


def _model(recipe: LabelRecipe) -> Iterator[Finding]:
    judge, usual = recipe.judge, [f"judge.{own.name}" for own in dataclasses.fields(Judge)]
    if judge.function is not None:
        if wrong := KINDS["function"].check(judge.function):
            yield "judge.function", wrong
        yield from no_effect(recipe, "where a function judges. remove it", *usual, "judge.people")
        return
    yield from no_effect(recipe, "without function. remove it", "judge.rationality")
    if not judge.asks_people:
        if wrong := check_judge(judge):
            yield "judge", wrong
        yield from no_effect(recipe, "where a model judges. remove it, or the model", "judge.people")
        if judge.mode == "score":
            yield "judge.mode", "score compares nothing. remove it"
        return
    yield from no_effect(recipe, "without endpoint or path. name one, or remove it", *usual)


def _select(recipe: LabelRecipe) -> Iterator[Finding]:
    if (select := recipe.select) is None:
        return
    if select.by == "random":
        yield from no_effect(recipe, "with by: random. remove it", "select.ensemble")
    elif not select.ensemble:
        yield "select.ensemble", f"{select.by} is that of reward models. name train-rm runs, or one with members"
    if select.by != "optimism":
        yield from no_effect(recipe, f"with by: {select.by}. remove it", "select.k")
    if recipe.judge.people.ranking == "all":
        yield "select", "chooses pairs, and judge.people.ranking: all asks about whole rows. remove one of the two"


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
        yield from no_effect(recipe, "where one annotator sees every row. remove it", f"{key}.overlap")


LABELS = (
    ENV,
    Check(("rows", "models", "samples", "prompts", "rollout", "judge", "select", "revise", *READING), _sources),
    Check(("rollout", "models"), _drawn),
    Check(("judge",), _model),
    Check(("select", "judge"), _select),
    Check(("judge",), _people),
)
