"""What every training stage does before its weights are loaded, and once they are trained."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.batches import DatasetSource, total_steps
from rlhf_cli.data.dataset import Dataset, data_report, prepare, question
from rlhf_cli.data.detect import Purpose
from rlhf_cli.data.encode import show_example
from rlhf_cli.data.formats import PROMPTS
from rlhf_cli.data.sources import RowRequest
from rlhf_cli.data.templates import Template, choose_template
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import MachineError, NumberError, Stopped, UsageError
from rlhf_cli.files import disk_errors, write_json
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import choose_pad_id
from rlhf_cli.models.load import load_config, load_tokenizer, quiet_libraries, resolve_dtype
from rlhf_cli.models.memory import Memory, auto_budget, estimate, is_out_of_memory
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.policy import load_trained, parent_lora, resolve_lora
from rlhf_cli.models.sampling import stop_ids
from rlhf_cli.objectives.base import Objective
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.dump import flatten_section
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.stages import ROW_USES, TRAINING_STAGES, learning_rate_of
from rlhf_cli.reports.training import write_report
from rlhf_cli.rollout.generate import Request, TransformersEngine
from rlhf_cli.runs.folder import RunFolder, open_run
from rlhf_cli.runs.manifest import BaseModel, Outcome, Parent, build_manifest, write_manifest
from rlhf_cli.runs.parents import Start, base_model, resolve_start
from rlhf_cli.runs.resume import finished_steps, forget_inputs, record_inputs, recorded_budget, refuse_other_inputs, reopen
from rlhf_cli.signals import StopSignals
from rlhf_cli.stages.plan import learning_rate_warning, plan
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


@dataclass(frozen=True)
class TrainingJob:
    """A run before its weights are loaded: its data, and the recipe with every `auto` replaced by the value in force."""

    loaded: Loaded
    recipe: recipes.TrainingRecipe
    objective: Objective
    lora: sections.Lora | None
    memory: Memory
    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    tokenizer: Any
    template: Template
    dataset: Dataset
    source: DatasetSource
    steps: int
    ranks: Ranks
    console: Console
    signals: StopSignals
    started: float
    inputs: dict[str, str] = field(default_factory=dict)  # what else a resumed run must have in common

    @property
    def budget(self) -> int:
        return int(self.recipe.train.tokens_per_device)

    def passes(self, backbone: Backbone) -> Passes:
        return Passes(backbone, self.budget, self.ranks)


def prepare_job(
    loaded: Loaded,
    *,
    check: bool,
    resume: bool,
    shape: Callable[[Dataset, recipes.TrainingRecipe], tuple[Dataset, Objective]] | None = None,
) -> TrainingJob:
    """Read and tokenise the data, settle every value, and show the plan.

    Where responses are drawn from the policy, the trees are prompts alone. `shape`: gives the
    trees another form, and the objective what it has to know of them.

    Raises:
        UsageError: the recipe, the data or what `model.path` names is wrong.
    """
    signals = StopSignals()
    signals.install()
    quiet_libraries()
    started = time.monotonic()
    recipe, where = loaded.recipe, loaded.where
    assert isinstance(recipe, recipes.TrainingRecipe)
    console, stage = Console(os.environ.get("RANK", "0") == "0"), TRAINING_STAGES[loaded.stage]
    start = resolve_start(recipe.model.path, recipe.model.revision, loaded.named("model.path"), stage.parents)
    tokenizer = load_tokenizer(start.tokenizer, start.revision, recipe.model.trust_remote_code)
    template = choose_template(tokenizer, recipe.model.chat_template)
    _check_template(recipe, start, template, loaded)
    objective, draws = recipe.objective, recipe.draws
    dataset = prepare(recipe.data, row_request(recipe, where), tokenizer, template)
    if shape is not None:
        dataset, objective = shape(dataset, recipe)
    elif draws:
        objective = objective.with_class_counts(1, 1)  # of every prompt one desirable response and one undesirable
    source = dataset.source(recipe.train, recipe.data, recipe.seed)
    steps = total_steps(recipe.train.epochs, recipe.train.steps, source.steps_per_epoch)
    ranks = Ranks(expected=not check)
    if resume and recipe.train.tokens_per_device == "auto" and (budget := recorded_budget(RunFolder(Path(recipe.output)))):
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, tokens_per_device=budget))
    lora, memory, recipe = _resolve(recipe, objective, start, dataset, ranks, loaded)
    base = base_model(start) if not check or Path(start.base).exists() else None
    job = TrainingJob(
        loaded,
        recipe,
        objective,
        lora,
        memory,
        start,
        base,
        tokenizer,
        template,
        dataset,
        source,
        steps,
        ranks,
        console,
        signals,
        started,
    )
    console.plan(plan(recipe, dataset, source, steps, memory, job.budget, _facts(job)))
    console.example(show_example(source.batch(1)[0], tokenizer), _example_words(recipe))
    for message in _warnings(job):
        console.warn(message)
    return job


def row_request(recipe: recipes.TrainingRecipe, where: Callable[[str], str]) -> RowRequest:
    """What the run asks of its rows: all that its objective needs or, where responses are drawn, prompts."""
    objective, draws = recipe.objective, recipe.draws
    if draws:
        return RowRequest(Purpose(recipe.stage, PROMPTS, ROW_USES), recipe.seed, where, reserve=draws.max_new_tokens)
    purpose = Purpose(recipe.stage, objective.rows, ROW_USES)
    return RowRequest(purpose, recipe.seed, where, margin_column=objective.margin_from, check=objective.check_tree)


@contextlib.contextmanager
def open_job(job: TrainingJob, *, resume: bool, force: bool) -> Iterator[RunFolder | None]:
    """The locked run folder with the recipe and the inputs recorded in it; None if the run is finished."""
    check_trackers(job.recipe.trackers)
    output, ranks = Path(job.recipe.output), job.ranks
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        inputs = {
            "base": job.base and job.base.weights_hash,
            "template": job.template.hash,
            "parent": job.start.parent and job.start.parent.manifest_hash,
            **job.dataset.fingerprints,
            **job.inputs,
        }
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
                reopen(folder)
                record_inputs(folder, job.recipe, job.loaded.stage, inputs)
                write_json(folder.data, data_report(job.dataset))
            try:
                yield folder
            except UsageError:
                if ranks.main and fresh and not folder.checkpoints.exists():
                    forget_inputs(folder)  # nothing was trained: the mended recipe may use the same folder
                raise
    ranks.close()


def load_job(job: TrainingJob) -> tuple[Backbone, str]:
    """The backbone with the role that the objective trains, and the base its adapter sits on."""
    recipe, start = job.recipe, job.start
    backbone, base = load_trained(
        recipe.model,
        job.lora,
        start.base,
        start.revision,
        start.adapter,
        job.ranks.device,
        recipe.seed,
        Path(recipe.output) / "base",
        job.objective.role,
    )
    backbone.pad_id = choose_pad_id(job.tokenizer, stop_ids(backbone, job.tokenizer, job.template))
    job.console.say(f"attention: {backbone.kernel.name}, {backbone.kernel.layout} rows")
    return backbone, base


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
) -> Trainer:
    """Check what must hold before the first step, then train to the end or to a signal.

    Raises:
        Stopped: a signal arrived; a checkpoint was written.
        NumberError: an invariant is broken, or a step was refused.
    """
    on_policy = on_policy or OnPolicy(job.source, _measure(job, backbone), job.source.batch(1))
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
        trackers=start_trackers(job.recipe, folder.path, job.ranks.main),
    )
    try:
        # Before a checkpoint is taken up: every process checks the start it was given, also one that goes on later.
        check_start(trainer.passes, job.objective, on_policy.first, reference_is_start=reference_is_start)
        trainer.resume()
        trainer.train()
    except (Stopped, NumberError) as error:
        if not error.one_rank:  # of all ranks alike: they part in order
            job.ranks.close()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Updates mend this themselves where they can; here it was a check or held-out rows.
        advice = f"set train.tokens_per_device below {job.budget}, then --resume"
        raise MachineError(f"out of memory outside of a step; {advice}").on_one_rank() from error
    finally:
        trainer.trackers.close()
    return trainer


def finish_job(
    job: TrainingJob,
    folder: RunFolder,
    trainer: Trainer,
    base: str,
    extra: dict[str, Any] | None = None,
    parents: tuple[Parent, ...] = (),
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Write model, report and, last of all, the manifest.

    parents: runs that were used beside the one it started from; fingerprints: of data beside the job's own.
    """
    if job.ranks.main:
        with disk_errors(folder.model):
            trainer.hooks.save_model(folder.model)
        described = job.base if base == job.start.base else base_model(Start(base, None, None, base, None, None))
        assert described is not None
        outcome = Outcome(
            stage=job.loaded.stage,
            seed=job.recipe.seed,
            base_model=described,
            data=job.dataset.fingerprints | dict(fingerprints or {}),
            chat_template_hash=job.template.hash,
            steps=trainer.state.step,
            tokens=trainer.state.usage.tokens,
            seconds=trainer.state.usage.seconds,
            peak_memory=trainer.peak_memory,
            parents=(*((job.start.parent,) if job.start.parent else ()), *parents),
            status=trainer.status,
            extra={
                "objective": flatten_section(job.objective),
                "learning_rate": job.recipe.train.learning_rate,
                "batch_size": job.recipe.train.batch_size,
                "lora": job.lora and dataclasses.asdict(job.lora),
                "best_step": trainer.state.watched.best_step,
                **(extra or {}),
            },
        )
        manifest = build_manifest(folder, outcome)
        write_report(folder, manifest)
        write_manifest(folder, manifest)
    best = trainer.state.watched.best_step
    if best is not None and best != trainer.state.step:
        job.console.say(f"the best checkpoint: {checkpoint_path(folder.checkpoints, best)}")
    job.console.say(f"{trainer.status} in {time.monotonic() - job.started:.0f} s: {folder.report}")


