"""What the keys of a recipe must agree on among themselves. A key that would have no effect is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlhf_cli.recipe.schema import METRICS, SftRecipe, Source
from rlhf_cli.recipe.suggest import closest

Finding = tuple[str, str]
"""(dotted key, what is wrong and what to do)"""

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")


class Check(NamedTuple):
    reads: tuple[str, ...]  # left out when one of these keys is wrong already
    test: Callable[[SftRecipe], Iterator[Finding]]


def _length(recipe: SftRecipe) -> Iterator[Finding]:
    train = recipe.train
    if train.steps is not None and train.epochs != 1.0:
        yield "train.epochs", "has no effect beside train.steps. keep one of the two"
    if train.epochs == 0:
        yield "train.epochs", "expected more than 0, found 0. use --check to train nothing"


def _intervals(recipe: SftRecipe) -> Iterator[Finding]:
    train = recipe.train
    intervals = {"eval_every": train.eval_every, "save_every": train.save_every}
    for name, value in intervals.items():
        if value == 0:
            yield f"train.{name}", "0 is no interval. write null for the end alone"
    for name, value in {**intervals, "warmup": train.warmup}.items():
        if value is not None and value > 1 and value != int(value):
            yield f"train.{name}", f"{value:g} is neither a share below 1 nor a whole number of steps. write {value:.0f}"


def _optimizer(recipe: SftRecipe) -> Iterator[Finding]:
    if recipe.train.optimizer == "sgd" and recipe.train.betas != (0.9, 0.999):
        yield "train.betas", "has no effect with optimizer: sgd. remove it"
    if recipe.train.max_grad_norm == 0:
        yield "train.max_grad_norm", "0 would erase every gradient. give a large number to clip nothing"


def _held_out(recipe: SftRecipe) -> Iterator[Finding]:
    if recipe.data.eval is not None and recipe.data.holdout:
        yield "data.holdout", "has no effect beside data.eval. keep one of the two"


def _evaluation(recipe: SftRecipe) -> Iterator[Finding]:
    if recipe.data.eval is not None or recipe.data.holdout:
        return
    if recipe.train.eval_every not in (0, 0.25):
        yield "train.eval_every", "has no effect without data.eval or data.holdout. set one of them, or remove it"
    if recipe.train.keep_best is not None:
        yield "train.keep_best", "needs an evaluation. set data.eval or data.holdout"


def _stop_rules(recipe: SftRecipe) -> Iterator[Finding]:
    for metric, rule in recipe.train.stop_if.items():
        given = [
            name for name, limit in (("above", rule.above), ("below", rule.below), ("falls", rule.falls)) if limit is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield f"train.stop_if.{metric}", f"expected exactly one of above, below, falls; found {found}. keep one"


def _sources(recipe: SftRecipe) -> Iterator[Finding]:
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


def _quantised(recipe: SftRecipe) -> Iterator[Finding]:
    if recipe.model.quantize is not None and recipe.lora is None:
        yield "model.quantize", "quantised weights cannot be trained, and lora is null. remove one of the two"


def _watched(recipe: SftRecipe) -> Iterator[Finding]:
    names = METRICS[recipe.objective.kind]
    keep = recipe.train.keep_best
    watched: dict[str, tuple[str, tuple[str, ...]]] = {f"train.stop_if.{name}": (name, names) for name in recipe.train.stop_if}
    if keep is not None:
        watched["train.keep_best.metric"] = (keep.metric, names[:3])
    for key, (name, known) in watched.items():
        if name not in known:
            near = closest(name, known)
            yield key, f"no metric is named {name}. " + (f"did you mean {near}?" if near else f"there are {', '.join(known)}")


CHECKS = (
    Check(("train.steps", "train.epochs"), _length),
    Check(("train.eval_every", "train.save_every", "train.warmup"), _intervals),
    Check(("train.optimizer", "train.betas", "train.max_grad_norm"), _optimizer),
    Check(("data.eval", "data.holdout"), _held_out),
    Check(("data.eval", "data.holdout", "train.eval_every", "train.keep_best"), _evaluation),
    Check(("train.stop_if",), _stop_rules),
    Check(("train.stop_if", "train.keep_best"), _watched),
    Check(("data.train", "data.eval"), _sources),
    Check(("model.quantize", "lora"), _quantised),
)


def findings(recipe: SftRecipe, bad: set[str]) -> Iterator[Finding]:
    """What the recipe's keys disagree on; checks that read a key in `bad` are left out."""
    for check in CHECKS:
        if not any(_touches(read, key) for read in check.reads for key in bad):
            yield from check.test(recipe)


def _touches(read: str, key: str) -> bool:
    return read == key or read.startswith(f"{key}.") or key.startswith(f"{read}.")
