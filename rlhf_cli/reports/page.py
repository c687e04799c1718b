"""One page of HTML that needs nothing beside itself: no script, no network, no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Literal, NamedTuple

from rlhf_cli.figures import Interval, mean_and_bounds

Kind = Literal["better", "worse", "open", "warning", "note"]
SIGNS: dict[Kind, str] = {"better": "▲", "worse": "▼", "open": "≈", "warning": "!", "note": "i"}
"""What stands before a finding, so that nothing is said by colour alone."""

SHOWN, LONGEST = 500, 5000
"""Characters of a text that are shown at once, and that are in the page at all."""
BAR_WIDTH, BAR_HEIGHT = 120, 12
"""Pixels of an interval's bar."""

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What would not be shown, is forbidden in HTML, or turns the direction of what stands around it."""


Cell = str | Interval


class Column(NamedTuple):
    """Of a table; a column of measures has bars on one scale."""

    name: str
    mark: float | None = None  # a line through all bars: what they are compared with
    scale: tuple[float, float] | None = None  # None: as far as the intervals reach


class Table(NamedTuple):
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]  # the first cell is the row's name


class Picture(NamedTuple):
    title: str
    name: str  # of the file
    alt: str  # what there is to see, for those who cannot
    png: bytes


class Finding(NamedTuple):
    kind: Kind
    head: str
    text: str


class Side(NamedTuple):
    """A response."""

    model: str
    text: str
    facts: str


class Example(NamedTuple):
    """A prompt and what was said to it."""

    prompt: str
    sides: tuple[Side, ...]
    note: str


class Examples(NamedTuple):
    title: str
    own: tuple[Example, ...]


class Items(NamedTuple):
    """A list of sentences."""

    own: tuple[str, ...]


class Definitions(NamedTuple):
    own: tuple[tuple[str, str], ...]  # (term, what it is)


Block = str | Table | Picture | Finding | Examples | Items | Definitions


class Section(NamedTuple):
    anchor: str
    title: str
    blocks: tuple[Block, ...]


AROUND: dict[type, tuple[str, str]] = {
    Finding: ('<ul class="findings">\n', "\n</ul>"),
    Picture: ('<div class="pictures">\n', "\n</div>"),
}
"""What surrounds neighbouring blocks of one kind."""


def visible(text: str) -> str:
    """Characters that are not to be seen, or would turn the text around them, as escapes.

    >>> visible("a\\x00b\\u202e")
    'a\\\\x00b\\\\u202e'
    """

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return STEERING.sub(escaped, text.replace("\r\n", "\n"))


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{each.anchor}">{_text(each.title)}</a></li>' for each in sections)
    body = "\n".join(_section(each) for each in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1 dir="auto">{_text(title)}</h1>\n<p class="lead" dir="auto">{_text(lead)}</p>\n</header>\n'
        f'<nav aria-label="Sections">\n<ul>{links}</ul>\n</nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _text(text: str) -> str:
    return escape(visible(text))


def _section(section: Section) -> str:
    name = f"{section.anchor}-title"
    body = []
    for kind, blocks in groupby(section.blocks, key=type):
        before, after = AROUND.get(kind, ("", ""))
        body.append(before + "\n".join(map(_block, blocks)) + after)
    inside = "\n".join(body)
    return (
        f'<section id="{section.anchor}" aria-labelledby="{name}">\n<h2 id="{name}">{_text(section.title)}</h2>\n'
        f"{inside}\n</section>"
    )


def _block(block: Block) -> str:
    match block:
        case str():
            return f'<p dir="auto">{_text(block)}</p>'
        case Table():
            return _table(block)
        case Picture():
            data = base64.b64encode(block.png).decode()
            picture = f'<img src="data:image/png;base64,{data}" alt="{_text(block.alt)}" width="864">'
            return f"<figure>{picture}<figcaption>{_text(block.title)}</figcaption></figure>"
        case Finding(kind, head, text):
            # A percent sign stays with its number.
            joined = text.replace(" %", "\u00a0%")
            said = f'<strong>{_text(head)}</strong> <span dir="auto">{_text(joined)}</span>'
            return f'<li class="{kind}"><span class="sign" aria-hidden="true">{SIGNS[kind]}</span><div>{said}</div></li>'
        case Examples(title, own):
            inside = "\n".join(_example(each) for each in own)
            return f'<details class="examples"><summary>{_text(title)}</summary>\n{inside}\n</details>'
        case Items(items):
            return "<ul>" + "".join(f'<li dir="auto">{_text(item)}</li>' for item in items) + "</ul>"
        case Definitions(definitions):
            return "<dl>" + "".join(f"<dt>{_text(term)}</dt><dd>{_text(what)}</dd>" for term, what in definitions) + "</dl>"


def _table(table: Table) -> str:
    scales = [_scale(column, [row[place] for row in table.rows]) for place, column in enumerate(table.columns)]
    head = "".join(f'<th scope="col">{_text(column.name)}</th>' for column in table.columns)
    lines = []
    for first, *rest in table.rows:
        assert isinstance(first, str)
        cells = (_cell(cell, column, scale) for cell, column, scale in zip(rest, table.columns[1:], scales[1:], strict=True))
        lines.append(f'<tr><th scope="row" dir="auto">{_text(first)}</th>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide" role="group" tabindex="0" aria-label="{_text(table.caption)}"><table>\n'
        f"<caption>{_text(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _scale(column: Column, cells: Sequence[Cell]) -> tuple[float, float]:
    """From where to where the bars of a column reach."""
    if column.scale:
        return column.scale
    marks = [] if column.mark is None else [column.mark]
    values = [value for cell in cells if isinstance(cell, Interval) for value in cell] + marks
    low, high = min(values, default=0.0), max(values, default=1.0)
    around = 0.0 if high > low else max(1.0, abs(low))
    return low - around, high + around


def _cell(cell: Cell, column: Column, scale: tuple[float, float]) -> str:
    if isinstance(cell, str):
        kind = ' class="number"' if re.fullmatch(r"[-+]?[\d.,e+-]+( %)?|", cell) else ' dir="auto"'
        return f"<td{kind}>{_text(cell)}</td>"
    mean, reach = mean_and_bounds(cell)
    between = f' <span class="reach">({reach})</span>' if reach else ""
    return f'<td class="measure"><span class="mean">{mean}</span>{between}{_bar(cell, column.mark, scale)}</td>'


def _bar(cell: Interval, mark: float | None, scale: tuple[float, float]) -> str:
    """The interval as a line with a dot, beside the line of what it is compared with. The numbers say the same."""
    middle = BAR_HEIGHT / 2

    def across(value: float) -> float:
        share = (value - scale[0]) / (scale[1] - scale[0])
        return round(4 + (BAR_WIDTH - 8) * min(1.0, max(0.0, share)), 1)

    low, mean, high = across(cell.low), across(cell.mean), across(cell.high)
    against = ""
    if mark is not None:
        at = across(mark)
        against = f'<line class="mark" x1="{at}" y1="0" x2="{at}" y2="{BAR_HEIGHT}"/>'
    return (
        f'<svg class="bar" width="{BAR_WIDTH}" height="{BAR_HEIGHT}" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" aria-hidden="true">'
        f'<line class="axis" x1="0" y1="{middle}" x2="{BAR_WIDTH}" y2="{middle}"/>{against}'
        f'<line class="span" x1="{low}" y1="{middle}" x2="{high}" y2="{middle}"/>'
        f'<circle cx="{mean}" cy="{middle}" r="3.5"/></svg>'
    )


def _example(example: Example) -> str:
    sides = "".join(
        f'<div class="side"><h4 dir="auto">{_text(side.model)}</h4>'
        f'<p class="facts">{_text(side.facts)}</p>{_long(side.text)}</div>'
        for side in example.sides
    )
    note = f'<p class="facts" dir="auto">{_text(example.note)}</p>' if example.note else ""
    return (
        f'<article class="example"><h3>Prompt</h3><div class="prompt">{_long(example.prompt)}</div>'
        f'{note}<div class="sides">{sides}</div></article>'
    )


def _long(text: str) -> str:
    """A text of any length: its beginning, the rest on demand, and what is far out only counted."""
    if not text.strip():
        return f'<p class="said empty">(empty{"" if not text else ": white space only"})</p>'
    if len(text) <= 1.2 * SHOWN:
        return f'<p class="said" dir="auto">{_text(text)}</p>'
    rest, beyond = text[SHOWN:LONGEST], len(text) - LONGEST
    left_out = f'<p class="facts">{beyond:,} more characters are in samples.jsonl.</p>' if beyond > 0 else ""
    return (
        f'<p class="said" dir="auto">{_text(text[:SHOWN])}…</p>'
        f"<details><summary>{len(rest):,} characters more</summary>"
        f'<p class="said" dir="auto">…{_text(rest)}</p>{left_out}</details>'
    )


STYLE = """\
:root {
  color-scheme: light dark;
  --ground: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #5b6570; --line: #dfe2e6; --tint: #f0f3f6;
  --blue: #2f6096; --green: #1c7a45; --red: #b3352f; --ochre: #8a6100;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15181c; --card: #1c2025; --ink: #e4e7eb; --soft: #9aa4b0; --line: #333a42; --tint: #252b32;
    --blue: #83b4e6; --green: #6cc692; --red: #ee8d85; --ochre: #dcb14e;
  }
  figure img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 4rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
