"""Whose response is better: the models of an evaluation compared by their scores, or by a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np

from rlhf_cli.data.records import prompt_lines
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.job import JUDGE, EvaluationJob
from rlhf_cli.evaluation.samples import Sample, Samples
from rlhf_cli.evaluation.winrate import outcomes
from rlhf_cli.judges.asking import Verdicts, prepare
from rlhf_cli.judges.judge import compare
from rlhf_cli.judges.question import Question
from rlhf_cli.rollout.judge_terms import JudgeTerm, find_judge
from rlhf_cli.rollout.rewards import Answers, RewardTerm
from rlhf_cli.sections import Judge

ModelPair = tuple[str, str]
Outcomes = dict[ModelPair, np.ndarray]
"""(one, other) → (P, K) outcomes, or probabilities, of the one's responses against the other's."""


def compare_models(
    job: EvaluationJob, samples: Mapping[str, Samples], verdicts: Path
) -> tuple[Outcomes, dict[str, Outcomes], list[str]]:
    """What winrate.judge says, what every term says, by its name, and what the report is to say of it.

    All pairs of models are compared; by a model that is asked, which is dear enough, each with the baseline unless the recipe
    says `all_pairs`. `verdicts`: where the answers of an endpoint are kept.

    MachineError: an endpoint gives no verdict; what it has given is kept. UsageError: see `deciding`.
    """
    winrate, by_terms = job.recipe.winrate, dict[str, Outcomes]()
    for name, term in job.terms.named.items():
        if term.compares and not isinstance(term, JudgeTerm):  # asking one costs
            by_terms[name] = _side_by_side(job, term, samples)
        elif not term.compares and all(own.told(name) for own in samples.values()):
            by_terms[name] = _by_scores(samples, name)
    if winrate is None:
        return {}, by_terms, []
    if isinstance(winrate.judge, str):
        term_of = deciding(job)
        return by_terms[term_of] if term_of else _by_scores(samples, winrate.judge), by_terms, []
    others = [(name, winrate.baseline) for name in samples if name != winrate.baseline]
    own, notes = _asked(job, winrate.judge, samples, [*combinations(samples, 2)] if winrate.all_pairs else others, verdicts)
    return own, by_terms, notes


def deciding(job: EvaluationJob) -> str | None:
    """The term that compares by which winrate.judge decides; None: it decides by scores, or is asked.

    UsageError: it is a part of a score, and that of each model is the same, for it compares a model with itself.
    """
    judge = job.recipe.winrate and job.recipe.winrate.judge
    named = [name for name, term in job.terms.named.items() if judge in (name.partition("/")[0], term.name)]
    comparing = [name for name in named if job.terms.named[name].compares]
    if comparing and len(named) > 1:
        raise UsageError(f"{job.loaded.named(JUDGE)}: {comparing[0]} compares, and has no part in a sum. name that term alone")
    return comparing[0] if comparing else None


def _by_scores(samples: Mapping[str, Samples], judge: str) -> Outcomes:
    tables = {name: own.worths(judge) for name, own in samples.items()}
    texts = {name: np.array(own.texts(), object) for name, own in samples.items()}
    pairs = combinations(samples, 2)
    return {(one, other): outcomes(tables[one], tables[other], texts[one] == texts[other]) for one, other in pairs}


def _side_by_side(job: EvaluationJob, term: RewardTerm, samples: Mapping[str, Samples]) -> Outcomes:
    """The probability p that a term gives the first of two responses, which it sees as all there are to the prompt.

    (p + 1 − q)/2 with q that of the second: two that a function gives 0 each, for neither wins, are a tie.
    """
    scorer, found = term.load(job.frozen_models(alone=True), "judge", job.budget), Outcomes()
    records = next(iter(job.rows["prompts"].by_tokenisation.values())).records if samples else []
    for pair in combinations(samples, 2):
        size, columns = samples[pair[0]].shape[1], []
        for number in range(size):  # one response of each to a prompt at a time: a function may group by prompts
            both = _pairs(samples, pair)[number::size]
            texts, ended = [[a.response, b.response] for a, b in both], [[a.ended, b.ended] for a, b in both]
            answers = Answers([], [records[a.row] for a, _ in both], texts, ended, [[a.tokens, b.tokens] for a, b in both])
            wins = np.atleast_2d(scorer.score(answers))[0]
            if wrong := wins[(wins < 0) | (wins > 1)].tolist():
                raise UsageError(f"{term.place}: expected the probability to win, from 0 to 1, found {wrong[0]:g}")
            columns.append((wins[::2] + 1 - wins[1::2]) / 2)
        found[pair] = np.stack(columns, 1)
    return found


def _pairs(samples: Mapping[str, Samples], pair: ModelPair) -> list[tuple[Sample, Sample]]:
    """The responses of two models side by side, (P · K)."""
    rows = zip(*(samples[name].own for name in pair), strict=True)
    return [both for own, others in rows for both in zip(own, others, strict=True)]


def _asked(
    job: EvaluationJob, settings: Judge, samples: Mapping[str, Samples], pairs: Sequence[ModelPair], path: Path
) -> tuple[Outcomes, list[str]]:
    questions = [Question(prompt_lines(a.prompt), a.response, b.response) for pair in pairs for a, b in _pairs(samples, pair)]

    def say(done: int, total: int) -> None:
        job.console.say(f"the judge has answered {done:,} of {total:,} questions")

    job.signals.say("while the judge was asked; its verdicts are kept, continue with --resume")
    recipe = job.recipe
    local = find_judge(settings, "pairwise", JUDGE, trust_remote_code=recipe.trust_remote_code, check=False)
    if local is not None:
        found = compare(local.load(settings, "pairwise", job.frozen_models(alone=True), "judge", job.budget), questions)
    else:
        with closing(Verdicts(path)) as verdicts:
            found = compare(prepare(settings, "pairwise", JUDGE, lambda: verdicts, say), questions)
    note = (
        f"The judge contradicted itself in {found.contradicting.sum():,} of {found.asked.sum():,} comparisons when the responses "
        "changed places; those count as ties."
    )
    shape = next(iter(samples.values())).shape
    return dict(zip(pairs, found.outcomes.reshape(len(pairs), *shape), strict=True)), [note]
