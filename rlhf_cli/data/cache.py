"""Arrays kept between runs, found by the content they were made from and never by a name or a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Stored(NamedTuple):
    """What one cache file holds: arrays, and facts that JSON can say."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


MAPPED_FROM = 1 << 26  # bytes of an array; a smaller one is copied, and does not mind what becomes of its file
DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""Of safetensors → of numpy."""


class Damaged(Exception):
    """The file is there but is not what was written."""


def default_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """${RLHF_CACHE:-${XDG_CACHE_HOME:-~/.cache}/rlhf}; None if there is no home."""
    if given := environment.get("RLHF_CACHE"):
        return Path(given)
    with contextlib.suppress(RuntimeError):
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"
    return None


def key(parts: Iterable[str]) -> str:
    """One digest of all parts, in their order; each is preceded by its length, so that no two lists run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(b"%d:%b" % (len(data), data))
    return digest.hexdigest()


def source_hash(*files: str) -> str:
    """Of the code itself: another version of it never reads what this one wrote."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def read(path: Path) -> Stored | None:
    """A file's arrays; None if there is none or it cannot be read. Raises Damaged if their checksum is wrong."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        # Large ones are mapped, and not copied as safetensors does: the tokens of a million rows are half a gigabyte.
        arrays = {name: _mapped(path, 8 + size, entry) for name, entry in sorted(header.items())}
    except OSError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise Damaged(str(path)) from error
    facts = metadata.get("facts", "")
    if metadata.get("sha256") != _checksum(arrays, facts):
        raise Damaged(str(path))
    return Stored(arrays, json.loads(facts))


def _mapped(path: Path, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape, (begin, _) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if 0 in shape:
        return np.zeros(shape, dtype)
    mapped = np.asarray(np.memmap(path, dtype, "r", start + begin, shape))
    return mapped if mapped.nbytes >= MAPPED_FROM else mapped.copy()


def write(path: Path, stored: Stored) -> bool:
    """Writes the file whole or not at all; False if the folder takes no files. Any number of processes may do so at once."""
    facts = json.dumps(stored.facts)
    metadata = {"facts": facts, "sha256": _checksum(stored.arrays, facts)}
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:20]}-", suffix=".tmp", delete=False) as file:
            partial = Path(file.name)
        _save(partial, stored.arrays, metadata)
        partial.replace(path)
    except OSError:
        if partial is not None:
            partial.unlink(missing_ok=True)
        return False
    return True


def _save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file, without a copy of every array, as the library makes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    widest_first = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned
    for name, array in widest_first:
        begin, end = end, end + array.nbytes
        dtype = next(theirs for theirs, ours in DTYPES.items() if np.dtype(ours) == array.dtype)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in widest_first:
            file.write(np.ascontiguousarray(array).data)


def _checksum(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()
