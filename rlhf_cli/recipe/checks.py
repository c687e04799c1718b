"""What the keys of a recipe must agree on among themselves. A key that would have no effect is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.data.files import is_hub_id
from rlhf_cli.metrics import metric
from rlhf_cli.objectives.distil import Distil
from rlhf_cli.objectives.general import General
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import GroupGradient
from rlhf_cli.recipe.evaluations import EvalRecipe
from rlhf_cli.recipe.keys import keys_of
from rlhf_cli.recipe.recipes import DirectRecipe, KtoRecipe, PpoRecipe, Recipe, SftRecipe, TrainingRecipe
from rlhf_cli.recipe.rewards import KINDS, kinds_of, term_names
from rlhf_cli.sections import Bound, Reward, Rows, Source, VllmServer
from rlhf_cli.suggest import did_you_mean

Finding = tuple[str, str]
"""(dotted key, what is wrong and what to do)"""


class Check(NamedTuple):
    reads: tuple[str, ...]  # left out when one of these keys is wrong already
    test: Callable[[Any], Iterator[Finding]]  # of the recipe


def no_effect(recipe: Any, why: str, *keys: str) -> Iterator[Finding]:
    """A finding for each of these keys that has another value than its default, where none has an effect."""
    for key in keys:
        *path, name = key.split(".")
        section: Any = reduce(lambda own, part: own[int(part)] if part.isdecimal() else vars(own)[part], path, recipe)
        kind: type = type(section)
        known = keys_of(kind)[name]
        if vars(section)[known.field] != known.default:
            yield key, f"has no effect {why}"


def unnamed(what: str, name: str, known: Collection[str]) -> str:
    there = f"there are {', '.join(known)}"
    return f"no {what} is named {name}. {did_you_mean(name, known, there)}"


def idle(test: Callable[[Any], bool], why: str, *keys: str, beside: Sequence[str]) -> Check:
    """These keys have no effect on a recipe of which the test, which reads those `beside`, is true."""
    return Check((*keys, *beside), lambda recipe: no_effect(recipe, why, *keys) if test(recipe) else iter(()))


def _length(recipe: TrainingRecipe) -> Iterator[Finding]:
    train = recipe.train
    if train.steps is not None:
        yield from no_effect(recipe, "beside train.steps. keep one of the two", "train.epochs")
    if train.epochs == 0:
        yield "train.epochs", "expected more than 0, found 0. use --check to train nothing"


def _intervals(recipe: TrainingRecipe) -> Iterator[Finding]:
    train = recipe.train
    for name, value in (("eval_every", train.eval_every), ("save_every", train.save_every), ("warmup", train.warmup)):
        if value == 0 and name != "warmup":
            yield f"train.{name}", "0 is no interval. write null for the end alone"
        if value is not None and value > 1 and value != int(value):
            yield f"train.{name}", f"{value:g} is neither a share below 1 nor a whole number of steps. write {value:.0f}"


def _clipped(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.train.max_grad_norm == 0:
        yield "train.max_grad_norm", "0 would erase every gradient. give a large number to clip nothing"


def _evaluation(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.data.eval is not None or recipe.data.holdout:
        return
    if recipe.train.eval_every != 0:
        yield from no_effect(recipe, "without data.eval or data.holdout. set one of them, or remove it", "train.eval_every")
    if recipe.train.keep_best is not None:
        yield "train.keep_best", "needs an evaluation. set data.eval or data.holdout"


def _stop_rules(recipe: TrainingRecipe) -> Iterator[Finding]:
    for name, rule in recipe.train.stop_if.items():
        given = [key for key, limit in vars(rule).items() if limit is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield f"train.stop_if.{name}", f"expected exactly one of above, below, falls; found {found}. keep one"


def _sources(recipe: TrainingRecipe) -> Iterator[Finding]:
    yield from _mixture(recipe, "data.train", recipe.data.train)
    for index, source in enumerate(recipe.data.eval or []):
        yield from no_effect(recipe, "on held-out rows: each counts once. remove it", f"data.eval.{index}.weight")
        yield from hub_keys(recipe, f"data.eval.{index}", source)


def _mixture(recipe: TrainingRecipe, key: str, sources: list[Source]) -> Iterator[Finding]:
    for index, source in enumerate(sources):
        if source.weight == 0:
            yield f"{key}.{index}.weight", f"0 never draws from {source.path}. remove the source"
        elif len(sources) == 1:
            yield from no_effect(recipe, "with one source. remove it", f"{key}.{index}.weight")
        yield from hub_keys(recipe, f"{key}.{index}", source)


def hub_keys(recipe: Recipe, key: str, source: Rows) -> Iterator[Finding]:
    """Of a hub's keys on a local file, or on a folder, which may have splits."""
    if not is_hub_id(source.path):
        for name, what in {"revision": "a hub revision", "name": "a hub configuration", "split": "a split"}.items():
            if name != "split" or not Path(source.path).is_dir():
                yield from no_effect(recipe, f"on a local file, it chooses {what}. remove it", f"{key}.{name}")


