"""`rlhf sft`: supervised fine-tuning and distillation, read from the top as it happens."""

from __future__ import annotations

import dataclasses
import json

from rlhf_cli.data.streams import Stream
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import Weights
from rlhf_cli.models.placement import Placement
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.source import SampleSource, drawn, probe
from rlhf_cli.stages.online import samplers
from rlhf_cli.stages.prepare import TrainingJob, prepare_job
from rlhf_cli.stages.reference import find_frozen, place_reference
from rlhf_cli.stages.training import OnPolicy, finish_job, load_job, open_job, train_job
from rlhf_cli.training.checkpoint import State
from rlhf_cli.training.step import evaluate


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on the responses of its data, or towards a teacher, there or on its own.

    RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume)
    frozen = {
        role: find_frozen(job, path, loaded.named(f"objective.{role}"), check) for role, path in job.objective.frozen.items()
    }
    for role, model in frozen.items():
        if model.start.template_hash not in (None, job.template.hash):
            job.console.warn(f"objective.{role}: {model.start.base} learned another chat template than {job.template.source}")
    records = {role: model.record for role, model in frozen.items()}
    job = dataclasses.replace(job, inputs={role: json.dumps(record) for role, record in records.items()})
    with open_job(job, check=check, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job, folder)
        placement = Placement(backbone, job.recipe.model, base, job.ranks.device)
        for role, model in frozen.items():
            place_reference(job, model, placement, base, role)
        trainer = train_job(job, folder, backbone, on_policy=_online(job, backbone, base) if job.recipe.draws else None)
        parents = tuple(parent for model in frozen.values() for parent in model.parents(job))
        finish_job(job, folder, trainer, base, records, parents)


def _online(job: TrainingJob, backbone: Backbone, base: Weights) -> OnPolicy:
    """Batches of the policy's own responses; those to held-out prompts follow from the same random numbers each time."""
    sampler, reading, held_out = samplers(job, backbone, base), job.dataset.reading, job.dataset.held_out
    own, unseen, passes, seed = sampler(reading.train), sampler(reading.held_out), job.passes(backbone), job.recipe.seed

    def measure(state: State) -> dict[str, float]:
        assert held_out is not None
        trees, figures = drawn(unseen, list(held_out.trees), Stream.HELD_OUT.seed(seed))
        return figures | evaluate(
            passes.at_most(state.budget), job.objective, trees, memory=state.memory, pause=job.signals.pause
        )

    source = SampleSource(own, job.source, seed)
    return OnPolicy(source, None if held_out is None else measure, probe(own, job.source.batch(1), seed))
