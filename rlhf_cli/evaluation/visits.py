"""Every model of an evaluation visited once: what it says, and how it reads what is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np

from rlhf_cli import sections
from rlhf_cli.errors import RunError, Stopped, UsageError
from rlhf_cli.evaluation.eval_json import Agreed
from rlhf_cli.evaluation.measure import Rows, draw, judged, response_logps, text_figures
from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.preference import agreement, check_finite
from rlhf_cli.evaluation.prepare import EvaluationJob
from rlhf_cli.evaluation.result import Measured
from rlhf_cli.evaluation.samples import Sample, grouped, read_samples
from rlhf_cli.files import to_json, write_atomic
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import resolve_dtype
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.models.scoring import score_responses
from rlhf_cli.rollout.experience import together
from rlhf_cli.rollout.rewards import Answers, RewardTerm, Scorer
from rlhf_cli.runs.folder import MetricsLog, RunFolder, read_metrics

VISITOR = "evaluated"
"""The role of a reward model that is evaluated, beside those among the terms."""


def measure_models(job: EvaluationJob, folder: RunFolder) -> Measured:
    """Visit every model once: its responses, its view of the preferences, its perplexity."""
    kept, log = _kept(job, folder)
    frozen = _load_frozen(job)
    series = {each.name: (each.series, each.step) for each in job.models if each.series and each.step is not None}
    measured = Measured({}, {}, {}, series)
    theirs = _reference_logps(job, frozen)
    for each in job.models:
        samples = kept.get(each.name)
        draws = "prompts" in job.rows and not each.scores and samples is None
        if draws or _agrees(job, each) or _reads(job, each):
            job.signals.say(f"while {each.name} was evaluated; the responses of those before it are kept, continue with --resume")
            since = time.monotonic()
            drawn = _visit(job, each, frozen, measured, theirs, draws, log)
            samples = drawn if draws else samples
            job.console.say(f"{each.name}: {time.monotonic() - since:.0f} s")
        if samples is not None:
            full = together(job.ranks, partial(_judged, job, each, samples, frozen))
            measured.samples[each.name] = grouped(full)
    if "preferences" in job.rows:
        measured.agreed.update(_agreed_terms(job, frozen))
    return measured


def _visit(
    job: EvaluationJob,
    each: EvaluatedModel,
    frozen: FrozenModels,
    measured: Measured,
    theirs: Sequence[np.ndarray],
    draws: bool,
    log: MetricsLog | None,
) -> list[Sample]:
    """All that needs the weights of one model: its responses if it `draws`, and the rest into `measured`."""
    start, role = each.start, VISITOR if each.scores else "policy"
    with frozen.loaded(role, start, head=each.scores) as backbone:
        samples = _drawn(job, each, backbone, frozen, log) if draws else []
        if _agrees(job, each):
            measured.agreed[each.name] = _agreed(job, each, backbone, theirs)
        if _reads(job, each):
            rows = job.rows["text"][each.tokenisation.name]
            found = text_figures(backbone, role, rows.trees, job.budget, job.ranks)
            check_finite(list(found), _wheres(rows), f"{each.name} is broken: evaluate an earlier checkpoint of it")
            measured.text[each.name] = found
    return samples


def _kept(job: EvaluationJob, folder: RunFolder) -> tuple[dict[str, list[Sample]], MetricsLog | None]:
    """The responses that an earlier start drew, of models that are complete; and the file that holds them and takes more."""
    kept: dict[str, list[Sample]] = {}
    log = None
    if job.ranks.main and "prompts" in job.rows:
        try:
            found = read_samples(read_metrics(folder.samples))
        except TypeError as error:
            what = f"{folder.samples}: a line is no response of an evaluation ({error})"
            raise UsageError(f"{what}\n  start anew with --force") from error
        for each in job.models:
            if each.scores:
                continue
            rows, count = job.rows["prompts"][each.tokenisation.name].trees, _responses(job, each)
            own = [sample for sample in found if sample.model == each.name and sample.number < count]
            places = set(product((tree.row for tree in rows), range(count)))
            if len(own) == len(places) and {(sample.row, sample.number) for sample in own} == places:
                kept[each.name] = own
        write_samples(folder.samples, [sample for own in kept.values() for sample in own])
        log = MetricsLog(folder.samples)
        if kept:
            job.console.say(f"the responses of {', '.join(kept)} are there already")
    return job.ranks.gather(kept)[0], log


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    write_atomic(path, b"".join(to_json(sample.line()) + b"\n" for sample in samples))


def _responses(job: EvaluationJob, each: EvaluatedModel) -> int:
    """How many responses to each prompt are drawn from a model."""
    most = max(job.recipe.best_of_n, default=1) if each is job.reference else 1
    return max(job.recipe.rollout.responses_per_prompt, most)


def _load_frozen(job: EvaluationJob) -> FrozenModels:
    """The frozen models beside the one that is visited: the reference and the reward models."""
    recipe, reference = job.recipe, job.reference
    settings = sections.Model(path="", dtype=recipe.dtype, attention=recipe.attention, trust_remote_code=recipe.trust_remote_code)
    frozen = FrozenModels(settings, resolve_dtype(recipe.dtype, job.ranks.device), job.ranks.device)
    if reference is not None:
        frozen.add("reference", reference.start)
    next(iter(job.terms.values())).load(frozen, job.budget)
    return frozen


def _agrees(job: EvaluationJob, each: EvaluatedModel) -> bool:
    """Has it a view of the preferences? A policy has one against a reference with the same tokens that is another one."""
    reference = job.reference
    compared = reference is not None and each is not reference and each.tokenisation == reference.tokenisation
    return "preferences" in job.rows and (each.scores or compared)


def _reads(job: EvaluationJob, each: EvaluatedModel) -> bool:
    return "text" in job.rows and not each.scores


def _reference_logps(job: EvaluationJob, frozen: FrozenModels) -> list[np.ndarray]:
    """Σ log π_ref of the preferences' responses; empty where nothing is compared with them."""
    reference = job.reference
    if reference is None or not any(_agrees(job, each) and not each.scores for each in job.models):
        return []
    trees = job.rows["preferences"][reference.tokenisation.name].trees
    return response_logps(frozen.hosts["reference"], "reference", trees, job.budget, job.ranks)


