"""The pictures of a report, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlhf_cli.files import disk_error, write_atomic
from rlhf_cli.reports.verdict import Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, HELD_OUT = "#4878a8", "#c44e52"
CHOSEN, REJECTED = "#4878a8", "#b8860b"
CHOSEN_HELD_OUT, REJECTED_HELD_OUT = "#1b3a5c", "#6b4a00"
SMOOTH_FROM = 40
"""From this many points on a line is drawn pale, with its moving average over it."""

Kind = Literal["noisy", "exact", "rare"]
"""noisy: also as a moving average; rare: measured now and then, so the points are marked."""


class Series(NamedTuple):
    """A metric of the lines of one split, as a curve to draw where there are such lines."""

    key: str
    label: str
    colour: str
    split: Literal["train", "eval"]
    kind: Kind
    before: int  # 1: a train line's figure is of the weights before its update, an eval line's of those after


class Curve(NamedTuple):
    """One line of a picture."""

    label: str
    colour: str
    steps: list[int]
    values: list[float]
    kind: Kind


def _measured(key: str, label: str = "", colours: tuple[str, str] = (TRAIN, HELD_OUT)) -> tuple[Series, Series]:
    """A metric on the batches of the training and on the held-out rows."""
    prefix = f"{label}, " if label else ""
    return (
        Series(key, f"{prefix}training", colours[0], "train", "noisy", 1),
        Series(key, f"{prefix}held-out rows", colours[1], "eval", "rare", 0),
    )


def _of_steps(key: str) -> Series:
    """A metric of training steps alone."""
    return Series(key, "training", TRAIN, "train", "noisy", 1)


BETTER, WORSE = (CHOSEN, CHOSEN_HELD_OUT), (REJECTED, REJECTED_HELD_OUT)

PLOTS: tuple[tuple[str, str, str, tuple[Series, ...]], ...] = (
    ("loss", "Loss", "loss", _measured("loss")),
    ("accuracy", "Accuracy", "share of pairs in their order", (*_measured("accuracy"), *_measured("rewards/accuracies"))),
    ("margin", "Margin", "score or implicit reward", (*_measured("margin"), *_measured("rewards/margins"))),
    (
        "rewards",
        "Implicit rewards",
        "implicit reward",
        (
            *_measured("rewards/chosen", "chosen", BETTER),
            *_measured("rewards/rejected", "rejected", WORSE),
            *_measured("rewards/desirable", "desirable", BETTER),
            *_measured("rewards/undesirable", "undesirable", WORSE),
        ),
    ),
    (
        "logps",
        "Log-probabilities of the responses",
        "nats per response",
        (
            *_measured("logps/chosen", "chosen", BETTER),
            *_measured("logps/rejected", "rejected", WORSE),
            *_measured("logps/desirable", "desirable", BETTER),
            *_measured("logps/undesirable", "undesirable", WORSE),
        ),
    ),
    ("kl", "KL estimate z0", "nats per response", _measured("kl")),
    ("score", "Score", "score", _measured("objective/scores")),
    ("reference_kl", "KL to the reference", "nats per response", _measured("objective/kl")),
    ("length", "Length of the responses", "tokens", _measured("response/length")),
    ("entropy", "Entropy", "nats per response", _measured("objective/entropy")),
    ("eos_rate", "Responses that end", "share", _measured("response/eos_rate")),
    (
        "explained_variance",
        "Explained variance of the value",
        "share",
        (_of_steps("value/explained_variance"),),
    ),
    ("clipfrac", "Clipped tokens", "share", (_of_steps("policy/clipfrac"),)),
    (
        "learning_rate",
        "Learning rate",
        "learning rate",
        (Series("learning_rate", "learning rate", TRAIN, "train", "exact", 0),),
    ),
    (
        "tokens_per_second",
        "Speed",
        "tokens per second",
        (Series("tokens_per_second", "tokens per second", TRAIN, "train", "noisy", 0),),
    ),
)
"""(file name, title, unit, what is drawn) in the order of reading; what a run did not measure is left out."""

TERMS = {"gold/": "Gold reward", "reward/": "Term of the reward"}
"""Beginning of a metric → title of its own picture."""


def draw_plots(folder: Path, train: Lines, held_out: Lines) -> list[tuple[str, str]]:
    """Write the PNGs for which there are numbers; their (title, file name) in the order of reading."""
    prepare(folder)
    lines = {"train": train, "eval": held_out}
    drawn = []
    for name, title, unit, series in (*PLOTS, *_terms((*train, *held_out))):
        if curves := [_curve(each, lines[each.split]) for each in series if any(each.key in line for line in lines[each.split])]:
            write_atomic(folder / f"{name}.png", _curves_png(title, unit, curves))
            drawn.append((title, f"{name}.png"))
    return drawn


def _terms(lines: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, tuple[Series, ...]]]:
    """A row of PLOTS for each gold term, and for each term of a reward that has several."""
    names = sorted({name for line in lines for name in line})
    found = {start: [name for name in names if name.startswith(start)] for start in TERMS}
    if len(found["reward/"]) < 2:
        found["reward/"] = []  # the score is its only term
    return [
        (re.sub(r"[^\w.-]", "_", name), f"{TERMS[start]}: {name.removeprefix(start)}", "score", _measured(name))
        for start in TERMS
        for name in found[start]
    ]


def draw_card(folder: Path, card: dict[str, Any]) -> list[tuple[str, str]]:
    """Write reliability.png and margins.png from a reward model's card; nothing where it has no pairs."""
    if not card["pairs"]:
        return []
    prepare(folder)
    write_atomic(folder / "reliability.png", reliability_png(card["reliability"]))
    write_atomic(folder / "margins.png", margins_png(card["margins"]))
    return [("Reliability", "reliability.png"), ("Margins of held-out pairs", "margins.png")]


