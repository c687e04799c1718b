"""Prompts whose responses all score alike: how many there are, what replaces them, and what a step may depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.source import PolicySource, PreferenceSource

ROWS, BATCH = 24, 4
Scores = Callable[[int, int], Sequence[float]]
"""The scores of a prompt's two responses, by its row and the number of its rollout."""


class Drawer:
    """Stands for a sampler: a prompt's two responses have 1 + row % 3 and 4 tokens, whose log-probabilities tell the row."""

    def __init__(self, scores: Scores) -> None:
        self.settings = sections.PolicySampling(responses_per_prompt=2, max_new_tokens=6)
        self.records: list[Record] = []
        self.scores = scores
        self.asked: list[tuple[list[int], int]] = []  # rows and seed of every rollout

    def rollout(self, prompts: Sequence[Tree], seed: int, *, values: bool = False) -> Rollout:
        rows = [tree.row for tree in prompts]
        trees = [tree._replace(responses=(np.zeros(1 + tree.row % 3, np.int32), np.zeros(4, np.int32))) for tree in prompts]
        known = np.concatenate([-0.01 * (1 + row) * np.ones(5 + row % 3) for row in rows])
        scores = np.concatenate([self.scores(row, len(self.asked)) for row in rows]).astype(float)
        self.asked.append((rows, seed))
        tokens = TokenFigures(known, known - 0.1, known, known - 0.1, known * (0.0 if values else np.nan), 0 * known, 0 * known)
        return Rollout(trees, np.ones(2 * len(rows), bool), {"reward/r": scores}, scores, tokens, {"rollout": 2.0, "score": 1.0})


def prompts() -> DatasetSource:
    records = [Record("", (), f"rows.jsonl:{n + 1}") for n in range(ROWS)]
    trees = [Tree(np.array([n], np.int32), np.zeros(1, bool), (), n) for n in range(ROWS)]
    return DatasetSource(flatten(trees, records), (ROWS,), (1.0,), BATCH, 3, True)


def source(scores: Scores, objective: PolicyGradient, **kl: Any) -> tuple[PolicySource, Drawer]:
    drawer: Any = Drawer(scores)
    return PolicySource(drawer, prompts(), objective, sections.Kl(estimator="k2", **kl), None, 0.0, 3), drawer


def rows(step: int) -> list[int]:
    return [tree.row for tree in prompts().batch(step)]


REDRAW = Grpo(ties="redraw")


def test_tied_prompts_are_replaced_by_the_next() -> None:
    """The second and the fourth tie, then the first of the next batch: that of the third batch stands for the fourth."""
    own, one, two = rows(1), rows(2), rows(3)
    tied = {own[1], own[3], one[0]}
    made, drawer = source(lambda row, _: (1, 1) if row in tied else (row, 0.5), REDRAW)
    found = made.collect(1, {})
    (trees,), (where,) = found.batches, found.locations
    assert [tree.row for tree in trees] == [own[0], one[1], own[2], two[0]]
    assert where == [f"rows.jsonl:{tree.row + 1}" for tree in trees]
    assert [asked for asked, _ in drawer.asked] == [own, one[:2], two[:1]]
    assert (found.metrics["reward/zero_spread"], found.metrics["rollout/redrawn"]) == (0.5, 0.5)
    # What was recorded of the tokens is that of the prompts that are learned from; a score above 0.5 is the better one.
    for tree in trees:
        better, worse = tree.recorded or ()
        for known, response in zip((better, worse), tree.responses, strict=True):
            assert known.old.tolist() == pytest.approx([-0.01 * (1 + tree.row)] * len(response))
        sign = np.sign(tree.row - 0.5)
        assert (better.advantage * sign > 0.9).all() and (worse.advantage * sign < -0.9).all()


def test_what_is_measured_is_of_the_steps_own_prompts() -> None:
    own = rows(1)
    made, _ = source(lambda row, _: (3, 3) if row == own[0] else (row, 0.5), REDRAW, target=1.0, horizon=10)
    plain, _ = source(lambda row, _: (3, 3) if row == own[0] else (row, 0.5), Grpo(), target=1.0, horizon=10)
    found, kept = made.collect(1, {}), plain.collect(1, {})
    scores = [(3 + 3) / 2, *((row + 0.5) / 2 for row in own[1:])]
    assert found.metrics["objective/scores"] == found.metrics["reward/r"] == pytest.approx(np.mean(scores))
    assert {name: found.metrics[name] for name in kept.metrics if "time" not in name} == {
        name: value for name, value in kept.metrics.items() if "time" not in name
    }
    assert found.memory == kept.memory
    assert (found.metrics["time/rollout"], kept.metrics["time/rollout"]) == (4.0, 2.0)
    assert "rollout/redrawn" not in kept.metrics and found.metrics["rollout/redrawn"] == 0.25


