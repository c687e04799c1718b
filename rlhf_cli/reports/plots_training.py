"""The pictures of a training run: every metric with a plot in the catalogue, over the steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_cli.figures import short
from rlhf_cli.metrics import Metric, Plot, in_order
from rlhf_cli.reports.document import Picture
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_picture, png, reliability_picture
from rlhf_cli.reports.run_result import History, RunResult

SMOOTH_FROM = 40  # from this many points on a line is drawn pale, with its moving average over it
COLOURS: dict[str, tuple[str, str]] = {
    "": (TRAIN, HELD_OUT),
    "chosen": (CHOSEN, "#1b3a5c"),
    "desirable": (CHOSEN, "#1b3a5c"),
    "rejected": (REJECTED, "#6b4a00"),
    "undesirable": (REJECTED, "#6b4a00"),
}
"""Which curve of a picture → its colours of training and of held-out rows."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture."""

    label: str
    colour: str
    steps: list[float]
    values: list[float]
    smoothed: bool
    dots: bool  # measured now and then


def draw_training(result: RunResult) -> dict[str, list[Picture]]:
    """Section's anchor → its pictures, those for which there are numbers, in the order of reading."""
    pictures = {"learned": [_picture(*key, *own) for key, own in _plots(result.history).items()], "card": []}
    if result.card and (margins := result.card.agreement.margins):
        reliability = result.card.agreement.reliability
        pictures["card"].append(reliability_picture(reliability, "the reward model", "reliability.png"))
        pictures["card"].append(margins_picture(margins, "held-out pairs", "margins.png"))
    return pictures


def _plots(history: History) -> dict[tuple[str, str], tuple[Plot, list[Curve]]]:
    """(file, title) of every picture → what is in it; metrics with the same plot share a picture, each term has its own."""
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
    return pictures


def _curves(row: Metric, name: str, plot: Plot, history: History) -> Iterator[Curve]:
    """On the batches of the training and on held-out rows; a line that lacks the metric (a batch of one class) is a step over."""
    before = 0 if plot.of_step else 1  # a train line's figure is of the weights before its update, an eval line's of those after
    splits = (("training", history.train, before), ("held-out rows", history.held_out, 0))
    for (split, lines, back), colour in zip(splits, COLOURS[row.curve], strict=True):
        known = [line for line in lines if name in line]
        if known:
            label = f"{row.curve}, {split}" if row.curve else split
            smoothed = split == "training" and plot.smooth and len(known) >= SMOOTH_FROM
            dots = split == "held-out rows" or len(known) == 1
            yield Curve(label, colour, [line["step"] - back for line in known], [line[name] for line in known], smoothed, dots)


def _picture(file: str, title: str, plot: Plot, curves: list[Curve]) -> Picture:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = canvases(title, "steps", [plot.unit])
    for curve in curves:
        label, values, width = curve.label, curve.values, 1.6
        if curve.smoothed:
            reach = len(values) // 40
            axes.plot(curve.steps, values, color=curve.colour, alpha=0.3, linewidth=1.2)
            label, values, width = f"{label} (mean of {2 * reach + 1} steps)", moving_average(values, reach), 1.8
        marker = "o" if curve.dots else ""
        axes.plot(curve.steps, values, color=curve.colour, linewidth=width, marker=marker, markersize=4, label=label)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1 or curves[0].smoothed:
        axes.legend(frameon=False)
    shown = (f"{curve.label} from {short(curve.values[0])} to {short(curve.values[-1])}" for curve in curves)
    return Picture(title, f"{file}.png", f"{title} over the steps, in {plot.unit}: {'; '.join(shown)}.", png(figure))


def moving_average(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on both sides, as many on the left as on the right.

    >>> moving_average([1.0, 3.0, 8.0], 1)
    [1.0, 4.0, 8.0]
    """
    last = len(values) - 1
    sides = [min(reach, place, last - place) for place in range(len(values))]
    return [sum(values[place - side : place + side + 1]) / (2 * side + 1) for place, side in enumerate(sides)]
