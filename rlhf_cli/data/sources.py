"""The data section of a recipe → records: sources are read and checked, cut to their limit, held out and mixed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.dialogue import BadRow, as_turns
from rlhf_cli.data.files import RawRow, find_files, is_hub_id, read_file
from rlhf_cli.data.formats import (
    COLUMNS,
    KNOWN_COLUMNS,
    STAGE_TAKES,
    STAGE_USE,
    Converter,
    Row,
    convert,
    converter_of,
    detect,
    needs,
    shown_columns,
    with_margin,
    wrong_stage,
)
from rlhf_cli.data.hub import read_hub
from rlhf_cli.data.records import Record
from rlhf_cli.errors import UsageError

Where = Callable[[str], str]

DETECT_ROWS = 100
EXAMPLES = 10


BEYOND_LIMIT = "beyond the limit"


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


@dataclass(frozen=True)
class Reading:
    """All records of a run. Those of source i are the next sizes[i] of train."""

    train: list[Record]
    held_out: list[Record]
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


def read_data(data: sections.Data, stage: str, seed: int, where: Where = str, margin_column: str | None = None) -> Reading:
    """Read every source of a run; the limit of a source comes first, then the hold-out.

    `margin_column` is the column, as the files name it, of the margins of pairs, if they are wanted: then every row has one.
    `where` gives the place of a recipe key for messages. Raises UsageError for what the recipe or a file has wrong,
    MachineError for a hub that cannot be reached.
    """
    if data.eval is not None and data.holdout > 0:
        raise UsageError(f"{where('data.holdout')}: data.eval and data.holdout exclude each other; keep one")
    shares = _shares(data.train, where)
    train, reports = _read_all(data.train, "data.train", stage, seed, data.shuffle, where, margin_column)
    held_out, eval_reports = _read_all(data.eval or [], "data.eval", stage, seed, data.shuffle, where, margin_column)
    if data.holdout > 0:
        train, held_out = _hold_out(train, data.holdout, seed, where("data.holdout"))
    sizes = tuple(len(records) for records in train)
    return Reading(list(chain(*train)), list(chain(*held_out)), reports, eval_reports, sizes, shares)


def _shares(sources: Sequence[sections.Source], where: Where) -> tuple[float, ...]:
    if not sources:
        raise UsageError(f"{where('data.train')}: the list is empty; name at least one source")
    for i, source in enumerate(sources):
        if not source.weight > 0:
            place = where(f"data.train.{i}.weight")
            raise UsageError(f"{place}: a weight of {source.weight:g} never draws from {source.path}; remove the source")
    total = math.fsum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


def _read_all(
    sources: Sequence[sections.Source], key: str, stage: str, seed: int, shuffle: bool, where: Where, margin: str | None
) -> tuple[list[list[Record]], list[SourceReport]]:
    read = [_read_source(source, f"{key}.{i}", stage, seed, shuffle, where, margin) for i, source in enumerate(sources)]
    return [records for records, _ in read], [report for _, report in read]


def _read_source(
    source: sections.Source, key: str, stage: str, seed: int, shuffle: bool, where: Where, margin: str | None
) -> tuple[list[Record], SourceReport]:
    parts = _parts(source, key, where, margin)
    name, rows = parts[0]
    head, objects = _peek(rows)
    if not objects:
        raise _no_good_row(name, _tally_of(name, head), f"one of {needs(stage)}")
    renamed = _rename_all(objects, source.columns, where(f"{key}.columns"))
    format = _format_of(source, renamed, stage, name, key, where)
    if margin is not None:
        _check_margin(margin, objects, format, f"{where('objective.margin_column')}: {name}")
    converter = converter_of(format, renamed)
    parts[0] = (name, chain(head, rows))
    tally = _Tally()
    records = [record for part in parts for record in _convert(*part, source.columns, margin, format, converter, stage, tally)]
    if not records:
        raise UsageError(
            f"{where(f'{key}.path')}: {stage} can use none of the {tally.read} rows: {_counts(tally.unused + tally.bad)}"
        )
    chosen = _limited(records, source, seed, shuffle)
    if len(chosen) < len(records):
        tally.unused[BEYOND_LIMIT] = len(records) - len(chosen)
    return chosen, _report(source.path, format, len(chosen), tally)


def _report(path: str, format: str, kept: int, tally: _Tally) -> SourceReport:
    bad, unused = dict(tally.bad.most_common()), dict(tally.unused.most_common())
    return SourceReport(path, format, tally.read, kept, bad, unused, tuple(tally.examples), tally.digest.hexdigest())


def _check_margin(column: str, objects: Sequence[Row], format: str, place: str) -> None:
    if "chosen" not in COLUMNS[format]:
        raise UsageError(f"{place}: {format} rows have no one margin; only pairs of chosen and rejected have")
    if not any(column in row for row in objects):
        raise UsageError(f"{place}: the data has no column '{column}'; found {shown_columns(objects)}")


def _parts(source: sections.Source, key: str, where: Where, margin: str | None) -> list[tuple[str, Iterator[RawRow]]]:
    """(name, raw rows) of each file of a source, or of its one hub split."""
    place = where(f"{key}.path")
    if is_hub_id(source.path):
        return [(f"{source.path}[{source.split}]", read_hub(source.path, source.name, source.split, place))]
    files = find_files(source.path, place)
    for name, value, default in (("name", source.name, None), ("split", source.split, "train")):
        if value != default:
            raise UsageError(
                f"{where(f'{key}.{name}')}: {name} is for data sets of the hub and has no effect on files; remove it"
            )
    columns = {theirs: ours for ours, theirs in source.columns.items()} | ({margin: "margin"} if margin is not None else {})
    return [(str(file), read_file(file, columns)) for file in files]


def _peek(rows: Iterator[RawRow]) -> tuple[list[RawRow], list[Row]]:
    """The raw rows up to the hundredth object, and those objects."""
    head: list[RawRow] = []
    objects: list[Row] = []
    for line, row in rows:
        head.append((line, row))
        if not isinstance(row, BadRow):
            objects.append(row)
            if len(objects) == DETECT_ROWS:
                break
    return head, objects


def _rename_all(rows: Sequence[Row], columns: Mapping[str, str], place: str) -> list[Row]:
    found = dict.fromkeys(name for row in rows for name in row)
    for ours, theirs in columns.items():
        if ours not in KNOWN_COLUMNS:
            raise UsageError(f"{place}: '{ours}' is none of our columns: {', '.join(KNOWN_COLUMNS)}")
        if theirs not in found:
            raise UsageError(f"{place}: the data has no column '{theirs}'; found {shown_columns(rows)}")
    return [_renamed(row, columns) for row in rows]


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names; a column that was renamed is gone under its own."""
    theirs = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs}
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def _format_of(source: sections.Source, objects: Sequence[Row], stage: str, name: str, key: str, where: Where) -> str:
    if source.format == "auto":
        return detect(objects, stage, f"{where(f'{key}.path')}: {name}")
    if source.format not in STAGE_TAKES[stage]:
        raise wrong_stage(source.format, stage, f"{where(f'{key}.format')}: {name}")
    return source.format


