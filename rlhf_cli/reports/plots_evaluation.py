"""The pictures of an evaluation."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.evaluation.overoptimisation import Fit, Peak, Point, SeriesFits
from rlhf_cli.evaluation.winrate import WinRate
from rlhf_cli.figures import Interval
from rlhf_cli.reports.document import Picture
from rlhf_cli.reports.findings_evaluation import step_of
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_picture, png, reliability_picture
from rlhf_cli.reports.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = 36
"""Characters of a name beside an axis."""
FORMS: dict[str, Callable[[float, float, float], float]] = {
    "bon": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * math.log(d)) if d > 0 else 0.0,
}
"""Gain over the start at d = √KL; Gao, Schulman & Hilton 2023."""


def draw_evaluation(result: EvaluationResult) -> dict[str, list[Picture]]:
    """Section's anchor → its pictures, those for which there are numbers."""
    found: dict[str, list[Picture]] = {"winrates": [], "ratings": [], "preferences": [], "overoptimisation": []}
    # A name may have characters that matplotlib's font lacks: they are drawn as boxes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for anchor, picture in _pictures(result):
            found[anchor].append(picture)
    return found


def _pictures(result: EvaluationResult) -> Iterator[tuple[str, Picture]]:
    if result.winrate:
        baseline = str(result.about.baseline)
        alt = f"Horizontal 95 % intervals of {len(result.winrate)} models' win rates over {baseline}; the table has the numbers."
        yield "winrates", Picture(f"Win rates over {baseline}", "winrates.png", alt, _winrates_png(baseline, result.winrate))
    if result.ratings:
        alt = f"Horizontal 95 % intervals of {len(result.ratings)} models' Elo ratings; the table has the numbers."
        yield "ratings", Picture("Ratings", "ratings.png", alt, _ratings_png(result.ratings))
    # Of policies the table has the figures: an evaluation of many checkpoints would end in pages of these.
    judges = {name: own for name, own in result.preferences.items() if own.kind != "policy"}
    for number, (name, own) in enumerate(judges.items(), 1):
        if own.reliability:
            yield "preferences", reliability_picture(own.reliability, name, _file("reliability", number, name))
        if own.margins:
            yield "preferences", margins_picture(own.margins, name, _file("margins", number, name))
    chosen = {name: points for name, points in result.series.items() if points[0].n is not None}
    runs = {name: points for name, points in result.series.items() if name not in chosen}
    for number, (name, points) in enumerate((runs or chosen).items(), 1):
        together = {name: points, **chosen}
        alt = f"Proxy and gold against the square root of the KL for {' and '.join(together)}; the table has the numbers."
        file, drawn = _file("overoptimisation", number, name), _overoptimisation_png(together, result.fits)
        yield "overoptimisation", Picture(f"Over-optimisation: {name}", file, alt, drawn)


def _file(kind: str, number: int, name: str) -> str:
    return f"{kind}-{number}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:LABEL].strip('.-') or 'model'}.png"


def _label(name: str) -> str:
    """A name as matplotlib shows it literally, its end rather than its beginning."""
    shown = visible(name).replace("\n", " ").replace("\t", " ")
    return (shown if len(shown) <= LABEL else f"…{shown[-LABEL:]}").replace("$", r"\$")


def _winrates_png(baseline: str, rates: Mapping[str, WinRate]) -> bytes:
    height = 1.5 + 0.42 * len(rates)
    figure, (axes,) = canvases(f"Win rates over {_label(baseline)}", "share of comparisons, ties half", [""], height)
    _intervals(axes, [own.rate for own in rates.values()], CHOSEN, -0.14, "as they are")
    _intervals(axes, [own.length_controlled for own in rates.values()], REJECTED, 0.14, "at equal length")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=2)
    axes.axvline(0.5, color="#444444", linewidth=1.0, linestyle="--")
    axes.set_xlim(0, 1)
    _rows(axes, list(rates))
    return png(figure)


