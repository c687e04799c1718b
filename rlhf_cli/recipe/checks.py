"""What the keys of a recipe must agree on among themselves. A key that would have no effect is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_cli.data.files import is_hub_id
from rlhf_cli.recipe.recipes import DirectRecipe, EvalRecipe, KtoRecipe, PpoRecipe, Recipe, TrainingRecipe
from rlhf_cli.recipe.rewards import KINDS, kinds_of, name_of
from rlhf_cli.sections import Kl, Reference, Reward, Rows, Source, Value
from rlhf_cli.suggest import closest

Finding = tuple[str, str]
"""(dotted key, what is wrong and what to do)"""


class Check(NamedTuple):
    reads: tuple[str, ...]  # left out when one of these keys is wrong already
    test: Callable[[Any], Iterator[Finding]]  # of the recipe


def _length(recipe: TrainingRecipe) -> Iterator[Finding]:
    train = recipe.train
    if train.steps is not None and train.epochs != 1.0:
        yield "train.epochs", "has no effect beside train.steps. keep one of the two"
    if train.epochs == 0:
        yield "train.epochs", "expected more than 0, found 0. use --check to train nothing"


def _intervals(recipe: TrainingRecipe) -> Iterator[Finding]:
    train = recipe.train
    intervals = {"eval_every": train.eval_every, "save_every": train.save_every}
    for name, value in intervals.items():
        if value == 0:
            yield f"train.{name}", "0 is no interval. write null for the end alone"
    for name, value in {**intervals, "warmup": train.warmup}.items():
        if value is not None and value > 1 and value != int(value):
            yield f"train.{name}", f"{value:g} is neither a share below 1 nor a whole number of steps. write {value:.0f}"


def _optimizer(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.train.optimizer == "sgd" and recipe.train.betas != (0.9, 0.999):
        yield "train.betas", "has no effect with optimizer: sgd. remove it"
    if recipe.train.max_grad_norm == 0:
        yield "train.max_grad_norm", "0 would erase every gradient. give a large number to clip nothing"


def _held_out(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.data.eval is not None and recipe.data.holdout:
        yield "data.holdout", "has no effect beside data.eval. keep one of the two"


def _evaluation(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.data.eval is not None or recipe.data.holdout:
        return
    if recipe.train.eval_every not in (0, 0.25):
        yield "train.eval_every", "has no effect without data.eval or data.holdout. set one of them, or remove it"
    if recipe.train.keep_best is not None:
        yield "train.keep_best", "needs an evaluation. set data.eval or data.holdout"


def _stop_rules(recipe: TrainingRecipe) -> Iterator[Finding]:
    for metric, rule in recipe.train.stop_if.items():
        given = [
            name for name, limit in (("above", rule.above), ("below", rule.below), ("falls", rule.falls)) if limit is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield f"train.stop_if.{metric}", f"expected exactly one of above, below, falls; found {found}. keep one"


def _sources(recipe: TrainingRecipe) -> Iterator[Finding]:
    yield from _mixture("data.train", recipe.data.train)
    for index, source in enumerate(recipe.data.eval or []):
        if source.weight != 1.0:
            yield f"data.eval.{index}.weight", "has no effect on held-out rows: each counts once. remove it"
        yield from hub_keys(f"data.eval.{index}", source)


def _mixture(key: str, sources: list[Source]) -> Iterator[Finding]:
    """The sources that an epoch is made of."""
    for index, source in enumerate(sources):
        if source.weight == 0:
            yield f"{key}.{index}.weight", f"0 never draws from {source.path}. remove the source"
        elif source.weight != 1.0 and len(sources) == 1:
            yield f"{key}.{index}.weight", "has no effect with one source. remove it"
        yield from hub_keys(f"{key}.{index}", source)


def hub_keys(key: str, source: Rows) -> Iterator[Finding]:
    """Of a hub's keys on a local file."""
    if not is_hub_id(source.path):
        if source.name is not None:
            yield f"{key}.name", "has no effect on a local file, it chooses a hub configuration. remove it"
        if source.split != "train":
            yield f"{key}.split", "has no effect on a local file, it chooses a hub split. remove it"


