"""Records by the million: in a file that is mapped into memory, so that what a run holds does not grow with their text."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from rlhf_cli.data.records import Facts, Record
from rlhf_cli.errors import MachineError

if TYPE_CHECKING:
    import pyarrow

IN_MEMORY = 20_000  # records that are kept as objects; of more, all are kept in a file
CHECKSUM = 32  # bytes, at the end of the file
BATCH = 5_000  # records that are written at a time
PLAIN = Facts()
COLUMNS = ("text", "file", "line", "facts", "fall")  # facts: null where there are none; fall: see `sources.prompt_share`


class Records(Sequence[Record]):
    """Records of several parts, in any order; record i is parts[part[i]][at[i]]."""

    def __init__(self, parts: Sequence[Sequence[Record]], part: np.ndarray, at: np.ndarray) -> None:
        self.parts, self.part, self.at = parts, part, at

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            part, at = self.part[index], self.at[index]
            found: dict[int, Record] = {}
            for k in np.unique(part):
                own, inner = np.flatnonzero(part == k), self.parts[k]
                rows = inner.read(at[own]) if isinstance(inner, Stored) else [inner[i] for i in at[own]]
                found |= zip(own.tolist(), rows, strict=True)
            return [found[i] for i in range(len(part))]
        record: Record = self.parts[self.part[index]][int(self.at[index])]
        return record


class Stored(Sequence[Record]):
    """The records of a file that `Writer` wrote."""

    def __init__(self, table: pyarrow.Table, mapped: mmap.mmap, names: list[str], digest: str) -> None:
        self.columns = {name: table.column(name) for name in COLUMNS}
        self.mapped, self.names, self.digest, self.size = mapped, names, digest, len(table)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return self.read(np.arange(self.size)[index])
        chunk, row = divmod(range(self.size)[index], BATCH)
        text, file, line = (self.columns[name].chunk(chunk)[row].as_py() for name in ("text", "file", "line"))
        return Record.read(text, f"{self.names[file]}:{line}")

    def read(self, at: np.ndarray) -> list[Record]:
        """Those records; what is mapped leaves this process's memory again."""
        first, end = (int(at.min()), int(at.max()) + 1) if len(at) else (0, 0)
        if end - first > 4 * len(at):  # far apart
            return [self[int(i)] for i in at]
        # Not `take`, which would copy the whole column.
        texts, files, lines = (self.columns[name].slice(first, end - first).to_pylist() for name in ("text", "file", "line"))
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)
        return [Record.read(texts[i], f"{self.names[files[i]]}:{lines[i]}") for i in (at - first).tolist()]

    def falls(self) -> np.ndarray:
        """(N,) float64"""
        return np.asarray(self.columns["fall"].to_numpy())

    def places(self) -> list[str]:
        """File and line of every record."""
        files, lines = (self.columns[name].to_pylist() for name in ("file", "line"))
        return [f"{self.names[file]}:{line}" for file, line in zip(files, lines, strict=True)]

    def all_facts(self) -> list[Facts]:
        """What the data say of every record beside its text."""
        return [PLAIN if text is None else Record.read_facts(json.loads(text)) for text in self.columns["facts"].to_pylist()]


def take(records: Sequence[Record], indices: np.ndarray) -> Sequence[Record]:
    """Some of the records, in that order."""
    if isinstance(records, Stored):
        return Records([records], np.zeros(len(indices), np.int32), indices)
    if isinstance(records, Records):
        return Records(records.parts, records.part[indices], records.at[indices])
    return [records[i] for i in indices]


