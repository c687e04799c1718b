"""Rules on metrics: when a run ends early, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_cli.recipe import schema


def note_best(best: Mapping[str, float], metrics: Mapping[str, float], train: schema.Train) -> dict[str, float]:
    """The best values so far of every metric that a `falls` rule or `keep_best` watches."""
    modes = {name: "max" for name, rule in train.stop_if.items() if rule.falls is not None}
    if train.keep_best is not None:
        modes[train.keep_best.metric] = train.keep_best.mode
    new = dict(best)
    for name, mode in modes.items():
        if name in metrics:
            new[name] = (max if mode == "max" else min)(metrics[name], best.get(name, metrics[name]))
    return new


def reason_to_stop(rules: Mapping[str, schema.StopRule], metrics: Mapping[str, float], best: Mapping[str, float]) -> str | None:
    """The first rule that these metrics break, in words. `best` already counts them."""
    for name, rule in rules.items():
        if name not in metrics:
            continue
        value = metrics[name]
        if rule.above is not None and value > rule.above:
            return f"{name} {value:.4g} is above {rule.above:.4g}"
        if rule.below is not None and value < rule.below:
            return f"{name} {value:.4g} is below {rule.below:.4g}"
        if rule.falls is not None and best[name] - value > rule.falls * abs(best[name]):
            return f"{name} {value:.4g} has lost more than {rule.falls:.0%} of its best, {best[name]:.4g}"
    return None
