"""The responses of an evaluation, ranked by its judge, as preference data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.evaluation.compare import ModelPair
from rlhf_cli.evaluation.job import EvaluationJob
from rlhf_cli.evaluation.samples import Sample, Samples
from rlhf_cli.files import disk_errors, to_json, write_atomic

DECIMALS = 5  # of the scores: what differs by less is the rounding of one text in two batches, and no difference


def dump_pairs(job: EvaluationJob, path: Path, samples: Mapping[str, Samples], outcomes: Mapping[ModelPair, np.ndarray]) -> None:
    """Write them, and say so; nothing is written where the judge sees no difference. MachineError: the file cannot be written."""
    judge = job.recipe.winrate.judge if job.recipe.winrate else "reward"
    if isinstance(judge, str):
        rows = ranked_rows(samples, {name: own.worths(judge) for name, own in samples.items()})
        words = f"the responses of {', '.join(samples)} to {len(rows):,} prompts, ranked by {judge}"
    else:
        rows = pair_rows(samples, outcomes)
        words = f"{len(rows):,} pairs of responses of {', '.join(samples)}"
    if not rows:
        what = "not written, since the judge sees no difference between any two responses to a prompt"
        job.console.warn(f"{path}: {what}. those that were cut off are left out: is rollout.max_new_tokens too small?")
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"".join(to_json(row) + b"\n" for row in rows))
    job.console.say(f"{path}: {words}")


def ranked_rows(samples: Mapping[str, Samples], scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """`{"prompt", "responses", "scores", "models"}`, best first, of all models together; scores: model → (P, K).

    Responses that were cut off are left out, since training would teach to end where they stop; so are repeated texts, empty
    ones and those with a NUL character, which no stage reads, and prompts whose responses all have one score.
    """
    found = []
    for number in range(next(iter(samples.values())).shape[0]):
        own: dict[str, tuple[float, Sample]] = {}
        for model, table in samples.items():
            for sample, score in zip(table.own[number], np.round(scores[model][number], DECIMALS).tolist(), strict=True):
                if sample.usable:
                    own.setdefault(sample.response.strip(), (score, sample))  # as rows are read: white space around it is nothing
        ordered = sorted(own.values(), key=lambda each: -each[0])
        if len({score for score, _ in ordered}) > 1:
            found.append(
                {
                    "prompt": ordered[0][1].prompt,
                    "responses": [sample.response for _, sample in ordered],
                    "scores": [score for score, _ in ordered],
                    "models": [sample.model for _, sample in ordered],
                }
            )
    return found


def pair_rows(samples: Mapping[str, Samples], outcomes: Mapping[ModelPair, np.ndarray]) -> list[dict[str, Any]]:
    """`{"prompt", "chosen", "rejected", "models"}` of every comparison that was won, of responses as in `ranked_rows`."""
    found = []
    for (one, other), outcome in outcomes.items():
        for mine, theirs, won in zip(samples[one].own, samples[other].own, outcome.tolist(), strict=True):
            for a, b, value in zip(mine, theirs, won, strict=True):
                better, worse = (a, b) if value > 0.5 else (b, a)
                if value in (0.0, 1.0) and a.usable and b.usable and a.response.strip() != b.response.strip():
                    found.append(
                        {
                            "prompt": better.prompt,
                            "chosen": better.response,
                            "rejected": worse.response,
                            "models": [better.model, worse.model],
                        }
                    )
    return found
