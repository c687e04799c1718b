"""How often the 95 % intervals of cards and evaluations cover the truth, where it is known because the data are simulated.

Prints a table for docs/evaluation.md; some minutes on one core. `--times N`: simulations of each line, 1,000 by default.
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
from rlhf_cli.evaluation.overoptimisation import peak, run_point
from rlhf_cli.evaluation.preference import margins, rate
from rlhf_cli.evaluation.winrate import win_rate

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


def flat(points: int, prompts: int) -> Covers:
    """No claim that gold fell along a run whose gold never changed."""

    def covers(draw: Draw) -> bool:
        counts, zero = intervals.resamples(prompts, int(draw.integers(2**31)), DRAWS), np.zeros((prompts, 1))
        level = draw.normal(size=(prompts, 1))
        gold = [level + draw.normal(size=(prompts, 1)) for _ in range(points)]
        own: Any = peak([run_point("run", str(k), k, zero, zero, each, counts) for k, each in enumerate(gold)], counts)
        return bool(own.fall.low <= 0)

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
    "no fall from the peak, 3 points of 60 prompts": flat(3, 60),
    "no fall from the peak, 10 points of 60 prompts": flat(10, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000)
    times = parser.parse_args().times
    print("| interval | covers |\n|---|---|")
    for name, covers in LINES.items():
        draw = np.random.default_rng(0)
        print(f"| {name} | {100 * np.mean([covers(draw) for _ in range(times)]):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
