"""Whose response is better: the models of an evaluation compared by their scores, or by a language model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np

from rlhf_cli.data.records import prompt_lines
from rlhf_cli.evaluation.job import JUDGE, EvaluationJob
from rlhf_cli.evaluation.samples import Samples
from rlhf_cli.evaluation.winrate import outcomes
from rlhf_cli.judges.asking import Verdicts, prepare
from rlhf_cli.judges.judge import compare
from rlhf_cli.judges.question import Question
from rlhf_cli.rollout.judge_terms import find_judge
from rlhf_cli.sections import Judge

ModelPair = tuple[str, str]


def compare_models(
    job: EvaluationJob, samples: Mapping[str, Samples], verdicts: Path
) -> tuple[dict[ModelPair, np.ndarray], list[str]]:
    """(one, other) → (P, K) outcomes of the one's responses against the other's, and what the report is to say of them.

    By scores of all pairs of models; by a judge that is asked, which is dear enough, of each against the baseline. `verdicts`:
    where the answers of an endpoint are kept.

    MachineError: an endpoint gives no verdict; what it has given is kept.
    """
    winrate = job.recipe.winrate
    if winrate is None:
        return {}, []
    if not isinstance(winrate.judge, str):
        return _asked(job, winrate.judge, samples, winrate.baseline, verdicts)
    tables = {name: own.worths(winrate.judge) for name, own in samples.items()}
    texts = {name: np.array(own.texts(), object) for name, own in samples.items()}
    pairs = combinations(samples, 2)
    return {(one, other): outcomes(tables[one], tables[other], texts[one] == texts[other]) for one, other in pairs}, []


def _asked(
    job: EvaluationJob, settings: Judge, samples: Mapping[str, Samples], baseline: str, path: Path
) -> tuple[dict[ModelPair, np.ndarray], list[str]]:
    names = [name for name in samples if name != baseline]
    questions = [
        Question(prompt_lines(mine.prompt), mine.response, other.response)
        for name in names
        for own, others in zip(samples[name].own, samples[baseline].own, strict=True)
        for mine, other in zip(own, others, strict=True)
    ]

    def say(done: int, total: int) -> None:
        job.console.say(f"the judge has answered {done:,} of {total:,} questions")

    job.signals.say("while the judge was asked; its verdicts are kept, continue with --resume")
    recipe = job.recipe
    local = find_judge(settings, "pairwise", JUDGE, trust_remote_code=recipe.trust_remote_code, check=False)
    if local is not None:
        found = compare(local.load(settings, "pairwise", job.frozen_models(), "judge", job.budget), questions)
    else:
        with closing(Verdicts(path)) as verdicts:
            found = compare(prepare(settings, "pairwise", JUDGE, lambda: verdicts, say), questions)
    note = (
        f"The judge contradicted itself in {found.contradicting.sum():,} of {found.asked.sum():,} comparisons when the responses "
        "changed places; those count as ties."
    )
    tables = found.outcomes.reshape(len(names), *samples[baseline].shape)
    return {(name, baseline): table for name, table in zip(names, tables, strict=True)}, [note]
