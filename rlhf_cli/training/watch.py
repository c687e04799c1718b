"""Rules on metrics: when a run ends early, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_cli import sections

KEPT = "keep_best"
"""The key of the best held-out value that `kept_by` names; a `falls` rule has one for training and one for held-out lines."""


@dataclass(frozen=True)
class Watched:
    """What `stop_if` and `keep_best` have seen so far."""

    best: dict[str, float] = field(default_factory=dict)  # metric → its best value
    best_step: int | None = None  # the checkpoint that keep_best protects
    stopped_by: str | None = None  # the rule of stop_if that ended the run

    def with_line(self, step: int, split: str, metrics: Mapping[str, float], train: sections.Train) -> Watched:
        """After a line of `split` (train or eval)."""
        best = note_best(self.best, split, metrics, train)
        stopped_by = self.stopped_by or reason_to_stop(train.stop_if, split, metrics, best)
        return Watched(best, step if best.get(KEPT) != self.best.get(KEPT) else self.best_step, stopped_by)


def note_best(best: Mapping[str, float], split: str, metrics: Mapping[str, float], train: sections.Train) -> dict[str, float]:
    """The best values so far, with those of a line of `split` (train or eval)."""
    new = dict(best)
    for name, rule in train.stop_if.items():
        if rule.falls is not None and name in metrics:
            key = f"{split}/{name}"
            new[key] = max(metrics[name], best.get(key, metrics[name]))
    keep = kept_by(train)
    if keep is not None and split == "eval" and keep.metric in metrics:
        new[KEPT] = (max if keep.mode == "max" else min)(metrics[keep.metric], best.get(KEPT, metrics[keep.metric]))
    return new


def kept_by(train: sections.Train) -> sections.KeepBest | None:
    """What decides which checkpoint is the best: `keep_best`, else the first metric that may not fall."""
    falling = [name for name, rule in train.stop_if.items() if rule.falls is not None]
    return train.keep_best or (sections.KeepBest(falling[0], "max") if falling else None)


def reason_to_stop(
    rules: Mapping[str, sections.StopRule], split: str, metrics: Mapping[str, float], best: Mapping[str, float]
) -> str | None:
    """The first rule that the metrics of a line break, in words. `best` already counts them."""
    for name, rule in rules.items():
        if name not in metrics:
            continue
        value = metrics[name]
        if rule.above is not None and value > rule.above:
            return f"{name} {value:.4g} is above {rule.above:.4g}"
        if rule.below is not None and value < rule.below:
            return f"{name} {value:.4g} is below {rule.below:.4g}"
        if rule.falls is not None:
            peak = best[f"{split}/{name}"]
            if peak - value > rule.falls * abs(peak):
                return f"{name} {value:.4g} has lost more than {rule.falls:.0%} of its best, {peak:.4g}"
    return None
