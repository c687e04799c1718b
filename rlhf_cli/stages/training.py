"""What every training stage does with its folder and weights, until the manifest is written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli.data.batches import member_seed
from rlhf_cli.data.dataset import data_report
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import MachineError, NumberError, RunError, Stopped, UsageError
from rlhf_cli.files import disk_errors, write_json
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import choose_pad_id
from rlhf_cli.models.load import GENERAL, STEPS, Weights, name_ends
from rlhf_cli.models.memory import is_out_of_memory
from rlhf_cli.models.policy import load_trained
from rlhf_cli.models.sharding import full
from rlhf_cli.models.tokens import untouched
from rlhf_cli.objectives.general import General
from rlhf_cli.objectives.steps import Steps
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.dump import flatten_section
from rlhf_cli.reports.training import write_report
from rlhf_cli.rollout.generate import Request, TransformersEngine
from rlhf_cli.runs.card import write_card
from rlhf_cli.runs.folder import RunFolder, member_folder, open_run
from rlhf_cli.runs.manifest import Parent, build_manifest, final_metrics
from rlhf_cli.runs.parents import merged_base
from rlhf_cli.runs.resume import (
    ATTENTION,
    CHANGED,
    CODE,
    all_changes,
    changed_code,
    finished_steps,
    forget_inputs,
    record_attention,
    record_inputs,
    recorded_attention,
    refuse_other_inputs,
)
from rlhf_cli.stages.prepare import TrainingJob
from rlhf_cli.training.checkpoint import checkpoint_path
from rlhf_cli.training.invariants import check_start
from rlhf_cli.training.loop import BatchSource, Hooks, Measure, Trainer
from rlhf_cli.training.optim import Schedule
from rlhf_cli.training.step import evaluate
from rlhf_cli.training.trackers import check_trackers, start_trackers

FINE = "the recipe and the data are fine; nothing was trained"
"""The last words of --check."""

SHOWN_PROMPTS, SHOWN_TOKENS = 8, 64
"""Samples in samples.jsonl: how many prompts, and how long their greedy continuations may get."""


@contextlib.contextmanager
def open_job(job: TrainingJob, *, check: bool, resume: bool, force: bool) -> Iterator[RunFolder | None]:
    """The locked run folder with the recipe and the inputs recorded in it; None with --check, and if the run is finished."""
    if check:
        job.console.say(FINE)
        yield None
        return
    check_trackers(job.recipe.trackers)
    output, ranks = Path(job.recipe.output), job.ranks
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        inputs = {
            "base": job.base and job.base.weights_hash,
            "base settings": job.base and job.base.settings_hash,
            "template": job.template.hash,
            "parent": job.start.parent and job.start.parent.manifest_hash,
            **job.dataset.fingerprints,
            **job.inputs,
        }
        refuse_apart(ranks, output, inputs)
        done = False
        if resume:
            refuse_other_inputs(folder, job.recipe, inputs)
            done = finished_steps(folder) >= job.steps
        ranks.barrier()
        if done:
            job.console.say(f"{output} is finished: {folder.manifest}")
            yield None
        else:
            fresh = not folder.recipe.exists()
            if ranks.main:
                folder.manifest.unlink(missing_ok=True)  # of a finished run that goes on it would be untrue
                changes = changed_code(folder, job.code)
                for change in changes:
                    hashes = f"{change['from'][:12]} → {change['to'][:12]}"
                    job.console.warn(
                        f"{change['what']} has changed ({hashes}): what the run learned until now followed the old one"
                    )
                code = {CODE: job.code, CHANGED: [*all_changes(folder), *changes], ATTENTION: recorded_attention(folder)}
                record_inputs(folder, job.recipe, job.loaded.stage, inputs | code)
                write_json(folder.data, data_report(job.dataset))
            try:
                yield folder
            except UsageError:
                if ranks.main and fresh and not folder.checkpoints.exists():
                    forget_inputs(folder)  # nothing was trained: the mended recipe may use the same folder
                raise
    ranks.close()


def refuse_apart(ranks: Ranks, output: Path, inputs: Mapping[str, object]) -> None:
    """UsageError: a rank, on another machine perhaps, does not see the folder that rank 0 made, or reads other files."""
    seen = ranks.gather((socket.gethostname(), output.is_dir(), dict(inputs)))
    for rank, (machine, sees, own) in enumerate(seen):
        where = f"rank {rank} on {machine}"
        if not sees:
            raise UsageError(
                f"output: {where} does not see {output}, which rank 0 made: it must be a folder that all machines share"
            )
        if other := [name for name, value in own.items() if value != seen[0][2].get(name)]:
            raise UsageError(f"{where} reads other files than rank 0 under the same paths: {other[0]} differs; copy them anew")


def load_job(job: TrainingJob, folder: RunFolder) -> tuple[Backbone, Weights]:
    """The backbone with the role that the objective trains, its kernel that of an earlier start; and the base of its adapter."""
    recipe, before = job.recipe, job.ranks.gather(recorded_attention(folder))[0]
    kept: Any = before or "auto"
    merged = Path(recipe.output) / "base"
    backbone, base = load_trained(
        dataclasses.replace(recipe.model, attention=kept) if recipe.model.attention == "auto" else recipe.model,
        job.lora,
        job.start,
        device=job.ranks.device,
        seeds={role: member_seed(recipe.seed, member) for member, role in enumerate(job.objective.roles)},
        merged=merged,
        ranks=job.ranks,
        labels=job.objective.width if isinstance(job.objective, General) else 1,
    )
    backbone.pad_id = choose_pad_id(job.tokenizer, backbone.stop_ids(job.tokenizer, job.template))
    kernel = backbone.kernel.name
    job.console.say(f"attention: {kernel}, {backbone.kernel.layout} rows")
    if before not in (None, kernel):
        job.console.warn(f"attention: the run has used {before} until now, which does not work here: the last digits may change")
    if job.ranks.main:
        record_attention(folder, kernel)
    if job.lora and (tokens := _untouched(job, backbone)):
        job.console.warn(
            f"the model has never learned {', '.join(tokens)}, and LoRA leaves embeddings as they are: "
            f"set lora.train_tokens: {json.dumps(tokens, ensure_ascii=False)}, or start from a model that knows its chat template"
        )
    return backbone, base


def _untouched(job: TrainingJob, backbone: Backbone) -> list[str]:
    """Control tokens of the first row whose embeddings look as if they had never been learned, and are not trained now."""
    first, model = job.dataset.train.trees[0], backbone.model
    used = {int(i) for part in (first.prompt, *first.responses) for i in part} - {*(job.lora.train_tokens if job.lora else ())}
    embeddings = [full(model.get_input_embeddings().weight)]
    if job.objective.role == "policy" and not model.config.get_text_config().tie_word_embeddings:
        embeddings.append(full(model.get_output_embeddings().weight))
    return list(job.tokenizer.convert_ids_to_tokens(untouched(embeddings, used & job.tokenizer.added_tokens_decoder.keys())))


@dataclass(frozen=True)
class OnPolicy:
    """How a run learns, where it does not from the responses of its data."""

    source: BatchSource
    measure: Measure | None
    first: list[Tree]  # what the start is checked with
    learning_rates: dict[str, float] = field(default_factory=dict)  # of roles beside the policy


def train_job(
    job: TrainingJob,
    folder: RunFolder,
    backbone: Backbone,
    *,
    sampled: bool = True,
    reference_is_start: bool = False,
    on_policy: OnPolicy | None = None,
    source: BatchSource | None = None,
) -> Trainer:
    """Check what must hold before the first step, then train to the end or to a signal. `source`: by default the job's rows.

    Stopped: a signal arrived; a checkpoint was written.
    NumberError: an invariant is broken, or a step was refused.
    """
    on_policy = on_policy or OnPolicy(source or job.source, _measure(job, backbone), job.source.batch(1))
    trainer = Trainer(
        passes=job.passes(backbone),
        objective=job.objective,
        hooks=Hooks(
            source=on_policy.source,
            measure=on_policy.measure,
            sample=partial(_samples, job, backbone) if sampled else lambda: [],
            save_model=partial(_save_model, job, backbone),
        ),
        schedule=Schedule(job.recipe.train, job.steps, job.recipe.seed, on_policy.learning_rates),
        run=folder,
        console=job.console,
        signals=job.signals,
        trackers=start_trackers(job.recipe, folder.path) if job.ranks.main else None,
    )
    # Updates mend memory that runs out themselves where they can; outside of them it was a check or held-out rows.
    advice = f"outside of a step; set train.tokens_per_device below {job.budget}, then --resume"
    try:
        with ending_together(job.ranks, (Stopped, NumberError), advice):
            # Before a checkpoint is taken up: every process checks the start it was given, also one that goes on later.
            check_start(trainer.passes, job.objective, on_policy.first, reference_is_start=reference_is_start)
            trainer.resume()
            trainer.train()
    finally:
        if trainer.trackers is not None:
            trainer.trackers.end_training()
    return trainer


@contextlib.contextmanager
def ending_together(ranks: Ranks, alike: tuple[type[RunError], ...], advice: str) -> Iterator[None]:
    """Errors that end all ranks `alike` end them in order; `advice` follows "out of memory"."""
    try:
        yield
    except alike as error:
        if not error.one_rank:
            ranks.close()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"out of memory {advice}").on_one_rank() from error


def finish_job(
    job: TrainingJob,
    folder: RunFolder,
    trainer: Trainer,
    base: Weights,
    extra: dict[str, Any] | None = None,
    parents: tuple[Parent, ...] = (),
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Write model, report and, last of all, the manifest.

    parents: runs that were used beside the one it started from; fingerprints: of data beside the job's own.
    """
    job.signals.obey_at_once("after the last step; continue with --resume")
    with trainer.backbone.gathered(job.ranks.main):
        if job.ranks.main:
            if not folder.metrics.exists():
                raise folder.moved.on_one_rank()
            with disk_errors(folder.model):
                trainer.hooks.save_model(folder.model)
    if job.ranks.main:
        described = job.base if base.base == job.start.base else merged_base(base)
        assert described is not None
        usage, lineage = trainer.state.usage, (*((job.start.parent,) if job.start.parent else ()), *parents)
        own = {
            "base_model": dataclasses.asdict(described),
            "parents": [dataclasses.asdict(parent) for parent in lineage],
            "data": job.dataset.fingerprints | dict(fingerprints or {}),
            "chat_template_hash": job.template.hash,
            "steps": trainer.state.step,
            "tokens": usage.tokens,
            "seconds": round(usage.seconds, 3),
            "sampling_seconds": round(usage.sampling_seconds, 3),
            "tokens_per_second": round(usage.tokens / usage.seconds, 1) if usage.seconds else 0.0,
            "peak_memory": round(trainer.peak_memory, 3),
            "final_metrics": final_metrics(folder),
            "objective": flatten_section(job.objective),
            "learning_rate": job.recipe.train.learning_rate,
            "batch_size": job.recipe.train.batch_size,
            "lora": job.lora and dataclasses.asdict(job.lora),
            "best_step": trainer.state.watched.best_step,
            **({"changed_code": changes} if (changes := all_changes(folder)) else {}),
            **(extra or {}),
        }
        with disk_errors(folder.model):
            write_card(folder.model, folder.path, {"stage": job.loaded.stage, **own})
        manifest = build_manifest(folder, job.loaded.stage, trainer.status, job.recipe.seed, own)
        write_report(folder, manifest)
        job.signals.defer()
        write_json(folder.manifest, manifest)  # the last write: the run is finished
    best = trainer.state.watched.best_step
    if best is not None and best != trainer.state.step:
        job.console.say(f"the best checkpoint: {checkpoint_path(folder.checkpoints, best)}")
    sampling = trainer.state.usage.sampling_seconds
    cost = f", {sampling:.0f} s of them for samples" if sampling >= 1 else ""
    job.console.say(f"{trainer.status} in {time.monotonic() - job.started:.0f} s{cost}: {folder.page}")


