"""`rlhf train-rm`: a reward model from comparisons, read from the top as it happens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rlhf_cli.data.batches import EnsembleSource, member_seed
from rlhf_cli.data.sources import prompt_share
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.agreement import Card, Member
from rlhf_cli.evaluation.preference import circles, reward_card
from rlhf_cli.files import from_anywhere
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import classifier_class
from rlhf_cli.models.load import Weights, load_config
from rlhf_cli.models.passes import as_scores, head_outputs
from rlhf_cli.objectives.general import General
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.ensembles import Scale, flat, mean_of_members, normalised
from rlhf_cli.runs.card import load_lines
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.stages.prepare import TrainingJob, prepare_job
from rlhf_cli.stages.training import finish_job, load_job, open_job, train_job
from rlhf_cli.training.loop import BatchSource

SCORED = 256
"""Training prompts, drawn with the seed, whose responses give the mean and the standard deviation of the scores."""


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train a reward model on the ranked responses of the recipe's data.

    RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume)
    if members := job.start.members:
        raise UsageError(
            f"{loaded.where('model.path')}: {job.recipe.model.path} has {len(members)} members; name one: {members[0].adapter}"
        )
    config = load_config(job.start.base, job.start.revision, job.recipe.model.trust_remote_code)
    if job.lora is None and classifier_class(config) is None:
        raise UsageError(
            f"{loaded.where('lora')}: lora: transformers has no sequence classifier for {config.model_type} models, so one whose "
            "weights are all trained could not be saved. leave lora at auto"
        )
    with open_job(job, check=check, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job, folder)
        trainer = train_job(job, folder, backbone, sampled=False, source=_source(job))
        job.signals.obey_at_once("after the last step; continue with --resume")
        card = _score(job, backbone, trainer.state.budget)
        if card.warning:
            job.console.warn(card.warning)
        finish_job(job, folder, trainer, base, _manifest(job, folder, backbone, base, card))


def _score(job: TrainingJob, backbone: Backbone, budget: int) -> Card:
    """The card of the trained model, from all held-out rows and some that it was trained on."""
    training, roles = job.dataset.train.trees, job.objective.roles
    held_out = job.dataset.held_out.trees if job.dataset.held_out else training[:0]
    chosen = np.random.default_rng(job.recipe.seed).permutation(len(training))[:SCORED]
    some = [training[int(i)] for i in sorted(chosen)]
    tau = job.objective.tau if isinstance(job.objective, General) else None
    read = [[head_outputs(backbone, r, trees, budget, job.ranks) for r in roles] for trees in (held_out, some)]
    unseen, seen = ([as_scores(own, tau) for own in heads] for heads in read)
    locations = job.dataset.held_out.trees.locations if job.dataset.held_out else ()
    of_one = zip(unseen, seen, strict=True)
    alone = [reward_card(scores, held_out, locations, training, of_some) for scores, of_some in of_one]
    if tau is not None:
        cyclic, triples = circles(held_out if locations else some, read[not locations][0], tau)
        return dataclasses.replace(alone[0], cyclic=cyclic, triples=triples)
    if len(roles) == 1:
        return alone[0]
    scales = [Scale(card.score_mean, card.score_std) for card in alone]
    card = reward_card(mean_of_members(unseen, scales), held_out, locations, training, mean_of_members(seen, scales))
    spread = normalised(np.stack([*map(flat, unseen if locations else seen)]), scales).std(0)
    members = [
        Member(member_seed(job.recipe.seed, number), own.agreement.rate, *scale)
        for number, (own, scale) in enumerate(zip(alone, scales, strict=True))
    ]
    return dataclasses.replace(card, members=members, disagreement=float(spread.mean()))


def _source(job: TrainingJob) -> BatchSource:
    """What each step learns from: the rows or, of an ensemble, each member's own sample of them."""
    if len(job.objective.roles) == 1:
        return job.source
    records = job.dataset.reading.train
    prompts = np.array([prompt_share(records[row], 0) for row in job.source.trees.rows])
    return EnsembleSource.draw(job.source, len(job.objective.roles), prompts)


def _manifest(job: TrainingJob, folder: RunFolder, backbone: Backbone, base: Weights, card: Card) -> dict[str, Any]:
    """What the manifest says of a reward model, with the lines of Python that load it where transformers has a class for it."""
    figures = card.to_json()
    if classifier_class(backbone.model.config) is None:
        job.console.warn("transformers has no sequence classifier for this architecture: only rlhf can load the reward model")
        return {"reward_model": figures}
    below, revision = (None, None) if job.lora is None else (from_anywhere(base.base), base.revision)
    lines = load_lines(from_anywhere(folder.model), below, revision, backbone.pad_id, len(backbone.heads["reward"].weight))
    return {"reward_model": figures, "pad_token_id": backbone.pad_id, "load": lines}
