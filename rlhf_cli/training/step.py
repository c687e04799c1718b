"""One optimiser step: passes, one division by the global counts, one reduction, one check, one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Batch, Tree, tree_length
from rlhf_cli.errors import MachineError, NumberError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.fused import Siblings
from rlhf_cli.models.memory import LONG_PASS, empty_cache, is_out_of_memory, return_freed
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.sharding import clip, local, multiply, total_norm
from rlhf_cli.objectives.base import Objective
from rlhf_cli.ranks import Ranks
from rlhf_cli.signals import Pause, no_pause

T = TypeVar("T")

FLOAT16_LOSS_SCALE = 1024.0
"""Keeps small gradients above float16's smallest number on their way back; taken out again before the update."""


@dataclass(frozen=True)
class Sums:
    """Sums over all ranks, and what they are divided by; those of several updates add up."""

    totals: dict[tuple[str, str], float] = field(default_factory=dict)  # (metric, unit) → sum
    counts: dict[str, float] = field(default_factory=dict)  # unit → count

    def __add__(self, other: Sums) -> Sums:
        totals = {key: self.totals.get(key, 0.0) + other.totals.get(key, 0.0) for key in self.totals | other.totals}
        counts = {unit: self.counts.get(unit, 0) + other.counts.get(unit, 0) for unit in self.counts | other.counts}
        return Sums(totals, counts)

    @property
    def means(self) -> dict[str, float]:
        """A metric with several units is the sum of its means."""
        found: dict[str, float] = {}
        for (name, unit), total in self.totals.items():
            found[name] = found.get(name, 0.0) + total / max(1, self.counts[unit])
        return found


UPDATES = "updates"
"""The unit of what an update has one of, as its gradient norm."""


@dataclass(frozen=True)
class Update:
    """One update of a step, the same on every rank."""

    step: int
    trees: list[Tree]  # its global batch
    rates: Mapping[str, float]  # trained role → learning rate
    max_grad_norm: float  # of each role's gradients, apart from the others'
    seed: int
    number: int = 0  # which of the step's updates
    memory: Mapping[str, float] = field(default_factory=dict)  # the objective's own numbers from the step before
    given: Mapping[str, float] = field(default_factory=dict)  # what else its terms take


@dataclass(frozen=True)
class StepResult:
    sums: Sums
    metrics: dict[str, float]
    budget: int  # tokens_per_device in force, smaller than before if memory ran out
    memory: dict[str, float]  # the objective's own numbers after the step


class NonFinite(NumberError):
    """The step was refused: a loss or a gradient is not finite. The weights are as they were."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows  # records of the passes concerned


def optimise(passes: Passes, objective: Objective, optimizer: torch.optim.Optimizer, update: Update) -> StepResult:
    """Make an update. Metrics are of the weights before it.

    NonFinite: a loss or gradient is not finite; nothing was changed.
    NumberError: the objective says that the run's first batch is wrong; nothing was changed.
    MachineError: memory runs out with a single tree in a pass.
    """
    backbone, ranks = passes.backbone, passes.ranks
    roles = backbone.trained_roles
    parameters = {name: p for own in roles.values() for name, p in own.items()}
    counts = objective.counts(update.trees)
    seen = objective.phases(update.trees)[0]
    passes, measured = within_memory(passes, update.trees, lambda fitting: _measure(fitting, objective, seen))
    statistics = _summed(measured, counts, ranks)
    if not all(map(math.isfinite, statistics.means.values())):
        raise _refusal(update.step, statistics.means, {}, measured, {}, ranks)
    given = {**update.memory, **update.given, **statistics.means}
    passes, found = within_memory(
        passes, update.trees, lambda fitting: _backward(fitting, objective, optimizer, update, counts, given)
    )
    first = update.step == 1 and update.number == 0
    if first:
        _check_gradients_exist(backbone, ranks)
    ranks.sum_gradients(parameters.values())
    if (scale := _loss_scale(backbone)) != 1:
        multiply(_gradients(parameters), 1 / scale)
    norms = {role: total_norm(_gradients(own)) for role, own in roles.items()}
    sums = Sums(statistics.totals) + _summed(found, counts, ranks)
    means = sums.means
    try:
        if not all(map(math.isfinite, (*norms.values(), *means.values()))):
            raise _refusal(update.step, means, norms, found, {n: p.grad for n, p in parameters.items()}, ranks)
        if first and not backbone.has_dropout and (start_error := objective.start_error(means)):
            raise NumberError(f"step 1: {start_error}; nothing was trained")
        for role, own in roles.items():
            clip(_gradients(own), update.max_grad_norm, norms[role])
        for group in optimizer.param_groups:
            group["lr"] = update.rates[group["role"]]
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    for role in roles:
        suffix = "" if role == objective.role else f"/{role}"
        named = {("grad_norm" + suffix, UPDATES): norms[role], ("learning_rate" + suffix, UPDATES): update.rates[role]}
        sums = Sums(sums.totals | named, sums.counts | {UPDATES: 1})
    return StepResult(sums, objective.metrics(sums.means), passes.budget, objective.remember(update.memory, means))


def _gradients(parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters.values() if p.grad is not None]


EVALUATED = 64
"""Held-out trees that are cut into passes together."""


def evaluate(
    passes: Passes,
    objective: Objective,
    trees: list[Tree],
    *,
    memory: Mapping[str, float] | None = None,
    batch_size: int = EVALUATED,
    pause: Pause = no_pause,
) -> dict[str, float]:
    """The objective's metrics on held-out trees, which are one global batch to its statistics; pauses after each pass."""
    counts = objective.counts(trees)
    seen, parts = objective.phases(trees)
    statistics = _summed(_measure(passes, objective, seen, pause), counts, passes.ranks).means
    given = {**(memory or {}), **statistics}
    found: list[_Pass] = []
    for learned in parts:
        for batch in _in_turn(passes, learned, batch_size):
            with torch.no_grad():
                found.append(_run_pass(passes.backbone, objective, batch, learned, counts, given, 0.0))
            pause()
    return objective.metrics(statistics | _summed(found, counts, passes.ranks).means)


