"""What the pictures of all reports have in common, drawn without a display and without touching matplotlib's global state."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cli.evaluation.agreement import Bin, Histogram
from rlhf_cli.figures import short
from rlhf_cli.reports.document import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, HELD_OUT = "#4878a8", "#c44e52"
CHOSEN, REJECTED = "#4878a8", "#b8860b"


def canvases(title: str, across: str, ups: Sequence[str], height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """One pair of axes for each of `ups` below one another, over the same x; `height` in inches."""
    # A read-only home makes matplotlib warn about its cache; the pictures are the same.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), dpi=120, layout="constrained")
    panels: list[Axes] = figure.subplots(len(ups), 1, sharex=True, squeeze=False)[:, 0].tolist()
    panels[0].set_title(title, loc="left")
    panels[-1].set_xlabel(across)
    for axes, up in zip(panels, ups, strict=True):
        axes.set_ylabel(up)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    figure.savefig(stream := io.BytesIO(), format="png")
    return stream.getvalue()


def reliability_picture(bins: Sequence[Bin], judge: str, file: str) -> Picture:
    """How often the preferred response is the better one, by confidence; at least one bin."""
    figure, (axes,) = canvases("Reliability", "confidence σ(|margin|)", ["share of pairs in their order"])
    most = max(each.count for each in bins)
    middles, heights = [(each.low + each.high) / 2 for each in bins], [0.4 * each.count / most for each in bins]
    axes.bar(middles, heights, width=0.045, color="#dde5ee", label=f"pairs (the highest bar: {most:,})")
    axes.plot([0.5, 1], [0.5, 1], color="#888888", linestyle="--", linewidth=1.2, label="perfectly calibrated")
    confidence, accuracy = [each.confidence for each in bins], [each.accuracy for each in bins]
    axes.plot(confidence, accuracy, color=HELD_OUT, marker="o", linewidth=1.6, label="this model")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="upper left")
    alt = f"How often {judge} is right, by its confidence σ(|margin|); the diagonal is perfect calibration."
    return Picture(f"Reliability of {judge}", file, alt, png(figure))


def margins_picture(margins: Histogram, judge: str, file: str) -> Picture:
    """The histogram of margins."""
    figure, (axes,) = canvases("Margins of held-out pairs", "score of the better response less score of the worse", ["pairs"])
    edges = margins.edges
    colours = [TRAIN if low >= 0 else HELD_OUT for low in edges[:-1]]
    axes.bar(edges[:-1], margins.counts, width=edges[1] - edges[0], align="edge", color=colours, edgecolor="white")
    axes.axvline(0, color="#444444", linewidth=1.0)
    alt = f"Histogram of {judge}'s margins between the better and the worse response; mean {short(margins.mean)}."
    return Picture(f"Margins of {judge}", file, alt, png(figure))
