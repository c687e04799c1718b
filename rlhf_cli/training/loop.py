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

from rlhf_cli import sections
from rlhf_cli.console import Console, Progress, peak_memory_gib
from rlhf_cli.data.batches import StepBatches, derive_seed, due_steps
from rlhf_cli.data.trees import Tree, tree_length
from rlhf_cli.errors import MachineError, NumberError, RunError, Stopped, UsageError
from rlhf_cli.files import write_json
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.objectives.base import Objective
from rlhf_cli.ranks import Ranks
from rlhf_cli.runs.folder import MetricsLog, RunFolder
from rlhf_cli.signals import StopSignals
from rlhf_cli.training.checkpoint import (
    State,
    checkpoint_path,
    load_state,
    newest_checkpoint,
    prune,
    remove_leftovers,
    restore,
    save_checkpoint,
    set_aside,
)
from rlhf_cli.training.optim import build_optimizer, learning_rate
from rlhf_cli.training.partial_step import PartialStep
from rlhf_cli.training.step import NonFinite, optimise
from rlhf_cli.training.trackers import Trackers
from rlhf_cli.training.watch import KEPT, note_best, reason_to_stop


class BatchSource(Protocol):
    """Where the global batch of every step comes from: data, as a function of the step alone, or the policy itself."""

    @property
    def steps_per_epoch(self) -> int: ...
    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """What `step` learns from."""
        ...


DEALT = 1
"""Tells the seed that deals a step's batch to its updates from the others."""

Samples = Callable[[], list[dict[str, Any]]]
"""Gives the lines for samples.jsonl without their step."""

Measure = Callable[[State], dict[str, float]]
"""Gives the held-out metrics; the state holds the budget and the objective's own numbers."""


