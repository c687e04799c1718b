"""What a report is made of, before it is written as Markdown or as HTML.

Texts are shown literally, whatever is in them; in those of paragraphs, findings and items, what stands between ` is code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.figures import Interval

Kind = Literal["better", "worse", "open", "warning", "note"]
Cell = str | Interval


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    text: str


@dataclass(frozen=True)
class Column:
    """Of a table; a column of intervals has bars on one scale."""

    name: str
    mark: float | None = None  # a line through all bars: what they are compared with
    scale: tuple[float, float] | None = None  # None: as far as the intervals reach


@dataclass(frozen=True)
class Table:
    """Rows under the heads of columns."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]  # the first cell is the row's name


@dataclass(frozen=True)
class Picture:
    """A PNG, in its file and in the page itself."""

    title: str
    name: str  # of the file in plots/
    alt: str  # what there is to see, for those who cannot
    png: bytes


@dataclass(frozen=True)
class Finding:
    """A sentence that says what a figure means; the head is its gist, or empty."""

    kind: Kind
    head: str
    text: str


@dataclass(frozen=True)
class Response:
    """What was said to a prompt."""

    by: str  # a model, or when in the training
    text: str
    facts: str


@dataclass(frozen=True)
class Example:
    """A prompt and its responses."""

    prompt: str
    responses: tuple[Response, ...]
    note: str = ""


@dataclass(frozen=True)
class Examples:
    """Prompts with as many responses each; with a title they are folded in until somebody wants to see them."""

    title: str
    own: tuple[Example, ...]


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    own: tuple[str, ...]


@dataclass(frozen=True)
class Definitions:
    """What the terms of a report mean."""

    own: tuple[tuple[str, str], ...]  # (term, what it is)


@dataclass(frozen=True)
class Code:
    """Lines of Python."""

    lines: tuple[str, ...]


Block = Paragraph | Table | Picture | Finding | Examples | Items | Definitions | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a title."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    lead: str
    sections: tuple[Section, ...]
