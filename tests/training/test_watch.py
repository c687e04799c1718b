"""Rules on metrics, by example."""

from __future__ import annotations

import pytest

from rlhf_cli.sections import KeepBest, StopRule, Train
from rlhf_cli.training.watch import Watched


@pytest.mark.parametrize(
    ("rule", "value", "best", "wanted"),
    [
        (StopRule(above=20), 20.0, None, None),
        (StopRule(above=20), 20.5, None, "objective/kl 20.5 is above 20"),
        (StopRule(below=0.5), 0.5, None, None),
        (StopRule(below=0.5), 0.25, None, "objective/kl 0.25 is below 0.5"),
        (StopRule(falls=0.2), 8.0, 10.0, None),
        (StopRule(falls=0.2), 7.9, 10.0, "objective/kl 7.9 has lost more than 20% of its best, 10"),
        (StopRule(falls=0.5), -3.0, -2.0, None),
        (StopRule(falls=0.5), -3.5, -2.0, "objective/kl -3.5 has lost more than 50% of its best, -2"),
        (StopRule(above=5, below=1), 0.5, None, "objective/kl 0.5 is below 1"),
    ],
)
def test_reason_to_stop(rule: StopRule, value: float, best: float | None, wanted: str | None) -> None:
    noted = Watched({} if best is None else {"train/objective/kl": best})
    train = Train(stop_if={"objective/kl": rule})
    assert noted.with_line(1, "train", {"objective/kl": value, "loss": 1e9}, train).stopped_by == wanted


def test_a_metric_that_is_not_there_breaks_no_rule() -> None:
    for rules in ({"score": StopRule(falls=0.1)}, {}):
        assert Watched().with_line(1, "train", {"loss": 1.0}, Train(stop_if=rules)) == Watched()


def test_best_values() -> None:
    """A `falls` rule follows the highest value of each split, keep_best its own mode on held-out lines; others are not noted."""
    train = Train(stop_if={"score": StopRule(falls=0.1), "kl": StopRule(above=1)}, keep_best=KeepBest("loss", "min"))
    watched = Watched()
    lines = (
        ("train", {"score": 1.0, "kl": 9.0, "loss": 1.0}),
        ("eval", {"score": 0.5, "loss": 3.0}),
        ("train", {"score": 2.0, "loss": 0.5}),
        ("eval", {"score": 0.4, "loss": 2.0}),
        ("eval", {"loss": 4.0}),
    )
    for step, (split, metrics) in enumerate(lines):
        watched = watched.with_line(step, split, metrics, train)
    assert watched.best == {"train/score": 2.0, "eval/score": 0.5, "keep_best": 2.0}
    assert watched.best_step == 3


def test_a_metric_that_may_not_fall_says_which_checkpoint_is_the_best() -> None:
    """Unless the recipe names another one: what stops the run for having fallen has a best checkpoint to go back to."""
    train = Train(stop_if={"objective/kl": StopRule(above=9), "gold/true": StopRule(falls=0.1)})
    watched = Watched()
    for step, (split, gold) in enumerate((("eval", 0.4), ("train", 0.9), ("eval", 0.6), ("eval", 0.5))):
        watched = watched.with_line(step, split, {"gold/true": gold, "objective/kl": 1.0}, train)
    assert watched.best == {"train/gold/true": 0.9, "eval/gold/true": 0.6, "keep_best": 0.6}
    assert (watched.best_step, watched.stopped_by) == (2, "gold/true 0.5 has lost more than 10% of its best, 0.6")
    named = Train(stop_if=train.stop_if, keep_best=KeepBest("loss", "min"))
    assert Watched().with_line(1, "eval", {"gold/true": 0.4, "loss": 2.0}, named).best["keep_best"] == 2.0
