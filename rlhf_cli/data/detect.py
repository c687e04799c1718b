"""Which format the rows of a source have, and what is said where nobody can use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.data.formats import FORMATS, KNOWN_COLUMNS, Format, Row, Use
from rlhf_cli.data.records import shortened
from rlhf_cli.errors import UsageError

ALIASES = {"prompt": ("instruction", "question", "query"), "completion": ("response", "output", "answer")}
"""Names that other data sets use; only for the suggestion in an error, never read on their own."""


@dataclass(frozen=True)
class Purpose:
    """Who reads rows, and what for."""

    label: str  # what errors call it
    use: Use
    others: Mapping[str, Use]  # who else reads rows, for the error about rows that are for others

    @property
    def needs(self) -> str:
        """The columns of every format that it takes."""
        return " | ".join(map(str, self.use.formats.values()))

    def refuse(self, format: Format, place: str, hint: str = "") -> UsageError:
        """The error for rows that it cannot use, and others can."""
        others = [name for name, use in self.others.items() if format.name in use.formats]
        found = f"found {format.name} data ({format})"
        return UsageError(f"{place}: {found}, which {' and '.join(others)} can use; {self.label} needs {self.needs}{hint}")


def detect(rows: Sequence[Row], purpose: Purpose, place: str) -> Format:
    """The one format most of the rows have and is of use; UsageError that begins with `place` otherwise."""
    counts = Counter(found for row in rows if (found := readings(row)))
    columns = shown_columns(rows)
    if not counts:
        hint = _rename_hint(rows, purpose.use)
        raise UsageError(f"{place}: found the columns {columns}; {purpose.label} needs {purpose.needs}{hint}")
    found = counts.most_common(1)[0][0]
    fitting = [name for name in found if name in purpose.use.formats]
    if not fitting:
        raise purpose.refuse(FORMATS[found[0]], place, _rename_hint(rows, purpose.use))
    if len(fitting) > 1:
        raise UsageError(
            f"{place}: the columns {columns} can be read as {' or as '.join(fitting)}; set format: to the one you mean"
        )
    return FORMATS[fitting[0]]


def readings(row: Row) -> tuple[str, ...]:
    """The names of the formats that a row can be read as; a prompt alone is one where no other format takes it."""
    there = {name: value for name, value in row.items() if value is not None}
    found = [format for format in FORMATS.values() if format.fits(there)]
    prompted = [format for format in found if "prompt" in format.columns]
    return tuple(format.name for format in found if format.name != "prompt" or prompted == [format])


def shown_columns(rows: Sequence[Row]) -> str:
    """The names of all columns of the rows, for a message."""
    names = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    shown = [name if name.isprintable() else shortened(name) for name in names[:12]]
    return ", ".join(shown + ["…"] * (len(names) > 12)) or "(none)"


def _rename_hint(rows: Sequence[Row], use: Use) -> str:
    """A `columns:` line that would make a format complete that is taken, where there is one obvious reading."""
    has = {str(name) for row in rows for name in row}
    ours = {name: [theirs for theirs in ALIASES.get(name, ()) if theirs in has] for name in KNOWN_COLUMNS}
    for format in use.formats.values():
        missing = [name for name in format.columns if name not in has]
        if missing and "input" not in has and all(len(ours[name]) == 1 for name in missing):
            return f"; perhaps columns: {{{', '.join(f'{name}: {ours[name][0]}' for name in missing)}}}"
    return ""
