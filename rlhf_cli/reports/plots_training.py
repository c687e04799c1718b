"""The pictures of a training run: every metric with a plot in the catalogue, over the steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf_cli.figures import short
from rlhf_cli.metrics import Metric, Plot, in_order
from rlhf_cli.reports.document import Picture
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_picture, png, reliability_picture, save
from rlhf_cli.reports.run_result import History, Line, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_FROM = 40
"""From this many points on a line is drawn pale, with its moving average over it."""
COLOURS: dict[str, tuple[str, str]] = {
    "": (TRAIN, HELD_OUT),
    "chosen": (CHOSEN, "#1b3a5c"),
    "desirable": (CHOSEN, "#1b3a5c"),
    "rejected": (REJECTED, "#6b4a00"),
    "undesirable": (REJECTED, "#6b4a00"),
}
"""Which curve of a picture → its colours of training and of held-out rows."""


class Pictures(NamedTuple):
    """Of a run's report."""

    learned: list[Picture]
    card: list[Picture]


@dataclass(frozen=True)
class Curve:
    """One line of a picture."""

    label: str
    colour: str
    steps: list[float]
    values: list[float]
    smoothed: bool
    dots: bool  # measured now and then


def draw_training(folder: Path, result: RunResult) -> Pictures:
    """Write the PNGs for which there are numbers, in the order of reading."""
    learned = [_picture(*own) for own in _plots(result.history)]
    card = []
    if result.card and result.card.agreement.margins:
        own = result.card.agreement
        margins = margins_picture(result.card.agreement.margins, "held-out pairs", "margins.png")
        card = [reliability_picture(own.reliability, "the reward model", "reliability.png"), margins]
    save(folder, [*learned, *card])
    return Pictures(learned, card)


def _plots(history: History) -> Iterator[tuple[str, str, Plot, list[Curve]]]:
    """(file, title, plot, curves) of every picture; metrics with the same plot share a picture, each term has its own."""
    names = [(row, name) for row, name in in_order(history.names) if row.plot]
    if len([name for row, name in names if row.name == "reward/"]) < 2:
        names = [(row, name) for row, name in names if row.name != "reward/"]  # the score is its only term
    pictures: dict[tuple[str, str], tuple[Plot, list[Curve]]] = {}
    for row, name in names:
        plot = row.plot
        assert plot is not None
        file, title = plot.file, plot.title
        if row.is_term:
            file, title = re.sub(r"[^\w.-]", "_", name), f"{title}: {name.removeprefix(row.name)}"
        pictures.setdefault((file, title), (plot, []))[1].extend(_curves(row, name, plot, history))
    for (file, title), (plot, curves) in pictures.items():
        yield file, title, plot, curves


def _curves(row: Metric, name: str, plot: Plot, history: History) -> Iterator[Curve]:
    """On the batches of the training and on held-out rows; a line that lacks the metric (a batch of one class) is a step over."""
    prefix = f"{row.curve}, " if row.curve else ""
    train = [line for line in history.train if name in line]
    before = 0 if plot.of_step else 1  # a train line's figure is of the weights before its update, an eval line's of those after
    if train:
        smoothed = plot.smooth and len(train) >= SMOOTH_FROM
        steps, values = _points(train, name, before)
        yield Curve(f"{prefix}training", COLOURS[row.curve][0], steps, values, smoothed, len(train) == 1)
    held_out = [line for line in history.held_out if name in line]
    if held_out:
        steps, values = _points(held_out, name, 0)
        yield Curve(f"{prefix}held-out rows", COLOURS[row.curve][1], steps, values, False, True)


def _points(lines: list[Line], name: str, before: int) -> tuple[list[float], list[float]]:
    return [line["step"] - before for line in lines], [line[name] for line in lines]


def _picture(file: str, title: str, plot: Plot, curves: list[Curve]) -> Picture:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = canvases(title, "steps", [plot.unit])
    for curve in curves:
        _draw(axes, curve)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1 or curves[0].smoothed:
        axes.legend(frameon=False)
    shown = (f"{curve.label} from {short(curve.values[0])} to {short(curve.values[-1])}" for curve in curves)
    return Picture(title, f"{file}.png", f"{title} over the steps, in {plot.unit}: {'; '.join(shown)}.", png(figure))


def _draw(axes: Axes, curve: Curve) -> None:
    if curve.smoothed:
        reach = len(curve.values) // 40
        axes.plot(curve.steps, curve.values, color=curve.colour, alpha=0.3, linewidth=1.2)
        label = f"{curve.label} (mean of {2 * reach + 1} steps)"
        axes.plot(curve.steps, moving_average(curve.values, reach), color=curve.colour, linewidth=1.8, label=label)
    else:
        marker = "o" if curve.dots else ""
        axes.plot(curve.steps, curve.values, color=curve.colour, linewidth=1.6, marker=marker, markersize=4, label=curve.label)


def moving_average(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on both sides, as many on the left as on the right.

    >>> moving_average([1.0, 3.0, 8.0], 1)
    [1.0, 4.0, 8.0]
    """
    last = len(values) - 1
    sides = [min(reach, place, last - place) for place in range(len(values))]
    return [sum(values[place - side : place + side + 1]) / (2 * side + 1) for place, side in enumerate(sides)]
