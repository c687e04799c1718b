"""A report as one page of HTML that needs nothing beside itself: no script, no network, no other file."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rlhf_cli.figures import Interval, mean_and_bounds
from rlhf_cli.reports.document import Block, Document, Kind, Table
from rlhf_cli.reports.text import pieces, visible

SIGNS: dict[Kind, str] = {"better": "▲", "worse": "▼", "open": "≈", "warning": "!", "note": "i"}
"""What stands before a finding, so that nothing is said by colour alone."""
SHOWN, LONGEST = 500, 5000  # characters of a text that are shown at once, and that are in the page at all
BAR_WIDTH, BAR_HEIGHT = 120, 12  # pixels of an interval's bar


def render(document: Document) -> str:
    """The text of report.html; whatever is in the document, it is escaped."""
    return _template().render(document=document)


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # what Jinja has escaped is of another type
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "grouped": _grouped,
        "pieces": lambda text: pieces(text.replace(" %", "\u00a0%")),  # a percent sign stays with its number
        "scales": _scales,
        "mean_and_bounds": mean_and_bounds,
        "base64": lambda data: base64.b64encode(data).decode(),
    }
    environment.tests["number"] = lambda text: re.fullmatch(r"[-+]?[\d.,e+-]+( %)?|", text) is not None
    environment.globals |= {"bar": bar, "signs": SIGNS, "shown": SHOWN, "longest": LONGEST}
    environment.globals |= {"width": BAR_WIDTH, "height": BAR_HEIGHT}
    return environment.get_template("page.html.jinja")


def _grouped(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbours of one class stand in one list, under its name."""
    return [(kind, list(own)) for kind, own in groupby(blocks, key=lambda block: type(block).__name__)]


def _scales(table: Table) -> list[tuple[float, float]]:
    scales = []
    for at, column in enumerate(table.columns):
        marks = [] if column.mark is None else [column.mark]
        values = [value for row in table.rows if isinstance(cell := row[at], Interval) for value in cell] + marks
        low, high = min(values, default=0.0), max(values, default=1.0)
        around = 0.0 if high > low else max(1.0, abs(low))
        scales.append(column.scale or (low - around, high + around))
    return scales


def bar(cell: Interval, mark: float | None, scale: tuple[float, float]) -> dict[str, float | None]:
    """Where low, mean, high and the mark are, in pixels from the left: a line with a dot, beside what it is compared with."""

    def across(value: float) -> float:
        share = (value - scale[0]) / (scale[1] - scale[0])
        return round(4 + (BAR_WIDTH - 8) * min(1.0, max(0.0, share)), 1)

    return {part: across(value) for part, value in cell._asdict().items()} | {"mark": None if mark is None else across(mark)}
