"""The data section of a recipe → records: sources are read and checked, cut to their limit, held out and mixed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data import cache, formats, stored
from rlhf_cli.data.cache import default_folder
from rlhf_cli.data.columns import OF_ITEMS, Columns, Row, check_named, renamed, respelled, shown
from rlhf_cli.data.conversations import as_spoken
from rlhf_cli.data.files import RawRow, find_files, is_hub_id, is_saved, read_file, read_saved
from rlhf_cli.data.formats import FORMATS, KNOWN_COLUMNS, UNFIT, Converter, Format, Use
from rlhf_cli.data.hub import read_hub
from rlhf_cli.data.meaning import LostMeaning, check_columns, check_ignored, without
from rlhf_cli.data.records import BadRow, Record, as_turns, remedies, spoken
from rlhf_cli.data.requests import ALL, RowRequest, SourceReport, check_lent
from rlhf_cli.data.stored import joined, take
from rlhf_cli.errors import UsageError
from rlhf_cli.files import sha256_file

DETECT_ROWS = 100
TOLD = 10_000  # rows after which the progress is told
KEPT_FROM = 1 << 22  # bytes of files whose records are kept between runs
EXAMPLES = 10
BEYOND_LIMIT = "beyond the limit"


class _Source(NamedTuple):
    """What was read of a source."""

    records: Sequence[Record]
    falls: np.ndarray  # (N,) where the prompt of each falls, if some are held out
    report: SourceReport


@dataclass(frozen=True)
class Reading:
    """All records of a run. Those of source i are the next sizes[i] of train."""

    train: Sequence[Record]
    held_out: Sequence[Record]
    reports: list[SourceReport]
    eval_reports: list[SourceReport]
    sizes: tuple[int, ...]
    shares: tuple[float, ...]  # of each source in an epoch, by weight; their sum is 1


@dataclass
class _Tally:
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    digest: blake2b = field(default_factory=lambda: blake2b(digest_size=16))

    def add_bad(self, place: str, bad: BadRow) -> None:
        self.bad[bad.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{place}: {bad}")

    def merge(self, other: _Tally) -> None:
        self.read += other.read
        self.bad += other.bad
        self.unused += other.unused
        self.examples = (self.examples + other.examples)[:EXAMPLES]


def read_data(data: sections.Data, request: RowRequest) -> Reading:
    """Read every source of a run; the limit of a source comes first, then the hold-out.

    Raises UsageError for what the recipe or a file has wrong, MachineError for a hub that cannot be reached.
    """
    read = [_read_source(source, f"data.train.{i}", data, request) for i, source in enumerate(data.train)]
    apart = [_read_source(source, f"data.eval.{i}", data, request) for i, source in enumerate(data.eval or [])]
    for part in (read, apart):
        check_lent([source.report for source in part], request)
    train, held_out = [own.records for own in read], [own.records for own in apart]
    if data.holdout > 0:
        train, held_out = _hold_out(read, data.holdout, request.where("data.holdout"))
    total = math.fsum(source.weight for source in data.train)
    return Reading(
        joined(train),
        joined(held_out),
        [own.report for own in read],
        [own.report for own in apart],
        sizes=tuple(map(len, train)),
        shares=tuple(source.weight / total for source in data.train),
    )


def _read_source(source: sections.Source, key: str, data: sections.Data, request: RowRequest) -> _Source:
    """The records of a source: those of large files are kept, and found again by the files' content."""
    seed, folder = data.holdout_seed if data.holdout > 0 else None, default_folder()
    path = folder / f"rows-{found}.arrow" if folder and (found := _cache_key(source, key, seed, request)) else None
    if path is not None and (kept := stored.read(path)) is not None:
        facts: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept[1].items()}
        read = _Source(kept[0], kept[0].falls(), SourceReport(**facts))
    else:
        with stored.Writer(folder) as writer:
            report = _convert(source, key, seed, request, writer)
            read = _Source(*writer.finish(path, dataclasses.asdict(report)), report)
    records, falls, report = read
    if source.limit is None or source.limit >= len(records):
        return read
    chosen = _limited(len(records), source.limit, source.path, request.seed, data.shuffle)
    unused = report.unused | {BEYOND_LIMIT: len(records) - len(chosen)}
    return _Source(take(records, chosen), falls[chosen], dataclasses.replace(report, kept=len(chosen), unused=unused))