def joined(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """All of several, one after the other."""
    if all(isinstance(part, list) for part in parts):
        return [record for part in parts for record in part]
    flat: list[tuple[Sequence[Record], np.ndarray]] = []
    for own in parts:
        for k, inner in enumerate(own.parts if isinstance(own, Records) else [own]):
            flat.append((inner, own.at[own.part == k] if isinstance(own, Records) else np.arange(len(own))))
    part = np.repeat(np.arange(len(flat), dtype=np.int32), [len(at) for _, at in flat])
    return Records([inner for inner, _ in flat], part, np.concatenate([at for _, at in flat]))


def digest(records: Sequence[Record]) -> str:
    """Of all that the records say, where they stand aside."""
    found = hashlib.sha256()
    if isinstance(records, Records):
        for part in records.parts:
            found.update(digest(part).encode())
        found.update(records.part.tobytes() + records.at.tobytes())
    elif isinstance(records, Stored):
        found.update(records.digest.encode())
    else:
        for record in records:
            found.update(record.serialised.encode())
    return found.hexdigest()


def each(records: Sequence[Record], of: Callable[[Record], Any], stored: Callable[[Stored], list[Any]]) -> list[Any]:
    """`of` every record, of those in files by `stored`, which need not read their texts."""
    if isinstance(records, Stored):
        return stored(records)
    if isinstance(records, Records):
        own = [each(part, of, stored) for part in records.parts]
        return [own[part][at] for part, at in zip(records.part.tolist(), records.at.tolist(), strict=True)]
    return [of(record) for record in records]


class Writer:
    """Takes records one by one, and gives them back as a sequence: a list, or what a file holds."""

    def __init__(self, folder: Path | None) -> None:
        self.records: list[Record] = []
        self.texts: list[str] = []
        self.falls: list[float] = []
        self.folder = folder
        self.file: Any = None
        self.names: dict[str, int] = {}
        self.digest = hashlib.sha256()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *failure: object) -> None:
        """No file is left where something failed."""
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)

    def add(self, record: Record, text: str, fall: float) -> None:
        """`text`: the record, serialised."""
        self.records.append(record)
        self.texts.append(text)
        self.falls.append(fall)
        if len(self.records) >= (IN_MEMORY if self.file is None else BATCH):
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        wheres = [record.where.rpartition(":") for record in self.records]
        for text in self.texts:
            self.digest.update(text.encode())
        columns = {
            "text": pyarrow.array(self.texts, pyarrow.string()),
            "file": pyarrow.array([self.names.setdefault(name, len(self.names)) for name, _, _ in wheres], pyarrow.int32()),
            "line": pyarrow.array([int(line) for _, _, line in wheres], pyarrow.int64()),
            "facts": pyarrow.array([None if r.facts == PLAIN else json.dumps(r.facts) for r in self.records], pyarrow.string()),
            "fall": pyarrow.array(self.falls, pyarrow.float64()),
        }
        table = pyarrow.table(columns)
        if self.file is None:
            with suppress(OSError, AttributeError):
                self.folder.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
                self.file = tempfile.NamedTemporaryFile(dir=self.folder, prefix=".rows-", suffix=".tmp", delete=False)  # noqa: SIM115
            self.file = self.file or tempfile.NamedTemporaryFile(prefix="rlhf-rows-", delete=False)  # noqa: SIM115
            self.stream = pyarrow.ipc.new_stream(self.file, table.schema)
        self.stream.write_table(table, max_chunksize=BATCH)
        self.records, self.texts, self.falls = [], [], []

    def finish(self, path: Path | None, facts: Any) -> tuple[Sequence[Record], np.ndarray]:
        """The records and where each falls. What a file holds is kept at `path` with `facts`, if there is a path."""
        if self.file is None:
            return self.records, np.array(self.falls)
        if self.records:
            self._flush()
        self.stream.close()
        tail = json.dumps({"facts": facts, "names": list(self.names), "digest": self.digest.hexdigest()}).encode()
        self.file.write(tail + len(tail).to_bytes(8, "little"))
        self.file.close()
        written = Path(self.file.name)
        with written.open("rb+") as file:
            checksum = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(checksum)
        opened = read(written)
        if opened is None:
            raise MachineError(f"{written}: not what was written a moment ago; is the disk full, or failing?")
        if path is not None and path.parent.is_dir() and written.parent.samefile(path.parent):
            written.replace(path)  # else it is removed, and its content stays as long as it is mapped
        return opened[0], opened[0].falls()


def read(path: Path) -> tuple[Stored, Any] | None:
    """The records of a file and what is said of them; None if there is no such file, or it is damaged."""
    import pyarrow

    try:
        size = path.stat().st_size - CHECKSUM
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = hashlib.sha256()
            for start in range(0, size, 1 << 20):  # read, not through the map, which would hold it all
                found.update(file.read(min(1 << 20, size - start)))
            if file.read() != found.digest():
                return None
        length = int.from_bytes(mapped[size - 8 : size], "little")
        said = json.loads(mapped[size - 8 - length : size - 8])
        table = pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)).read_all()
    except (OSError, ValueError):
        return None
    return Stored(table, mapped, said["names"], said["digest"]), said["facts"]