@dataclass
class Trainer:
    """One training run: what it is made of, and where it stands."""

    run: RunFolder
    backbone: Backbone
    objective: Objective
    source: BatchSource
    measure: Measure | None  # None: nothing is held out
    sample: Samples
    save_model: Callable[[Path], None]  # writes what is trained, and its tokenizer, into a folder
    train: sections.Train
    steps: int
    seed: int
    budget: int
    ranks: Ranks
    console: Console
    signals: StopSignals
    trackers: Trackers
    learning_rates: dict[str, float] = field(default_factory=dict)  # role → its peak, where it is not the recipe's
    state: State = field(init=False)
    partial: PartialStep | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.state = State(0, -1, 0, 0.0, 0.0, self.budget, 0, 0, {}, None, None, self.steps, self.budget)
        self.optimizer = build_optimizer(self.backbone.trained_roles, self.train)

    def resume(self) -> None:
        """Take up the newest intact checkpoint, if there is one; leftovers of a killed process are cleared."""
        checkpoint: Path | None = None
        if self.ranks.main:
            remove_leftovers(self.run.checkpoints)
            checkpoint, damaged = newest_checkpoint(self.run.checkpoints)
            for path in damaged:
                self.console.warn(f"{path} is damaged; it is set aside as {set_aside(path).name} and the one before it is used")
        checkpoint = self.ranks.gather(checkpoint)[0]
        if checkpoint is None:
            return
        self.state = load_state(checkpoint)
        self.partial = restore(checkpoint, self.backbone, self.objective.role, self.optimizer)
        within = f" and {self.partial.updates} updates of the next" if self.partial and self.partial.updates else ""
        self.console.say(f"resuming after step {self.state.step}{within} from {checkpoint}")
        self._take_up_changes()

    def _take_up_changes(self) -> None:
        """What a resumed run may change: the budget, where the recipe names another, and the number of steps."""
        done, planned = self.state.step, self.state.planned
        if any(learning_rate(self.train, k, planned) != learning_rate(self.train, k, self.steps) for k in range(1, done + 1)):
            self.console.warn(
                f"steps 1 to {done} followed the learning rates of a run of {planned} steps: "
                f"the result is not that of a run of {self.steps} steps from the start"
            )
        budget = self.state.budget if self.state.asked == self.budget else self.budget
        self._advance(planned=self.steps, budget=budget, asked=self.budget)

    @property
    def status(self) -> str:
        """How the run ended: "finished", or the rule that stopped it early."""
        return "finished" if self.state.stopped_by is None else f"stopped: {self.state.stopped_by}"

    def go(self) -> None:
        """Train to the end, or until a rule of stop_if ends the run.

        Raises:
            Stopped: a signal arrived; a checkpoint was written.
            NumberError: a step was refused; the batch is in failed/.
        """
        self.signals.defer(alone=self.ranks.size == 1)
        self._open_logs()
        evals, saves = due_steps(self.train.eval_every, self.steps), due_steps(self.train.save_every, self.steps)
        with self.console.progress(self.steps, self.train.log_every) as progress:
            try:
                self._look(progress, {0} | evals)
                if self.state.best_step == self.state.step and self._is_unsaved():
                    self._save()
                while self.state.step < self.steps and self.state.stopped_by is None:
                    self._step(progress)
                    self._look(progress, evals)
                    if self.state.step in saves | {self.state.best_step} or self.state.stopped_by is not None:
                        self._save()
                    self._obey_signal()
            except Stopped as stopped:
                if self._is_unsaved():
                    self._save()
                updates = self.partial.updates if self.partial else 0
                within = f"in step {self.state.step + 1} of {self.steps}, after {updates} of its updates"
                done = within if updates else f"after step {self.state.step} of {self.steps}"
                raise Stopped(f"stopped {done}; continue with --resume", stopped.number) from stopped

    def _open_logs(self) -> None:
        if self.ranks.main:
            self.metrics, self.samples = MetricsLog(self.run.metrics), MetricsLog(self.run.samples)
            self.metrics.truncate_after(self.state.metrics_bytes)
            self.samples.truncate_after(self.state.samples_bytes)

    def _step(self, progress: Progress) -> None:
        """All updates of the next step. A signal between two of them ends the run with what is done saved."""
        step = self.state.step + 1
        started = time.monotonic() - (self.partial.seconds if self.partial else 0.0)
        partial = self._begin(step)
        ready = time.monotonic()
        trees = partial.draw.batches[step - partial.draw.first]
        # Responses that are all tied teach nothing; an update without a gradient would still move weights by its momentum.
        updates = self.objective.updates(trees, derive_seed(self.seed, step, DEALT)) if trees else []
        while partial.updates < len(updates):
            partial = self._update(step, partial, updates[partial.updates], started)
            if partial.updates < len(updates):
                self._obey_signal()
        seconds = time.monotonic() - started
        tokens = sum(map(tree_length, trees))
        if not updates:
            self.console.warn(f"step {step}: the responses of every prompt are tied; nothing was learned")
        learned = self.objective.metrics(partial.sums.means | partial.first) if updates else {"loss": 0.0}
        metrics = learned | {
            "tokens": self.state.tokens + tokens,
            "tokens_per_second": tokens / seconds,
            "epoch": step / self.source.steps_per_epoch,
        }
        if partial.draw.first == step and partial.draw.metrics:
            metrics |= partial.draw.metrics | {"time/update": time.monotonic() - ready}
        self._advance(step=step, tokens=self.state.tokens + tokens, seconds=self.state.seconds + seconds)
        self.partial = PartialStep(partial.draw) if partial.draw.serves(step + 1) else None
        self._log("train", metrics)
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        progress.update(step, self.steps, metrics, memory)
        self._watch("train", metrics)

    def _begin(self, step: int) -> PartialStep:
        """What is known of the step: a batch that was drawn for it before, or one that is drawn now."""
        if self.partial is None:
            try:
                draw = self.source.collect(step, self.state.memory)
            except (UsageError, NumberError, MachineError) as error:
                raise self._kept(error, f"step {step}") from error
            self.partial = PartialStep(draw)
            self._advance(memory=draw.memory)
            self._obey_signal()
        return self.partial

    def _kept(self, error: RunError, when: str) -> RunError:
        """What responses that cannot be drawn or judged end a run with: nothing of what was trained is lost."""
        if not self.state.step or error.one_rank:
            return error
        if self._is_unsaved():
            self._save()
        kind = MachineError if isinstance(error, MachineError) else NumberError
        return kind(f"{when} (what was trained before is saved): {error}")

    def _update(self, step: int, partial: PartialStep, trees: list[Tree], started: float) -> PartialStep:
        peak = self.train.learning_rate or 0.0
        peaks = {role: self.learning_rates.get(role, peak) for role in self.backbone.trained_roles}
        rates = {role: learning_rate(self.train, step, self.steps, own) for role, own in peaks.items()}
        try:
            result = optimise(
                self.backbone,
                self.objective,
                self.optimizer,
                trees,
                step=step,
                seed=self.seed,
                rates=rates,
                max_grad_norm=self.train.max_grad_norm,
                budget=self.state.budget,
                ranks=self.ranks,
                memory=self.state.memory,
                given=partial.draw.given,
                update=partial.updates,
            )
        except NonFinite as error:
            raise self._keep_evidence(error, step, partial.draw) from error
        if result.budget != self.state.budget:
            self.console.warn(
                f"step {step}: out of memory; replayed with tokens_per_device {result.budget}, the result is the same"
            )
        means = result.sums.means
        first = partial.first if partial.updates else {name: means[name] for name in self.objective.of_first_update}
        self._advance(budget=result.budget, memory=result.memory)
        sums = partial.sums + result.sums
        self.partial = PartialStep(partial.draw, partial.updates + 1, sums, first, time.monotonic() - started)
        return self.partial

    def _look(self, progress: Progress, due: set[int] | frozenset[int]) -> None:
        """Held-out figures and samples of the weights after this step, if they are due and not yet in the logs."""
        if self.state.step not in due or self.state.evaluated >= self.state.step:
            return
        started = time.monotonic()
        try:
            metrics = self.measure(self.state) if self.measure is not None else {}
        except (UsageError, NumberError, MachineError) as error:
            raise self._kept(error, f"held-out responses after step {self.state.step}") from error
        lines = self.sample() if self.ranks.main else []
        self.ranks.barrier()
        if metrics:
            self._log("eval", metrics)
            progress.evaluated(self.state.step, metrics)
        if self.ranks.main:
            for line in lines:
                self.samples.append({"step": self.state.step} | line)
        self._advance(evaluated=self.state.step, seconds=self.state.seconds + time.monotonic() - started)
        self._watch("eval", metrics)

    def _log(self, split: str, metrics: dict[str, float]) -> None:
        if self.ranks.main:
            self.metrics.append({"step": self.state.step, "split": split, "time": round(time.time(), 3)} | metrics)
            self.trackers.log({f"{split}/{name}": value for name, value in metrics.items()}, self.state.step)

    def _watch(self, split: str, metrics: dict[str, float]) -> None:
        """Note the best values; a new best checkpoint is saved by the loop once this step's figures are in the logs."""
        before = self.state.best
        best = note_best(before, split, metrics, self.train)
        self._advance(best=best, stopped_by=self.state.stopped_by or reason_to_stop(self.train.stop_if, split, metrics, best))
        if best.get(KEPT) != before.get(KEPT):
            self._advance(best_step=self.state.step)

    def _advance(self, **changes: Any) -> None:
        self.state = dataclasses.replace(self.state, **changes)

    def _save(self) -> None:
        """A checkpoint of this step.

        Raises:
            NumberError: a trained weight is not finite; nothing is written.
        """
        broken = [name for name, p in self.backbone.trained_parameters().items() if not torch.isfinite(p).all()]
        if broken:
            raise NumberError(f"step {self.state.step}: {broken[0]} is not finite after the update; no checkpoint is written")
        if self.ranks.main:
            self._advance(peak_memory=max(self.state.peak_memory, peak_memory()))
            self._advance(metrics_bytes=self.metrics.sync(), samples_bytes=self.samples.sync())
            save_checkpoint(
                self.run.checkpoints,
                self.backbone,
                self.objective.role,
                self.save_model,
                self.optimizer,
                self.state,
                self.partial,
            )
            prune(self.run.checkpoints, self.train.keep_checkpoints, self.state.best_step)
        self.ranks.barrier()

    def _is_unsaved(self) -> bool:
        """As rank 0 sees it, for all: saving is a joint affair."""
        updates = self.partial.updates if self.partial else 0
        path = checkpoint_path(self.run.checkpoints, self.state.step, updates)
        return self.ranks.any(self.ranks.main and not path.exists())

    def _obey_signal(self) -> None:
        """Raises Stopped on all ranks if a signal is here on one."""
        received = max(s or 0 for s in self.ranks.gather(self.signals.received))
        if received:
            raise Stopped("", received)

    def _keep_evidence(self, error: NonFinite, step: int, draw: StepBatches) -> NumberError:
        """Save the refused batch, and the state before it where no checkpoint has it yet."""
        with contextlib.suppress(NumberError):
            if self.state.step and self._is_unsaved():
                self._save()
        trees, rows = draw.batches[step - draw.first], draw.locations[step - draw.first]
        suspects = [where for where, tree in zip(rows, trees, strict=True) if tree.row in error.rows]
        path: Path = self.run.path / "failed" / f"step-{step:08d}.json"
        if self.ranks.main:
            path.parent.mkdir(exist_ok=True)
            batch = [
                {"row": row, "prompt": tree.prompt.tolist(), "responses": [r.tolist() for r in tree.responses]}
                for row, tree in zip(rows, trees, strict=True)
            ]
            write_json(path, {"step": step, "error": str(error), "suspects": suspects, "batch": batch})
        near = f"rows of the passes concerned: {', '.join(suspects[:5])}" if suspects else "every loss was finite"
        return NumberError(f"{error}\n{near}\nthe batch is in {path}; lower train.learning_rate or look at the rows")


def peak_memory() -> float:
    """GiB: the GPU's allocations where there is one, else this process's resident memory."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_memory_gib()