def _resolve(
    recipe: recipes.TrainingRecipe, objective: Objective, start: Start, dataset: Dataset, ranks: Ranks, loaded: Loaded
) -> tuple[sections.Lora | None, Memory, recipes.TrainingRecipe]:
    lora = resolve_lora(
        recipe.lora, parent_lora(start.adapter, start.manifest and start.manifest.get("lora")), loaded.where("lora")
    )
    dtype = resolve_dtype(recipe.model.dtype, ranks.device)
    memory = estimate(
        load_config(start.base, start.revision, recipe.model.trust_remote_code),
        rank=lora.r if lora else None,
        dtype=dtype,
        checkpointing=recipe.model.gradient_checkpointing,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    recipe = dataclasses.replace(recipe, lora=lora, objective=objective)
    asked = recipe.train.tokens_per_device
    longest = dataset.longest + (recipe.draws.responses_per_prompt * recipe.draws.max_new_tokens if recipe.draws else 0)
    budget = ranks.min(auto_budget(memory, longest, ranks.device, values=objective.values)) if asked == "auto" else asked
    train = dataclasses.replace(recipe.train, tokens_per_device=budget, learning_rate=learning_rate_of(recipe))
    model = dataclasses.replace(recipe.model, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    return lora, memory, dataclasses.replace(recipe, train=train, model=model)


def _example_words(recipe: recipes.TrainingRecipe) -> str:
    objective = recipe.objective
    if recipe.draws:
        return "is learned: that is a prompt, and its responses are drawn from the policy"
    if objective.rows.responses == "first":
        return "is what the model learns to write"
    if objective.mismatches:
        return "is a judged response and, after it, another prompt's: the policy's drift is measured on those"
    return "is a response, the best one first"


def _facts(job: TrainingJob) -> dict[str, str]:
    recipe, start = job.recipe, job.start
    return {
        "start": recipe.model.path + (f" (continues the adapter in {start.adapter})" if start.adapter else ""),
        "trains": f"LoRA r {job.lora.r}" if job.lora else "all weights",
        "objective": job.objective.kind,
        "dtype": recipe.model.dtype,
        "chat template": job.template.source,
        "devices": f"{job.ranks.size} × {job.ranks.device.type}",
    }


def _warnings(job: TrainingJob) -> Iterator[str]:
    yield from job.dataset.train.notices
    if message := learning_rate_warning(job.recipe, job.memory):
        yield message
    if not job.objective.soft_labels and any(facts.probability is not None for facts in job.dataset.train.trees.facts):
        yield f"the column 'probability' has no effect with kind {job.objective.kind}: every chosen response counts as better"
    if job.lora and job.lora.dropout:
        yield "with lora.dropout, results depend on tokens_per_device: the masks follow the cut"


def _check_template(recipe: recipes.TrainingRecipe, start: Start, template: Template, loaded: Loaded) -> None:
    if start.template_hash not in (None, template.hash) and recipe.model.chat_template is None:
        raise UsageError(
            f"{loaded.where('model.path')}: {recipe.model.path} was trained with another chat template than {template.source}. "
            "name the one you want in model.chat_template"
        )


def _save_model(job: TrainingJob, backbone: Backbone, folder: Path) -> None:
    """What was trained, with its tokenizer and the template it was trained with."""
    backbone.save(job.objective.role, folder)
    job.tokenizer.chat_template = job.template.text
    job.tokenizer.save_pretrained(str(folder))


def _measure(job: TrainingJob, backbone: Backbone) -> Measure | None:
    """The objective's metrics on the held-out rows."""
    if job.dataset.held_out is None:
        return None
    trees = list(job.dataset.held_out.trees)
    passes = job.passes(backbone)
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
    ends = stop_ids(backbone, job.tokenizer, job.template)
    drawn = engine.generate(Request(prompts, range(len(prompts)), 1, SHOWN_TOKENS, 0.0, ends, 0), job.signals.pause)
    lines = []
    for tree, ((ids, ended),) in zip(trees, drawn, strict=True):
        record, shown = records[tree.row], ids[: len(ids) - ended]
        response = job.tokenizer.decode(shown.tolist(), skip_special_tokens=True)
        line = {"prompt": question(record), "response": response, "ended": ended, "tokens": len(shown), "where": record.where}
        lines.append(line)
    return lines
