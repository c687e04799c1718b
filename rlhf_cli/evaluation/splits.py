"""Which rows the models of an evaluation were trained on, as far as their runs record it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.rows import SECTIONS, SectionRows
from rlhf_cli.recipe import evaluations
from rlhf_cli.runs.ancestry import Ancestor, Split, unknown

Origins = Mapping[str, Sequence[Ancestor]]
"""Path of a model → the runs that it comes from."""


def with_holdout_seed(recipe: evaluations.EvalRecipe, origins: Origins) -> evaluations.EvalRecipe:
    """The recipe with the holdout_seed of the models' runs where it names none; 0 where they have several or none."""
    splits = [run.split for runs in origins.values() for run in runs if run.split is not None]
    seeds = {split.seed for split in splits if split.holdout and split.seed is not None}
    seed = seeds.pop() if len(seeds) == 1 else 0
    named: dict[str, Any] = {
        name: [
            dataclasses.replace(each, holdout_seed=seed if each.holdout_seed is None else each.holdout_seed) for each in sources
        ]
        for name in SECTIONS
        if (sources := vars(recipe)[name]) is not None
    }
    return dataclasses.replace(recipe, **named)


def trained_on(
    recipe: evaluations.EvalRecipe, models: Sequence[EvaluatedModel], rows: Mapping[str, SectionRows], origins: Origins
) -> Iterator[str]:
    """Which models come from runs that were trained on rows that they are measured on, and which do not tell."""
    yield from dict.fromkeys(said for model in models for said in unknown(origins[model.path]))
    for section, own in rows.items():
        for source, report in zip(vars(recipe)[section], own.dataset.reading.reports, strict=True):
            found: dict[Ancestor, list[str]] = {}
            for model in models:
                for run in origins[model.path]:
                    if report.fingerprint in run.trained_on and run.split != Split(source.holdout, source.holdout_seed):
                        found.setdefault(run, []).append(model.name)
            for run, names in found.items():
                yield (
                    f"{', '.join(names)} may have been trained on rows of {source.path}, {section} here: {run.path} learned from "
                    f"that file, and held out {run.split}."
                )