def _drawn(
    job: EvaluationJob, each: EvaluatedModel, backbone: Backbone, frozen: FrozenModels, log: MetricsLog | None
) -> list[Sample]:
    """The model's responses, also written to the log."""
    samples = draw(
        each,
        backbone,
        frozen,
        job.terms[each.tokenisation.name],
        job.rows["prompts"][each.tokenisation.name],
        job.recipe,
        samples=_responses(job, each),
        compared=job.reference is not None and each.tokenisation == job.reference.tokenisation,
        budget=job.budget,
        ranks=job.ranks,
        say=job.console.say,
    )
    if log is not None:
        job.signals.defer()  # a model's lines are there all or not at all, but for a kill
        for sample in samples:
            log.append(sample.line())
        job.signals.obey_at_once(f"after {each.name}; what was drawn is kept, continue with --resume")
    return samples


def _judged(job: EvaluationJob, each: EvaluatedModel, samples: list[Sample], frozen: FrozenModels) -> list[Sample]:
    """With what Python functions make of them; rank 0 alone asks those, and the others' samples stay as they are."""
    if not job.ranks.main:
        return samples
    rows = job.rows["prompts"][each.tokenisation.name]
    try:
        return judged(samples, job.terms[each.tokenisation.name], frozen, rows.records, job.recipe)
    except RunError as error:
        if isinstance(error, Stopped):
            raise
        raise type(error)(f"{error}\n  the responses are kept: mend it, then continue with --resume") from error


def _agreed(job: EvaluationJob, each: EvaluatedModel, backbone: Backbone, theirs: Sequence[np.ndarray]) -> Agreed:
    """How a reward model's scores, or a policy's implicit rewards β (log π − log π_ref), agree with the preferences."""
    rows = job.rows["preferences"][each.tokenisation.name]
    if each.scores:
        scores = score_responses(backbone, VISITOR, rows.trees, job.budget, job.ranks)
        check_finite(scores, _wheres(rows), f"{each.name} is broken: evaluate an earlier checkpoint of it")
        return Agreed("reward model", agreement(scores, rows.trees, rows.training))
    own = response_logps(backbone, "policy", rows.trees, job.budget, job.ranks)
    scores = [each.beta * (mine - other) for mine, other in zip(own, theirs, strict=True)]
    check_finite(scores, _wheres(rows), f"{each.name} or {job.recipe.reference} is broken: evaluate an earlier checkpoint of it")
    return Agreed("policy", agreement(scores, rows.trees, rows.training), each.beta)


def _wheres(rows: Rows) -> list[str]:
    return [rows.records[tree.row].where for tree in rows.trees]


def _agreed_terms(job: EvaluationJob, frozen: FrozenModels) -> dict[str, Agreed]:
    """How the terms of the reward and of gold agree with the preferences, by raw scores; those that need no weights first."""
    terms, found = next(iter(job.terms.values())), {}
    scorers = dict(zip(terms.named, chain(*terms.load(frozen, job.budget)), strict=True))
    for name, term in sorted(terms.named.items(), key=lambda each: each[1].needs_weights):
        rows = job.rows["preferences"]
        own = rows[job.tokenisations.of(*term.text_form).name] if term.text_form else next(iter(rows.values()))
        scores = _row_scores(job, term, scorers[name], own)
        if scores is not None:
            check_finite(scores, _wheres(own), f"{name} is broken: name an earlier checkpoint of it")
            found[name] = Agreed(term.kind, agreement(scores, own.trees, own.training))
    return found


def _row_scores(job: EvaluationJob, term: RewardTerm, scorer: Scorer, rows: Rows) -> list[np.ndarray] | None:
    """(K,) of every row's responses. A term that needs no weights is asked by rank 0 alone, and others get None."""
    records = [rows.records[tree.row] for tree in rows.trees]
    texts = [list(record.responses) for record in records]
    answers = Answers(list(rows.trees), records, texts, [[True] * len(own) for own in texts])
    if term.needs_weights:
        return scorer.score_rows(answers, job.ranks)
    return together(job.ranks, lambda: scorer.score_rows(answers, job.ranks) if job.ranks.main else None)
