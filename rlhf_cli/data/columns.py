"""The columns of a row under our names: another column, a place inside one, or a text that joins several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.suggest import did_you_mean

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Ours → theirs: a column, a place inside one ("input.messages", "summaries.0.text"), or a text with columns in braces. In a
spelling "responses.0" is the first of our list `responses`."""

IN_BRACES = re.compile(r"\{([^{}]+)\}")
OF_ITEMS = ("text", "score", "rank")
"""Ours that stand, where no column is called so, in each object of the list `responses`."""


def renamed(row: Row, columns: Columns) -> Row:
    """The row under our names; a column that was read under one of them is gone under its own."""
    taken = {name for theirs in columns.values() for name in read_by(theirs, row)}
    kept = {name: value for name, value in row.items() if name not in taken}
    own = {ours: value for ours, theirs in columns.items() if (value := value_of(row, theirs)) is not None or theirs in row}
    for ours in [name for name in own if "." in name]:
        own.setdefault(ours.partition(".")[0], []).append(own.pop(ours))
    inner = {ours: columns[ours] for ours in OF_ITEMS if ours in columns and ours not in own}
    if inner and isinstance(items := own.get("responses", row.get("responses")), list):
        own["responses"] = [
            item | {ours: item.get(theirs) for ours, theirs in inner.items()} if isinstance(item, dict) else item
            for item in items
        ]
    return kept | own


def respelled(row: Row, names: Columns) -> Row:
    """The row under our names as a public data set spells them; what the row has under ours stays."""
    return renamed(row, {ours: theirs for ours, theirs in names.items() if ours not in row})


def read_by(theirs: str, row: Row) -> list[str]:
    """The columns of the row that are read for what `columns` says."""
    return IN_BRACES.findall(theirs) or [theirs if theirs in row else theirs.partition(".")[0]]


def value_of(row: Row, theirs: str) -> Any:
    """What the row has there; None for nothing."""
    if "{" in theirs:
        return _joined(row, theirs)
    if theirs in row or "." not in theirs:
        return row.get(theirs)
    value: Any = row
    for part in theirs.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _joined(row: Row, text: str) -> str | None:
    """The text with its columns filled in; a paragraph all of whose columns are empty or missing vanishes."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        values = {name: row.get(name) for name in IN_BRACES.findall(paragraph)}
        filled = {name: "" if value is None else str(value) for name, value in values.items()}
        if not values or any(value.strip() for value in filled.values()):
            paragraphs.append(IN_BRACES.sub(lambda match, filled=filled: filled[match[1]], paragraph))  # type: ignore[misc]
    return "\n\n".join(paragraphs) or None


def check_named(columns: Columns, known: Iterable[str], rows: Sequence[Row], place: str) -> None:
    """UsageError for a name that is none of ours, or that stands for nothing in these rows."""
    there = {name for row in rows for name in (*row, *_of_items(row))}
    for ours, theirs in columns.items():
        if ours not in known:
            all_of_them = f"they are {', '.join(known)}"
            raise UsageError(f"{place}: '{ours}' is none of our columns. {did_you_mean(ours, known, all_of_them)}")
        for name in read_by(theirs, dict.fromkeys(there)):
            if name not in there:
                raise UsageError(f"{place}: the data has no column '{name}'; found {shown(rows)}")
        if "." in theirs and "{" not in theirs and all(value_of(row, theirs) is None for row in rows):
            raise UsageError(f"{place}: '{theirs}' is nowhere in the first rows")


def _of_items(row: Row) -> Iterable[str]:
    return (key for value in row.values() if isinstance(value, list) for item in value if isinstance(item, dict) for key in item)


def shown(rows: Sequence[Row]) -> str:
    """The names of all columns of the rows, for a message."""
    names = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    printed = [name if name.isprintable() else ascii(name)[:40] for name in names[:12]]
    return ", ".join(printed + ["…"] * (len(names) > 12)) or "(none)"