def _convert(
    name: str,
    rows: Iterable[RawRow],
    columns: Mapping[str, str],
    margin: str | None,
    format: str,
    converter: Converter,
    stage: str,
    tally: _Tally,
) -> Iterator[Record]:
    """The records of one file that the stage can use; everything else is counted. A file without a good row is a UsageError."""
    use = STAGE_USE[stage]
    own = _Tally()
    for line, row in rows:
        place = f"{name}:{line}"
        own.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            record = convert(_renamed(row, columns) if columns else row, place, converter)
            if margin is not None:
                record = with_margin(record, row, margin)
        except BadRow as bad:
            own.add_bad(place, bad)
            continue
        tally.digest.update(json.dumps((record.prompt, *record[1:2], *record[3:])).encode())
        used = use(record)
        if isinstance(used, str):
            own.unused[used] += 1
        else:
            yield used
    if own.read == own.bad.total():
        raise _no_good_row(name, own, f"{format} rows ({' + '.join(COLUMNS[format])})")
    tally.merge(own)


def _tally_of(name: str, rows: Iterable[RawRow]) -> _Tally:
    tally = _Tally()
    for line, row in rows:
        assert isinstance(row, BadRow)
        tally.read += 1
        tally.add_bad(f"{name}:{line}", row)
    return tally


