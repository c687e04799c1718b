"""The pictures of a report, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf_cli.runs.files import disk_error, write_atomic
from rlhf_cli.runs.verdict import Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, HELD_OUT = "#4878a8", "#c44e52"
SMOOTH_FROM = 40
"""From this many points on a line is drawn pale, with its moving average over it."""


def draw_plots(folder: Path, train: Lines, held_out: Lines) -> list[tuple[str, str]]:
    """Write the PNGs for which there are numbers; their (title, file name) in the order of reading."""
    # A read-only home makes matplotlib warn about its cache; the pictures are the same.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    drawn = []
    for name, title, unit, draw in PLOTS:
        if data := draw(train, held_out):
            write_atomic(folder / f"{name}.png", _png(title, unit, data))
            drawn.append((title, f"{name}.png"))
    return drawn


Kind = Literal["noisy", "exact", "rare"]
"""noisy: also as a moving average; rare: measured now and then, so the points are marked."""


class Curve(NamedTuple):
    """One line of a picture."""

    label: str
    colour: str
    steps: list[int]
    values: list[float]
    kind: Kind


def _loss(train: Lines, held_out: Lines) -> list[Curve]:
    # A train line's loss is of the weights before its update, an eval line's of those after: k − 1 and k updates.
    curves = [
        _curve("training", TRAIN, train, "loss", "noisy", before=1),
        _curve("held-out rows", HELD_OUT, held_out, "loss", "rare"),
    ]
    return [curve for curve in curves if curve.steps]


def _learning_rate(train: Lines, held_out: Lines) -> list[Curve]:
    curve = _curve("learning rate", TRAIN, train, "learning_rate", "exact")
    return [curve] if curve.steps else []


def _speed(train: Lines, held_out: Lines) -> list[Curve]:
    curve = _curve("tokens per second", TRAIN, train, "tokens_per_second", "noisy")
    return [curve] if curve.steps else []


PLOTS: tuple[tuple[str, str, str, Callable[[Lines, Lines], list[Curve]]], ...] = (
    ("loss", "Loss", "nats per token", _loss),
    ("learning_rate", "Learning rate", "learning rate", _learning_rate),
    ("tokens_per_second", "Speed", "tokens per second", _speed),
)


def _curve(label: str, colour: str, lines: Lines, key: str, kind: Kind, *, before: int = 0) -> Curve:
    found = [line for line in lines if key in line]
    return Curve(label, colour, [line["step"] - before for line in found], [line[key] for line in found], kind)


def moving_average(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on both sides, as many on the left as on the right.

    >>> moving_average([1.0, 3.0, 8.0], 1)
    [1.0, 4.0, 8.0]
    """
    last = len(values) - 1
    sides = [min(reach, place, last - place) for place in range(len(values))]
    return [sum(values[place - side : place + side + 1]) / (2 * side + 1) for place, side in enumerate(sides)]


def _png(title: str, unit: str, curves: list[Curve]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        _draw(axes, curve)
    axes.set_title(title, loc="left")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(unit)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 or _is_smoothed(curves[0]):
        axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _is_smoothed(curve: Curve) -> bool:
    return curve.kind == "noisy" and len(curve.values) >= SMOOTH_FROM


def _draw(axes: Axes, curve: Curve) -> None:
    label, colour, steps, values, kind = curve
    if _is_smoothed(curve):
        reach = len(values) // 40
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1.2)
        axes.plot(
            steps, moving_average(values, reach), color=colour, linewidth=1.8, label=f"{label} (mean of {2 * reach + 1} steps)"
        )
    else:
        marker = "o" if kind == "rare" or len(values) == 1 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
