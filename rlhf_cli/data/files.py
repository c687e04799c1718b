"""A path → its files, and a file → its raw rows with line numbers. Nothing in a file is ever executed."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import BadRow, kind_of
from rlhf_cli.errors import MachineError, UsageError

RawRow = tuple[int, dict[str, Any] | BadRow]  # (line or row number from 1, the row or why it is none)

MAX_LINE = 8 * 2**20  # bytes of one row; a longer one is a bad row, and is never held in memory as a whole

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".tsv", ".gz", ".zip", ".zst", ".arrow", ".pkl", ".yaml", ".py")
"""A path that ends so means a file, also when it does not exist."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), "validation"),
}
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])")
BOM = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\n\r]*")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


def is_hub_id(path: str) -> bool:
    """owner/name that cannot have been meant as a local path."""
    local = Path(path).exists() or Path(path).parent.exists() or path.lower().endswith(FILE_SUFFIXES)
    return not local and HUB_ID.fullmatch(path) is not None


def find_files(path: str, place: str, split: str = "train") -> list[Path]:
    """The data files of a file, a glob, or a folder's `split`, sorted; UsageError that begins with `place` if there are none."""
    target = Path(path).expanduser()
    if target.is_file():
        if reader_of(target) is None:
            text = '. a text does not say where a row ends: write lines of {"text": …}' if target.suffix == ".txt" else ""
            raise UsageError(f"{place}: cannot read {path}; expected {', '.join(READERS)}{text}")
        return [target]
    if target.is_dir():
        found, what = _of_split(target, split, place), "the folder"
    elif any(character in path for character in "*?["):
        found, what = list(Path(target.anchor).glob(str(target.relative_to(target.anchor)))), "the pattern"
    else:
        raise UsageError(f"{place}: no such file or folder: {path}{_near(target)}")
    files = sorted(file for file in found if file.is_file() and not file.name.startswith(".") and reader_of(file))
    if not files:
        raise UsageError(f"{place}: {what} {path} has no data file among its {len(found)} entries; expected {', '.join(READERS)}")
    return files


def _of_split(folder: Path, split: str, place: str) -> list[Path]:
    """What is in a folder or, where its files (else its folders) are named after splits, in that split of it."""
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    files = [entry for entry in inside if entry.is_file() and reader_of(entry)]
    splits: dict[str, list[Path]] = {}
    if not files and (folder / "data").is_dir():  # as the hub's repositories have it
        return _of_split(folder / "data", split, place)
    for entry in files or [entry for entry in inside if entry.is_dir() and entry.name in SPLITS]:
        named = SPLIT.search(entry.name.lower())
        splits.setdefault(SPLITS[named[1]] if named else "", []).extend([entry] if files else entry.iterdir())
    if split in splits and "" not in splits:
        return splits[split]
    if split == "train" and splits.keys() <= {""}:
        return inside
    there = ", ".join(f"{name or 'no split'}: {found[0].name}" for name, found in sorted(splits.items()) if found) or "none"
    raise UsageError(f"{place}: which files of {folder} are its split {split}? found {there}; give the path of a file or a glob")


