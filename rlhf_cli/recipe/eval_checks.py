"""What the keys of an evaluation's recipe must agree on among themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf_cli.recipe.checks import ENV, REWARD, UNTEMPLATED, Check, Finding, hub_keys, idle, no_effect, unnamed
from rlhf_cli.recipe.evaluations import EvalRecipe, is_pattern
from rlhf_cli.recipe.rewards import check_judge, check_match, term_names
from rlhf_cli.sections import Judge
from rlhf_cli.suggest import did_you_mean


def _rows(recipe: EvalRecipe) -> Iterator[Finding]:
    sections = {"prompts": recipe.prompts, "preferences": recipe.preferences, "text": recipe.text}
    if not any(sections.values()):
        yield "prompts", "there is nothing to evaluate on. name prompts, preferences or text"
    for name, sources in sections.items():
        for index, source in enumerate(sources or ()):
            yield from hub_keys(recipe, f"{name}.{index}", source)
            for key in ("holdout", "holdout_seed"):
                if sources and vars(source)[key] != vars(sources[0])[key]:
                    yield f"{name}.{index}.{key}", f"all sources of a list are split alike. give each the same {key}"


def _models(recipe: EvalRecipe) -> Iterator[Finding]:
    if not recipe.models:
        yield "models", "there is none. add `name: path` for each"
    for name in recipe.models:
        if not re.fullmatch(r"[^\s/]+", name):
            yield f"models.{name}", f"'{name}' is no name: one word without a slash. give it another one"
        if name in ("reward", "gold") and is_pattern(recipe.models[name]):
            yield f"models.{name}", "its checkpoints would be called like terms of the reward or of gold. give it another name"
    if recipe.reference is not None:
        yield from _known("reference", recipe.reference, recipe)


def _known(key: str, name: str, recipe: EvalRecipe) -> Iterator[Finding]:
    entry = name.partition("/")[0]  # a checkpoint's name is its entry's and its own
    if is_pattern(recipe.models.get(entry, "")):
        yield key, f"{entry} is several models, {recipe.models[entry]}. give the one a name of its own in models"
    elif name not in recipe.models:
        yield key, unnamed("model", name, recipe.models)


def _drawn_or_compared(recipe: EvalRecipe) -> Iterator[Finding]:
    """What has no effect where nothing is drawn, compared or scored."""
    if recipe.reward is None:
        yield from no_effect(recipe, "without reward. add one, or remove it", "reward_combine", "rollout.missing_eos_penalty")
    if recipe.prompts is None:
        drawn = ("rollout", "winrate", "best_of_n", "vote", "compare_at_kl", "dump_pairs")
        yield from no_effect(recipe, "without prompts. name some, or remove it", *drawn)
        if recipe.preferences is None:
            yield from no_effect(recipe, "without prompts or preferences. name some, or remove it", "reference", "reward", "gold")
    elif recipe.rollout.max_new_tokens >= recipe.max_length:
        what = f"leaves no room for a prompt in max_length ({recipe.max_length}). lower it, or raise max_length"
        yield "rollout.max_new_tokens", what


def _winrate(recipe: EvalRecipe) -> Iterator[Finding]:
    winrate = recipe.winrate
    if winrate is None:
        return
    yield from _known("winrate.baseline", winrate.baseline, recipe)
    yield from _judge(winrate.judge, recipe)
    if isinstance(winrate.judge, str):
        yield from no_effect(recipe, "with scores, by which every two models are compared. remove it", "winrate.all_pairs")
    ranks_one = recipe.dump_pairs is not None and isinstance(winrate.judge, str)
    if recipe.models and not _several(recipe) and not ranks_one:
        yield "winrate", "there is no other model to compare with the baseline. add one to models"


def _judge(judge: str | Judge, recipe: EvalRecipe) -> Iterator[Finding]:
    key = "winrate.judge"
    if not isinstance(judge, str):
        if wrong := check_judge(judge):
            yield key, wrong
        if judge.mode == "score":
            yield f"{key}.mode", "score compares nothing. remove it, or make the judge a term of the reward and name that"
        return
    rewards, golds = map(term_names, recipe.terms)
    whole = {"reward": rewards, "gold": golds}
    terms = zip(whole, whole.values(), recipe.terms, strict=True)
    named = [(role, *each) for role, names, own in terms for each in zip(names, own, strict=True)]
    if any(term.least_responses > 1 for role, name, term in named if judge in (role, name)):
        what = "compares the responses of one model with each other (mode: pairwise), so that every model has ½. "
        yield key, f"{judge} {what}name that judge here, {{endpoint: …}} or {{path: …}}, or set its mode: score"
    if judge in whole:
        if not whole[judge]:
            yield key, f"there is no {judge} in this recipe. add {judge}: [{{model: …}}] or [{{function: file.py:name}}]"
        return
    names = list(dict.fromkeys((*(name for name, terms in whole.items() if terms), *rewards, *golds)))
    if judge in names:
        return
    there = f"there is {', '.join(names) or 'no reward and no gold to name'}; a server is {{endpoint: http://…, model: …}}"
    yield key, f"no term is named {judge}. {did_you_mean(judge, names or whole, there)}"


def _best_of(recipe: EvalRecipe) -> Iterator[Finding]:
    if not recipe.best_of_n:
        return
    if len(set(recipe.best_of_n)) < len(recipe.best_of_n):
        yield "best_of_n", "a number is there twice. keep one of each"
    if recipe.reference is None:
        yield "best_of_n", "chooses among the reference's responses. name a reference"
    if recipe.reward is None:
        yield "best_of_n", "chooses by the score. add a reward"


def _vote(recipe: EvalRecipe) -> Iterator[Finding]:
    if recipe.vote is None:
        return
    if wrong := check_match(recipe.vote.match):
        yield "vote.match", wrong
    if set(recipe.vote.by) - {"majority"} and not recipe.reward:
        yield "vote.by", "weighted votes, and the best of n, need a score. add a reward"
    for name, values in (("by", recipe.vote.by), ("n", recipe.vote.n)):
        if not values:
            yield f"vote.{name}", "there is none. name one, or remove vote"
        if len(set(values)) < len(values):
            yield f"vote.{name}", "one is there twice. keep one of each"


def _at_kl(recipe: EvalRecipe) -> Iterator[Finding]:
    if recipe.compare_at_kl is None or recipe.prompts is None:
        return
    if recipe.reference is None:
        yield "compare_at_kl", "measures KL from the policy that both series start from. name it as the reference"
    if not recipe.gold:
        yield "compare_at_kl", "compares gold, what people really want. add gold: [{function: file.py:name}] or [{model: …}]"
    seen = {recipe.reference}
    for key, names in vars(recipe.compare_at_kl).items():
        if not names:
            yield f"compare_at_kl.{key}", "there is no model. name one, or one that stands for the checkpoints of a run"
        for name in names:
            if name not in recipe.models:
                yield f"compare_at_kl.{key}", unnamed("model", name, recipe.models)
            elif name in seen:
                what = "is where both series begin" if name == recipe.reference else "is there twice"
                yield f"compare_at_kl.{key}", f"{name} {what}. remove it"
            seen.add(name)


def _dump(recipe: EvalRecipe) -> Iterator[Finding]:
    if recipe.dump_pairs is None or recipe.prompts is None:
        return
    endpoint = recipe.winrate is not None and not isinstance(recipe.winrate.judge, str)
    if recipe.winrate is None and recipe.reward is None:
        yield "dump_pairs", "needs a judge to rank the responses. add winrate or reward"
    if not recipe.dump_pairs.endswith(".jsonl"):
        yield "dump_pairs", f"expected a .jsonl file, found {recipe.dump_pairs}. rename it"
    if not endpoint and recipe.rollout.responses_per_prompt < 2 and not _several(recipe):
        yield "dump_pairs", "one response to a prompt is no ranking. set rollout.responses_per_prompt to 2 or more"


def _several(recipe: EvalRecipe) -> bool:
    return len(recipe.models) > 1 or any(map(is_pattern, recipe.models.values()))


def _implicit(recipe: EvalRecipe) -> Iterator[Finding]:
    if recipe.beta is not None and (recipe.preferences is None or recipe.reference is None):
        yield "beta", "scales implicit rewards, which need preferences and a reference. name both, or remove it"


EVALUATION = (
    ENV,
    Check(("models", "reference"), _models),
    idle(lambda it: it.chat_template == "none", UNTEMPLATED, "template_options", beside=("chat_template",)),
    Check(("prompts", "preferences", "text"), _rows),
    Check(
        (
            *("prompts", "preferences", "reference", "rollout", "max_length"),
            *("reward", "reward_combine", "gold", "winrate", "best_of_n", "vote", "compare_at_kl", "dump_pairs"),
        ),
        _drawn_or_compared,
    ),
    Check(("models", "winrate", "reward", "gold", "dump_pairs"), _winrate),
    Check(("best_of_n", "reference", "reward"), _best_of),
    Check(("vote",), _vote),
    Check(("compare_at_kl", "models", "prompts", "reference", "gold"), _at_kl),
    Check(("dump_pairs", "prompts", "winrate", "reward", "rollout", "models"), _dump),
    Check(("beta", "preferences", "reference"), _implicit),
    REWARD,
)
