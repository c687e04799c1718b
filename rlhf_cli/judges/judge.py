"""Which of two responses is better, or how good one is, by the answers of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlhf_cli.judges.question import Question, Wording


class Judge(Protocol):
    """Who is asked."""

    @property
    def wording(self) -> Wording: ...
    def answer(self, questions: Sequence[Question]) -> Mapping[Question, float]:
        """Of each question P(a is better), or how good a is, from 1 to 10; missing where the answer says nothing.

        RunError: there is no answer.
        """


@dataclass(frozen=True)
class Comparisons:
    """N comparisons, each made in both orders; texts that are equal are not asked about."""

    first: np.ndarray  # (2, N) float64: P(a is better), where a stood first and where it stood second; NaN: nothing was said
    asked: np.ndarray  # (N,) bool

    @property
    def probability(self) -> np.ndarray:
        """(N,) that a is better, the mean of both orders (Lee et al. 2023, RLAIF: a judge that says always "first" gives ½)."""
        return np.asarray(self.first.mean(0))

    @property
    def outcomes(self) -> np.ndarray:
        """(N,) 1 where a is better in both orders, 0 where b is, else ½ (Zheng et al. 2023, section 3.4)."""
        one, other = np.sign(self.first - 0.5)
        return np.where(one == other, (one + 1) / 2, 0.5)

    @property
    def contradicting(self) -> np.ndarray:
        """(N,) bool: the response in the same place was better in both orders."""
        one, other = np.sign(self.first - 0.5)
        return np.asarray(one * other < 0)


def compare(judge: Judge, comparisons: Sequence[Question]) -> Comparisons:
    """Ask about every comparison in both orders, with the principles that are drawn for it."""
    drawn = [judge.wording.drawn(each) if each.a != each.b else [] for each in comparisons]
    found = judge.answer([question for own in drawn for each in own for question in (each, each.swapped())])
    first = np.full((2, len(comparisons)), 0.5)
    for k, own in enumerate(drawn):
        if own:
            said = [(found.get(each, np.nan), 1 - found.get(each.swapped(), np.nan)) for each in own]
            first[:, k] = np.mean(said, 0)
    return Comparisons(first, np.array([bool(own) for own in drawn], bool))


def score(judge: Judge, questions: Sequence[Question]) -> np.ndarray:
    """(N,) how good each response is, from 1 to 10, the mean over the principles that are drawn for it."""
    drawn = [judge.wording.drawn(each) for each in questions]
    found = judge.answer([each for own in drawn for each in own])
    return np.array([np.mean([found[each] for each in own]) for own in drawn], np.float64)
