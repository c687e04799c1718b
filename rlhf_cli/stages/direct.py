"""`rlhf dpo`, `ipo` and `kto`: direct alignment from preferences, read from the top as it happens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_cli.data.cache import default_folder
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.unpaired import unpaired_dataset
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.load import load_model, load_tokenizer, read_adapter
from rlhf_cli.objectives.base import Objective
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.runs.manifest import BaseModel, weights_hash
from rlhf_cli.runs.parents import Start, base_model, resolve_start
from rlhf_cli.stages.training import FINE, Job, finish_job, load_job, open_job, prepare_job, train_job
from rlhf_cli.training.reference import reference_logps, weights_key
from rlhf_cli.training.signals import BEFORE


@dataclass(frozen=True)
class Reference:
    """The frozen model that the policy is compared with."""

    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    is_start: bool  # the very weights that the policy starts from

    @property
    def record(self) -> dict[str, str | None]:
        """What identifies it, in the manifest and when a run is resumed."""
        return {
            "model": str(self.start.adapter or self.start.base),
            "base": self.base.weights_hash if self.base else None,
            "adapter": weights_hash(self.start.adapter) if self.start.adapter else None,
        }


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on preferences, against a frozen reference where the objective has one.

    Raises:
        RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume, shape=partial(_judged, loaded) if loaded.stage == "kto" else None)
    reference = _find_reference(job, check)
    for words in _announce(job, reference):
        job.console.say(words)
    if check:
        job.console.say(FINE)
        return
    if reference is not None:
        job = dataclasses.replace(job, inputs={"reference": json.dumps(reference.record)})
    with open_job(job, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job)
        if reference is not None:
            job = _with_reference(job, reference, backbone, base)
        fit = train_job(job, folder, backbone, reference_is_start=reference is not None and reference.is_start)
        used = reference is not None and reference.start.parent
        parents = (used,) if used and used != job.start.parent else ()
        finish_job(job, folder, fit, base, {"reference": reference and reference.record}, parents)


def _announce(job: Job, reference: Reference | None) -> Iterator[str]:
    """What the recipe's keys do not show."""
    if reference is not None:
        path = reference.record["model"]
        yield f"reference: the weights this run starts from, {path}" if reference.is_start else f"reference: {path}"
    if words := job.objective.announcement:
        yield words


def _judged(loaded: Loaded, dataset: Dataset, recipe: schema.Recipe) -> tuple[Dataset, Objective]:
    """Single responses with their labels and mismatches, and the objective with the weights that follow from their numbers."""
    objective = recipe.objective
    changed = unpaired_dataset(
        dataset, loaded.where("data.train"), recipe.seed, recipe.data.max_length, mismatches=objective.mismatches
    )
    labels = [facts.label for facts in changed.train.trees.facts]
    return changed, objective.settled(labels.count(True), labels.count(False))


def _find_reference(job: Job, check: bool) -> Reference | None:
    """What `reference.model` names, with the policy's own vocabulary; None for an objective without a reference.

    Raises:
        UsageError: it cannot be told what it names, its base has changed, or its tokenizer is another one.
    """
    assert isinstance(job.recipe, schema.DirectRecipe)
    path, place = job.recipe.reference.model, job.loaded.named("reference.model")
    if not job.objective.reference:
        return None
    if path == "base" and job.start.adapter is None and job.start.parent is not None:
        raise UsageError(
            f"{place}: base is the model under an adapter, and {job.recipe.model.path} has none: all its weights were trained. "
            "name the model by its path"
        )
    if path in ("start", "base"):
        bare = dataclasses.replace(job.start, adapter=None, parent=None, manifest=None)
        found = job.start if path == "start" else bare
    else:
        found = resolve_start(path, None, place)
        tokenizer = load_tokenizer(found.tokenizer, found.revision, job.recipe.model.trust_remote_code)
        if tokenizer.get_vocab() != job.tokenizer.get_vocab():
            raise UsageError(f"{place}: {path} has another tokenizer than {job.recipe.model.path}; a reference must share it")
    is_start = _same(found.base, job.start.base) and _same(found.adapter, job.start.adapter)
    base = base_model(found) if not check or Path(found.base).exists() else None
    return Reference(found, base, is_start and found.revision == job.start.revision)


def _same(one: str | Path | None, other: str | Path | None) -> bool:
    """Do both name the same folder, however it is written, or the same hub id?"""
    return (one and Path(one).resolve()) == (other and Path(other).resolve())


def _with_reference(job: Job, reference: Reference, backbone: Backbone, base: str) -> Job:
    """The job with the reference's log-probabilities in its trees or, with `cache: false`, with the role "reference"."""
    assert isinstance(job.recipe, schema.DirectRecipe)
    assert reference.base is not None
    cached = job.recipe.reference.cache
    if not (cached and reference.is_start):
        _add_reference(job, reference, backbone, base)
    if not cached:
        return job
    parts = [part for part in (job.dataset.train, job.dataset.held_out) if part is not None]
    # Before its first update the policy is the start: no second copy of anything is needed.
    role = "policy" if reference.is_start else "reference"
    weights, adapter = reference.base.weights_hash, reference.start.adapter
    if reference.is_start and base != job.start.base:
        weights, adapter = base_model(Start(base, None, None, base, None, None)).weights_hash, None
    elif reference.is_start and job.lora is None and adapter is not None:
        weights += " merged"  # rounded once more than base and adapter apart
    job.signals.say("while the reference's log-probabilities were computed; what is done is kept, continue with --resume")
    filled = reference_logps(
        backbone,
        role,
        [part.trees for part in parts],
        key=weights_key(backbone.elsewhere.get(role, backbone), weights, adapter),
        budget=job.budget,
        ranks=job.ranks,
        console=job.console,
        folder=default_folder(),
    )
    job.signals.say(BEFORE)
    backbone.elsewhere.pop(role, None)
    known = dict(zip(map(id, (part.trees for part in parts)), filled, strict=True))
    dataset = job.dataset.map_trees(lambda trees: known[id(trees)])
    return dataclasses.replace(job, dataset=dataset, source=dataclasses.replace(job.source, trees=dataset.train.trees))


def _add_reference(job: Job, reference: Reference, backbone: Backbone, base: str) -> None:
    """Give the backbone the role "reference": a frozen adapter on the policy's base or the bare base, else a model of its own."""
    settings, start = job.recipe.model, reference.start
    fresh = base != job.start.base  # a merged parent: the policy's adapter is new, and its base is the start
    shares = job.lora is not None and not fresh and _same(start.base, job.start.base) and start.revision == job.start.revision
    if job.lora is not None and ((fresh and reference.is_start) or (shares and start.adapter is None)):
        backbone.alias["reference"] = BASE
    elif shares and start.adapter is not None:
        config, state, _ = read_adapter(start.adapter)
        backbone.add_lora("reference", config, state, trained=False)
    else:
        model = load_model(settings, start.base, start.revision, backbone.compute_dtype, job.ranks.device)
        other = Backbone(model, backbone.compute_dtype, settings.attention)
        if start.adapter is not None:
            config, state, _ = read_adapter(start.adapter)
            other.add_lora("reference", config, state, trained=False)
        backbone.elsewhere["reference"] = other