@dataclass(frozen=True)
class _Pass:
    sums: dict[tuple[str, str], torch.Tensor]  # (metric, unit) → sum
    rows: tuple[int, ...]  # the records of its trees


def _measure(passes: Passes, objective: Objective, trees: list[Tree], pause: Pause = no_pause) -> list[_Pass]:
    """The objective's statistics, pass by pass, with dropout off."""
    passes.backbone.train(False)
    measured: list[_Pass] = []
    for batch in _in_turn(passes, trees, EVALUATED):
        with torch.no_grad():
            sums = objective.statistics(passes.backbone, batch)
        found = {(name, unit): value.detach().double() for name, (value, unit) in sums.items()}
        measured.append(_Pass(found, tuple(trees[tree].row for tree in batch.trees)))
        pause()
    return measured


def _in_turn(passes: Passes, trees: list[Tree], size: int) -> Iterator[Batch]:
    """Passes over so many trees at a time; a batch names them by their places among all."""
    for start in range(0, len(trees), size):
        for batch in passes.over(trees[start : start + size]):
            yield replace(batch, trees=tuple(start + tree for tree in batch.trees))


def _backward(
    passes: Passes,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    update: Update,
    counts: dict[str, float],
    given: Mapping[str, float],
) -> list[_Pass]:
    """All passes of an update forward and backward, on this rank. Dropout is on for these, and off elsewhere."""
    backbone, ranks = passes.backbone, passes.ranks
    optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(Stream.DROPOUT.seed(update.seed, update.step, update.number, ranks.rank))
    backbone.train(True)
    try:
        return [
            _run_pass(backbone, objective, batch, trees, counts, given, _loss_scale(backbone))
            for trees in objective.phases(update.trees)[1]
            for batch in passes.over(trees)
        ]
    finally:
        backbone.train(False)


def _run_pass(
    backbone: Backbone,
    objective: Objective,
    batch: Batch,
    trees: Sequence[Tree],
    counts: dict[str, float],
    given: Mapping[str, float],
    scale: float,
) -> _Pass:
    """Forward one pass and, with a scale, each of its terms backward before the next; the division is here and nowhere else."""
    sums: dict[tuple[str, str], torch.Tensor] = {}
    several = len({role for host in backbone.hosts for role in host.trained}) > 1
    for term in objective.terms(backbone, batch, given):
        if scale:
            torch.stack([loss * (scale / max(1, counts[unit])) for unit, loss in term.losses.items()]).sum().backward()  # type: ignore[no-untyped-call]
        found = {("loss", unit): loss for unit, loss in term.losses.items()}
        found |= {(name, unit): value for name, (value, unit) in term.sums.items()}
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value.detach().double()
        if scale and batch.tokens > LONG_PASS and backbone.device.type == "cpu" and several:
            return_freed()
    return _Pass(sums, tuple(trees[tree].row for tree in batch.trees))


