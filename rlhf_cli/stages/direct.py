"""`rlhf dpo`, `ipo` and `kto`: direct alignment from preferences, read from the top as it happens."""

from __future__ import annotations

import dataclasses
from functools import partial

from rlhf_cli.data.cache import default_folder
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.unpaired import unpaired_dataset
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.load import load_model, load_tokenizer, read_adapter
from rlhf_cli.objectives.base import Objective
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.runs.manifest import Parent
from rlhf_cli.runs.parents import Start, base_model, resolve_start
from rlhf_cli.stages.training import Job, finish_job, load_job, open_job, prepare_job, train_job
from rlhf_cli.training.reference import reference_logps, weights_key


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on preferences, against a frozen reference where the objective has one.

    Raises:
        RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume, shape=partial(_judged, loaded) if loaded.stage == "kto" else None)
    reference = _find_reference(job)
    if words := job.objective.announcement:
        job.console.say(words)
    if check:
        return
    with open_job(job, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job)
        parents: tuple[Parent, ...] = ()
        if reference is not None:
            job = _with_reference(job, reference, backbone, base)
            parents = (reference.parent,) if reference.parent and reference.parent != job.start.parent else ()
        fit = train_job(job, folder, backbone, reference_is_start=reference == job.start)
        finish_job(job, folder, fit, base, parents=parents)


def _judged(loaded: Loaded, dataset: Dataset, recipe: schema.Recipe) -> tuple[Dataset, Objective]:
    """Single responses with their labels and mismatches, and the objective with the weights that follow from their numbers."""
    objective = recipe.objective
    changed = unpaired_dataset(
        dataset, loaded.where("data.train"), recipe.seed, recipe.data.max_length, mismatches=objective.mismatches
    )
    labels = [facts.label for facts in changed.train.trees.facts]
    return changed, objective.settled(labels.count(True), labels.count(False))


def _find_reference(job: Job) -> Start | None:
    """What `reference.model` names, with the policy's own vocabulary; None for an objective without a reference.

    Raises:
        UsageError: its tokenizer is another one.
    """
    assert isinstance(job.recipe, schema.DirectRecipe)
    path = job.recipe.reference.model
    if not job.objective.reference:
        return None
    if path == "start" or (path == "base" and job.start.adapter is None):
        return job.start
    if path == "base":
        return dataclasses.replace(job.start, adapter=None, parent=None, manifest=None)
    place = job.loaded.where("reference.model")
    found = resolve_start(path, None, f"{place}: reference.model")
    tokenizer = load_tokenizer(found.tokenizer, found.revision, job.recipe.model.trust_remote_code)
    if tokenizer.get_vocab() != job.tokenizer.get_vocab():
        raise UsageError(f"{place}: {path} has another tokenizer than {job.recipe.model.path}; a reference must share it")
    return found


def _with_reference(job: Job, reference: Start, backbone: Backbone, base: str) -> Job:
    """The job with the reference's log-probabilities in its trees or, with `cache: false`, with the role "reference"."""
    assert isinstance(job.recipe, schema.DirectRecipe)
    cached, is_start = job.recipe.reference.cache, reference == job.start
    if not (cached and is_start):
        _add_reference(job, reference, backbone, base)
    if not cached:
        return job
    parts = [part for part in (job.dataset.train, job.dataset.held_out) if part is not None]
    # Before its first update the policy is the start: no second copy of anything is needed.
    role = "policy" if is_start else "reference"
    key = weights_key(backbone.elsewhere.get(role, backbone), base_model(reference).weights_hash, reference.adapter)
    filled = reference_logps(
        backbone,
        role,
        [part.trees for part in parts],
        key=key,
        budget=job.budget,
        ranks=job.ranks,
        console=job.console,
        folder=default_folder(),
    )
    backbone.elsewhere.pop(role, None)
    known = dict(zip(map(id, (part.trees for part in parts)), filled, strict=True))
    dataset = job.dataset.map_trees(lambda trees: known[id(trees)])
    return dataclasses.replace(job, dataset=dataset, source=dataclasses.replace(job.source, trees=dataset.train.trees))


def _add_reference(job: Job, reference: Start, backbone: Backbone, base: str) -> None:
    """Give the backbone the role "reference": a frozen adapter on the policy's base or the bare base, else a model of its own."""
    settings = job.recipe.model
    fresh = base != job.start.base  # a merged parent: the policy's adapter is new, and its base is the start
    same_base = (
        job.lora is not None and not fresh and (reference.base, reference.revision) == (job.start.base, job.start.revision)
    )
    if job.lora is not None and ((fresh and reference == job.start) or (same_base and reference.adapter is None)):
        backbone.alias["reference"] = BASE
    elif same_base and reference.adapter is not None:
        config, state, _ = read_adapter(reference.adapter)
        backbone.add_lora("reference", config, state, trained=False)
    else:
        model = load_model(settings, reference.base, reference.revision, backbone.compute_dtype, job.ranks.device)
        other = Backbone(model, backbone.compute_dtype, settings.attention)
        if reference.adapter is not None:
            config, state, _ = read_adapter(reference.adapter)
            other.add_lora("reference", config, state, trained=False)
        backbone.elsewhere["reference"] = other
