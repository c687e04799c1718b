"""The pictures of an evaluation."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_cli.evaluation.at_kl import AtKl
from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.evaluation.overoptimisation import Peak, Point, SeriesFits
from rlhf_cli.figures import Interval
from rlhf_cli.reports.document import Picture
from rlhf_cli.reports.findings_evaluation import step_of
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_picture, png, reliability_picture
from rlhf_cli.reports.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = 36  # characters of a name beside an axis
FORMS: dict[str, Callable[[float, float, float], float]] = {
    "bon": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * math.log(d)) if d > 0 else 0.0,
}
"""Gain over the start at d = √KL; Gao, Schulman & Hilton 2023."""


def draw_evaluation(result: EvaluationResult) -> dict[str, list[Picture]]:
    """Section's anchor → its pictures, those for which there are numbers."""
    found: dict[str, list[Picture]] = defaultdict(list)
    # A name may have characters that matplotlib's font lacks: they are drawn as boxes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for anchor, picture in _pictures(result):
            found[anchor].append(picture)
    return found


def _pictures(result: EvaluationResult) -> Iterator[tuple[str, Picture]]:
    if result.winrate:
        baseline, rates = str(result.about.baseline), result.winrate
        height = 1.5 + 0.42 * len(rates)
        figure, (axes,) = canvases(f"Win rates over {_label(baseline)}", "share of comparisons, ties half", [""], height)
        _intervals(axes, {name: own.rate for name, own in rates.items()}, CHOSEN, -0.14, "as they are")
        _intervals(axes, {name: own.length_controlled for name, own in rates.items()}, REJECTED, 0.14, "at equal length")
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=2)
        axes.axvline(0.5, color="#444444", linewidth=1.0, linestyle="--")
        axes.set_xlim(0, 1)
        alt = f"Horizontal 95 % intervals of {len(rates)} models' win rates over {baseline}; the table has the numbers."
        yield "winrates", Picture(f"Win rates over {baseline}", "winrates.png", alt, png(figure))
    if any(len(own) > 1 for own in result.voted.values()):
        figure, (axes,) = canvases("Votes", "n responses that vote", ["accuracy"])
        for name, votes in result.voted.items():
            across = [each.n for each in votes]
            (line,) = axes.plot(across, [each.accuracy for each in votes], marker="o", label=_label(name))
            axes.vlines(across, [each.low for each in votes], [each.high for each in votes], color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xticks(across, map(str, across))
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)
        alt = f"Accuracy by the number of responses that vote, for {', '.join(result.votes)}; the table has the numbers."
        yield "votes", Picture("Accuracy of votes", "votes.png", alt, png(figure))
    if ratings := dict(sorted(result.ratings.items(), key=lambda rating: -rating[1].mean)):
        figure, (axes,) = canvases("Ratings", "Elo", [""], 1.3 + 0.38 * len(ratings))
        _intervals(axes, ratings, CHOSEN, 0.0, "")
        alt = f"Horizontal 95 % intervals of {len(ratings)} models' Elo ratings; the table has the numbers."
        yield "ratings", Picture("Ratings", "ratings.png", alt, png(figure))
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
    if result.at_kl:
        both = f"{result.at_kl.a.name} and {result.at_kl.b.name}"
        alt = f"Gold against the square root of the KL for {both}; the table has the numbers."
        yield "kl", Picture(f"Gold at equal KL: {both}", "at-kl.png", alt, _at_kl_png(result.at_kl))


def _file(kind: str, number: int, name: str) -> str:
    return f"{kind}-{number}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:LABEL].strip('.-') or 'model'}.png"


def _label(name: str) -> str:
    """A name as matplotlib shows it literally, its end rather than its beginning."""
    shown = visible(name).replace("\n", " ").replace("\t", " ")
    return (shown if len(shown) <= LABEL else f"…{shown[-LABEL:]}").replace("$", r"\$")