def _summed(passes: Sequence[_Pass], counts: dict[str, float], ranks: Ranks) -> Sums:
    """Sums over all passes and ranks. Ranks without a pass learn the names from the others."""
    mine: dict[tuple[str, str], float] = {}
    found = [(key, value) for p in passes for key, value in p.sums.items()]
    # Read at once: the device is waited for a single time.
    for (key, _), value in zip(found, torch.stack([value for _, value in found]).tolist() if found else [], strict=True):
        mine[key] = mine.get(key, 0.0) + value
    keys = sorted({key for keys in ranks.gather(list(mine)) for key in keys})
    totals = ranks.sum(mine.get(key, 0.0) for key in keys)
    return Sums(dict(zip(keys, totals, strict=True)), counts)


def _loss_scale(backbone: Backbone) -> float:
    return FLOAT16_LOSS_SCALE if backbone.compute_dtype == torch.float16 else 1.0


def within_memory(passes: Passes, trees: Sequence[Tree], run: Callable[[Passes], T]) -> tuple[Passes, T]:
    """What `run` gives for `trees`, after the passes that it fitted in: their budget is halved whenever memory runs out.

    `run` works on this rank alone. Where memory runs out on one of several, all of them do their share again.

    MachineError: memory runs out with a single tree in a pass.
    """
    while True:
        result: list[T] = []
        shards = passes.backbone.shards
        if shards is not None:
            shards.sharding.begin()
        try:
            result.append(run(passes))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        Siblings.waiting = None
        # Out here the error, and with it the pass's tensors, is gone.
        if shards is not None and not result:
            for host in passes.backbone.hosts:
                host.rest()
            shards.sharding.finish(partial(run, passes))
        if not passes.ranks.any(not result):
            return passes, result[0]
        budget, longest = passes.budget, max(map(tree_length, trees))
        if budget <= longest:
            raise MachineError(
                f"out of memory with one tree of {longest} tokens in the pass; set train.tokens_per_device below {budget}, "
                "shorten data.max_length or set model.gradient_checkpointing: true"
            )
        passes = passes.at_most(max(budget // 2, 1))
        empty_cache(passes.backbone.device)


def _check_gradients_exist(backbone: Backbone, ranks: Ranks) -> None:
    """After the first backward every adapter tensor has a gradient, and no frozen one has any."""
    trained = backbone.trained_parameters()
    needed = (name for name in trained if ".lora_" in name or ".score." in name)
    lost = [name for name in needed if trained[name].grad is None]
    every = [pair for host in backbone.hosts for pair in host.model.named_parameters()]
    leaked = [name for name, p in every if p.grad is not None and name not in trained]
    if ranks.size == 1 and lost:
        raise NumberError(f"step 1: {len(lost)} trained tensors have no gradient, the first is {lost[0]}; nothing was trained")
    if leaked:
        raise NumberError(f"step 1: {len(leaked)} frozen tensors have a gradient, the first is {leaked[0]}; nothing was trained")


def _refusal(
    step: int,
    means: Mapping[str, float],
    norms: Mapping[str, float],
    passes: list[_Pass],
    gradients: dict[str, torch.Tensor | None],
    ranks: Ranks,
) -> NonFinite:
    rows = [row for p in passes if not all(math.isfinite(float(v)) for v in p.sums.values()) for row in p.rows]
    tensor = next((n for n, g in gradients.items() if g is not None and not torch.isfinite(local(g)).all()), None)
    suspects = sorted({row for share in ranks.gather(rows) for row in share})
    broken = sorted((name for name, value in means.items() if not math.isfinite(value)), key=lambda name: name != "loss")
    norm = next((norm for norm in norms.values() if not math.isfinite(norm)), math.nan)
    where = f" (first in {tensor})" if tensor else ", of gradients that are finite each"
    what = f"the {broken[0]} is {means[broken[0]]}" if broken else f"the gradient norm is {norm}{where}"
    return NonFinite(f"step {step}: {what}; the update was refused and the weights are as before it", suspects)
