"""`rlhf dpo`, `ipo` and `kto`: direct alignment from preferences, read from the top as it happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np

from rlhf_cli.data.cache import default_folder
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.formats import LABELS
from rlhf_cli.data.records import Facts
from rlhf_cli.data.unpaired import unpaired_dataset
from rlhf_cli.errors import UsageError
from rlhf_cli.figures import sampling
from rlhf_cli.models.load import Weights
from rlhf_cli.models.placement import Placement
from rlhf_cli.objectives.base import Objective
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.rewards import PolicyText
from rlhf_cli.rollout.source import PreferenceSource, Shape
from rlhf_cli.rollout.terms import RewardTerms, find_terms
from rlhf_cli.runs.parents import merged_base
from rlhf_cli.signals import BEFORE
from rlhf_cli.stages.online import as_unpaired, recorded, set_up_rollouts
from rlhf_cli.stages.prepare import TrainingJob, prepare_job
from rlhf_cli.stages.reference import ReferenceModel, find_reference, place_reference
from rlhf_cli.stages.training import OnPolicy, finish_job, load_job, open_job, train_job
from rlhf_cli.training.reference import reference_logps, weights_key


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on preferences, against a frozen reference where the objective has one.

    RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    assert isinstance(loaded.recipe, recipes.DirectRecipe)
    draws = loaded.recipe.draws is not None
    unpaired = loaded.recipe.objective.rows is LABELS and not draws
    job = prepare_job(loaded, check=check, resume=resume, shape=partial(_as_unpaired, loaded) if unpaired else None)
    reference = find_reference(job, check, needed=draws or job.objective.reference)
    policy = PolicyText(job.tokenizer, job.template, job.recipe.model.trust_remote_code, check, pause=job.signals.pause)
    terms = find_terms(loaded, policy)
    if job.objective.self_play and not terms.reward[0].compares:
        who = "a general preference model, a judge with mode: pairwise, or a function with compares: true"
        raise UsageError(f"{terms.reward[0].place}: gives scores, and kind {job.objective.kind} wants wins. name {who}")
    for words in _announce(job, reference, terms):
        job.console.say(words)
    explores = isinstance(job.recipe, recipes.DpoRecipe) and job.recipe.explore is not None
    needed = {
        "rollout:": draws,
        "objective.kind: dpo": job.objective.kind == "dpo",
        "a reference that stays (start, base or a path)": reference is not None and not reference.previous,
    }
    if explores and (missing := [what for what, there in needed.items() if not there]):
        raise UsageError(f"{loaded.named('explore')}: needs {' and '.join(missing)}. give it that, or remove explore")
    if reference is not None:
        job = dataclasses.replace(job, inputs=recorded(reference, terms, job.dataset.reading), code=terms.code)
    with open_job(job, check=check, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job, folder)
        placement = Placement(backbone, job.recipe.model, base, job.ranks.device)
        on_policy = None
        if draws and reference is not None:
            place_reference(job, reference, placement, base)
            on_policy = _online(job, terms, placement, base, reference.previous)
        elif reference is not None:
            job = _with_reference(job, reference, placement, base)
        trainer = train_job(
            job, folder, backbone, reference_is_start=reference is not None and reference.is_start, on_policy=on_policy
        )
        parents = (*(reference.parents(job) if reference else ()), *terms.parents)
        finish_job(job, folder, trainer, base, {"reference": reference and reference.record, **terms.record}, parents)


def _announce(job: TrainingJob, reference: ReferenceModel | None, terms: RewardTerms) -> Iterator[str]:
    """What the recipe's keys do not show."""
    if reference is not None:
        yield reference.words
    yield from terms.words
    if isinstance(job.recipe, recipes.DirectRecipe) and (rollout := job.recipe.rollout):
        often = "every step" if rollout.refresh == 1 else f"every {rollout.refresh} steps"
        yield f"responses are drawn from the policy {often}, {rollout.responses_per_prompt} to a prompt, and ranked by the reward"
        if reference is not None and reference.previous and rollout.refresh == 1:
            yield "each step begins at its reference: loss and margins stay what they are there, and say nothing of progress"
        if rollout.warps:
            drawn = sampling(rollout.temperature, rollout.warps)
            yield f"they are drawn at {drawn}; log-probabilities, KL and entropy are the whole policy's, of what is drawn"
    if words := job.objective.announcement:
        yield words