def _no_good_row(name: str, tally: _Tally, expected: str) -> UsageError:
    if not tally.read:
        return UsageError(f"{name}: no rows; expected {expected}")
    return UsageError(f"{name}: no good row among {tally.read}: {_counts(tally.bad)}; expected {expected}\n  {tally.examples[0]}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in counter.most_common(5))


def _limited(records: list[Record], source: sections.Source, seed: int, shuffle: bool) -> list[Record]:
    if source.limit is None or source.limit >= len(records):
        return records
    if not shuffle:
        return records[: source.limit]
    key = int.from_bytes(blake2b(source.path.encode(), digest_size=8).digest())
    chosen = np.random.default_rng([seed, key]).permutation(len(records))[: source.limit]
    return [records[i] for i in sorted(chosen)]


def check_lost(lost: int, read: int, max_lost: float, examples: Sequence[str]) -> None:
    """UsageError if more than the share max_lost of the rows is lost; shows the first three examples."""
    if lost <= max_lost * read:
        return
    raise UsageError(
        f"{lost} of {read} rows ({lost / read:.1%}) are dropped or truncated; data.max_lost allows {max_lost:.1%}\n"
        f"  {'; '.join(examples[:3])}\n"
        f"  mend these rows, or set data.max_lost to {math.ceil(lost / read * 1000) / 1000:g} or more"
    )


def prompt_share(record: Record, seed: int) -> float:
    """Where a prompt falls in [0, 1): the same for a seed in every format, source and stage; a text is its own prompt."""
    prompt = record.prompt or record.responses[0]
    turns = [(turn.role, turn.content.strip()) for turn in as_turns(prompt)]
    digest = blake2b(json.dumps(turns).encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) / 2**64


def _hold_out(train: list[list[Record]], share: float, seed: int, place: str) -> tuple[list[list[Record]], list[list[Record]]]:
    """Each source's records split by their prompts; each side keeps at least one prompt."""
    falls = [[prompt_share(record, seed) for record in records] for records in train]
    every = sorted(set(chain(*falls)))
    if len(every) < 2:
        raise UsageError(f"{place}: all rows have the same prompt, so none can be held out; set data.eval instead")
    # The lowest prompt is always held out and the highest never.
    bound = min(max(share, math.nextafter(every[0], 1)), every[-1])
    kept = [[r for r, fall in zip(records, at, strict=True) if fall >= bound] for records, at in zip(train, falls, strict=True)]
    held = [[r for r, fall in zip(records, at, strict=True) if fall < bound] for records, at in zip(train, falls, strict=True)]
    return kept, held


def epoch_order(sizes: Sequence[int], shares: Sequence[float], seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The rows of an epoch (from 0) as indices into the concatenated sources, (sum(sizes),) int64; a pure function.

    Each source fills its share, rounded to whole rows. It is drawn without replacement; when it is exhausted, a fresh
    permutation of it begins, and goes on in the next epoch where this one ends. Without shuffling, the sources are
    interleaved evenly, each in file order. A source without rows leaves its share to the others.
    """
    counts = _apportion(sum(sizes), [share if size else 0.0 for size, share in zip(sizes, shares, strict=True)])
    starts = np.cumsum([0, *sizes])
    drawn = [starts[i] + _draw(size, counts[i], seed, i, epoch, shuffle) for i, size in enumerate(sizes)]
    rows = np.concatenate(drawn)
    if shuffle:
        return rows[np.random.default_rng([seed, 1, epoch]).permutation(len(rows))]
    position = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return rows[np.argsort(position, kind="stable")]


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole rows by largest remainder."""
    exact = [total * share / math.fsum(shares) for share in shares]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(size: int, count: int, seed: int, source: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Rows epoch·count … (epoch+1)·count of the endless sequence of a source's permutations, (count,)."""
    begin, end = epoch * count, (epoch + 1) * count
    pieces = [np.empty(0, dtype=np.int64)]
    for cycle in range(begin // size, -(-end // size)) if count else ():
        order = np.random.default_rng([seed, 2, source, cycle]).permutation(size) if shuffle else np.arange(size)
        pieces.append(order[max(begin - cycle * size, 0) : end - cycle * size])
    return np.concatenate(pieces)