def _intervals(axes: Axes, own: Mapping[str, Interval], colour: str, offset: float, label: str) -> None:
    rows = [row + offset for row in range(len(own))]
    axes.hlines(rows, [each.low for each in own.values()], [each.high for each in own.values()], color=colour, linewidth=2.2)
    means = [each.mean for each in own.values()]
    axes.plot(means, rows, linestyle="", marker="o", markersize=5, color=colour, label=label)
    axes.set_yticks(range(len(own)), list(map(_label, own)))
    axes.set_ylim(len(own) - 0.5, -0.5)


def _overoptimisation_png(series: Mapping[str, list[Point]], fits: Mapping[str, SeriesFits]) -> bytes:
    """Proxy above gold over the same √KL: they have scales of their own, and what matters is where they part."""
    first = next(iter(series))
    values = ["proxy", "gold"] if any(point.gold for own in series.values() for point in own) else ["proxy"]
    height = 1.4 + 2.3 * len(values)
    figure, panels = canvases(f"Over-optimisation: {_label(first)}", "√KL from the start (KL in nats)", values, height)
    for (name, points), colour in zip(series.items(), (TRAIN, REJECTED), strict=False):
        fit = fits.get(name)
        form, label = ("rl", "run") if points[0].n is None else ("bon", "best of n")
        for axes, value in zip(panels, values, strict=True):
            known = [(point.kl, own) for point in points if (own := point.proxy if value == "proxy" else point.gold)]
            _points(axes, known, colour, label)
            forms = fit and (fit.proxy if value == "proxy" else fit.gold)
            if forms and known and (found := forms.rl if form == "rl" else forms.bon):
                # From the series' start on.
                across = [_root(max(point.kl.mean for point in points)) * number / 100 for number in range(101)]
                up = [known[0][1].mean + FORMS[form](d, found.alpha, found.beta) for d in across]
                axes.plot(across, up, color=colour, linewidth=1.0, alpha=0.8)
        if fit and fit.peak and name == first:
            _peak(panels, fit.peak)
    if len(panels) > 1 or len(series) > 1:
        figure.legend(*panels[-1].get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=4)
    return png(figure)


def _at_kl_png(own: AtKl) -> bytes:
    """Both series as the lines that are compared, and where the shorter one ends."""
    figure, (axes,) = canvases("Gold at equal KL", "√KL from the start (KL in nats)", ["gold"])
    for series, colour in ((own.a, TRAIN), (own.b, REJECTED)):
        _points(axes, [(point.kl, point.gold) for point in series.points], colour, _label(series.name))
        across, up = [_root(point.kl.mean) for point in series.points], [point.gold.mean for point in series.points]
        axes.plot(across, up, color=colour, linewidth=1.2)
    end = _root(own.shorter.points[-1].kl.mean)
    axes.axvline(end, color="#444444", linewidth=1.0, linestyle="--", label="end of the common range")
    axes.legend(frameon=False)
    return png(figure)


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0))


def _points(axes: Axes, known: Sequence[tuple[Interval, Interval]], colour: str, label: str) -> None:
    """(KL, value) of each point, as a cross of intervals."""
    across, up = [_root(kl.mean) for kl, _ in known], [own.mean for _, own in known]
    axes.vlines(across, [own.low for _, own in known], [own.high for _, own in known], color=colour, linewidth=1.4, alpha=0.7)
    left, right = [_root(kl.low) for kl, _ in known], [_root(kl.high) for kl, _ in known]
    axes.hlines(up, left, right, color=colour, linewidth=1.4, alpha=0.7)
    axes.plot(across, up, color=colour, marker="o", markersize=5, linestyle="", label=label)


def _peak(panels: Sequence[Axes], top: Peak) -> None:
    """Of gold, whose panel is the last one."""
    at = _root(top.kl)
    for axes in panels:
        axes.axvline(at, color=HELD_OUT, linewidth=1.0, linestyle="--")
    (ring,) = panels[-1].plot([at], [top.gold], "o", markersize=11, markerfacecolor="none", markeredgecolor=HELD_OUT)
    ring.set(markeredgewidth=1.6, label=f"gold's peak ({step_of(top) if top.step or top.n else 'start'})")