def _ratings_png(ratings: Mapping[str, Interval]) -> bytes:
    names = sorted(ratings, key=lambda name: -ratings[name].mean)
    figure, (axes,) = canvases("Ratings", "Elo", [""], 1.3 + 0.38 * len(names))
    _intervals(axes, [ratings[name] for name in names], CHOSEN, 0.0, "")
    _rows(axes, names)
    return png(figure)


def _intervals(axes: Axes, own: Sequence[Interval], colour: str, offset: float, label: str) -> None:
    rows = [row + offset for row in range(len(own))]
    axes.hlines(rows, [each.low for each in own], [each.high for each in own], color=colour, linewidth=2.2)
    axes.plot([each.mean for each in own], rows, linestyle="", marker="o", markersize=5, color=colour, label=label)


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _overoptimisation_png(series: Mapping[str, list[Point]], fits: Mapping[str, SeriesFits]) -> bytes:
    """Proxy above gold over the same √KL: they have scales of their own, and what matters is where they part."""
    first = next(iter(series))
    has_gold = any(point.gold for own in series.values() for point in own)
    values = ["proxy", "gold"] if has_gold else ["proxy"]
    height = 1.4 + 2.3 * len(values)
    figure, panels = canvases(f"Over-optimisation: {_label(first)}", "√KL from the start (KL in nats)", values, height)
    for (name, points), colour in zip(series.items(), (TRAIN, REJECTED), strict=False):
        fit = fits.get(name)
        form, label = ("rl", "run") if points[0].n is None else ("bon", "best of n")
        for axes, value in zip(panels, values, strict=True):
            _points(axes, points, value, colour, label)
            if fit and (forms := fit.proxy if value == "proxy" else fit.gold):
                _fit(axes, points, value, form, forms.rl if form == "rl" else forms.bon, colour)
        if fit and fit.peak and name == first:
            _peak(panels, values, fit.peak)
    if len(panels) > 1 or len(series) > 1:
        figure.legend(*panels[-1].get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=4)
    return png(figure)


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0))


def _value(point: Point, value: str) -> Interval | None:
    return point.proxy if value == "proxy" else point.gold


def _points(axes: Axes, points: Sequence[Point], value: str, colour: str, label: str) -> None:
    known = [(point.kl, own) for point in points if (own := _value(point, value))]
    across, up = [_root(kl.mean) for kl, _ in known], [own.mean for _, own in known]
    axes.vlines(across, [own.low for _, own in known], [own.high for _, own in known], color=colour, linewidth=1.4, alpha=0.7)
    left, right = [_root(kl.low) for kl, _ in known], [_root(kl.high) for kl, _ in known]
    axes.hlines(up, left, right, color=colour, linewidth=1.4, alpha=0.7)
    axes.plot(across, up, color=colour, marker="o", markersize=5, linestyle="", label=label)


def _fit(axes: Axes, points: Sequence[Point], value: str, form: str, fit: Fit | None, colour: str) -> None:
    """The form that was found for this kind of optimisation, from the series' start on."""
    start = _value(points[0], value)
    if fit is None or start is None:
        return
    end = max(_root(point.kl.mean) for point in points)
    across = [end * number / 100 for number in range(101)]
    up = [start.mean + FORMS[form](d, fit.alpha, fit.beta) for d in across]
    axes.plot(across, up, color=colour, linewidth=1.0, alpha=0.8)


def _peak(panels: Sequence[Axes], values: list[str], top: Peak) -> None:
    at = _root(top.kl)
    for axes in panels:
        axes.axvline(at, color=HELD_OUT, linewidth=1.0, linestyle="--")
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgecolor": HELD_OUT,
        "markeredgewidth": 1.6,
    }
    label = f"gold's peak ({step_of(top) if top.place else 'start'})"
    panels[values.index("gold")].plot([at], [top.gold], linestyle="", label=label, **ring)
