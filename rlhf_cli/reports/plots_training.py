"""The pictures of a training run: every metric with a plot in the catalogue, over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from rlhf_cli.figures import short
from rlhf_cli.metrics import Metric, Plot, in_order
from rlhf_cli.reports.document import Picture
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_picture, png, reliability_picture
from rlhf_cli.reports.run_result import History, RunResult

DRAWN = 2000  # points of a line: more are not seen on a picture of 864 pixels, and take long to draw
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
    kind: str  # chosen, rejected …; empty where a picture has one kind
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
        if result.card.unit == "pair":
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
            file, title = re.sub(r"[^\w.-]", "_", name), f"{title}: {name.removeprefix(row.name).removesuffix(row.name)}"
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
            yield Curve(
                label, row.curve, colour, [line["step"] - back for line in known], [line[name] for line in known], smoothed, dots
            )


def _picture(file: str, title: str, plot: Plot, curves: list[Curve]) -> Picture:
    from matplotlib.ticker import MaxNLocator

    panels = _panels(curves)
    figure, all_axes = canvases(title, "steps", [plot.unit] * len(panels), height=4.0 if len(panels) == 1 else 5.6)
    for axes, own in zip(all_axes, panels, strict=True):
        for curve in own:
            label, values, width = curve.label, curve.values, 1.6
            if curve.smoothed:
                reach = len(values) // 40
                axes.plot(*thinned(curve.steps, values), color=curve.colour, alpha=0.3, linewidth=1.2)
                label, values, width = f"{label} (mean of {2 * reach + 1} steps)", moving_average(values, reach), 1.8
            marker, line = "o" if curve.dots else "", thinned(curve.steps, values)
            axes.plot(*line, color=curve.colour, linewidth=width, marker=marker, markersize=4, label=label)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1 or curves[0].smoothed:
        figure.legend(frameon=False, loc="outside lower left", ncols=2)  # where it hides no curve
    shown = (f"{curve.label} from {short(curve.values[0])} to {short(curve.values[-1])}" for curve in curves)
    return Picture(title, f"{file}.png", f"{title} over the steps, in {plot.unit}: {'; '.join(shown)}.", png(figure))


def _panels(curves: list[Curve]) -> list[list[Curve]]:
    """All in one, or one of each kind below the other where they are further apart than either moves: it would not be seen."""
    kinds: dict[str, list[Curve]] = {}
    for curve in curves:
        kinds.setdefault(curve.kind, []).append(curve)
    ranges = sorted((min(values), max(values)) for own in kinds.values() if (values := [v for each in own for v in each.values]))
    apart = any(low - high > max(high - before, beyond - low) for (before, high), (low, beyond) in pairwise(ranges))
    return list(kinds.values()) if apart else [curves]


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most DRAWN points of a line, the lowest and the highest of every stretch: no peak is lost.

    >>> thinned([1.0, 2.0], [5.0, 6.0])
    ([1.0, 2.0], [5.0, 6.0])
    """
    if len(values) <= DRAWN:
        return steps, values
    size, kept = math.ceil(2 * len(values) / DRAWN), list[int]()
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[k] for k in kept], [values[k] for k in kept]


def moving_average(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on each side, as many as there are.

    >>> moving_average([1.0, 3.0, 8.0], 1)
    [2.0, 4.0, 5.5]
    """
    sums, count = [0.0, *accumulate(values)], len(values)
    ends = ((max(0, place - reach), min(count, place + reach + 1)) for place in range(count))
    return [(sums[high] - sums[low]) / (high - low) for low, high in ends]
