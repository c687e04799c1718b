"""How often the 95 % intervals of cards and evaluations cover the truth, where it is known because the data are simulated.

Prints a table for docs/evaluation.md; some minutes on one core. `--times N`: simulations of each line, 1,000 by default.
`--only TEXT`: the lines with this text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree
from rlhf_cli.evaluation import intervals
from rlhf_cli.evaluation.at_kl import compare_at_kl
from rlhf_cli.evaluation.overoptimisation import fit, peak, run_point
from rlhf_cli.evaluation.preference import lead, margins, rate
from rlhf_cli.evaluation.winrate import ratings, win_rate

DRAWS = 400  # bootstrap draws of each interval; evaluations take 2,000
Draw = np.random.Generator
Covers = Callable[[Draw], bool]


def pairs(prompts: int, rows: int) -> Covers:
    """The accuracy of a judge that is right with another chance, of Beta(2, 1), for each prompt."""

    def covers(draw: Draw) -> bool:
        right = draw.random(prompts * rows) < np.repeat(draw.beta(2, 1, prompts), rows)
        two = (np.ones(1, np.int32), np.ones(1, np.int32))
        trees = [Tree(np.array([k // rows], np.int32), np.zeros(1, bool), two, k, Facts()) for k in range(len(right))]
        own = rate(margins(trees, [(1.0, 0.0) if each else (0.0, 1.0) for each in right]))
        return own is not None and own.low <= 2 / 3 <= own.high

    return covers


def mean(prompts: int, skewed: bool) -> Covers:
    """The mean of a figure: of normal numbers, or of exponential ones, as a KL or a length may be."""

    def covers(draw: Draw) -> bool:
        values = draw.exponential(size=prompts) if skewed else draw.normal(1, 1, prompts)
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        own = intervals.ratio_interval(values, np.ones(prompts), counts)
        return own.low <= 1 <= own.high

    return covers


def won(prompts: int, share: float) -> Covers:
    """A win rate."""

    def covers(draw: Draw) -> bool:
        outcome = (draw.random((prompts, 1)) < share).astype(float)
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        own = win_rate(outcome, np.zeros((prompts, 1)), counts).rate
        return own.low <= share <= own.high

    return covers


def ahead(prompts: int, rows: int) -> Covers:
    """By how much a judge, right in 65 %, is before a rule that is in 55 %: both depend on the prompt, and on one another."""

    def covers(draw: Draw) -> bool:
        two = (np.ones(1, np.int32), np.ones(1, np.int32))
        trees = [Tree(np.array([k // rows], np.int32), np.zeros(1, bool), two, k, Facts()) for k in range(prompts * rows)]
        easy, luck = np.repeat(draw.beta(2, 2, prompts), rows), draw.random(prompts * rows)
        other_luck = np.where(draw.random(len(luck)) < 0.7, luck, draw.random(len(luck)))
        right = [luck < 0.4 + 0.5 * easy, other_luck < 0.3 + 0.5 * easy]
        both = [margins(trees, [(1.0, 0.0) if each else (0.0, 1.0) for each in own]) for own in right]
        own = lead(*both)
        return own.low <= 0.1 <= own.high

    return covers


def at_equal_length(prompts: int, better: float) -> Covers:
    """A win rate with length taken out, of outcomes with the logit `better` + 0.8·tanh(Δ/20)."""

    def covers(draw: Draw) -> bool:
        longer = draw.normal(15, 20, (prompts, 4)).round()
        outcome = (draw.random((prompts, 4)) < 1 / (1 + np.exp(-better - 0.8 * np.tanh(longer / 20)))).astype(float)
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        own = win_rate(outcome, longer, counts).length_controlled
        return own.low <= 1 / (1 + np.exp(-better)) <= own.high

    return covers


def rated(prompts: int, strength: float) -> Covers:
    """The rating of a model that is so many Elo points above the anchor, among three that all met."""

    def covers(draw: Draw) -> bool:
        true = {"a": 0.0, "b": strength, "c": -strength / 2}
        pairs = [("a", "b"), ("a", "c"), ("b", "c")]
        chance = {pair: 1 / (1 + 10 ** ((true[pair[1]] - true[pair[0]]) / 400)) for pair in pairs}
        outcomes = {pair: (draw.random((prompts, 1)) < own).astype(float) for pair, own in chance.items()}
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        own = ratings(list(true), outcomes, "a", counts)["b"]
        return own.low <= 1000 + strength <= own.high

    return covers


def fitted(prompts: int) -> Covers:
    """β of d (α − β d), fitted to gold at six KLs: noise that a prompt's points share, and noise of their own."""

    def covers(draw: Draw) -> bool:
        d = np.sqrt([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
        table = (d * (2 - 0.5 * d))[:, None] + draw.exponential(1, (1, prompts)) + draw.normal(0, 0.5, (6, prompts))
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        own = fit((d**2).tolist(), table.mean(1).tolist(), counts @ table.T / prompts, prompts).bon
        assert own is not None and own.beta_low is not None and own.beta_high is not None
        return own.beta_low <= 0.5 <= own.beta_high

    return covers


def flat(points: int, prompts: int) -> Covers:
    """No claim that gold fell along a run whose gold never changed."""

    def covers(draw: Draw) -> bool:
        counts, zero = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS), np.zeros((prompts, 1))
        level = draw.normal(size=(prompts, 1))
        gold = [level + draw.normal(size=(prompts, 1)) for _ in range(points)]
        own: Any = peak([run_point("run", str(k), k, zero, zero, each, counts) for k, each in enumerate(gold)], counts)
        return bool(own.fall.low <= 0)

    return covers


def at_equal_kl(prompts: int, kls: tuple[float, ...], mean: bool) -> Covers:
    """How much gold 1.9 d is ahead of 1.5 d, d = √KL: at the end of the common range, or in the mean over it.

    KLs are skewed, and gold follows them; half of both, and a level of gold, are a prompt's own, the rest each model's.
    """

    def covers(draw: Draw) -> bool:
        easy, shared, tables = draw.normal(0, 0.5, prompts), draw.gamma(2, 0.5, prompts), []
        for slope, reached in ((1.9, kls), (1.5, (0.2, 0.8, 2.5, 6.0))):
            own = {"start": (np.zeros(prompts), easy + draw.normal(0, 0.3, prompts))}
            for number, kl in enumerate(reached):
                ratio = kl * (shared + draw.gamma(2, 0.5, prompts)) / 2
                own[str(number)] = ratio, easy + slope * kl**0.5 + 0.2 * (ratio - kl) + draw.normal(0, 0.3, prompts)
            tables.append(own)
        counts = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS)
        found = compare_at_kl(("a", "b"), tables, counts)
        own_interval = found.mean if mean else found.matched[-1].difference
        assert own_interval is not None
        end = max(kls) ** 0.5
        return own_interval.low <= 0.4 * end / (2 if mean else 1) <= own_interval.high

    return covers


