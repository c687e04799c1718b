"""Every model of an evaluation loaded once: its responses, how it agrees with preferences, how it predicts text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from rlhf_cli.data.trees import Tree
from rlhf_cli.evaluation.concord import verdicts
from rlhf_cli.evaluation.job import EvaluationJob
from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.preference import agreement, check_finite
from rlhf_cli.evaluation.responses import draw_responses, keep_responses, kept_responses, score_samples
from rlhf_cli.evaluation.result import Measured
from rlhf_cli.evaluation.samples import grouped
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import score_responses
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.objectives.reward import member_role
from rlhf_cli.rollout.ensembles import mean_of_members
from rlhf_cli.rollout.experience import read_logps, together
from rlhf_cli.rollout.reward_models import recorded_scales
from rlhf_cli.runs.folder import RunFolder

EVALUATED = "evaluated"  # the role of a reward model that is evaluated, beside those among the terms


def measure_models(job: EvaluationJob, folder: RunFolder) -> Measured:
    """All that needs weights. Responses are kept in the folder model by model, and those that are there are not drawn again.

    RunError: a model, a reward or the data is broken, or the run was stopped.
    """
    kept, log = kept_responses(job, folder)
    frozen = _load_frozen(job)
    measured = Measured({}, {}, {})
    compared = any(_has_preferences(job, model) and not model.is_reward_model for model in job.models)
    reference_logps: list[np.ndarray] = []  # Σ log π_ref of the preferences' responses
    if job.reference is not None and compared:
        trees = job.rows_of("preferences", job.reference).trees
        reference_logps = _response_logps(job, frozen.hosts["reference"], "reference", trees)
    for model in job.models:
        samples = kept.get(model.name)
        draws = "prompts" in job.rows and not model.is_reward_model and samples is None
        reads = "text" in job.rows and not model.is_reward_model
        if draws or reads or _has_preferences(job, model):
            job.signals.say(
                f"while {model.name} was evaluated; the responses of those before it are kept, continue with --resume"
            )
            since = time.monotonic()
            role = EVALUATED if model.is_reward_model else "policy"
            with frozen.loaded(role, model.start, head=model.is_reward_model) as backbone:
                if draws:
                    samples = draw_responses(job, model, backbone, frozen)
                    keep_responses(job, model, samples, log)
                if _has_preferences(job, model):
                    _judge(job, model, backbone, frozen, reference_logps, measured)
                if reads:
                    measured.text[model.name] = _text_figures(job, model, backbone)
            del backbone  # or its weights would stay in memory beside the next model's
            job.console.say(f"{model.name}: {time.monotonic() - since:.0f} s")
        if samples is not None:
            measured.samples[model.name] = grouped(together(job.ranks, partial(score_samples, job, model, samples, frozen)))
    if "preferences" in job.rows:
        _judge_by_terms(job, frozen, measured)
    return measured


def _load_frozen(job: EvaluationJob) -> FrozenModels:
    """The frozen models beside the one that is evaluated: the reference and the reward models among the terms."""
    frozen = job.frozen_models()
    if job.reference is not None:
        frozen.add("reference", job.reference.start)
    job.terms.load(frozen, job.budget)
    return frozen


def _has_preferences(job: EvaluationJob, model: EvaluatedModel) -> bool:
    """Does it prefer some responses? A policy does against a reference with the same tokens that is another one."""
    compared = model is not job.reference and job.shares_tokens(model)
    return "preferences" in job.rows and (model.is_reward_model or compared)


def _other_members(job: EvaluationJob, model: EvaluatedModel, frozen: FrozenModels) -> Iterator[list[np.ndarray]]:
    """The scores of the members of an ensemble but for the first."""
    trees = job.rows_of("preferences", model).trees
    for number, member in enumerate(model.start.members[1:], 1):
        role = member_role(EVALUATED, number)
        with frozen.loaded(role, member, head=True) as backbone:
            yield score_responses(backbone, role, trees, job.budget, job.ranks)


def _judge(
    job: EvaluationJob,
    model: EvaluatedModel,
    backbone: Backbone,
    frozen: FrozenModels,
    reference_logps: Sequence[np.ndarray],
    measured: Measured,
) -> None:
    """How a reward model's scores, or a policy's implicit rewards β (log π − log π_ref), agree with the preferences.

    Of an ensemble the mean of the members' scores.
    """
    rows = job.rows_of("preferences", model)
    if model.is_reward_model:
        kind, who, beta = "reward model", model.name, None
        first = score_responses(backbone, EVALUATED, rows.trees, job.budget, job.ranks, model.start.tau)
        scores = mean_of_members([first, *_other_members(job, model, frozen)], recorded_scales(model.start))
    else:
        kind, who, beta = "policy", f"{model.name} or {job.recipe.reference}", model.beta
        own = _response_logps(job, backbone, "policy", rows.trees)
        scores = [model.beta * (mine - other) for mine, other in zip(own, reference_logps, strict=True)]
    check_finite(scores, rows.locations, f"{who} is broken: evaluate an earlier checkpoint of it")
    measured.agreed[model.name] = agreement(kind, scores, rows.trees, rows.training, beta)
    measured.verdicts[model.name] = verdicts(rows.trees, rows.records, scores)


def _judge_by_terms(job: EvaluationJob, frozen: FrozenModels, measured: Measured) -> None:
    """How the terms of the reward and of gold agree with the preferences, by raw scores; those that need no weights first."""
    scorers = dict(zip(job.terms.named, chain(*job.terms.load(frozen, job.budget)), strict=True))
    by_tokenisation = job.rows["preferences"].by_tokenisation
    for name, term in sorted(job.terms.named.items(), key=lambda each: each[1].needs_weights):
        own = job.tokenisations.of(*term.text_form) if term.text_form else next(iter(by_tokenisation))
        rows = by_tokenisation[own]
        score = partial(scorers[name].score_rows, rows.answers, job.ranks)
        if not term.needs_weights:  # nothing is shared: rank 0 asks alone
            score = partial(together, job.ranks, score if job.ranks.main else list)
        scores: list[np.ndarray] = score()
        if job.ranks.main:
            # A term of texts says NaN of a row that it does not apply to.
            kept = [k for k, own in enumerate(scores) if term.needs_weights or not np.isnan(own).any()]
            if len(kept) < len(scores):
                job.console.say(f"{name}: says nothing of {len(scores) - len(kept)} rows, which are left out of its agreement")
            trees, scores = [rows.trees[k] for k in kept], [scores[k] for k in kept]
            check_finite(scores, [rows.locations[k] for k in kept], f"{name} is broken: name an earlier checkpoint of it")
            if kept:
                measured.agreed[name] = agreement(term.kind, scores, trees, rows.training)
                measured.verdicts[name] = verdicts(trees, rows.records, scores)


def _text_figures(job: EvaluationJob, model: EvaluatedModel, backbone: Backbone) -> np.ndarray:
    """(P, 2): −Σ log π of the supervised tokens of each prompt's rows, and their number; a row without prompt is one alone."""
    rows = job.rows_of("text", model)
    logps = read_logps(backbone, "policy", rows.trees, job.budget, job.ranks)
    found = np.array([[-sum(part.sum() for part in row), sum(part.shape[1] for part in row)] for row in logps])
    check_finite(list(found), rows.locations, f"{model.name} is broken: evaluate an earlier checkpoint of it")
    prompts: dict[object, int] = {}
    own = [prompts.setdefault(rows.records[tree.row].prompt or tree.row, len(prompts)) for tree in rows.trees]
    if len(prompts) < 2:
        return found  # rows are all there is to draw
    sums = np.zeros((len(prompts), 2))
    np.add.at(sums, own, found)
    return sums


def _response_logps(job: EvaluationJob, backbone: Backbone, role: str, trees: Sequence[Tree]) -> list[np.ndarray]:
    """Σ log π of every tree's responses, (K,) each, on every rank."""
    return [np.array([part.sum() for part in own]) for own in read_logps(backbone, role, trees, job.budget, job.ranks)]
