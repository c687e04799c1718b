"""Accuracy of the answer that several responses to a prompt agree on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.eval_json import Voted
from rlhf_cli.evaluation.intervals import ratio_interval, within_shares
from rlhf_cli.rollout.verifiable import COMPARE, extractor, right_answer

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


def majority(cast: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """(S,) the answer with the most votes in each subset, of a tie the one seen first; −1: nobody has an answer.

    cast: (N,) of `ballots`; subsets: (S, n) numbers of responses, ascending. Wang et al. 2023, "Self-consistency
    improves chain of thought reasoning in language models".
    """
    votes = cast[subsets]
    tally = (votes[:, :, None] == np.arange(max(cast.max() + 1, 1))).sum(1)
    backing = np.where(votes < 0, 0, np.take_along_axis(tally, votes, 1))
    winner: np.ndarray = votes[np.arange(len(votes)), backing.argmax(1)]  # the first of the largest
    return winner


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
    texts: Sequence[Sequence[str]], right: Sequence[str | None], vote: sections.Vote, counts: np.ndarray, seed: int
) -> dict[str, list[Voted]]:
    """`vote.by` → accuracy for each n: mean over all subsets of n of a prompt's responses, without an answer wrong.

    texts: (P)(N) responses; right: (P) answers, prompts without one are left out; counts: (B, P), of `resamples`.
    """
    known = np.array([answer is not None for answer in right], np.float64)
    subsets = [subsets_of(len(texts[0]), n, seed) for n in sorted(vote.n)]
    shares = np.zeros((len(subsets), len(texts)))
    for at, (own, answer) in enumerate(zip(texts, right, strict=True)):
        if answer is not None:
            answers, cast = ballots(own, vote.match)
            correct = np.array([*(COMPARE[vote.match.compare](each, answer) for each in answers), False])
            shares[:, at] = [correct[majority(cast, each)].mean() for each in subsets]
    found = [within_shares(ratio_interval(share, known, counts)) for share in shares]
    return {by: [Voted(n, *own) for n, own in zip(sorted(vote.n), found, strict=True)] for by in vote.by}
