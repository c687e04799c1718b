"""What the curves of a run say, in plain words."""

from __future__ import annotations

from typing import Any

Lines = list[dict[str, Any]]
RISE = 1.01
"""Held-out loss this far above its lowest is a rise and not noise."""


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
    if last > RISE * best["loss"] and since and since[1] < since[0]:
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
