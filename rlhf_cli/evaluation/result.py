"""What eval.json says, from what was measured: every figure with its interval, all from the same bootstrap draws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rlhf_cli.evaluation.agreement import Agreement
from rlhf_cli.evaluation.at_kl import AtKl, compare_at_kl
from rlhf_cli.evaluation.compare import Outcomes
from rlhf_cli.evaluation.concord import Verdicts, by_subset, concord, labels
from rlhf_cli.evaluation.eval_json import About, AskedJudge, EvaluationResult, Voted
from rlhf_cli.evaluation.intervals import DRAWS, ratio_interval, resamples
from rlhf_cli.evaluation.job import EvaluationJob
from rlhf_cli.evaluation.overoptimisation import Point, best_of_points, fit_series, run_point
from rlhf_cli.evaluation.samples import Sample, Samples, figures, log_ratios
from rlhf_cli.evaluation.votes import as_weights, drawn_subsets, electors, right_answers, vote_accuracies
from rlhf_cli.evaluation.winrate import WinRate, exploitability, ratings, win_rate
from rlhf_cli.figures import Interval
from rlhf_cli.judges.question import address
from rlhf_cli.recipe import evaluations
from rlhf_cli.sections import Judge, as_written


@dataclass(frozen=True)
class Measured:
    """All that needed weights, of every model."""

    samples: dict[str, Samples]  # model → its responses; the reference may have more than the others
    agreed: dict[str, Agreement]
    text: dict[str, np.ndarray]  # model → (R, 2): −Σ log π and tokens of every row
    verdicts: dict[str, Verdicts] = field(default_factory=dict)  # judge → what it says of the preferences' pairs


def summarise(
    job: EvaluationJob, measured: Measured, outcomes: Outcomes, by_terms: Mapping[str, Outcomes], notes: Sequence[str]
) -> EvaluationResult:
    """What eval.json says. `outcomes`: by winrate.judge; `by_terms`: by every term of reward and gold."""
    recipe = job.recipe
    equal = {name: own.first(recipe.rollout.responses_per_prompt) for name, own in measured.samples.items()}
    prompts = next((own.shape[0] for own in equal.values()), 0)
    counts = resamples(prompts, recipe.seed) if prompts else np.zeros((DRAWS, 0), np.int64)
    points = _points(job, measured, equal, counts)
    size = recipe.drawn(of_reference=False)
    if recipe.vote is not None:
        notes = [*notes, *drawn_subsets(size, recipe.vote.n, recipe.seed)]
    winrate, drawn = recipe.winrate, recipe.rollout
    judge = winrate.judge if winrate else None
    named = (judge.path or as_written(judge.model)) if isinstance(judge, Judge) else judge
    at_kl, untold = _at_kl(job, measured, equal, counts), "Gold says nothing of some responses, so that "
    if recipe.gold and points and points[0].gold is None:
        notes = [*notes, f"{untold}the points of over-optimisation have none."]
    if recipe.compare_at_kl and at_kl is None:
        notes = [*notes, f"{untold}it is not compared at equal KL."]
    rows = next(iter(job.rows["preferences"].by_tokenisation.values())) if "preferences" in job.rows else None
    judges = {**labels(rows.trees, rows.records), **measured.verdicts} if rows else {}
    return EvaluationResult(
        about=About(
            reference=recipe.reference,
            baseline=winrate.baseline if winrate else None,
            judge=AskedJudge(address(judge), as_written(judge.model), judge.path) if isinstance(judge, Judge) else judge,
            prompts=prompts,
            responses=drawn.responses_per_prompt,
            temperature=drawn.temperature,
            max_new_tokens=drawn.max_new_tokens,
            seed=recipe.seed,
            resamples=DRAWS,
            notes=[*job.notes, *notes],
            warping=drawn.warps,
        ),
        models=_models(recipe, measured, equal, counts),
        winrate=_win_rates(winrate.baseline, equal, outcomes, counts) if winrate else {},
        pairwise={name: _pairwise(tables) for name, tables in {**by_terms, str(named): outcomes}.items() if tables},
        exploitability=exploitability(outcomes, counts),
        ratings=ratings(list(equal), outcomes, winrate.baseline, counts) if winrate and len(equal) > 1 else {},
        preferences=measured.agreed,
        votes=_votes(job, {name: own.first(size) for name, own in measured.samples.items()}, counts),
        overoptimisation=points,
        fits=fit_series(points, counts),
        at_kl=at_kl,
        agreement=concord(judges),
        agreement_by_subset=by_subset(judges, rows.trees, rows.records) if rows else {},
    )


def _models(
    recipe: evaluations.EvalRecipe, measured: Measured, equal: Mapping[str, Samples], counts: np.ndarray
) -> dict[str, dict[str, Interval]]:
    found: dict[str, dict[str, Interval]] = {}
    for name in dict.fromkeys([*equal, *measured.text]):
        found[name] = figures(equal[name], counts) if name in equal else {}
        if name in measured.text:
            nll, tokens = measured.text[name].T
            own = ratio_interval(nll, tokens, resamples(len(nll), recipe.seed))
            # As while training: a perplexity above e^700 is no float.
            found[name]["perplexity"] = Interval(*(math.exp(min(value, 700.0)) for value in own))
    return found


def _votes(job: EvaluationJob, samples: Mapping[str, Samples], counts: np.ndarray) -> dict[str, dict[str, list[Voted]]]:
    vote, found = job.recipe.vote, {}
    if vote is None:
        return {}
    terms = [term.name for term in job.terms.reward] if set(vote.by) - {"majority"} else ()
    rewards = {
        term: {name: own.table(partial(Sample.term, name=f"reward/{term}")) for name, own in samples.items()} for term in terms
    }
    weights = {term: as_weights(own) for term, own in rewards.items()}
    for model in job.models:
        if own := samples.get(model.name):
            records = job.rows_of("prompts", model).records
            right = right_answers(vote.match, [records[first.row] for first, *_ in own.own], model.name)
            each, weigh = ({term: table[model.name] for term, table in given.items()} for given in (rewards, weights))
            found[model.name] = vote_accuracies(own.texts(), right, vote, electors(vote.by, each, weigh), counts, job.recipe.seed)
    return found


def _pairwise(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Model → another one → how often, or how probably, the one's responses are better."""
    found = defaultdict[str, dict[str, float]](dict)
    for (one, other), table in outcomes.items():
        found[one][other] = float(np.nanmean(table))
        found[other][one] = 1 - found[one][other]
    return dict(found)