def _cache_key(source: sections.Source, key: str, seed: int | None, request: RowRequest) -> str | None:
    """All that the records of a source depend on; None where they are not kept."""
    if is_hub_id(source.path) or is_saved(source.path):
        return None
    files = find_files(source.path, request.where(f"{key}.path"), source.split)
    if sum(file.stat().st_size for file in files) < KEPT_FROM:
        return None
    use = request.purpose.use
    asked = [source.format, source.columns, source.ignore, sorted(use.needs), use.responses, use.keep.__qualname__]
    lent = sorted((name, who is None) for name, who in request.columns.items())
    wanted = [sorted(use.better), request.margin_column, request.separator, lent, request.chat, seed]
    settings = json.dumps([*asked, *wanted, *map(str, files)])
    return cache.key([_CODE, settings, *map(sha256_file, files)])


def _convert(source: sections.Source, key: str, seed: int | None, request: RowRequest, writer: stored.Writer) -> SourceReport:
    """Writes the records of a source, and says what became of its rows; `seed`: of the hold-out."""
    where, margin, purpose = request.where, request.margin_column, request.purpose
    files = _files(source, where(f"{key}.path"), margin)
    name, rows = files[0]
    head, objects = _peek(rows)
    if not objects:
        tally = _Tally(len(head))
        for line, bad_row in head:
            assert isinstance(bad_row, BadRow)
            tally.add_bad(f"{name}:{line}", bad_row)
        raise _no_good_row(name, tally, f"one of {purpose.needs}")
    check_ignored(source.ignore, objects, where(f"{key}.ignore"))
    own = [without(row, source.ignore) for row in objects]
    check_named(source.columns, (*KNOWN_COLUMNS, *request.columns), own, where(f"{key}.columns"))
    own = [renamed(row, source.columns) for row in own]
    format = _format_of(source, key, name, own, request)
    spelling = format.spelling(own)
    if spelling:
        spelling = {**spelling, **{ours: theirs for ours, theirs in source.columns.items() if ours in OF_ITEMS}}
    own = [respelled(row, spelling) for row in own]
    if margin is not None and not any(margin in row for row in objects):
        place = f"{where('objective.margin_column')}: {name}"
        raise UsageError(f"{place}: the data has no column '{margin}'; found {shown(objects)}")
    converter = format.converter(own, request.chat, f"{where(f'{key}.path')}: {name}", request.separator)
    convert = _Conversion(source, key, format, converter, request, spelling, format.used(own) | ({margin} if margin else set()))
    files[0] = (name, chain(head, rows))
    tally, kept = _Tally(), 0
    for file, raw in files:
        counted = _Tally(digest=tally.digest)
        for record in _records(raw, file, convert, purpose.use, counted):
            writer.add(*record, 0.0 if seed is None else prompt_share(record[0], seed))
            kept += 1
            if kept % TOLD == 0:
                request.progress("read", kept, None)
        if counted.read == counted.bad.total():
            raise _no_good_row(file, counted, f"{format.name} rows ({format})")
        tally.merge(counted)
    if not kept:
        what = f"{purpose.label} can use none of the {tally.read} rows: {_counts(tally.unused + tally.bad)}"
        raise UsageError(f"{where(f'{key}.path')}: {what}")
    return SourceReport(
        source.path,
        format.name,
        tally.read,
        kept,
        dict(tally.bad.most_common()),
        dict(tally.unused.most_common()),
        tuple(tally.examples),
        tally.digest.hexdigest(),
        tuple(name for name in convert.seen if not {name, ALL} & {*convert.used, *request.columns}),
        tuple(name for name in (request.columns if ALL not in request.columns else convert.seen) if name in convert.lent),
        convert.transcripts,
        tuple(convert.said(own, tally.read - tally.bad.total())),
    )


_CODE = cache.source_hash(*map(str, sorted(Path(__file__).parent.glob("*.py"))))