def _quantised(recipe: TrainingRecipe) -> Iterator[Finding]:
    if recipe.model.quantize is not None and recipe.lora is None:
        yield "model.quantize", "quantised weights cannot be trained, and lora is null. remove one of the two"


def _watched(recipe: TrainingRecipe) -> Iterator[Finding]:
    held_out = recipe.held_out_metrics
    keep = recipe.train.keep_best
    either = tuple(dict.fromkeys((*recipe.training_metrics, *held_out)))
    watched: dict[str, tuple[str, tuple[str, ...]]] = {f"train.stop_if.{name}": (name, either) for name in recipe.train.stop_if}
    if keep is not None:
        watched["train.keep_best.metric"] = (keep.metric, held_out)
    for key, (name, known) in watched.items():
        if name not in known:
            near = closest(name, known)
            yield key, f"no metric is named {name}. " + (f"did you mean {near}?" if near else f"there are {', '.join(known)}")


def _reference(recipe: DirectRecipe) -> Iterator[Finding]:
    if recipe.objective.reference:
        return
    default = Reference()
    given = {"model": recipe.reference.model != default.model, "cache": recipe.reference.cache != default.cache}
    for name in (name for name, differs in given.items() if differs):
        yield f"reference.{name}", f"has no effect with kind: {recipe.objective.kind}, which needs no reference. remove it"


def _balance(recipe: KtoRecipe) -> Iterator[Finding]:
    objective = recipe.objective
    if objective.kind != "kto":
        return
    if objective.lambda_d == objective.lambda_u == 0:
        yield "objective.lambda_d", "0 beside lambda_u: 0 leaves nothing to learn. give one class a weight"
    if objective.lambda_ is None:
        return
    for name, weight in {"lambda_d": objective.lambda_d, "lambda_u": objective.lambda_u}.items():
        if weight != 1.0:
            yield f"objective.{name}", "has no effect beside objective.lambda: auto. keep one of the two"


def _terms(key: str, terms: list[Reward] | None) -> Iterator[Finding]:
    """The terms of the reward or of what is only measured."""
    if terms is None:
        return
    if not terms:
        yield key, "the list is empty. name a term: {model: …} or {function: file.py:name}"
    names: set[str] = set()
    for index, term in enumerate(terms):
        yield from _term(f"{key}.{index}", term)
        name = name_of(term)
        if name in names:
            yield f"{key}.{index}.name", f"a second term would be logged as {key}/{name}. give one of them another name"
        names.add(name)


def _term(key: str, term: Reward) -> Iterator[Finding]:
    kinds = kinds_of(term)
    if len(kinds) != 1:
        found, advice = ("both", "make it two terms") if kinds else ("none", "name one")
        yield key, f"expected {' or '.join(KINDS)}, found {found}. {advice}"
        return
    own = kinds[0]
    if wrong := KINDS[own].check(vars(term)[own]):
        yield f"{key}.{own}", wrong
    for kind in KINDS.values():
        for name in kind.options:
            if name not in KINDS[own].options and vars(term)[name] is not None:
                yield f"{key}.{name}", f"has no effect on a {KINDS[own].noun}, it is for {kind.noun}s. remove it"
    if term.name is not None and not term.name.strip():
        yield f"{key}.name", "expected a name, found blank text. remove it for the default"


def _reward(recipe: PpoRecipe | DirectRecipe | EvalRecipe) -> Iterator[Finding]:
    yield from _terms("reward", recipe.reward)
    yield from _terms("gold", recipe.gold)
    for index, term in enumerate(recipe.reward or []):
        if term.weight == 0:
            yield f"reward.{index}.weight", "0 leaves the term out of the score. move it to gold, where it is only measured"
    for index, term in enumerate(recipe.gold or []):
        if term.weight != 1.0:
            yield f"gold.{index}.weight", "has no effect on a term that is only measured. remove it"
    if recipe.reward is not None and len(recipe.reward) == 1 and recipe.reward_combine != "sum":
        yield "reward_combine", "has no effect on one term. remove it, or add a term to reward"


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


