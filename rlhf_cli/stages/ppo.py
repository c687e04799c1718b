"""`rlhf ppo`: policy optimisation against a reward, read from the top as it happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from rlhf_cli import sections
from rlhf_cli.data.dataset import Dataset, prepare
from rlhf_cli.data.formats import ANSWERS, Purpose
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.models.load import Weights, load_config
from rlhf_cli.models.placement import Head, Placement
from rlhf_cli.objectives.policy_gradient import REDRAWS, PolicyGradient
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.recipe.stages import ROW_USES
from rlhf_cli.rollout.experience import Sampler
from rlhf_cli.rollout.rewards import PolicyText
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.rollout.terms import RewardTerms, find_terms
from rlhf_cli.stages.online import recorded, set_up_rollouts
from rlhf_cli.stages.prepare import TrainingJob, prepare_job
from rlhf_cli.stages.reference import find_reference, place_reference
from rlhf_cli.stages.training import OnPolicy, finish_job, load_job, open_job, train_job


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on its own responses, judged by the reward.

    RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume)
    reference = find_reference(job, check)
    policy = PolicyText(job.tokenizer, job.template, job.recipe.model.trust_remote_code, check, pause=job.signals.pause)
    terms = find_terms(loaded, policy)
    terms.check_samples(_parts(job)[0].rollout.responses_per_prompt)
    ptx = _ptx_rows(job)
    assert reference is not None
    for words in (reference.words, *terms.words, *_announce(job)):
        job.console.say(words)
    inputs = recorded(reference, terms, job.dataset.reading) | (ptx.fingerprints if ptx else {})
    job = dataclasses.replace(job, inputs=inputs, code=terms.code)
    with open_job(job, check=check, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job, folder)
        placement = Placement(backbone, job.recipe.model, base, job.ranks.device)
        place_reference(job, reference, placement, base)
        sampler, measure, probe = set_up_rollouts(job, terms, placement, base)
        rates = _add_value(job, terms, placement, base)
        on_policy = OnPolicy(_source(job, sampler, ptx), measure, probe, rates)
        trainer = train_job(job, folder, backbone, reference_is_start=reference.is_start, on_policy=on_policy)
        parents = (*reference.parents(job), *terms.parents)
        extra = {"reference": reference.record, **terms.record}
        finish_job(job, folder, trainer, base, extra, parents, ptx.fingerprints if ptx else {})


def _announce(job: TrainingJob) -> Iterator[str]:
    """What a step does, and what the recipe's keys do not show."""
    recipe, objective = _parts(job)
    prompts, samples = min(recipe.train.batch_size, len(job.source.trees)), recipe.rollout.responses_per_prompt
    yield (
        f"each step draws {prompts} prompts (train.batch_size) × {samples} (rollout.responses_per_prompt) responses and learns "
        f"from them in {objective.epochs} passes (objective.epochs) of {objective.minibatches} (objective.minibatches) updates"
    )
    if objective.redraws:
        yield (
            "objective.ties: redraw: prompts whose responses all score alike are replaced by the next ones, in at most "
            f"{REDRAWS} rounds; what is measured of a step is of its own prompts"
        )
    if recipe.kl.estimator == "k2":
        yield "kl: ½(log π/π_ref)² is a loss term; on the policy's own tokens its gradient is that of each token's KL"
    if recipe.kl.estimator == "k3":
        yield "kl: k3 is a loss term; on the policy's own tokens it descends KL(π_ref‖π), not KL(π‖π_ref)"
    if job.lora and job.lora.dropout:
        yield "with lora.dropout the policy that learns differs from the one that drew: the first ratio is not 1, nor checked"
    if (dense := [name_of(term) for term in recipe.reward if term.per or term.per_step]) and objective.kind != "ppo":
        yield f"kind: {objective.kind} has one return for a response: what {', '.join(dense)} gives its parts is added up"
    if objective.announcement:
        yield objective.announcement


def _parts(job: TrainingJob) -> tuple[recipes.PpoRecipe, PolicyGradient]:
    assert isinstance(job.recipe, recipes.PpoRecipe)
    assert isinstance(job.objective, PolicyGradient)
    return job.recipe, job.objective


def _ptx_rows(job: TrainingJob) -> Dataset | None:
    recipe, _ = _parts(job)
    if recipe.ptx is None:
        return None
    data = dataclasses.replace(recipe.data, train=recipe.ptx.data, eval=None)

    def where(key: str) -> str:
        return job.loaded.named(key.replace("data.train", "ptx.data", 1))

    rows = prepare(data, RowRequest(Purpose("ptx", ANSWERS, ROW_USES), recipe.seed, where), job.tokenizer, job.template)
    config = load_config(job.start.base, job.start.revision, recipe.model.trust_remote_code)
    rows.check_ids(config.get_text_config().vocab_size, job.tokenizer, recipe.model.path)
    return rows


def _source(job: TrainingJob, sampler: Sampler, ptx: Dataset | None) -> PolicySource:
    recipe, objective = _parts(job)
    rows = ptx.source(recipe.train, recipe.data, recipe.seed) if ptx else None
    coef = recipe.ptx.coef if recipe.ptx else 0.0
    truncate = recipe.rollout.correction == "truncate"
    return PolicySource(sampler, job.source, objective, recipe.kl, rows, coef, recipe.seed, truncate)


def _add_value(job: TrainingJob, terms: RewardTerms, placement: Placement, base: Weights) -> dict[str, float]:
    """Give the role "value" its weights, where the objective has one; returns the learning rate of the role.

    From a reward model r it starts as that term of the score, weight · (r − mean)/std; from the policy, as 0.
    """
    recipe, objective = _parts(job)
    if not objective.values:
        return {}
    lora = job.lora or sections.Lora()
    starts = ((term.name, begin) for term in terms.reward if (begin := term.value_start()) is not None)
    first = next(starts, None) if recipe.value.init == "reward" else None
    if first is not None:
        name, (start, head) = first
        placement.add_value(start, lora, head)
        job.console.say(f"value: starts as {'the first member of ' * bool(start.members)}the reward model {name}")
    else:
        weights = job.start if base.base == job.start.base else base
        width = placement.policy.model.config.get_text_config().hidden_size
        placement.add_value(weights, lora, Head(torch.zeros(1, width), 0.0))
        why = "" if recipe.value.init == "policy" else ": no reward model reads its tokens"
        job.console.say(f"value: starts as 0, on the policy's weights{why}")
    assert recipe.value.learning_rate is not None
    return {"value": recipe.value.learning_rate}