def _save_model(job: TrainingJob, backbone: Backbone, folder: Path) -> None:
    """What was trained, with its tokenizer and the template it was trained with.

    Of an ensemble each member has a folder in it, and the first is the folder's own model too.
    """
    roles = job.objective.roles
    members = {member_folder(folder, number): role for number, role in enumerate(roles)} if len(roles) > 1 else {}
    job.tokenizer.chat_template = job.template.text
    for own, role in {folder: roles[0], **members}.items():
        backbone.save(role, own)
        job.tokenizer.save_pretrained(str(own))
    if isinstance(job.objective, General):
        write_json(folder / GENERAL, {"tau": job.objective.tau})
    if isinstance(job.objective, Steps):
        write_json(folder / STEPS, {"separator": job.objective.separator})
    if job.objective.role == "policy":
        name_ends(folder, backbone.stop_ids(job.tokenizer, job.template), backbone.model)


def _measure(job: TrainingJob, backbone: Backbone) -> Measure | None:
    """The objective's metrics on the held-out rows."""
    if job.dataset.held_out is None:
        return None
    trees, passes = list(job.dataset.held_out.trees), job.passes(backbone)
    return lambda state: evaluate(
        passes.at_most(state.budget), job.objective, trees, memory=state.memory, pause=job.signals.pause
    )


