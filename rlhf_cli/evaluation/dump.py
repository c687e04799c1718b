"""What models said, ranked by the judge, as rows of preference data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_cli.evaluation.samples import Sample, Samples

Row = dict[str, Any]

DECIMALS = 5
"""Of the scores: what differs by less is the rounding of one text in two batches, and no difference."""


def ranked_rows(samples: Mapping[str, Samples], scores: Mapping[str, np.ndarray]) -> list[Row]:
    """`{"prompt", "responses", "scores", "models"}`, best first, of all models together; scores: model → (P, K).

    Responses that were cut off are left out, since training would teach to end where they stop; so are repeated texts, empty
    ones and those with a NUL character, which no stage reads, and prompts whose responses all have one score.
    """
    found = []
    for number in range(next(iter(samples.values())).shape[0]):
        own: dict[str, tuple[float, Sample]] = {}
        for model, table in samples.items():
            for sample, score in zip(table.own[number], np.round(scores[model][number], DECIMALS).tolist(), strict=True):
                if _usable(sample):
                    own.setdefault(sample.response, (score, sample))
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


def pair_rows(samples: Mapping[str, Samples], judged: Mapping[tuple[str, str], np.ndarray]) -> list[Row]:
    """`{"prompt", "chosen", "rejected", "models"}` of every comparison that was won, of responses as in `ranked_rows`."""
    found = []
    for (one, other), outcome in judged.items():
        for mine, theirs, won in zip(samples[one].own, samples[other].own, outcome.tolist(), strict=True):
            for a, b, value in zip(mine, theirs, won, strict=True):
                better, worse = (a, b) if value > 0.5 else (b, a)
                if value in (0.0, 1.0) and _usable(a) and _usable(b):
                    found.append(
                        {
                            "prompt": better.prompt,
                            "chosen": better.response,
                            "rejected": worse.response,
                            "models": [better.model, worse.model],
                        }
                    )
    return found


def _usable(sample: Sample) -> bool:
    return sample.ended and bool(sample.response.strip()) and "\0" not in sample.response