@dataclass
class _Conversion:
    """How the rows of a source become records, and what was seen of their columns."""

    source: sections.Source
    key: str  # of the source in the recipe
    format: Format
    converter: Converter
    request: RowRequest
    spelling: Columns
    used: set[str]
    seen: dict[str, None] = field(default_factory=dict)  # all columns under our names
    lent: Counter[str] = field(default_factory=Counter)  # of any name that terms of a reward read → rows that have it
    transcripts: int = 0

    def rows(self, raw: Iterator[RawRow], file: str) -> Iterator[RawRow]:
        """The rows of a file under our names, those of which the format makes one together.

        UsageError: a column that changes what a row means is not read.
        """
        own = ((line, row if isinstance(row, BadRow) else self._ours(row, f"{file}:{line}")) for line, row in raw)
        return own if self.format.gather is None else self.format.gather(own)

    def _ours(self, row: Row, place: str) -> dict[str, Any]:
        own, margin = without(row, self.source.ignore), self.request.margin_column
        own = renamed(own, self.source.columns) if self.source.columns else own
        own = respelled(own, self.spelling) if self.spelling else own
        if not own.keys() <= self.seen.keys():
            self.seen.update(dict.fromkeys(own))
        with self._meant(place):
            check_columns(own, self.used, self.request.purpose.use.responses == "none")
        beside: dict[str, Any] = {} if margin is None or margin not in row else {margin: row[margin]}
        if asked := self.request.columns:
            every = {**row, **own} if ALL not in asked else own
            beside[ALL] = {name: every[name] for name in (every if ALL in asked else asked) if name in every}
            self.lent.update(name for name, value in beside[ALL].items() if value is not None)
        return {**own, **beside}

    def __call__(self, row: Row, place: str) -> Record:
        """UsageError where a turn says what is not read. Raises BadRow."""
        request = self.request
        with self._meant(place):
            record = formats.convert(row, place, self.converter)
        if not record.responses and request.purpose.use.responses != "none":
            raise BadRow(f"{' or '.join(self.format.columns)} does not end in an assistant turn")
        prompt = as_spoken(record.prompt) if request.chat else record.prompt
        self.transcripts += self.format.name == "hh" or prompt is not record.prompt
        columns = json.dumps(row[ALL], default=str) if ALL in row else ""
        record, margin = record._replace(prompt=prompt, columns=columns), request.margin_column
        return record if margin is None else formats.with_margin(record, row, margin)

    def said(self, first: Sequence[Row], rows: int) -> Iterator[str]:
        """What a person should know of how the rows are read, and of columns that a term of the reward reads and not all have."""
        path, format, lent = self.source.path, self.format, self.lent
        if format.without_prompts and isinstance(self.converter, partial):
            yield f"{path}: the responses repeat the prompt, which is cut off them"
        if format.gather is not None and format.name == "tree":
            yield f"{path}: each message of a person with its answers is one row"
        elif format.gather is not None and any("response" in row for row in first):
            yield f"{path}: rows of one prompt, with a response each, are one row"
        for name, who in self.request.columns.items():
            if who is not None and name != ALL and lent[name] < rows:
                how = f"{lent[name]:,} of {rows:,} rows have" if lent[name] else "no row has"
                yield f"{path}: {how} the column '{name}', which a term of the reward reads: elsewhere it is given null"

    @contextmanager
    def _meant(self, place: str) -> Iterator[None]:
        """LostMeaning within is a UsageError that says what the recipe can do."""
        try:
            yield
        except LostMeaning as lost:
            advice = f"read it by a format or columns, or leave it out on purpose: {self.key}.ignore: [{lost.name}]"
            raise UsageError(f"{self.request.where(f'{self.key}.path')}: {place}: {lost}\n  {advice}") from None


def _format_of(source: sections.Source, key: str, name: str, rows: Sequence[Row], request: RowRequest) -> Format:
    """The format that the recipe names, or that the first rows of the file `name` have."""
    where, purpose = request.where, request.purpose
    if source.format == "auto":
        format = formats.detect(rows, purpose, f"{where(f'{key}.path')}: {name}")
    elif source.format in purpose.use.formats:
        format = FORMATS[source.format]
    else:
        raise purpose.refuse(FORMATS[source.format], f"{where(f'{key}.format')}: {name}")
    if request.margin_column is not None and "pair" not in format.contains:
        place = f"{where('objective.margin_column')}: {name}"
        raise UsageError(f"{place}: {format.name} rows have no one margin; only pairs of chosen and rejected have")
    return format


