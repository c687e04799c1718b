"""What the keys of a recipe must agree on among themselves. A key that would have no effect is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rlhf_cli.recipe.schema import TRAINING_METRICS, DirectRecipe, KtoRecipe, Recipe, Reference, Source, metrics_of
from rlhf_cli.recipe.suggest import closest

Finding = tuple[str, str]
"""(dotted key, what is wrong and what to do)"""

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")


class Check(NamedTuple):
    reads: tuple[str, ...]  # left out when one of these keys is wrong already
    test: Callable[[Any], Iterator[Finding]]  # of the recipe


def _length(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if train.steps is not None and train.epochs != 1.0:
        yield "train.epochs", "has no effect beside train.steps. keep one of the two"
    if train.epochs == 0:
        yield "train.epochs", "expected more than 0, found 0. use --check to train nothing"


def _intervals(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    intervals = {"eval_every": train.eval_every, "save_every": train.save_every}
    for name, value in intervals.items():
        if value == 0:
            yield f"train.{name}", "0 is no interval. write null for the end alone"
    for name, value in {**intervals, "warmup": train.warmup}.items():
        if value is not None and value > 1 and value != int(value):
            yield f"train.{name}", f"{value:g} is neither a share below 1 nor a whole number of steps. write {value:.0f}"


def _optimizer(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.optimizer == "sgd" and recipe.train.betas != (0.9, 0.999):
        yield "train.betas", "has no effect with optimizer: sgd. remove it"
    if recipe.train.max_grad_norm == 0:
        yield "train.max_grad_norm", "0 would erase every gradient. give a large number to clip nothing"


def _held_out(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.eval is not None and recipe.data.holdout:
        yield "data.holdout", "has no effect beside data.eval. keep one of the two"


def _evaluation(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.eval is not None or recipe.data.holdout:
        return
    if recipe.train.eval_every not in (0, 0.25):
        yield "train.eval_every", "has no effect without data.eval or data.holdout. set one of them, or remove it"
    if recipe.train.keep_best is not None:
        yield "train.keep_best", "needs an evaluation. set data.eval or data.holdout"


def _stop_rules(recipe: Recipe) -> Iterator[Finding]:
    for metric, rule in recipe.train.stop_if.items():
        given = [
            name for name, limit in (("above", rule.above), ("below", rule.below), ("falls", rule.falls)) if limit is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield f"train.stop_if.{metric}", f"expected exactly one of above, below, falls; found {found}. keep one"


def _sources(recipe: Recipe) -> Iterator[Finding]:
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval or [])):
        for index, source in enumerate(sources):
            yield from _source(f"{key}.{index}", source, alone=len(sources) == 1)
        if len(sources) > 1 and not any(source.weight for source in sources):
            yield key, "every source has weight 0. give one a share"


def _source(key: str, source: Source, alone: bool) -> Iterator[Finding]:
    if alone and source.weight != 1.0:
        yield f"{key}.weight", "has no effect with one source. remove it"
    if source.path.endswith(FILE_ENDINGS):
        if source.name is not None:
            yield f"{key}.name", "has no effect on a local file, it chooses a hub configuration. remove it"
        if source.split != "train":
            yield f"{key}.split", "has no effect on a local file, it chooses a hub split. remove it"


def _quantised(recipe: Recipe) -> Iterator[Finding]:
    if recipe.model.quantize is not None and recipe.lora is None:
        yield "model.quantize", "quantised weights cannot be trained, and lora is null. remove one of the two"


def _watched(recipe: Recipe) -> Iterator[Finding]:
    held_out = metrics_of(recipe)
    keep = recipe.train.keep_best
    training = (*held_out, *TRAINING_METRICS)
    watched: dict[str, tuple[str, tuple[str, ...]]] = {f"train.stop_if.{name}": (name, training) for name in recipe.train.stop_if}
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


CHECKS = (
    Check(("train.steps", "train.epochs"), _length),
    Check(("train.eval_every", "train.save_every", "train.warmup"), _intervals),
    Check(("train.optimizer", "train.betas", "train.max_grad_norm"), _optimizer),
    Check(("data.eval", "data.holdout"), _held_out),
    Check(("data.eval", "data.holdout", "train.eval_every", "train.keep_best"), _evaluation),
    Check(("train.stop_if",), _stop_rules),
    Check(("train.stop_if", "train.keep_best", "objective.kind"), _watched),
    Check(("data.train", "data.eval"), _sources),
    Check(("model.quantize", "lora"), _quantised),
)

DIRECT = (Check(("objective.kind", "reference"), _reference),)

CHECKS_OF_STAGE: dict[str, tuple[Check, ...]] = {"dpo": DIRECT, "ipo": DIRECT, "kto": (*DIRECT, Check(("objective",), _balance))}


def findings(recipe: Recipe, bad: set[str]) -> Iterator[Finding]:
    """What the recipe's keys disagree on; checks that read a key in `bad` are left out."""
    for check in (*CHECKS, *CHECKS_OF_STAGE.get(recipe.stage, ())):
        if not any(_touches(read, key) for read in check.reads for key in bad):
            yield from check.test(recipe)


def _touches(read: str, key: str) -> bool:
    return read == key or read.startswith(f"{key}.") or key.startswith(f"{read}.")