def _samples(job: TrainingJob, backbone: Backbone) -> list[dict[str, Any]]:
    """Greedy responses to the first held-out prompts, or to the first that are trained on."""
    encoded, records = job.dataset.train, job.dataset.reading.train
    if job.dataset.held_out is not None:
        encoded, records = job.dataset.held_out, job.dataset.reading.held_out
    first: dict[bytes, Tree] = {}  # a prompt may have several rows, and kto splits a row in two
    for tree in encoded.trees:
        if len(first) == SHOWN_PROMPTS:
            break
        if len(tree.prompt):
            first.setdefault(tree.prompt.tobytes(), tree)
    trees = list(first.values())
    if not trees:
        return []
    engine = TransformersEngine(backbone, job.objective.role)
    prompts = [tree.prompt for tree in trees]
    ends = backbone.stop_ids(job.tokenizer, job.template)
    drawn = engine.generate(Request(prompts, range(len(prompts)), 1, SHOWN_TOKENS, 0.0, ends, 0), job.signals.pause)
    lines = []
    for tree, ((ids, ended, _),) in zip(trees, drawn, strict=True):
        record, shown = records[tree.row], ids[: len(ids) - ended]
        response = job.tokenizer.decode(shown.tolist(), skip_special_tokens=True)
        line = {"prompt": record.question, "response": response, "ended": ended, "tokens": len(shown), "where": record.where}
        lines.append(line)
    return lines