def _files(source: sections.Source, place: str, margin: str | None) -> list[tuple[str, Iterator[RawRow]]]:
    """(name, raw rows) of each file of a source, or of its one hub split."""
    if is_hub_id(source.path):
        return [(f"{source.path}[{source.split}]", read_hub(source, place))]
    if is_saved(source.path):
        return [(source.path, read_saved(source.path, source.split, place))]
    columns = {theirs: ours for ours, theirs in source.columns.items()} | ({margin: "margin"} if margin is not None else {})
    return [(str(file), read_file(file, columns)) for file in find_files(source.path, place, source.split)]


def first_rows(source: sections.Source, place: str) -> list[Row]:
    """The first objects of a source, as they are. UsageError that begins with `place`: there is no such source."""
    return _peek(_files(source, place, None)[0][1])[1]


def _peek(rows: Iterator[RawRow]) -> tuple[list[RawRow], list[Row]]:
    """The raw rows up to the hundredth object, and those objects."""
    head, objects = list[RawRow](), list[Row]()
    for line, row in rows:
        head.append((line, row))
        objects += [] if isinstance(row, BadRow) else [row]
        if len(objects) == DETECT_ROWS:
            break
    return head, objects


def _records(rows: Iterator[RawRow], name: str, convert: _Conversion, use: Use, tally: _Tally) -> Iterator[tuple[Record, str]]:
    """The records of one file that are of use, as objects and as text; everything else is counted."""
    for line, row in convert.rows(rows, name):
        place = f"{name}:{line}"
        tally.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            record = convert(row, place)
        except BadRow as bad:
            tally.add_bad(place, bad)
            continue
        text = record._replace(columns="").serialised  # what stands beside it is no part of its fingerprint
        tally.digest.update(text.encode())
        used = use.keep(record) if record.facts.better in use.better else UNFIT[record.facts.better]
        if isinstance(used, str):
            tally.unused[used] += 1
        else:
            yield used, text if used == record and not used.columns else used.serialised


def _no_good_row(name: str, tally: _Tally, expected: str) -> UsageError:
    if not tally.read:
        return UsageError(f"{name}: no rows; expected {expected}")
    return UsageError(f"{name}: no good row among {tally.read}: {_counts(tally.bad)}; expected {expected}\n  {tally.examples[0]}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in counter.most_common(5))


def _limited(count: int, limit: int, path: str, seed: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(limit)
    key = int.from_bytes(blake2b(path.encode(), digest_size=8).digest())
    return np.sort(np.random.default_rng([seed, key]).permutation(count)[:limit])


def check_lost(lost: int, read: int, max_lost: float, examples: Sequence[str]) -> None:
    """UsageError if more than the share max_lost of the rows is lost; shows the first three examples."""
    if lost <= max_lost * read:
        return
    raise UsageError(
        f"{lost} of {read} rows ({lost / read:.1%}) are dropped or truncated; data.max_lost allows {max_lost:.1%}\n"
        f"  {'; '.join(examples[:3])}\n"
        f"  {remedies(examples)}mend these rows, or set data.max_lost to {math.ceil(lost / read * 1000) / 1000:g} or more"
    )


def prompt_share(record: Record, seed: int) -> float:
    """Where a prompt falls in [0, 1): the same for a seed in every format, source and stage; a text is its own prompt.

    It follows from the first user turn, capitals and spaces aside: the longer versions of a dialogue fall where it does.
    """
    turns = as_turns(record.prompt or spoken(record.responses[0]))
    first = next((turn.content for turn in turns if turn.role == "user"), turns[0].content)
    digest = blake2b(" ".join(first.casefold().split()).encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) / 2**64


def _hold_out(sources: Sequence[_Source], share: float, place: str) -> tuple[list[Sequence[Record]], list[Sequence[Record]]]:
    """Each source's records split by their prompts; each side keeps at least one prompt."""
    every = np.unique(np.concatenate([source.falls for source in sources]))
    if len(every) < 2:
        raise UsageError(f"{place}: all rows have the same prompt, so none can be held out; set data.eval instead")
    # The lowest prompt is always held out and the highest never.
    bound = min(max(share, math.nextafter(every[0], 1)), every[-1])
    kept = [take(source.records, np.flatnonzero(source.falls >= bound)) for source in sources]
    return kept, [take(source.records, np.flatnonzero(source.falls < bound)) for source in sources]