header, main, nav ul { width: min(76rem, 100%); margin-inline: auto; padding-inline: clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(1.5rem, 5vw, 3.5rem); }
h1 {
  font-size: clamp(1.6rem, 4.5vw, 2.4rem); line-height: 1.15; letter-spacing: -0.015em;
  margin: 0 0 0.5rem; text-wrap: balance;
}
h2 { font-size: 1.4rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 1rem; }
h3, h4 { font-size: 0.95rem; margin: 0; }
p { max-width: 46rem; margin: 0 0 1rem; }
.lead { color: var(--soft); font-size: 1.05rem; margin-bottom: 1.25rem; }
a { color: var(--blue); text-underline-offset: 0.2em; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
nav { position: sticky; top: 0; z-index: 3; background: var(--ground); border-block: 1px solid var(--line); }
nav ul {
  display: flex; gap: 0 1.4rem; list-style: none; margin-block: 0; padding-block: 0;
  overflow-x: auto; white-space: nowrap;
}
nav a { display: block; padding: 0.65rem 0; font-size: 0.92rem; text-decoration: none; }
nav a:hover { text-decoration: underline; }
main { padding-bottom: 4rem; }
section { padding-top: 2.5rem; }
.findings { list-style: none; margin: 0 0 1rem; padding: 0; display: grid; gap: 0.6rem; }
.findings li {
  display: grid; grid-template-columns: 1.7rem 1fr; gap: 0.8rem; padding: 0.8rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--tone, var(--soft)); border-radius: 0.4rem;
}
.findings li div { max-width: 60rem; }
.findings strong { color: var(--tone, inherit); }
.sign { color: var(--tone, var(--soft)); font-weight: 700; text-align: center; }
.better { --tone: var(--green); } .worse { --tone: var(--red); } .warning { --tone: var(--ochre); } .open { --tone: var(--blue); }
.wide { overflow-x: auto; margin: 0 0 1.6rem; background: var(--card); border: 1px solid var(--line); border-radius: 0.4rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.75rem 0.9rem; font-weight: 600; }
th, td {
  padding: 0.45rem 0.9rem; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); overflow-wrap: normal;
}
thead th { color: var(--soft); font-weight: 600; font-size: 0.85rem; vertical-align: bottom; background: var(--tint); }
tbody th { font-weight: 600; max-width: 16rem; min-width: 7rem; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card); border-right: 1px solid var(--line); }
thead th:first-child { background: var(--tint); }
tbody tr:hover > * { background: var(--tint); }
.number, .measure { white-space: nowrap; }
.mean { font-weight: 600; }
.reach { color: var(--soft); font-size: 0.86em; }
.bar { display: block; margin-top: 0.2rem; overflow: visible; }
.bar .axis { stroke: var(--line); stroke-width: 1; }
.bar .mark { stroke: var(--ochre); stroke-width: 1.5; stroke-dasharray: 2 2; }
.bar .span { stroke: var(--blue); stroke-width: 3; stroke-linecap: round; opacity: 0.55; }
.bar circle { fill: var(--blue); }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: 1rem; margin: 0 0 1.6rem;
}
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 0.4rem;
  padding: 0.8rem; max-width: 58rem;
}
figure img { display: block; width: 100%; max-width: 864px; height: auto; margin-inline: auto; }
figcaption { color: var(--soft); font-size: 0.9rem; padding-top: 0.6rem; }
summary { cursor: pointer; color: var(--blue); }
.examples { margin-bottom: 0.6rem; background: var(--card); border: 1px solid var(--line); border-radius: 0.4rem; }
.examples > summary { padding: 0.7rem 1rem; font-weight: 600; }
.example { padding: 1rem; border-top: 1px solid var(--line); }
.example h3 { color: var(--soft); font-size: 0.8rem; font-weight: 600; }
.prompt { margin-bottom: 0.6rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0.8rem; }
.side { background: var(--tint); border-radius: 0.4rem; padding: 0.7rem 0.9rem; min-width: 0; }
.facts { color: var(--soft); font-size: 0.85rem; margin: 0 0 0.4rem; }
.said { white-space: pre-wrap; margin: 0; font-size: 0.95rem; }
.empty { color: var(--soft); font-style: italic; }
dl { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr; gap: 0.4rem 1.2rem; margin: 0 0 1rem; max-width: 62rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 36rem) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 0.5rem; }
  tbody th { max-width: 9rem; }
  th, td { padding-inline: 0.6rem; }
}
@media print {
  :root { --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f4f4f4; color-scheme: light; }
  body { font-size: 9.5pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  th:first-child { position: static; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  tr, figure, .findings li, .side { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  figure img { filter: none; }
}
"""
