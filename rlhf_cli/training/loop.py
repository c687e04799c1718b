"""The loop every stage shares: step, evaluate, sample, save; stop and resume at any point between."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf_cli.console import Console, Progress, peak_memory_gib
from rlhf_cli.data.batches import StepBatches, due_steps
from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Tree, tree_length
from rlhf_cli.errors import MachineError, NumberError, RunError, Stopped, UsageError
from rlhf_cli.files import write_json
from rlhf_cli.metrics import LOGP_GAP, MOST_GAP, REDRAWN, ZERO_SPREAD
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.sharding import local
from rlhf_cli.objectives.base import Objective
from rlhf_cli.runs.folder import MetricsLog, RunFolder
from rlhf_cli.signals import StopSignals
from rlhf_cli.training.checkpoint import (
    LogSizes,
    State,
    checkpoint_path,
    load_state,
    newest_checkpoint,
    prune,
    restore,
    save_checkpoint,
    set_aside,
)
from rlhf_cli.training.optim import Schedule, build_optimizer, learning_rate, optimizer_state
from rlhf_cli.training.partial_step import PartialStep
from rlhf_cli.training.step import NonFinite, Update, optimise


class BatchSource(Protocol):
    """Where the global batch of every step comes from: data, as a function of the step alone, or the policy itself."""

    @property
    def steps_per_epoch(self) -> int: ...
    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """What `step` learns from."""
        ...


SAMPLES_SHARE = 0.1
"""Of a run's time that samples may have taken when more are drawn; at its first and its last look they always are."""

Measure = Callable[[State], dict[str, float]]
"""Gives the held-out metrics; the state holds the budget and the objective's own numbers."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, and a stage decides."""

    source: BatchSource
    measure: Measure | None  # None: nothing is held out
    sample: Callable[[], list[dict[str, Any]]]  # gives the lines for samples.jsonl without their step
    save_model: Callable[[Path], None]  # writes what is trained, and its tokenizer, into a folder