def prepare(folder: Path) -> None:
    """Make the folder of the pictures."""
    # A read-only home makes matplotlib warn about its cache; the pictures are the same.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error


def _curve(series: Series, lines: Lines) -> Curve:
    """A line that lacks the metric (a batch of one class) is a step over."""
    found = [line for line in lines if series.key in line]
    steps, values = [line["step"] - series.before for line in found], [line[series.key] for line in found]
    return Curve(series.label, series.colour, steps, values, series.kind)


def moving_average(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on both sides, as many on the left as on the right.

    >>> moving_average([1.0, 3.0, 8.0], 1)
    [1.0, 4.0, 8.0]
    """
    last = len(values) - 1
    sides = [min(reach, place, last - place) for place in range(len(values))]
    return [sum(values[place - side : place + side + 1]) / (2 * side + 1) for place, side in enumerate(sides)]


def canvas(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    """A picture with one pair of axes in the style of all."""
    figure, (axes,) = canvases(title, across, [up])
    return figure, axes


def canvases(title: str, across: str, ups: list[str], height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """One pair of axes for each of `ups` below one another, over the same x; `height` in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), dpi=120, layout="constrained")
    panels: list[Axes] = figure.subplots(len(ups), 1, sharex=True, squeeze=False)[:, 0].tolist()
    panels[0].set_title(title, loc="left")
    panels[-1].set_xlabel(across)
    for axes, up in zip(panels, ups, strict=True):
        _style(axes, up)
    return figure, panels


def _style(axes: Axes, up: str) -> None:
    axes.set_ylabel(up)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _curves_png(title: str, unit: str, curves: list[Curve]) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(title, "steps", unit)
    for curve in curves:
        _draw(axes, curve)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1 or _is_smoothed(curves[0]):
        axes.legend(frameon=False)
    return png(figure)


def reliability_png(bins: list[dict[str, Any]]) -> bytes:
    """How often the preferred response is the better one, by confidence; `bins` as in a card, at least one."""
    figure, axes = canvas("Reliability", "confidence σ(|margin|)", "share of pairs in their order")
    most = max(each["count"] for each in bins)
    middles, heights = [(each["low"] + each["high"]) / 2 for each in bins], [0.4 * each["count"] / most for each in bins]
    axes.bar(middles, heights, width=0.045, color="#dde5ee", label=f"pairs (the highest bar: {most:,})")
    axes.plot([0.5, 1], [0.5, 1], color="#888888", linestyle="--", linewidth=1.2, label="perfectly calibrated")
    confidence, accuracy = [each["confidence"] for each in bins], [each["accuracy"] for each in bins]
    axes.plot(confidence, accuracy, color=HELD_OUT, marker="o", linewidth=1.6, label="this model")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="upper left")
    return png(figure)


def margins_png(margins: dict[str, Any]) -> bytes:
    """The histogram of a card's margins."""
    figure, axes = canvas("Margins of held-out pairs", "score of the better response less score of the worse", "pairs")
    edges = margins["edges"]
    colours = [TRAIN if low >= 0 else HELD_OUT for low in edges[:-1]]
    axes.bar(edges[:-1], margins["counts"], width=edges[1] - edges[0], align="edge", color=colours, edgecolor="white")
    axes.axvline(0, color="#444444", linewidth=1.0)
    return png(figure)


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
