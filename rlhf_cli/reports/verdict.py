"""What the curves of a run say, in plain words."""

from __future__ import annotations

from typing import Any

from rlhf_cli.evaluation.intervals import wilson
from rlhf_cli.figures import figure, percent

Lines = list[dict[str, Any]]
RISE = 1.01
"""Held-out loss this far above its lowest is a rise and not noise."""
DISPLACED = 0.01
"""A log-probability of the chosen responses that falls by more than this share of itself is displacement."""
DRIFT = 0.25
"""A mean length that changes by more than this share is drift."""


def window(count: int) -> int:
    """How many steps one mean is over: a tenth of them, at most 10; single steps are noise."""
    return max(1, min(10, count // 10))


def ends(values: list[float]) -> tuple[float, float]:
    """Mean of the first and of the last `window` values."""
    size = window(len(values))
    return sum(values[:size]) / size, sum(values[-size:]) / size


def train_verdict(train: Lines) -> list[str]:
    """The training loss in a sentence."""
    if len(train) < 2:
        return ["Too few steps to say how the training loss moved."]
    first, last = ends([line["loss"] for line in train])
    size = window(len(train))
    over = f" (means of the first and the last {size} steps)" if size > 1 else ""
    if last < first:
        return [f"Training loss fell from {first:.4g} to {last:.4g}{over}."]
    words = f"**Training loss did not fall**: {first:.4g} at the start, {last:.4g} at the end{over}."
    return [f"{words} Is the learning rate right? Is the run too short?"]


def held_out_verdict(train: Lines, held_out: Lines) -> list[str]:
    """Whether the held-out loss fell, did not, or rose again while the training loss fell."""
    if not held_out:
        return ["No rows were held out, so nothing tells learning from memorising: set `data.holdout: 0.05` or `data.eval`."]
    first, last = held_out[0]["loss"], held_out[-1]["loss"]
    if len(held_out) == 1:
        return [f"Held-out loss was measured once, after step {held_out[0]['step']}: {last:.4g}."]
    moved = f"from {first:.4g} to {last:.4g}, {100 * (last - first) / abs(first):+.1f} %" if first else f"from 0 to {last:.4g}"
    if last < first:
        words = [f"Held-out loss fell {moved}: the model is better on rows it has not seen."]
    else:
        words = [f"**Held-out loss did not fall** ({moved}): on rows it has not seen, the model is not better than at the start."]
    best = min(held_out, key=lambda line: float(line["loss"]))
    since = _train_since(train, best["step"])
    if last - best["loss"] > (RISE - 1) * abs(best["loss"]) and since and since[1] < since[0]:
        words.append(
            f"**Overfitting**: held-out loss was lowest after step {best['step']} ({best['loss']:.4g}) and rose to {last:.4g}, "
            f"while training loss fell from {since[0]:.4g} to {since[1]:.4g}. Train for fewer steps, "
            "or keep the best checkpoint with `train.keep_best: {metric: loss, mode: min}`."
        )
    return words


def _train_since(train: Lines, step: int) -> tuple[float, float] | None:
    """Mean training loss just after `step` updates and at the end; None when those would share steps."""
    later = [line["loss"] for line in train if line["step"] > step]
    size = window(len(train))
    if len(later) < 2 * size:
        return None
    return sum(later[:size]) / size, sum(later[-size:]) / size


def moved(train: Lines, held_out: Lines, key: str) -> tuple[float, float] | None:
    """A metric at the start and at the end: on held-out rows, else `ends` of the training; None without two measurements."""
    on_held_out = any(key in line for line in held_out)
    values = [line[key] for line in (held_out if on_held_out else train) if key in line]
    if len(values) < 2:
        return None
    return (values[0], values[-1]) if on_held_out else ends(values)


def preference_verdict(train: Lines, held_out: Lines, rows: int) -> list[str]:
    """What the implicit rewards and log-probabilities of preferred responses say; nothing where a run has none.

    `rows`: held-out ones, the observations of an interval.
    """
    where = "held-out" if held_out else "training"

    def of(key: str) -> tuple[float, float] | None:
        return moved(train, held_out, key)

    words = []
    if accuracies := of("rewards/accuracies"):
        words.append(_accuracy(accuracies[1], where, rows if held_out else 0))
    if (desirable := of("rewards/desirable")) and (undesirable := of("rewards/undesirable")):
        words.append(_classes(desirable[1], undesirable[1], where))
    for better, worse in (("chosen", "rejected"), ("desirable", "undesirable")):
        if (margins := of("rewards/margins")) and (logps := of(f"logps/{better}")):
            words.append(_displacement(better, worse, logps, margins, where))
    if (logratio := of("margin/logratio")) and (target := of("margin/target")):
        words.append(_distance_to_target(logratio[1], target[1], where))
    elif saturated := of("rewards/saturated"):
        words.append(_saturation(saturated[1], where))
    return words


def _accuracy(share: float, where: str, rows: int) -> str:
    said = f"The implicit reward prefers the chosen response in {percent(share)} of the {where} pairs"
    if not rows:
        return f"{said}."
    low, high = wilson(share, rows)
    said += f" (95 % interval {percent(low)} to {percent(high)}, each of {rows:,} rows one observation)"
    return f"**{said}: that cannot be told from guessing.**" if low <= 0.5 else f"{said}."


def _classes(desirable: float, undesirable: float, where: str) -> str:
    said = f"the mean implicit reward of {where} desirable responses is {desirable:.4g}, of undesirable ones {undesirable:.4g}"
    if desirable > undesirable:
        return f"At the end {said}."
    return f"**The policy does not tell desirable from undesirable responses**: at the end {said}."


def _displacement(better: str, worse: str, logps: tuple[float, float], margins: tuple[float, float], where: str) -> str:
    first, last = logps
    said = f"the log-probability of the {where} {better} responses"
    if last >= first - DISPLACED * abs(first):
        return f"No displacement: {said} went from {first:.4g} to {last:.4g} nats."
    fell = f"{said} fell by {first - last:.4g} nats, from {first:.4g} to {last:.4g}"
    if margins[1] <= margins[0]:
        return f"**The {better} responses became less likely**: {fell}, and the margin did not grow."
    return (
        f"**Displacement**: {fell}, although the margin grew from {figure(margins[0])} to {figure(margins[1])}. The policy tells "
        f"the responses apart by making the {worse} ones unlikely, and what both lost went to responses that nobody has judged. "
        "Read the samples; a lower learning rate or fewer steps limit it"
        + (", `objective.sft_weight` holds the chosen responses up." if better == "chosen" else ".")
    )


def _distance_to_target(reached: float, target: float, where: str) -> str:
    said = f"The mean difference that IPO compares is {reached:.4g} on {where} pairs, its target {target:.4g}"
    if reached > target:
        return f"{said}: {reached - target:.4g} beyond it."
    return f"{said}: {target - reached:.4g} short of it, {percent(reached / target)} of the way."


def _saturation(share: float, where: str) -> str:
    said = (
        f"{percent(share)} of the {where} pairs are saturated: the loss has less than 5 % of its gradient at equal rewards there"
    )
    if share <= 0.5:
        return f"{said}."
    return f"**{said}.** More steps teach little and move the policy on: train for fewer epochs."


def length_verdict(samples: Lines) -> str | None:
    """How long the sampled responses were before and after; None where that is not known."""
    known = [line for line in samples if "tokens" in line]
    steps = [line["step"] for line in known]
    if not steps or min(steps) == max(steps):
        return None
    first, last = (_mean([line["tokens"] for line in known if line["step"] == step]) for step in (min(steps), max(steps)))
    said = f"{first:.1f} tokens before, {last:.1f} after"
    cut = any(not line["ended"] for line in known if line["step"] in (min(steps), max(steps)))
    note = "; those that did not end count as far as they were sampled" if cut else ""
    if abs(last - first) <= DRIFT * first:
        return f"Mean length of these responses: {said}{note}."
    return (
        f"**Length drift**: these responses have a mean of {said} ({percent(last / first - 1, '+') if first else 'from nothing'})"
        f"{note}. Preferences often follow length: are the {'longer' if last > first else 'shorter'} ones better?"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
