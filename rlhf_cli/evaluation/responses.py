"""What the policies of an evaluation say: drawn once, kept in samples.jsonl, and scored by every term."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path

import numpy as np

from rlhf_cli.data.records import Record, plain_prompt
from rlhf_cli.data.streams import Stream
from rlhf_cli.errors import RunError, Stopped, UsageError
from rlhf_cli.evaluation.job import EvaluationJob
from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.samples import Sample, grouped
from rlhf_cli.files import to_json, write_atomic
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.experience import Rollout, Sampler
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.rewards import Answers, combined
from rlhf_cli.runs.folder import MetricsLog, RunFolder, read_metrics

PATIENCE = 30.0  # seconds between two words on a model that takes its time


def kept_responses(job: EvaluationJob, folder: RunFolder) -> tuple[dict[str, list[Sample]], MetricsLog | None]:
    """Those that an earlier start drew, of models that are complete; and on rank 0 the file that holds them and takes more.

    UsageError: a line of the file is no response.
    """
    kept: dict[str, list[Sample]] = {}
    log = None
    if job.ranks.main and "prompts" in job.rows:
        try:
            found = [Sample(**line) for line in read_metrics(folder.samples)]
        except TypeError as error:
            what = f"a line is no response of an evaluation ({error})"
            raise UsageError(f"{folder.samples}: {what}\n  start anew with --force") from error
        for model in (model for model in job.models if not model.is_reward_model):
            trees, count = job.rows_of("prompts", model).trees, job.responses_of(model)
            own = [sample for sample in found if sample.model == model.name and sample.number < count]
            places = set(product((tree.row for tree in trees), range(count)))
            if len(own) == len(places) and {(sample.row, sample.number) for sample in own} == places:
                kept[model.name] = own
        write_samples(folder.samples, [sample for own in kept.values() for sample in own])
        log = MetricsLog(folder.samples)
        if kept:
            job.console.say(f"the responses of {', '.join(kept)} are there already")
    return job.ranks.gather(kept)[0], log


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    write_atomic(path, b"".join(to_json(dataclasses.asdict(sample)) + b"\n" for sample in samples))


def draw_responses(job: EvaluationJob, model: EvaluatedModel, backbone: Backbone, frozen: FrozenModels) -> list[Sample]:
    """The policy's responses to every prompt, scored by the terms that need weights; the same on every rank.

    The randomness is that of held-out prompts while training: at equal prompts, seed and temperature a checkpoint says the same
    here as it said there. Of two models the k-th responses to a prompt come from the same random numbers.

    RunError: a reward model cannot read a response, or memory ran out.
    """
    rows, terms, own = job.rows_of("prompts", model), job.terms_of[model.tokenisation], model.tokenisation
    reward, gold = terms.load(frozen, job.budget)
    started = told = time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told > PATIENCE:
            told = time.monotonic()
            job.console.say(f"{model.name}: drawing and scoring, {told - started:.0f} s so far")

    sampler = Sampler(
        backbone=backbone,
        engine=TransformersEngine(backbone, "policy"),
        tokenizer=own.tokenizer,
        ends=tuple(backbone.stop_ids(own.tokenizer, own.template)),
        settings=job.recipe.rollout,
        records=rows.records,
        terms=[scorer for term, scorer in zip(terms.reward, reward, strict=True) if term.needs_weights],
        gold=[scorer for term, scorer in zip(terms.gold, gold, strict=True) if term.needs_weights],
        combine="sum",  # not used: `score_responses` combines, with the terms that need no weights among them
        budget=job.budget,
        ranks=job.ranks,
        compared=job.shares_tokens(model),
        pause=tell,
    )
    rollout = sampler.rollout(list(rows.trees), Stream.HELD_OUT.seed(job.recipe.seed), samples=job.responses_of(model))
    return list(_samples(model.name, rollout, sampler, rows.records))


def keep_responses(job: EvaluationJob, model: EvaluatedModel, samples: Sequence[Sample], log: MetricsLog | None) -> None:
    """Add a model's responses to the file: all or none of them, but for a kill. A signal that came meanwhile is obeyed then."""
    if log is not None:
        job.signals.defer()
        for sample in samples:
            log.append(dataclasses.asdict(sample))
        job.signals.obey_at_once(f"after {model.name}; what was drawn is kept, continue with --resume")


def _samples(model: str, rollout: Rollout, sampler: Sampler, records: Sequence[Record]) -> Iterator[Sample]:
    starts = np.concatenate([[0], np.cumsum(rollout.lengths)[:-1]])
    logps, reference = (np.add.reduceat(values, starts) for values in (rollout.tokens.plain, rollout.tokens.plain_reference))
    flat = ((tree, number, ids) for tree in rollout.trees for number, ids in enumerate(tree.responses))
    for at, (tree, number, ids) in enumerate(flat):
        record, ended = records[tree.row], bool(rollout.ended[at])
        yield Sample(
            model=model,
            row=tree.row,
            number=number,
            where=record.where,
            prompt=plain_prompt(record.prompt),
            response=sampler.text(ids, ended),
            ended=ended,
            tokens=len(ids),
            logp=float(logps[at]),
            reference_logp=float(reference[at]) if sampler.compared else None,
            terms={name: float(values[at]) for name, values in rollout.terms.items()},
        )


def score_samples(job: EvaluationJob, model: EvaluatedModel, samples: list[Sample], frozen: FrozenModels) -> list[Sample]:
    """The samples with the terms that need texts alone, such as Python functions, and with the score, on rank 0.

    A function sees a model's responses all at once, prompt by prompt. The other terms are those that the samples have.

    UsageError: a function fails, or returns something else than numbers.
    NumberError: one of its numbers is not finite.
    """
    if not job.ranks.main:
        return samples
    recipe, records, terms = job.recipe, job.rows_of("prompts", model).records, job.terms_of[model.tokenisation]
    reward, gold = terms.load(frozen, job.budget)
    scorers = {f"gold/{scorer.name}": scorer for scorer in gold} | {f"reward/{scorer.name}": scorer for scorer in reward}
    samples = [sample for row in grouped(samples).own for sample in row]
    rows = [list(own) for _, own in groupby(samples, key=lambda sample: sample.row)]
    answers = Answers(
        trees=[],
        records=[records[own[0].row] for own in rows],
        texts=[[sample.response for sample in own] for own in rows],
        ended=[[sample.ended for sample in own] for own in rows],
        tokens=[[sample.tokens for sample in own] for own in rows],
    )
    try:
        found: dict[str, np.ndarray] = {}
        for name, scorer in scorers.items():
            names = [name, *(f"{name}/{what}" for what in scorer.beside)]
            known = scorer.needs_weights  # since they were drawn
            values = [[sample.terms[each] for sample in samples] for each in names] if known else scorer.score(answers)
            found |= zip(names, np.atleast_2d(np.array(values, np.float64)), strict=True)
    except Stopped:
        raise
    except RunError as error:
        raise type(error)(f"{error}\n  the responses are kept: mend it, then continue with --resume") from error
    scores = None
    if reward:
        each = np.stack([found[f"reward/{scorer.name}"] for scorer in reward])
        ended = np.array([sample.ended for sample in samples])
        scores = combined(recipe.reward_combine, each, [scorer.weight for scorer in reward], answers.pairs)
        scores = scores - recipe.rollout.missing_eos_penalty * ~ended
    return [
        dataclasses.replace(
            sample,
            terms={name: None if np.isnan(values[at]) else float(values[at]) for name, values in found.items()},
            score=None if scores is None else float(scores[at]),
        )
        for at, sample in enumerate(samples)
    ]