def is_saved(path: str) -> bool:
    """A folder that `save_to_disk` of datasets wrote."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(path: str, split: str, place: str) -> Iterator[RawRow]:
    """The rows of such a folder; UsageError for a split that it lacks, or damage."""
    import datasets

    try:
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise UsageError(f"{place}: {path} has no split {split}; it has {', '.join(saved)}")
        yield from rows_of(saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{place}: {path}: damaged ({str(error).splitlines()[0]})") from None


def rows_of(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split as `datasets` has it, numbered from 1."""
    batches = dataset.iter(batch_size=1000)
    found = (dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
    yield from ((number, sparse(row)) for number, row in enumerate(found, start=1))


def sparse(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls inside its values: where columns have types, every object has the keys of all others."""
    return {name: _sparse(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}


def _sparse(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sparse(inner) for name, inner in value.items() if inner is not None}
    return [_sparse(inner) for inner in value] if isinstance(value, list) else value


def _near(target: Path) -> str:
    missing = target
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = [str(missing.parent / name) for name in get_close_matches(missing.name, names, n=3)]
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return " (a data set on the hub is named owner/name)" if len(target.parts) == 1 and not target.suffix else ""


def read_file(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[RawRow]:
    """The rows of a file; a file that is damaged as a whole is a UsageError that names it.

    `columns` (the file's name → ours) says which cells of a CSV, all of them texts, stand for something else.
    """
    reader = reader_of(path)
    assert reader is not None, path
    line = 0
    try:
        for line, row in reader(path):
            if reader in (_csv, _tsv) and not isinstance(row, BadRow):
                row = {name: CELLS.get((columns or {}).get(name, name), str)(cell) for name, cell in row.items()}
            yield line, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"cut off or damaged after line {line}" if line else "not a gzip file, or cut off"
        raise UsageError(f"{path}: {what} ({error}); copy or write it again") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror or error}") from None


def _jsonl(path: Path) -> Iterator[RawRow]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        yield from _lines(stream)


def _lines(stream: BufferedIOBase) -> Iterator[RawRow]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield number, BadRow(f"longer than {MAX_LINE // 2**20} MiB")
        elif line and not line.isspace():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return _object(STRICT.decode(line.decode().rstrip()))
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start + 1}")
    except RecursionError:
        return BadRow("nested too deeply")
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"{error.msg.removesuffix(' at')}, column {error.colno}")
    except ValueError:
        return BadRow("not JSON", "a number has too many digits")


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if type(value) is dict else BadRow(f"the row is {kind_of(value)}, expected an object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow("a key is given twice", next(repr(name)[:40] for name in names if names.count(name) > 1))
    return row


def _constant(name: str) -> float:
    raise BadRow("NaN and Infinity are not JSON", name)


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _json(path: Path) -> Iterator[RawRow]:
    """A list of objects, or an object whose one list they are; else JSON Lines, which often bear this name too."""
    data = path.read_bytes().removeprefix(BOM)
    wrapped = _is_one_object(data)
    if not wrapped and data.count(b"\n", 0, -1) == 0 and isinstance(row := _parse_line(data), dict) and len(row) == 1:
        inner = next(iter(row.values()))  # a list of turns is a row; of other objects they are the rows
        wrapped = isinstance(inner, list) and bool(inner)
        wrapped &= wrapped and all(isinstance(each, dict) and not each.keys() & {"role", "from"} for each in inner)
    if not wrapped and not data.lstrip().startswith(b"["):
        yield from _lines(BytesIO(data))
        return
    try:
        yield from _wrapped(data.decode(), path) if wrapped else _elements(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise UsageError(f"{path}:{error.lineno}: not JSON ({what}); expected one list of objects") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply; expected one list of objects") from None


def _is_one_object(data: bytes) -> bool:
    """Does an object begin that goes on after its first line? That line may also be a damaged one of many."""
    first, _, more = data.lstrip().partition(b"\n")
    if not first.startswith(b"{") or not isinstance(_parse_line(first), BadRow):
        return False
    return isinstance(_parse_line(more.lstrip().partition(b"\n")[0]), BadRow)


def _wrapped(text: str, path: Path) -> Iterator[RawRow]:
    """The objects in the one list of an object, each with its number from 1."""
    try:
        lists = {name: value for name, value in STRICT.decode(text).items() if isinstance(value, list)}
    except BadRow as bad:
        raise UsageError(f"{path}: {bad}; expected one list of objects") from None
    if len(lists) != 1:
        there = f"the lists {', '.join(lists)}" if lists else "no list"
        raise UsageError(f"{path}: one object with {there}; expected one list of objects, or an object on each line")
    yield from ((number, _object(value)) for number, value in enumerate(next(iter(lists.values())), start=1))


def _elements(text: str) -> Iterator[RawRow]:
    """The elements of a JSON list, with the line each begins on."""
    position, counted, line = _skip(text, text.index("[") + 1), 0, 1
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = STRICT.raw_decode(text, position)
            yield line, _object(value)
        except BadRow as bad:
            position = json.JSONDecoder().raw_decode(text, position)[1]
            yield line, bad
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
    end = _skip(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the list", text, end)


def _skip(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


def _tsv(path: Path) -> Iterator[RawRow]:
    return _csv(path, "\t")


def _csv(path: Path, delimiter: str | None = None) -> Iterator[RawRow]:
    """Cells between commas or, where the header has none, semicolons or tabs."""
    csv.field_size_limit(MAX_LINE)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header_line = stream.readline()
        stream.seek(0)
        found = next((mark for mark in ",;\t" if mark in header_line), ",") if delimiter is None else delimiter
        reader = csv.reader(stream, strict=True, delimiter=found)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UsageError(f"{path}:1: the header is not CSV ({error})") from None
        if len(set(header)) != len(header):
            raise UsageError(f"{path}:1: the header names a column twice: {', '.join(header)}")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error) == "unexpected end of data":
                    raise UsageError(f"{path}:{line}: a quote is opened and never closed") from None
                yield line, BadRow("not CSV", str(error))
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield line, BadRow("another number of cells than the header", f"{len(cells)}, expected {len(header)}")
            elif any(ESCAPED_BYTE.search(cell) for cell in cells):
                yield line, BadRow("not UTF-8")
            else:
                yield line, dict(zip(header, cells, strict=True))


def _json_cell(cell: str) -> Any:
    """A list or an object is written as JSON in a cell; what is none stays text."""
    if cell[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError, BadRow):
            return STRICT.decode(cell)
    return cell


def _number_cell(cell: str) -> Any:
    """An empty cell has no number."""
    with suppress(ValueError):
        return float(cell) if cell.strip() else None
    return cell


CELLS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("messages", "conversations", "history", "tools", "responses", "ranks", "scores"), _json_cell),
    **dict.fromkeys(("completions", "answers", "conversation_a", "conversation_b", "chat_template_kwargs"), _json_cell),
    **dict.fromkeys(("score_chosen", "score_rejected", "probability", "margin", "score", "rank", "strength"), _number_cell),
    "label": lambda cell: {"true": True, "false": False}.get(cell.strip().lower(), cell),
}


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                    yield number, sparse(row)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        what = f"damaged after row {number}" if number else "not a parquet file, or damaged"
        raise UsageError(f"{path}: {what} ({str(error).splitlines()[0]})") from None


Reader = Callable[[Path], Iterator[RawRow]]
_JSON: dict[str, Reader] = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json}
READERS = {**_JSON, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}


def reader_of(path: Path) -> Reader | None:
    """The reader for a file name."""
    return next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), None)
