"""Accuracy of the answer that several responses to a prompt agree on, or that a reward chooses among theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.eval_json import Voted
from rlhf_cli.evaluation.intervals import ratio_interval, within_shares
from rlhf_cli.recipe import evaluations
from rlhf_cli.rollout.verifiable import COMPARE, extractor, right_answer

Elector = tuple[str, np.ndarray | None]
"""majority, weighted or best, and the (P, N) scores by which the last two choose; NaN where there is none."""
SUBSETS = 20_000  # of a prompt's responses; where there are more of them, so many are drawn


def right_answers(match: sections.Match, records: Sequence[Record], place: str) -> list[str | None]:
    """Those of the rows, None where one has none. UsageError: one is neither text nor a number, or too few rows have any."""
    found = []
    for record in records:
        try:
            found.append(right_answer(match, json.loads(record.columns or "{}")))
        except UsageError as error:
            raise UsageError(f"{place}: {record.where}: {error}") from None
    if len(found) - found.count(None) < 2:
        raise UsageError(f"{place}: fewer than 2 rows have an answer in '{match.column}', which is too few for any interval")
    return found


def ballots(texts: Sequence[str], match: sections.Match) -> tuple[list[str], np.ndarray]:
    """The different answers in the order in which they are seen, and (N,) which of them each text gives, −1 for none.

    An answer that does not even equal itself, such as one without a number among numbers, is none.
    """
    extract, same = extractor(match.extract), COMPARE[match.compare]
    answers, known = list[str](), dict[str | None, int]({None: -1, "": -1})
    cast = []
    for text in texts:
        answer = extract(text)
        if answer is not None and answer not in known:
            known[answer] = next((k for k, other in enumerate(answers) if same(answer, other)), -1)
            if known[answer] < 0 and same(answer, answer):
                known[answer] = len(answers)
                answers.append(answer)
        cast.append(known[answer])
    return answers, np.array(cast)


def winners(by: str, cast: np.ndarray, scores: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """(S,) the answer that wins in each subset, of a tie the one seen first; −1: nobody has an answer.

    cast: (N,) of `ballots`; scores: (N,), all 1 for a majority (Wang et al. 2023, "Self-consistency improves chain of thought
    reasoning in language models"), from 0 to 1 where they weigh votes (Li et al. 2023, "Making language models better
    reasoners with step-aware verifier"), NaN: no vote; subsets: (S, n) numbers of responses, ascending.
    """
    votes, backing = np.where(np.isnan(scores), 0, cast + 1)[subsets], np.nan_to_num(scores)[subsets]
    if by != "best":
        rows = np.arange(len(votes))[:, None] * (cast.max() + 2)
        backing = np.bincount((rows + votes).ravel(), backing.ravel())[rows + votes]
    found: np.ndarray = (
        votes[np.arange(len(votes)), np.where(votes > 0, backing, -np.inf).argmax(1)] - 1
    )  # the first of the largest
    return found


def as_weights(scores: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """A term's scores of each model's responses: as they are if all lie from 0 to 1, else by the logistic function; NaN stays."""
    if all(((own >= 0) & (own <= 1) | np.isnan(own)).all() for own in scores.values()):
        return scores
    return {model: 1 / (1 + np.exp(-np.clip(own, -700, 700))) for model, own in scores.items()}


def electors(by: Sequence[str], rewards: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> dict[str, Elector]:
    """Who wins a vote, by name; rewards, and weights from 0 to 1: term → (P, N). With several terms each wins by its own name."""
    found: dict[str, Elector] = {}
    for kind in by:
        if kind == "majority":
            found[kind] = kind, None
        for term, scores in (rewards if kind == "best" else weights if kind == "weighted" else {}).items():
            found[kind if len(rewards) == 1 else f"{kind} by {term}"] = kind, scores
    return found


def subsets_of(size: int, n: int, seed: int) -> np.ndarray:
    """(S, n) all subsets of n of so many responses, or SUBSETS drawn ones where there are more; ascending."""
    if math.comb(size, n) <= SUBSETS:
        return np.array([*combinations(range(size), n)])
    return np.sort(np.random.default_rng(seed).random((SUBSETS, size)).argsort(1)[:, :n], 1)


def drawn_subsets(size: int, ns: Sequence[int], seed: int) -> Iterator[str]:
    """What the report says of votes that are not counted in all subsets."""
    for n in ns:
        if math.comb(size, n) > SUBSETS:
            there = f"{SUBSETS:,} of the {math.comb(size, n):,} subsets of a prompt's {size} responses"
            yield f"Votes of n = {n}: over {there}, drawn with seed {seed}."


def vote_accuracies(
    texts: Sequence[Sequence[str]],
    right: Sequence[str | None],
    vote: evaluations.Vote,
    chosen_by: Mapping[str, Elector],
    counts: np.ndarray,
    seed: int,
) -> dict[str, list[Voted]]:
    """Who wins → accuracy for each n: mean over all subsets of n of a prompt's responses, without an answer wrong.

    texts: (P)(N) responses; right: (P) answers, prompts without one are left out; counts: (B, P), of `resamples`.
    """
    known = np.array([answer is not None for answer in right], np.float64)
    ns = sorted(vote.n)
    subsets = [subsets_of(len(texts[0]), n, seed) for n in ns]
    shares = np.zeros((len(chosen_by), len(ns), len(texts)))
    for at, (own, answer) in enumerate(zip(texts, right, strict=True)):
        if answer is not None:
            answers, cast = ballots(own, vote.match)
            correct = np.array([*(COMPARE[vote.match.compare](each, answer) for each in answers), False])
            for share, (kind, scores) in zip(shares, chosen_by.values(), strict=True):
                worth = np.ones(len(cast)) if scores is None else scores[at]
                share[:, at] = [correct[winners(kind, cast, worth, each)].mean() for each in subsets]
    return {
        name: [Voted(n, *within_shares(ratio_interval(each, known, counts))) for n, each in zip(ns, share, strict=True)]
        for name, share in zip(chosen_by, shares, strict=True)
    }