LINES: dict[str, Covers] = {
    "accuracy of pairs, 60 prompts of one row": pairs(60, 1),
    "accuracy of pairs, 60 prompts of 5 rows": pairs(60, 5),
    "accuracy of pairs, 60 prompts of 20 rows": pairs(60, 20),
    "mean of normal figures, 30 prompts": mean(30, False),
    "mean of skewed figures, 30 prompts": mean(30, True),
    "mean of skewed figures, 100 prompts": mean(100, True),
    "win rate of 50 %, 64 prompts": won(64, 0.5),
    "win rate of 95 %, 64 prompts": won(64, 0.95),
    "ahead of length, 60 prompts of one row": ahead(60, 1),
    "ahead of length, 60 prompts of 5 rows": ahead(60, 5),
    "win rate at equal length of 50 %, 64 prompts": at_equal_length(64, 0.0),
    "win rate at equal length of 73 %, 64 prompts": at_equal_length(64, 1.0),
    "rating of a model 100 Elo points ahead, 64 prompts": rated(64, 100.0),
    "rating of a model 400 Elo points ahead, 64 prompts": rated(64, 400.0),
    "β of a fit, 64 prompts": fitted(64),
    "gold at equal KL, mean over the range, 64 prompts": at_equal_kl(64, (0.3, 1.0, 2.0, 4.0), True),
    "gold at equal KL, end of the range, 64 prompts": at_equal_kl(64, (0.3, 1.0, 2.0, 4.0), False),
    "gold at equal KL, end of the range, four models about there, 64 prompts": at_equal_kl(
        64, (0.5, 2.0, 3.95, 4.0, 4.05, 4.1), False
    ),
    "no fall from the peak, 3 points of 60 prompts": flat(3, 60),
    "no fall from the peak, 10 points of 60 prompts": flat(10, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--only", default="", help="lines with this text alone")
    arguments = parser.parse_args()
    times = arguments.times
    print("| interval | covers |\n|---|---|")
    for name, covers in ((name, own) for name, own in LINES.items() if arguments.only in name):
        draw = np.random.default_rng(0)
        print(f"| {name} | {100 * np.mean([covers(draw) for _ in range(times)]):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