def _quantised(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.model.quantize is not None and recipe.lora is None:
        yield "model.quantize", "quantised weights cannot be trained, and lora is null. remove one of the two"


def _heads(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.lora is None and len(recipe.objective.roles) > 1:
        yield "objective.members", "are adapters on one base, and with lora: null each would be a whole model. leave lora at auto"
    if isinstance(recipe.objective, General) and recipe.objective.width % 2:
        yield "objective.width", f"{recipe.objective.width} is odd, and the numbers are taken two by two. write an even one"


def _watched(recipe: TrainingRecipe) -> Iterator[Finding]:
    held_out = recipe.held_out_metrics
    either = tuple(dict.fromkeys((*recipe.training_metrics, *held_out)))
    watched = [(f"train.stop_if.{name}", name, either) for name in recipe.train.stop_if]
    if recipe.train.keep_best is not None:
        watched.append(("train.keep_best.metric", recipe.train.keep_best.metric, held_out))
    for key, name, known in watched:
        if name not in known:
            yield key, unnamed("metric", name, known)


def _reference(recipe: DirectRecipe) -> Iterator[Finding]:
    if not recipe.objective.reference:
        why = f"with kind: {recipe.objective.kind}, which needs no reference. remove it"
        if recipe.reference.model != "start":  # what `auto` comes to, as recorded recipes have it
            yield from no_effect(recipe, why, "reference.model")
        yield from no_effect(recipe, why, "reference.cache")
    elif recipe.reference.model == "previous" and recipe.rollout is None:
        why = "previous is the policy when responses were last drawn, and without rollout none are. write start, or add rollout"
        yield "reference.model", why
    elif recipe.reference.model == "previous" and recipe.objective.token_figure == "kl":
        what = "tdpo2 compares whole distributions. write start, base or a path"
        yield "reference.model", f"of an earlier policy one number a token is kept, and {what}"


def _distilled(recipe: SftRecipe) -> Iterator[Finding]:
    objective, rollout = recipe.objective, recipe.rollout
    if isinstance(objective, Distil) and objective.divergence != "jsd":
        yield from no_effect(recipe, f"with divergence: {objective.divergence}. remove it", "objective.beta")
    if rollout is None:
        return
    if not objective.frozen:
        yield "rollout", "kind: sft learns from the responses of its data. remove it, or write kind: distil with a teacher"
    yield from no_effect(recipe, "where nothing is scored. remove it", "rollout.missing_eos_penalty")
    yield from no_effect(recipe, "where responses are drawn. remove it", "data.train_on")


def _balance(recipe: KtoRecipe) -> Iterator[Finding]:
    objective = recipe.objective
    if objective.kind != "kto":
        return
    if objective.lambda_d == objective.lambda_u == 0:
        yield "objective.lambda_d", "0 beside lambda_u: 0 leaves nothing to learn. give one class a weight"
    if objective.lambda_ is not None:
        why = "beside objective.lambda: auto. keep one of the two"
        yield from no_effect(recipe, why, "objective.lambda_d", "objective.lambda_u")


SECRET = re.compile(r"(?i)(^|_)(token|key|secret|password|passwd|credentials?)(_|$)|^(hf_|sk-|ghp_|glpat-|xox)")


def _env(recipe: Recipe) -> Iterator[Finding]:
    for name, value in recipe.env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"env.{name[:40]}", "no name of an environment variable. write letters, digits and _"
        elif SECRET.search(name) or SECRET.search(str(value)):
            yield f"env.{name}", "looks like a secret, and a recipe is kept and shown. set it in the shell instead"


ENV = Check(("env",), _env)
UNTEMPLATED = "with chat_template: none. remove it"


def _terms(key: str, terms: list[Reward]) -> Iterator[Finding]:
    if not terms:
        yield key, "the list is empty. name a term, such as {model: …} or {function: file.py:name}"
    names = term_names(terms)
    for index, (name, term) in enumerate(zip(names, terms, strict=True)):
        yield from _term(f"{key}.{index}", term)
        if metric(f"{key}/{name}").name != f"{key}/":
            yield f"{key}.{index}.name", f"{key}/{name} is logged of something else. give the term another name"
        if name in names[:index]:
            yield f"{key}.{index}.name", f"a second term would be logged as {key}/{name}. give one of them another name"


def _term(key: str, term: Reward) -> Iterator[Finding]:
    kinds = kinds_of(term)
    if len(kinds) != 1:
        found, advice = (" and ".join(kinds), f"make it {len(kinds)} terms") if kinds else ("none", "name one")
        yield key, f"expected one of {', '.join(KINDS)}, found {found}. {advice}"
        return
    own = kinds[0]
    if wrong := KINDS[own].check(vars(term)[own]):
        yield f"{key}.{own}", wrong
    idle = {name: f"on a {KINDS[own].noun}, it is for {kind.noun}s" for kind in KINDS.values() for name in kind.options}
    idle = {name: why for name, why in idle.items() if name not in KINDS[own].options}
    idle |= {"separator": "without per: step"} if own == "function" and term.per != "step" else {}
    idle |= {"aggregate": "with per_step: true"} if term.per_step else {"compares": "with per"} if term.per else {}
    for name, why in idle.items():
        yield from ((f"{key}.{name}", what) for _, what in no_effect(term, f"{why}. remove it", name))
    if isinstance(term.combine, Bound) and (term.combine.lcb is None) == (term.combine.ucb is None):
        yield f"{key}.combine", "expected mean, min, or one of lcb and ucb. give one"
    if term.name is not None and not term.name.strip():
        yield f"{key}.name", "expected a name, found blank text. remove it for the default"


def _reward(recipe: PpoRecipe | DirectRecipe | EvalRecipe) -> Iterator[Finding]:
    known = {kind: terms for kind, terms in (("reward", recipe.reward), ("gold", recipe.gold)) if terms is not None}
    for kind, terms in known.items():
        yield from _terms(kind, terms)
    asked: dict[str | None, str | None] = {}  # model → endpoint
    for kind, index, term in ((kind, index, term) for kind, terms in known.items() for index, term in enumerate(terms)):
        if kind == "gold":
            yield from no_effect(recipe, "on a term that is only measured. remove it", f"gold.{index}.weight")
        elif term.weight == 0:
            yield f"reward.{index}.weight", "0 leaves the term out of the score. move it to gold, where it is only measured"
        if recipe.rollout is not None and term.least_responses > recipe.rollout.responses_per_prompt:
            why = "compares the responses of a prompt. set rollout.responses_per_prompt to 2 or more, or mode: score"
            yield f"{kind}.{index}.judge.mode", f"pairwise {why}"
        judge = term.judge
        if judge is not None and judge.endpoint != asked.setdefault(judge.model, judge.endpoint):
            why = "what one says would be taken for what the other says. give it another name on its server"
            yield f"{kind}.{index}.judge.model", f"{judge.model} is a judge at {asked[judge.model]} too: {why}"
    if recipe.reward is not None and len(recipe.reward) == 1:
        yield from no_effect(recipe, "on one term. remove it, or add a term to reward", "reward_combine")
    if isinstance(recipe, PpoRecipe) and recipe.reward_combine != "sum" and any(own.per or own.per_step for own in recipe.reward):
        yield "reward_combine", f"{recipe.reward_combine} takes one number a response, and a term gives several. use sum"


def _drawn(recipe: TrainingRecipe) -> Iterator[Finding]:
    """What changes where responses are drawn and only the prompts of the data are used."""
    rollout, data = recipe.draws, recipe.data
    if rollout is None:
        return
    if data.overlong == "truncate-response":
        yield "data.overlong", "truncate-response has no effect where responses are drawn. use drop, error or truncate-prompt"
    if rollout.max_new_tokens >= data.max_length:
        what = f"leaves no room for a prompt in data.max_length ({data.max_length}). lower it, or raise data.max_length"
        yield "rollout.max_new_tokens", what
    if isinstance(rollout.engine, VllmServer) and recipe.lora is None:
        yield "rollout.engine", "a server is given adapters, and lora: null trains all weights. write vllm, or remove lora: null"


def _samples(recipe: PpoRecipe) -> Iterator[Finding]:
    objective, found = recipe.objective, recipe.rollout.responses_per_prompt
    if recipe.rollout.engine == "transformers":
        yield from no_effect(recipe, "where the model that learns draws by itself. remove it", "rollout.correction")
    elif isinstance(recipe.rollout.engine, VllmServer) and recipe.rollout.temperature != 1:
        why = "with a server, whose log-probabilities are those at temperature 1. write rollout.temperature: 1, or engine: vllm"
        yield from no_effect(recipe, why, "rollout.correction")
    if found < objective.least_samples:
        what = f"{found} is too few for kind: {objective.kind}, which compares the responses of a prompt. "
        yield "rollout.responses_per_prompt", f"{what}set it to {objective.least_samples} or more"
    if objective.minibatches > recipe.train.batch_size:
        what = f"{objective.minibatches} updates cannot share train.batch_size ({recipe.train.batch_size}) prompts. "
        yield "objective.minibatches", f"{what}lower it"


def _options(recipe: PpoRecipe) -> Iterator[Finding]:
    """Of what grpo and rloo take: combinations that are no method."""
    objective, longest = recipe.objective, recipe.rollout.max_new_tokens
    if isinstance(objective, GroupGradient) and (objective.overlong or 0) > longest:
        yield "objective.overlong", f"{objective.overlong} is more than rollout.max_new_tokens ({longest}). lower it"
    if not isinstance(objective, Grpo):
        return
    over, whole, cispo = objective.mean_over, objective.ratio == "sequence", objective.surrogate == "cispo"
    if whole and cispo:
        what = "weighs every token by its own ratio, and ratio: sequence gives a response one. remove one of the two"
        yield "objective.surrogate", f"cispo {what}"
    elif whole and over in ("tokens", "constant"):
        what = "lets long responses count for more, and with ratio: sequence each counts once. remove it"
        yield "objective.mean_over", f"{over} {what}"
    elif cispo and over in ("responses", "constant"):
        yield "objective.mean_over", f"{over} does not go with surrogate: cispo, which is a mean over tokens. remove it"
    if cispo and objective.clip_high is not None:
        why = "beside clip_high with surrogate: cispo, which is not clipped below 1. remove it"
        yield from no_effect(recipe, why, "objective.clip")


def _value(recipe: PpoRecipe) -> Iterator[Finding]:
    if not recipe.objective.values:
        why = f"with kind: {recipe.objective.kind}, which learns no value. remove it"
        yield from no_effect(recipe, why, "value.init", "value.learning_rate")


def _kl(recipe: PpoRecipe) -> Iterator[Finding]:
    kl, objective = recipe.kl, recipe.objective
    if kl.estimator == "k1" and isinstance(objective, Grpo) and objective.scale != "none":
        what = f"k1 is part of the return, and kind: grpo with scale: {objective.scale} takes the scores alone. "
        yield "kl.estimator", f"{what}write k2 or k3, which are loss terms, or remove it"
    if recipe.reference.model == "previous":
        what = "previous would be the policy that draws: its KL would be 0 and hold nothing. write start, base or a path"
        yield "reference.model", what
    if kl.target is None:
        yield from no_effect(recipe, "without kl.target. set one, or remove it", "kl.horizon")
    if kl.coef == 0:
        why = "with kl.coef: 0, which stays 0 whatever it is multiplied by. give coef a start"
        yield from no_effect(recipe, why, "kl.target")
        yield from no_effect(recipe, "with kl.coef: 0. remove it, or give coef a weight", "kl.estimator")


def _ptx(recipe: PpoRecipe) -> Iterator[Finding]:
    yield from _mixture(recipe, "ptx.data", recipe.ptx.data if recipe.ptx else [])
    if recipe.ptx and recipe.ptx.coef == 0:
        yield "ptx.coef", "0 learns nothing from these rows. give it a weight, or remove ptx"


def _self_play(recipe: DirectRecipe) -> Iterator[Finding]:
    what = f"kind {recipe.objective.kind} learns from how probably the policy's own responses win"
    if recipe.rollout is None:
        yield "objective.kind", f"{what}. add rollout: {{}} and a reward that compares"
    elif any(len(recipe.reward or ()) != 1 or term.weight != 1 for term in recipe.reward or ()):
        yield "reward", f"{what}, which one term says. name one, of weight 1"
    elif recipe.rollout.missing_eos_penalty:
        yield "rollout.missing_eos_penalty", f"{what}, and this would change that. remove it"


def _online(recipe: DirectRecipe) -> Iterator[Finding]:
    if recipe.objective.self_play:
        yield from _self_play(recipe)
    if recipe.rollout is None:
        why = "without rollout. add `rollout: {}` to draw responses, or remove it"
        yield from no_effect(recipe, why, "reward", "reward_combine", "gold")
        return
    if recipe.rollout.engine != "transformers" and recipe.rollout.min_p and recipe.rollout.top_p < 1:
        yield "rollout.min_p", "vllm would apply it before top_p, which then keeps fewer tokens. keep one of the two"
    if recipe.reward is None:
        yield "rollout", "needs a reward to rank what is drawn. add reward: [{model: …}] or [{function: file.py:name}]"
    if recipe.objective.reference:
        why = "with rollout: responses are new, so nothing can be kept. remove it"
        yield from no_effect(recipe, why, "reference.cache")


TRAINING = (
    ENV,
    Check(("train.steps", "train.epochs"), _length),
    Check(("train.eval_every", "train.save_every", "train.warmup"), _intervals),
    idle(lambda it: it.train.optimizer == "sgd", "with optimizer: sgd. remove it", "train.betas", beside=("train.optimizer",)),
    Check(("train.max_grad_norm",), _clipped),
    idle(lambda it: it.data.eval is not None, "beside data.eval. keep one of the two", "data.holdout", beside=("data.eval",)),
    Check(("data.eval", "data.holdout", "train.eval_every", "train.keep_best"), _evaluation),
    Check(("train.stop_if",), _stop_rules),
    Check(("train.stop_if", "train.keep_best", "objective.kind", "rollout", "reward", "gold", "ptx"), _watched),
    Check(("data.train", "data.eval"), _sources),
    Check(("model.quantize", "lora"), _quantised),
    Check(("objective", "lora"), _heads),
    idle(lambda it: it.model.chat_template == "none", UNTEMPLATED, "model.template_options", beside=("model.chat_template",)),
    Check(("data.overlong", "data.max_length", "rollout", "lora"), _drawn),
)

SFT = (*TRAINING, Check(("objective", "rollout", "data.train_on"), _distilled))

REWARD = Check(("reward", "reward_combine", "gold", "rollout"), _reward)

DIRECT = (
    *TRAINING,
    Check(("objective.kind", "reference", "rollout"), _reference),
    REWARD,
    Check(("objective.kind", "rollout", "reward", "reward_combine", "gold", "reference"), _online),
)

KTO = (*DIRECT, Check(("objective",), _balance))

PPO = (
    *TRAINING,
    REWARD,
    Check(("objective", "rollout", "train.batch_size"), _samples),
    Check(("objective", "rollout"), _options),
    Check(("objective.kind", "value"), _value),
    Check(("kl", "objective", "reference"), _kl),
    Check(("ptx",), _ptx),
)


def findings(checks: Sequence[Check], recipe: Recipe, bad: set[str]) -> Iterator[Finding]:
    """What the recipe's keys disagree on; checks that read a key in `bad` are left out."""
    for check in checks:
        pairs = product((f"{read}." for read in check.reads), (f"{key}." for key in bad))
        if not any(read.startswith(key) or key.startswith(read) for read, key in pairs):
            yield from check.test(recipe)