def _samples(recipe: PpoRecipe) -> Iterator[Finding]:
    objective, found = recipe.objective, recipe.rollout.responses_per_prompt
    if found < objective.least_samples:
        what = f"{found} is too few for kind: {objective.kind}, which compares the responses of a prompt. "
        yield "rollout.responses_per_prompt", f"{what}set it to {objective.least_samples} or more"
    if objective.minibatches > recipe.train.batch_size:
        what = f"{objective.minibatches} updates cannot share train.batch_size ({recipe.train.batch_size}) prompts. "
        yield "objective.minibatches", f"{what}lower it"


def _value(recipe: PpoRecipe) -> Iterator[Finding]:
    if recipe.objective.values:
        return
    default = Value()
    given = {"init": recipe.value.init != default.init, "learning_rate": recipe.value.learning_rate != default.learning_rate}
    for name in (name for name, differs in given.items() if differs):
        yield f"value.{name}", f"has no effect with kind: {recipe.objective.kind}, which learns no value. remove it"


def _kl(recipe: PpoRecipe) -> Iterator[Finding]:
    kl, default = recipe.kl, Kl()
    if kl.target is None and kl.horizon != default.horizon:
        yield "kl.horizon", "has no effect without kl.target. set one, or remove it"
    if kl.coef:
        return
    if kl.target is not None:
        yield "kl.target", "has no effect with kl.coef: 0, which stays 0 whatever it is multiplied by. give coef a start"
    if kl.estimator != default.estimator:
        yield "kl.estimator", "has no effect with kl.coef: 0. remove it, or give coef a weight"


def _ptx(recipe: PpoRecipe) -> Iterator[Finding]:
    if recipe.ptx is None:
        return
    yield from _mixture("ptx.data", recipe.ptx.data)
    if recipe.ptx.coef == 0:
        yield "ptx.coef", "0 learns nothing from these rows. give it a weight, or remove ptx"


def _online(recipe: DirectRecipe) -> Iterator[Finding]:
    if recipe.rollout is None:
        given = {
            "reward": recipe.reward is not None,
            "reward_combine": recipe.reward_combine != "sum",
            "gold": recipe.gold is not None,
        }
        for name in (name for name, there in given.items() if there):
            yield name, "has no effect without rollout. add `rollout: {}` to draw responses, or remove it"
        return
    if recipe.reward is None:
        yield "rollout", "needs a reward to rank what is drawn. add reward: [{model: …}] or [{function: file.py:name}]"
    if recipe.objective.reference and not recipe.reference.cache:
        yield "reference.cache", "has no effect with rollout: responses are new, so nothing can be kept. remove it"


TRAINING = (
    Check(("train.steps", "train.epochs"), _length),
    Check(("train.eval_every", "train.save_every", "train.warmup"), _intervals),
    Check(("train.optimizer", "train.betas", "train.max_grad_norm"), _optimizer),
    Check(("data.eval", "data.holdout"), _held_out),
    Check(("data.eval", "data.holdout", "train.eval_every", "train.keep_best"), _evaluation),
    Check(("train.stop_if",), _stop_rules),
    Check(("train.stop_if", "train.keep_best", "objective.kind", "rollout", "reward", "gold", "ptx"), _watched),
    Check(("data.train", "data.eval"), _sources),
    Check(("model.quantize", "lora"), _quantised),
    Check(("data.overlong", "data.max_length", "rollout"), _drawn),
)

REWARD = Check(("reward", "reward_combine", "gold"), _reward)

DIRECT = (
    *TRAINING,
    Check(("objective.kind", "reference"), _reference),
    REWARD,
    Check(("objective.kind", "rollout", "reward", "reward_combine", "gold", "reference"), _online),
)

KTO = (*DIRECT, Check(("objective",), _balance))

PPO = (
    *TRAINING,
    REWARD,
    Check(("objective", "rollout", "train.batch_size"), _samples),
    Check(("objective.kind", "value"), _value),
    Check(("kl",), _kl),
    Check(("ptx",), _ptx),
)


def findings(checks: Sequence[Check], recipe: Recipe, bad: set[str]) -> Iterator[Finding]:
    """What the recipe's keys disagree on; checks that read a key in `bad` are left out."""
    for check in checks:
        if not any(_touches(read, key) for read in check.reads for key in bad):
            yield from check.test(recipe)


def _touches(read: str, key: str) -> bool:
    return read == key or read.startswith(f"{key}.") or key.startswith(f"{read}.")
