"""Rules on metrics: when a run ends early, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_cli import sections

KEPT = "keep_best"
"""The key of the best held-out value of the metric that says which checkpoint is the best."""


@dataclass(frozen=True)
class Watched:
    """What `stop_if` and `keep_best` have seen so far."""

    best: dict[str, float] = field(default_factory=dict)  # KEPT, and "split/metric" of each `falls` rule → its best value
    best_step: int | None = None  # the checkpoint that keep_best protects
    stopped_by: str | None = None  # the rule of stop_if that ended the run

    def with_line(self, step: int, split: str, metrics: Mapping[str, float], train: sections.Train) -> Watched:
        """After a line of `split` (train or eval). The first rule that a line breaks ends the run."""
        best, stopped_by = dict(self.best), self.stopped_by
        for name, rule in train.stop_if.items():
            if name not in metrics:
                continue
            key, value = f"{split}/{name}", metrics[name]
            peak = max(value, best.get(key, value))
            if rule.falls is not None:
                best[key] = peak
            stopped_by = stopped_by or _reason_to_stop(name, rule, value, peak)
        # Without keep_best, the first metric that may not fall says which checkpoint is the best.
        falling = [name for name, rule in train.stop_if.items() if rule.falls is not None]
        keep = train.keep_best or (sections.KeepBest(falling[0], "max") if falling else None)
        if keep is not None and split == "eval" and keep.metric in metrics:
            best[KEPT] = (max if keep.mode == "max" else min)(metrics[keep.metric], best.get(KEPT, metrics[keep.metric]))
        return Watched(best, step if best.get(KEPT) != self.best.get(KEPT) else self.best_step, stopped_by)


def _reason_to_stop(name: str, rule: sections.StopRule, value: float, peak: float) -> str | None:
    if rule.above is not None and value > rule.above:
        return f"{name} {value:.4g} is above {rule.above:.4g}"
    if rule.below is not None and value < rule.below:
        return f"{name} {value:.4g} is below {rule.below:.4g}"
    if rule.falls is not None and peak - value > rule.falls * abs(peak):
        return f"{name} {value:.4g} has lost more than {rule.falls:.0%} of its best, {peak:.4g}"
    return None
