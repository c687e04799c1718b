"""What eval.json says, from what was measured: every figure with its interval, all from the same bootstrap draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli.evaluation.agreement import Agreement
from rlhf_cli.evaluation.compare import ModelPair, scores_of
from rlhf_cli.evaluation.eval_json import About, EndpointJudge, EvaluationResult
from rlhf_cli.evaluation.generation import figures, log_ratios
from rlhf_cli.evaluation.intervals import DRAWS, ratio_interval, resamples
from rlhf_cli.evaluation.overoptimisation import BEST_OF_N, Point, best_of_points, fit_series, run_point
from rlhf_cli.evaluation.ratings import ratings
from rlhf_cli.evaluation.samples import Samples
from rlhf_cli.evaluation.winrate import WinRate, win_rate
from rlhf_cli.figures import Interval
from rlhf_cli.recipe import recipes
from rlhf_cli.sections import Endpoint


@dataclass(frozen=True)
class Measured:
    """All that needed weights, of every model."""

    samples: dict[str, Samples]  # model → its responses; the reference may have more than the others
    agreed: dict[str, Agreement]
    text: dict[str, np.ndarray]  # model → (R, 2): −Σ log π and tokens of every row
    series: dict[str, tuple[str, int]]  # checkpoint → (its run's name, step)


def summarise(
    recipe: recipes.EvalRecipe, measured: Measured, outcomes: Mapping[ModelPair, np.ndarray], notes: Sequence[str]
) -> EvaluationResult:
    """What eval.json says. `outcomes`: (one, other) → (P, K) outcomes of the one's responses against the other's."""
    equal = {name: own.first(recipe.rollout.responses_per_prompt) for name, own in measured.samples.items()}
    prompts = next((own.shape[0] for own in equal.values()), 0)
    counts = resamples(prompts, recipe.seed) if prompts else np.zeros((DRAWS, 0), np.int64)
    points = _points(recipe, measured, equal, counts)
    winrate, drawn = recipe.winrate, recipe.rollout
    judge = winrate.judge if winrate else None
    return EvaluationResult(
        about=About(
            reference=recipe.reference,
            baseline=winrate.baseline if winrate else None,
            judge=EndpointJudge(judge.endpoint, judge.model) if isinstance(judge, Endpoint) else judge,
            prompts=prompts,
            responses=drawn.responses_per_prompt,
            temperature=drawn.temperature,
            max_new_tokens=drawn.max_new_tokens,
            seed=recipe.seed,
            resamples=DRAWS,
            notes=list(notes),
        ),
        models=_models(recipe, measured, equal, counts),
        winrate=_win_rates(winrate.baseline, equal, outcomes, counts) if winrate else {},
        ratings=_ratings(winrate.baseline, equal, outcomes, counts) if winrate and len(equal) > 1 else {},
        preferences=measured.agreed,
        overoptimisation=points,
        fits=fit_series(points, counts),
    )


def _models(
    recipe: recipes.EvalRecipe, measured: Measured, equal: Mapping[str, Samples], counts: np.ndarray
) -> dict[str, dict[str, Interval]]:
    found: dict[str, dict[str, Interval]] = {}
    for name in dict.fromkeys([*equal, *measured.text]):
        found[name] = figures(equal[name], counts) if name in equal else {}
        if name in measured.text:
            nll, tokens = measured.text[name].T
            # As while training: a perplexity above e^700 is no float.
            perplexity = ratio_interval(nll, tokens, resamples(len(nll), recipe.seed), lambda value: math.exp(min(value, 700.0)))
            found[name]["perplexity"] = perplexity
    return found


def _win_rates(
    baseline: str, samples: Mapping[str, Samples], outcomes: Mapping[ModelPair, np.ndarray], counts: np.ndarray
) -> dict[str, WinRate]:
    found = {}
    lengths = {name: own.table(lambda sample: sample.tokens) for name, own in samples.items()}
    for name in (name for name in samples if name != baseline):
        outcome = outcomes[name, baseline] if (name, baseline) in outcomes else 1 - outcomes[baseline, name]
        found[name] = win_rate(outcome, lengths[name] - lengths[baseline], counts)
    return found


def _ratings(
    baseline: str, samples: Mapping[str, Samples], outcomes: Mapping[ModelPair, np.ndarray], counts: np.ndarray
) -> dict[str, Interval]:
    place = {name: number for number, name in enumerate(samples)}
    numbered = {(place[one], place[other]): outcome for (one, other), outcome in outcomes.items()}
    return ratings(list(samples), numbered, place[baseline], counts)


def _points(recipe: recipes.EvalRecipe, measured: Measured, equal: Mapping[str, Samples], counts: np.ndarray) -> list[Point]:
    """Every run's checkpoints after the start that they share, and best of n of the reference."""
    reference = recipe.reference
    if reference is None or reference not in equal or not recipe.reward:
        return []
    points: list[Point] = []

    def worth(samples: Samples) -> tuple[np.ndarray, np.ndarray | None]:
        return scores_of(samples, "reward", recipe), scores_of(samples, "gold", recipe) if recipe.gold else None

    at_start = worth(measured.samples[reference])
    for series in dict.fromkeys(name for name, _ in measured.series.values()):
        own = []
        for model, (name, step) in measured.series.items():
            ratios = log_ratios(equal[model]) if name == series and model in equal else None
            if ratios is not None:
                own.append(run_point(series, model, step, ratios, *worth(equal[model]), counts))
        if own:  # the tokens of a series may be others than the reference's
            points += [run_point(series, reference, 0, None, *at_start, counts), *own]
    if recipe.best_of_n:
        points += best_of_points(BEST_OF_N, reference, *at_start, recipe.best_of_n, counts)
    return points