@dataclass
class Trainer:
    """One training run: what it is made of, and where it stands."""

    passes: Passes  # their budget is the recipe's; that of the state is in force
    objective: Objective
    hooks: Hooks
    schedule: Schedule
    run: RunFolder
    console: Console
    signals: StopSignals
    trackers: Any  # accelerate's, None where nothing is tracked
    state: State = field(init=False)
    partial: PartialStep | None = field(init=False, default=None)
    told_of_ties: bool = field(init=False, default=False)
    told_of_gap: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.backbone, self.ranks = self.passes.backbone, self.passes.ranks
        self.settings, self.steps = self.schedule.settings, self.schedule.steps
        self.state = State(planned=self.steps, budget=self.passes.budget, asked=self.passes.budget)
        self.optimizer = build_optimizer(self.backbone.trained_roles, self.settings)

    def resume(self) -> None:
        """Take up the newest intact checkpoint, if there is one."""
        checkpoint: Path | None = None
        if self.ranks.main:
            checkpoint, damaged = newest_checkpoint(self.run.checkpoints)
            for path in damaged:
                self.console.warn(f"{path} is damaged; it is set aside as {set_aside(path).name} and the one before it is used")
        checkpoint = self.ranks.gather(checkpoint)[0]
        if checkpoint is None:
            if self.run.metrics.exists() and self.run.metrics.stat().st_size:
                self.console.warn(f"{self.run.checkpoints} has no checkpoint: the run begins anew, and its logs with it")
            return
        self.state = load_state(checkpoint)
        self.partial = restore(checkpoint, self.backbone, self.objective.roles, self.optimizer)
        within = f" and {self.partial.updates} updates of the next" if self.partial and self.partial.updates else ""
        self.console.say(f"resuming after step {self.state.step}{within} from {checkpoint}")
        # What a resumed run may change: the budget, where the recipe names another, and the number of steps.
        done, planned = self.state.step, self.state.planned
        rates = [[learning_rate(self.settings, k, steps) for k in range(1, done + 1)] for steps in (planned, self.steps)]
        if rates[0] != rates[1]:
            self.console.warn(
                f"steps 1 to {done} followed the learning rates of a run of {planned} steps: "
                f"the result is not that of a run of {self.steps} steps from the start"
            )
        asked = self.passes.budget
        self._advance(planned=self.steps, budget=self.state.budget if self.state.asked == asked else asked, asked=asked)

    @property
    def status(self) -> str:
        """How the run ended: "finished", or the rule that stopped it early."""
        stopped_by = self.state.watched.stopped_by
        return "finished" if stopped_by is None else f"stopped: {stopped_by}"

    def train(self) -> None:
        """Train to the end, or until a rule of stop_if ends the run.

        Stopped: a signal arrived; a checkpoint was written.
        NumberError: a step was refused; the batch is in failed/.
        """
        self.signals.defer(alone=self.ranks.size == 1)
        if self.ranks.main:
            logs = self.state.logs
            self.metrics = self._take_up(self.run.metrics, logs.metrics_bytes, logs.metrics_hash)
            self.samples = self._take_up(self.run.samples, logs.samples_bytes, logs.samples_hash)
        with self.console.progress(self.steps, self.settings.log_every) as progress:
            try:
                self._train(progress)
            except Stopped as stopped:
                if self._is_unsaved():
                    self._save()
                updates = self.partial.updates if self.partial else 0
                within = f"in step {self.state.step + 1} of {self.steps}, after {updates} of its updates"
                done = within if updates else f"after step {self.state.step} of {self.steps}"
                raise Stopped(f"stopped {done}; continue with --resume", stopped.number) from stopped

    def _take_up(self, path: Path, size: int, digest: str | None) -> MetricsLog:
        """The log as the checkpoint knew it; one that has been changed since is set aside, and another begins."""
        log = MetricsLog(path)
        if log.truncate_after(size, digest):
            return log
        log.close()
        aside = path.rename(path.with_name(f"damaged-{path.name}"))
        self.console.warn(
            f"{path} is not what the checkpoint was written with; it is set aside as {aside.name}, and another begins"
        )
        return MetricsLog(path)

    def _train(self, progress: Progress) -> None:
        evals, saves = (due_steps(every, self.steps) for every in (self.settings.eval_every, self.settings.save_every))
        self._evaluate(progress, {0} | evals)
        if self.state.watched.best_step == self.state.step and self._is_unsaved():
            self._save()
        while self.state.step < self.steps and self.state.watched.stopped_by is None:
            self._step(progress)
            self._evaluate(progress, evals)
            if self.state.step in saves | {self.state.watched.best_step} or self.state.watched.stopped_by is not None:
                self._save()
            self._obey_signal()

    def _step(self, progress: Progress) -> None:
        """All updates of the next step. A signal between two of them ends the run with what is done saved."""
        step = self.state.step + 1
        started = time.monotonic() - (self.partial.seconds if self.partial else 0.0)
        partial = self._collect(step)
        ready = time.monotonic()
        batches = partial.batches
        trees = batches.batches[step - batches.first]
        # Responses that are all tied teach nothing; an update without a gradient would still move weights by its momentum.
        updates = self.objective.updates(trees, Stream.UPDATES.seed(self.schedule.seed, step)) if trees else []
        while partial.updates < len(updates):
            partial = self._update(step, partial, updates[partial.updates], started)
            if partial.updates < len(updates):
                self._obey_signal()
        tied = batches.metrics.get(ZERO_SPREAD) == 1 and not batches.metrics.get(REDRAWN)
        if updates and tied and not self.told_of_ties:
            self.told_of_ties = True
            self.console.warn(
                f"step {step}: all responses to a prompt have one score, for every prompt; nothing says which is better"
            )
        if (gap := batches.metrics.get(LOGP_GAP, 0.0)) > MOST_GAP and not self.told_of_gap:
            self.told_of_gap = True
            what = f"{LOGP_GAP} is {gap:.2g}, more than {MOST_GAP}: rollout.engine draws from another policy than this one"
            self.console.warn(f"step {step}: {what}; are base, dtype and adapter the same? ppo has rollout.correction: truncate")
        if not updates:
            self.console.warn(f"step {step}: the responses of every prompt are tied; nothing was learned")
        seconds, tokens, usage = time.monotonic() - started, sum(map(tree_length, trees)), self.state.usage
        metrics = self.objective.metrics(partial.sums.means | partial.first) if updates else {"loss": 0.0}
        metrics = metrics | {
            "tokens": usage.tokens + tokens,
            "tokens_per_second": tokens / seconds,
            "epoch": step / self.hooks.source.steps_per_epoch,
        }
        if batches.first == step and batches.metrics:
            metrics |= batches.metrics | {"time/update": time.monotonic() - ready}
        usage = dataclasses.replace(usage, tokens=usage.tokens + tokens, seconds=usage.seconds + seconds)
        self._advance(step=step, usage=usage)
        self.partial = PartialStep(batches) if batches.serves(step + 1) else None
        self._log("train", metrics)
        progress.update(step, self.steps, metrics, peak_memory())

    def _collect(self, step: int) -> PartialStep:
        """What is known of the step: batches that were made for it before, or those that are made now."""
        if self.partial is None:
            try:
                batches = self.hooks.source.collect(step, self.state.memory)
            except (UsageError, NumberError, MachineError) as error:
                raise self._kept(error, f"step {step}") from error
            self.partial = PartialStep(batches)
            self._advance(memory=batches.memory)
            self._obey_signal()
        return self.partial

    def _kept(self, error: RunError, when: str) -> RunError:
        """What responses that cannot be drawn or scored end a run with: nothing of what was trained is lost."""
        if not self.state.step or error.one_rank:
            return error
        if self._is_unsaved():
            self._save()
        kind = MachineError if isinstance(error, MachineError) else NumberError
        return kind(f"{when} (what was trained before is saved): {error}")

    def _update(self, step: int, partial: PartialStep, trees: list[Tree], started: float) -> PartialStep:
        update = Update(
            step=step,
            trees=trees,
            rates=self.schedule.rates(step, self.backbone.trained_roles),
            max_grad_norm=self.settings.max_grad_norm,
            seed=self.schedule.seed,
            number=partial.updates,
            memory=self.state.memory,
            given=partial.batches.given,
        )
        try:
            result = optimise(self.passes.at_most(self.state.budget), self.objective, self.optimizer, update)
        except NonFinite as error:
            raise self._keep_evidence(error, step, partial.batches) from error
        if result.budget != self.state.budget:
            self.console.warn(
                f"step {step}: out of memory; replayed with tokens_per_device {result.budget}, the result is the same"
            )
        means = result.sums.means
        first = partial.first if partial.updates else {name: means[name] for name in self.objective.of_first_update}
        self._advance(budget=result.budget, memory=result.memory)
        sums = partial.sums + result.sums
        self.partial = PartialStep(partial.batches, partial.updates + 1, sums, first, time.monotonic() - started)
        return self.partial

    def _evaluate(self, progress: Progress, due: set[int] | frozenset[int]) -> None:
        """Held-out figures and samples of the weights after this step, if they are due and not yet in the logs."""
        if self.state.step not in due or self.state.evaluated >= self.state.step:
            return
        started, usage = time.monotonic(), self.state.usage
        try:
            metrics = self.hooks.measure(self.state) if self.hooks.measure is not None else {}
        except (UsageError, NumberError, MachineError) as error:
            raise self._kept(error, f"held-out responses after step {self.state.step}") from error
        sampling = 0.0
        last = self.state.step == self.steps or self.state.watched.stopped_by is not None
        if self.ranks.gather(last or usage.sampling_seconds <= SAMPLES_SHARE * usage.seconds)[0]:
            asked = time.monotonic()
            with self.backbone.whole():
                for line in self.hooks.sample() if self.ranks.main else ():
                    self.samples.append({"step": self.state.step} | line)
            sampling = time.monotonic() - asked
        self.ranks.barrier()
        usage = dataclasses.replace(
            usage, seconds=usage.seconds + time.monotonic() - started, sampling_seconds=usage.sampling_seconds + sampling
        )
        self._advance(evaluated=self.state.step, usage=usage)
        if metrics:
            self._log("eval", metrics)
            progress.evaluated(self.state.step, metrics)

    def _log(self, split: str, metrics: dict[str, float]) -> None:
        """Write a line and note its best values; a new best checkpoint is saved by the loop once all of the step is logged."""
        if self.ranks.main:
            self.metrics.append({"step": self.state.step, "split": split, "time": round(time.time(), 3)} | metrics)
            if self.trackers is not None:
                self.trackers.log({f"{split}/{name}": value for name, value in metrics.items()}, step=self.state.step)
        self._advance(watched=self.state.watched.with_line(self.state.step, split, metrics, self.settings))

    def _advance(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)

    def _save(self) -> None:
        """A checkpoint of this step.

        NumberError: a trained weight is not finite; nothing is written.
        """
        parameters = self.backbone.trained_parameters()
        found = [name for name, p in parameters.items() if not torch.isfinite(local(p)).all()]
        if broken := [name for names in self.ranks.gather(found) for name in names]:
            raise NumberError(f"step {self.state.step}: {broken[0]} is not finite after the update; no checkpoint is written")
        optimizer = optimizer_state(self.optimizer, parameters)
        with self.backbone.gathered(self.ranks.main):
            if self.ranks.main:
                self._write(optimizer)
        self.ranks.barrier()

    def _write(self, optimizer: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
        if not self.metrics.is_in_place():
            raise self.run.moved.on_one_rank()
        usage = dataclasses.replace(self.state.usage, peak_memory=self.peak_memory)
        (size, digest), (samples_size, samples_digest) = self.metrics.sync(), self.samples.sync()
        self._advance(usage=usage, logs=LogSizes(size, samples_size, digest, samples_digest))
        save_checkpoint(
            self.run.checkpoints,
            self.backbone,
            self.objective.roles,
            self.hooks.save_model,
            optimizer,
            self.state,
            self.partial,
        )
        prune(self.run.checkpoints, self.settings.keep_checkpoints, self.state.watched.best_step)

    def _is_unsaved(self) -> bool:
        """As rank 0 sees it, for all: saving is a joint affair."""
        updates = self.partial.updates if self.partial else 0
        path = checkpoint_path(self.run.checkpoints, self.state.step, updates)
        return self.ranks.any(self.ranks.main and not path.exists())

    def _obey_signal(self) -> None:
        """Raises Stopped on all ranks if a signal is here on one."""
        if received := max(s or 0 for s in self.ranks.gather(self.signals.received)):
            raise Stopped("", received)

    def _keep_evidence(self, error: NonFinite, step: int, batches: StepBatches) -> NumberError:
        """Save the refused batch, and the state before it where no checkpoint has it yet."""
        with contextlib.suppress(NumberError):
            if self.state.step and self._is_unsaved():
                self._save()
        trees, rows = batches.batches[step - batches.first], batches.locations[step - batches.first]
        suspects = [where for where, tree in zip(rows, trees, strict=True) if tree.row in error.rows]
        path: Path = self.run.failed / f"step-{step:08d}.json"
        if self.ranks.main:
            path.parent.mkdir(exist_ok=True)
            batch = [
                {"row": row, "prompt": tree.prompt.tolist(), "responses": [r.tolist() for r in tree.responses]}
                for row, tree in zip(rows, trees, strict=True)
            ]
            write_json(path, {"step": step, "error": str(error), "suspects": suspects, "batch": batch})
        near = f"rows of the passes concerned: {', '.join(suspects[:5])}" if suspects else "every loss was finite"
        return NumberError(f"{error}\n{near}\nthe batch is in {path}; lower train.learning_rate or look at the rows")

    @property
    def peak_memory(self) -> float:
        """GiB, of every process so far."""
        return max(self.state.usage.peak_memory, peak_memory())


def peak_memory() -> float:
    """GiB: the GPU's allocations where there is one (of Apple's those of now), else this process's resident memory."""
    if torch.backends.mps.is_available():
        return max(torch.mps.driver_allocated_memory() / 2**30, peak_memory_gib())
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_memory_gib()