def _win_rates(baseline: str, samples: Mapping[str, Samples], outcomes: Outcomes, counts: np.ndarray) -> dict[str, WinRate]:
    found = {}
    lengths = {name: own.table(lambda sample: sample.tokens) for name, own in samples.items()}
    for name in (name for name in samples if name != baseline):
        outcome = outcomes[name, baseline] if (name, baseline) in outcomes else 1 - outcomes[baseline, name]
        found[name] = win_rate(outcome, lengths[name] - lengths[baseline], counts)
    return found


def _points(job: EvaluationJob, measured: Measured, equal: Mapping[str, Samples], counts: np.ndarray) -> list[Point]:
    """Every run's checkpoints after the start that they share, and best of n of the reference."""
    recipe, reference = job.recipe, job.recipe.reference
    if reference is None or reference not in equal or not recipe.reward:
        return []
    points: list[Point] = []

    golden = bool(recipe.gold) and all(own.told("gold") for own in measured.samples.values())

    def worth(samples: Samples) -> tuple[np.ndarray, np.ndarray | None]:
        return samples.worths("reward"), samples.worths("gold") if golden else None

    at_start = worth(measured.samples[reference])
    for series in dict.fromkeys(model.series for model in job.models if model.series):
        own = []
        for model in job.models:
            ratios = log_ratios(equal[model.name]) if model.series == series and model.name in equal else None
            if ratios is not None and model.step is not None:
                own.append(run_point(series, model.name, model.step, ratios, *worth(equal[model.name]), counts))
        if own:  # the tokens of a series may be others than the reference's
            points += [run_point(series, reference, 0, None, *at_start, counts), *own]
    if recipe.best_of_n:
        points += best_of_points(reference, *at_start, recipe.best_of_n, counts)
    return points


def _at_kl(job: EvaluationJob, measured: Measured, equal: Mapping[str, Samples], counts: np.ndarray) -> AtKl | None:
    """Both series after the start that they share."""
    asked, reference = job.recipe.compare_at_kl, job.recipe.reference
    if asked is None or reference is None or not all(own.told("gold") for own in measured.samples.values()):
        return None
    gold = measured.samples[reference].worths("gold").mean(1)
    tables = [{reference: (np.zeros(len(gold)), gold)} for _ in ("a", "b")]
    for names, table in zip((asked.a, asked.b), tables, strict=True):
        for name in (model.name for model in job.models if (model.series or model.name) in names):
            if (ratios := log_ratios(equal[name])) is not None:  # others were refused
                table[name] = ratios.mean(1), equal[name].worths("gold").mean(1)
    return compare_at_kl([" and ".join(names) for names in (asked.a, asked.b)], tables, counts)