def _online(job: TrainingJob, terms: RewardTerms, placement: Placement, base: Weights, previous: bool) -> OnPolicy:
    """Batches of the policy's own responses, in the form that the objective takes."""
    recipe, (sampler, measure, probe) = job.recipe, set_up_rollouts(job, terms, placement, base)
    assert isinstance(recipe, recipes.DirectRecipe)
    assert recipe.rollout is not None
    shape: Shape | None = None
    if job.objective.rows is LABELS:
        shape = partial(
            as_unpaired, records=sampler.records, max_length=recipe.data.max_length, mismatches=job.objective.mismatches
        )
    refresh, steps = recipe.rollout.refresh, job.steps
    source = PreferenceSource(sampler, job.source, refresh, steps, job.objective, shape, recipe.seed, previous)
    if isinstance(recipe, recipes.DpoRecipe) and recipe.explore is not None:
        host = sampler.backbone.at("reference")
        explorer = dataclasses.replace(sampler, backbone=host, engine=TransformersEngine(host, "reference"))
        source = dataclasses.replace(source, explore=recipe.explore, explorer=explorer)
    order = tuple(float(k) for k in range(recipe.rollout.responses_per_prompt))
    first = [tree._replace(facts=Facts(ranks=order, scores=order[::-1])) for tree in probe]
    return OnPolicy(source, measure, shape(first, recipe.seed) if shape else first)


def _as_unpaired(loaded: Loaded, dataset: Dataset, recipe: recipes.TrainingRecipe) -> tuple[Dataset, Objective]:
    """Single responses with their labels and mismatches, and the objective with the weights that follow from their numbers."""
    objective = recipe.objective
    changed = unpaired_dataset(
        dataset, loaded.where("data.train"), recipe.seed, recipe.data.max_length, mismatches=objective.mismatches
    )
    labels = [facts.label for facts in changed.train.trees.facts]
    return changed, objective.with_class_counts(labels.count(True), labels.count(False))


def _with_reference(job: TrainingJob, reference: ReferenceModel, placement: Placement, base: Weights) -> TrainingJob:
    """The job with the reference's log-probabilities in its trees or, with `cache: false`, with the role "reference"."""
    assert isinstance(job.recipe, recipes.DirectRecipe)
    assert reference.base is not None
    cached, backbone = job.recipe.reference.cache and job.objective.token_figure != "kl", placement.policy
    if not (cached and reference.is_start):
        place_reference(job, reference, placement, base)
    if not cached:
        return job
    parts, reached = [job.dataset.train.trees], [job.source.reached(job.steps)]
    if job.dataset.held_out is not None:
        parts.append(job.dataset.held_out.trees)
        reached.append(np.ones(len(parts[-1]), bool))
    # Before its first update the policy is the start: no second copy of anything is needed.
    role = "policy" if reference.is_start else "reference"
    weights, adapter = reference.base.weights_hash, reference.start.adapter
    if reference.is_start and base.base != job.start.base:
        weights, adapter = merged_base(base).weights_hash, None
    elif reference.is_start and job.lora is None and adapter is not None:
        weights += " merged"  # rounded once more than base and adapter apart
    job.signals.say("while the reference's log-probabilities were computed; what is done is kept, continue with --resume")
    key = weights_key(backbone.at(role), weights, adapter)
    filled = reference_logps(
        job.passes(backbone), role, parts, reached=reached, key=key, console=job.console, folder=default_folder()
    )
    job.signals.say(BEFORE)
    backbone.elsewhere.pop(role, None)
    known = dict(zip(map(id, parts), filled, strict=True))
    dataset = job.dataset.map_trees(lambda trees: known[id(trees)])
    return dataclasses.replace(job, dataset=dataset, source=dataclasses.replace(job.source, trees=dataset.train.trees))
