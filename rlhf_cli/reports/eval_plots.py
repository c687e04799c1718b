"""The pictures of an evaluation."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.files import write_atomic
from rlhf_cli.reports.eval_words import place, series_of, step_of
from rlhf_cli.reports.page import Picture, visible
from rlhf_cli.reports.plots import CHOSEN, HELD_OUT, REJECTED, TRAIN, canvases, margins_png, png, prepare, reliability_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = 36
"""Characters of a name beside an axis."""
FORMS: dict[str, Callable[[float, float, float], float]] = {
    "bon": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * math.log(d)) if d > 0 else 0.0,
}
"""Gain over the start at d = √KL; Gao, Schulman & Hilton 2023."""


def draw_evaluation(folder: Path, result: dict[str, Any]) -> dict[str, list[Picture]]:
    """Write the PNGs for which there are numbers; section's anchor → its pictures."""
    found: dict[str, list[Picture]] = {"winrates": [], "ratings": [], "preferences": [], "overoptimisation": []}
    prepare(folder)
    # A name may have characters that matplotlib's font lacks: they are drawn as boxes.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for anchor, picture in _pictures(result):
            write_atomic(folder / picture.name, picture.png)
            found[anchor].append(picture)
    return found


def _pictures(result: dict[str, Any]) -> Iterator[tuple[str, Picture]]:
    judged = {name: own for name, own in result["winrate"].items()}
    if judged:
        baseline = result["about"]["baseline"]
        alt = f"Horizontal 95 % intervals of {len(judged)} models' win rates over {baseline}; the table has the numbers."
        yield "winrates", Picture(f"Win rates over {baseline}", "winrates.png", alt, _winrates_png(baseline, judged))
    if result["ratings"]:
        alt = f"Horizontal 95 % intervals of {len(result['ratings'])} models' Elo ratings; the table has the numbers."
        yield "ratings", Picture("Ratings", "ratings.png", alt, _ratings_png(result["ratings"]))
    # Of policies the table has the figures: an evaluation of many checkpoints would end in pages of these.
    judges = {name: own for name, own in result["preferences"].items() if own["kind"] != "policy"}
    for number, (name, own) in enumerate(judges.items(), 1):
        if own["reliability"]:
            alt = f"How often {name} is right, by its confidence σ(|margin|); the diagonal is perfect calibration."
            file = _file("reliability", number, name)
            yield "preferences", Picture(f"Reliability of {name}", file, alt, reliability_png(own["reliability"]))
        if own["margins"]:
            alt = f"Histogram of {name}'s margins between the better and the worse response; mean {own['margins']['mean']:.4g}."
            file = _file("margins", number, name)
            yield "preferences", Picture(f"Margins of {name}", file, alt, margins_png(own["margins"]))
    series = series_of(result)
    chosen = {name: points for name, points in series.items() if points[0]["n"] is not None}
    runs = {name: points for name, points in series.items() if name not in chosen}
    for number, (name, points) in enumerate((runs or chosen).items(), 1):
        together = {name: points, **chosen}
        alt = f"Proxy and gold against the square root of the KL for {' and '.join(together)}; the table has the numbers."
        file = _file("overoptimisation", number, name)
        yield (
            "overoptimisation",
            Picture(f"Over-optimisation: {name}", file, alt, _overoptimisation_png(together, result["fits"])),
        )


def _file(kind: str, number: int, name: str) -> str:
    return f"{kind}-{number}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:LABEL].strip('.-') or 'model'}.png"


def _label(name: str) -> str:
    """A name as matplotlib shows it literally, its end rather than its beginning."""
    shown = visible(name).replace("\n", " ").replace("\t", " ")
    return (shown if len(shown) <= LABEL else f"…{shown[-LABEL:]}").replace("$", r"\$")


def _winrates_png(baseline: str, judged: dict[str, Any]) -> bytes:
    controlled = any(own["length_controlled"] for own in judged.values())
    offset = 0.14 if controlled else 0.0
    height = 1.5 + 0.42 * len(judged)
    figure, (axes,) = canvases(f"Win rates over {_label(baseline)}", "share of comparisons, ties half", [""], height)
    _intervals(axes, list(judged.values()), "mean", CHOSEN, -offset, "as they are")
    if controlled:
        _intervals(axes, [own["length_controlled"] for own in judged.values()], "mean", REJECTED, offset, "at equal length")
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=2)
    axes.axvline(0.5, color="#444444", linewidth=1.0, linestyle="--")
    axes.set_xlim(0, 1)
    _rows(axes, list(judged))
    return png(figure)


