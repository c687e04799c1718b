"""What a run asks of the rows of its sources, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_cli.data.formats import Purpose
from rlhf_cli.errors import UsageError
from rlhf_cli.suggest import did_you_mean

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Tree

ALL = "*"
"""Stands for every column of a row."""
Lent = Mapping[str, str | None]
"""Columns of a row, or ALL, that terms of a reward read → who cannot do without it; None: it may be missing."""


@dataclass(frozen=True)
class RowRequest:
    """What is asked of the rows that a recipe names."""

    purpose: Purpose
    seed: int
    where: Callable[[str], str] = str  # the place of a recipe key, for messages
    margin_column: str | None = None  # the column, as the files name it, of the margins of pairs: then every row has one
    check: Callable[[Tree], str | None] | None = None  # why a tree cannot be used, if it cannot
    separator: str | None = None  # what tells the steps of a response apart, where they are asked for
    reserve: int = 0  # tokens that a prompt without responses leaves free
    progress: Callable[[str, int, int | None], None] = lambda done, rows, total: None  # is told what was done to how many rows
    chat: bool = True  # is a chat template in force? Then a text is one user turn, unless it is a transcript
    columns: Lent = field(default_factory=dict)  # what is kept of a row beside its record


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source: read = kept + all of bad + all of unused."""

    path: str
    format: str
    read: int
    kept: int
    bad: dict[str, int]  # reason → rows
    unused: dict[str, int]  # reason → rows that are no fault: of no use to the stage, or beyond the limit
    bad_examples: tuple[str, ...]  # "file:line: reason" of the first ten
    fingerprint: str  # hash of the good rows in file order, before the limit: the same for the same rows in another file type
    left_out: tuple[str, ...] = ()  # columns that nothing reads
    lent: tuple[str, ...] = ()  # columns that terms of a reward read
    transcripts: int = 0  # good rows whose text was read as the turns of a Human/Assistant transcript
    notices: tuple[str, ...] = ()  # for the console


def check_lent(reports: Sequence[SourceReport], request: RowRequest) -> None:
    """UsageError for a column that a term of the reward cannot do without, and that no source has."""
    for name, who in request.columns.items() if reports else ():
        if who is not None and name != ALL and not any(name in report.lent for report in reports):
            there = sorted({found for report in reports for found in (*report.left_out, *report.lent)})
            known = (
                f"beside what is read of them, the rows have {', '.join(there)}" if there else "the rows have none beside theirs"
            )
            files = ", ".join(report.path for report in reports)
            raise UsageError(f"{who} reads the column '{name}', and no row of {files} has it. {did_you_mean(name, there, known)}")