def test_four_rounds_at_most_and_the_rest_stay() -> None:
    """One untied prompt in each round takes the place of the first tied one; where all tie, all stay as they were."""
    own = rows(1)
    made, drawer = source(lambda _, __: (1, 1), REDRAW)
    found = made.collect(1, {})
    assert [tree.row for tree in found.batches[0]] == own
    assert [asked for asked, _ in drawer.asked] == [rows(k) for k in range(1, 6)]
    assert (found.metrics["reward/zero_spread"], found.metrics["rollout/redrawn"]) == (1.0, 0.0)
    last = {rows(5)[0], rows(5)[2]}
    made, drawer = source(lambda row, _: (1, 0) if row in last else (1, 1), REDRAW)
    assert [tree.row for tree in made.collect(1, {}).batches[0]] == [rows(5)[0], rows(5)[2], *own[2:]]
    assert len(drawer.asked) == 5


def test_a_step_draws_the_same_whatever_went_before() -> None:
    """And a run that is resumed at it; no two rounds or steps share a seed."""
    untied = {rows(k)[0] for k in range(2, 9)}

    def scores(row: int, _: int) -> Sequence[float]:
        return (row, 0.5) if row in untied else (1, 1)

    whole, drawer = source(scores, REDRAW)
    steps = {step: (whole.collect(step, {}), drawer.asked.copy()) for step in (1, 2, 3) if not drawer.asked.clear()}
    fresh, other = source(scores, REDRAW)
    again = fresh.collect(3, {})
    assert other.asked == steps[3][1]
    assert [tree.row for tree in again.batches[0]] == [tree.row for tree in steps[3][0].batches[0]]
    assert again.metrics == steps[3][0].metrics
    lucky, drawer = source(lambda row, _: (row, 0.5), REDRAW)  # nothing ties: the later step's prompts are the same
    lucky.collect(2, {})
    assert drawer.asked == [steps[2][1][0]]
    seeds = [seed for _, asked in steps.values() for _, seed in asked]
    assert len(seeds) == len(set(seeds)) > 9
    assert seeds[:2] == [Stream.ROLLOUT.seed(3, 1), Stream.REDRAW.seed(3, 1, 1)]


@pytest.mark.parametrize("objective", [Grpo(), Rloo(), Ppo(), Rloo(ties="redraw")])
def test_ties_are_counted_before_the_penalty_for_length(objective: PolicyGradient) -> None:
    """Where they are kept, nothing is drawn again; of one response to a prompt there is no spread to speak of."""
    tied = rows(1)[2]
    made, drawer = source(lambda row, _: (1, 1) if row == tied else (row, 0.5), objective)
    found = made.collect(1, {})
    assert found.metrics["reward/zero_spread"] == 0.25
    assert len(drawer.asked) == (2 if objective.redraws else 1)


def test_the_penalty_for_length_is_part_of_the_score_that_is_learned_from() -> None:
    """Responses of 1 to 3 and of 4 tokens, 6 at most: the last 3 count, so that 4 tokens lose a third."""
    made, _ = source(lambda row, _: (1, 1), Rloo(overlong=3))
    found = made.collect(1, {})
    assert found.metrics["reward/zero_spread"] == 1.0
    assert found.metrics["objective/scores"] == 1.0
    assert found.metrics["response/overlong"] == pytest.approx(-1 / 6)
    assert found.given["max_new_tokens"] == 6.0
    for tree in found.batches[0]:
        shorter, longer = tree.recorded or ()
        assert shorter.advantage == pytest.approx(1 / 3) and longer.advantage == pytest.approx(-1 / 3)


def test_direct_objectives_count_them_too() -> None:
    tied = rows(1)[2]
    drawer: Any = Drawer(lambda row, _: (1, 1) if row == tied else (row, 0.5))
    drawer.records = [Record("", (), f"rows.jsonl:{n + 1}") for n in range(ROWS)]
    found = PreferenceSource(drawer, prompts(), 1, 5, Dpo(), None, 3).collect(1, {})
    assert found.metrics["reward/zero_spread"] == 0.25
    assert len(found.batches[0]) == BATCH - 1