def _ratings_png(ratings: dict[str, Any]) -> bytes:
    names = sorted(ratings, key=lambda name: -float(ratings[name]["elo"]))
    figure, (axes,) = canvases("Ratings", "Elo", [""], 1.3 + 0.38 * len(names))
    _intervals(axes, [ratings[name] for name in names], "elo", CHOSEN, 0.0, "")
    _rows(axes, names)
    return png(figure)


def _intervals(axes: Axes, own: Sequence[dict[str, Any] | None], key: str, colour: str, offset: float, label: str) -> None:
    known = [(row + offset, each) for row, each in enumerate(own) if each]
    rows, middles = [row for row, _ in known], [each[key] for _, each in known]
    axes.hlines(rows, [each["low"] for _, each in known], [each["high"] for _, each in known], color=colour, linewidth=2.2)
    axes.plot(middles, rows, linestyle="", marker="o", markersize=5, color=colour, label=label)


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _overoptimisation_png(series: dict[str, list[dict[str, Any]]], fits: dict[str, Any]) -> bytes:
    """Proxy above gold over the same √KL: they have scales of their own, and what matters is where they part."""
    first = next(iter(series))
    values = ["proxy", *(["gold"] if any(point["gold"] is not None for own in series.values() for point in own) else [])]
    height = 1.4 + 2.3 * len(values)
    figure, panels = canvases(f"Over-optimisation: {_label(first)}", "√KL from the start (KL in nats)", values, height)
    for (name, points), colour in zip(series.items(), (TRAIN, REJECTED), strict=False):
        form, label = ("rl", "run") if points[0]["n"] is None else ("bon", "best of n")
        for axes, value in zip(panels, values, strict=True):
            _points(axes, points, value, colour, label)
            _fit(axes, points, value, (fits.get(name) or {}).get(value), form, colour)
        top = (fits.get(name) or {}).get("peak")
        if top and name == first:
            _peak(panels, values, top)
    if len(panels) > 1 or len(series) > 1:
        figure.legend(*panels[-1].get_legend_handles_labels(), frameon=False, loc="outside lower right", ncols=4)
    return png(figure)


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0))


def _points(axes: Axes, points: list[dict[str, Any]], value: str, colour: str, label: str) -> None:
    known = [point for point in points if point[value] is not None]
    across, up = [_root(point["kl"]) for point in known], [point[value] for point in known]
    reach = [point["intervals"][value] or [point[value]] * 2 for point in known]
    side = [_root(point["intervals"]["kl"][0]) for point in known], [_root(point["intervals"]["kl"][1]) for point in known]
    axes.vlines(across, [low for low, _ in reach], [high for _, high in reach], color=colour, linewidth=1.4, alpha=0.7)
    axes.hlines(up, *side, color=colour, linewidth=1.4, alpha=0.7)
    axes.plot(across, up, color=colour, marker="o", markersize=5, linestyle="", label=label)


def _fit(axes: Axes, points: list[dict[str, Any]], value: str, fits: dict[str, Any] | None, form: str, colour: str) -> None:
    """The form that was found for this way of optimising, from the series' start on."""
    own, start = (fits or {}).get(form), points[0][value]
    if not own or start is None:
        return
    end = max(_root(point["kl"]) for point in points)
    across = [end * number / 100 for number in range(101)]
    up = [start + FORMS[form](d, own["alpha"], own["beta"]) for d in across]
    axes.plot(across, up, color=colour, linewidth=1.0, alpha=0.8)


def _peak(panels: list[Axes], values: list[str], top: dict[str, Any]) -> None:
    at = _root(top["kl"])
    for axes in panels:
        axes.axvline(at, color=HELD_OUT, linewidth=1.0, linestyle="--")
    ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": HELD_OUT, "markeredgewidth": 1.6}
    label = f"gold's peak ({'start' if not place(top) else step_of(top)})"
    panels[values.index("gold")].plot([at], [top["gold"]], marker="o", linestyle="", label=label, **ring)
