"""Reading JSON, and writing files so that a crash, a full disk or a NaN leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError, NumberError, UsageError

SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files beside the weights of a model that decide what it computes, reads and writes."""

ADVICE = {
    errno.ENOSPC: ("the disk is full", "free some space, then continue with --resume"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then continue with --resume"),
    errno.EFBIG: ("the file would pass the size limit", "raise the limit (ulimit -f), then continue with --resume"),
    errno.EACCES: ("no permission", "choose another output, or change the permissions"),
    errno.EPERM: ("no permission", "choose another output, or change the permissions"),
    errno.EROFS: ("the file system is read-only", "choose another output"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter output"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another output"),
    errno.ENOLCK: ("the file system has no locks", "choose an output on another file system"),
    errno.EOPNOTSUPP: ("the file system has no locks", "choose an output on another file system"),
}
ELSE = "mend the cause or choose another output, then continue with --resume"


def disk_error(path: Path, error: OSError) -> MachineError:
    """What the operating system refused for `path`, and what to do about it."""
    what, todo = ADVICE.get(error.errno or 0, (error.strerror or str(error), ELSE))
    return MachineError(f"cannot write {path}: {what}\n  {todo}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """MachineError for what the operating system refuses while `path` is written."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        # safetensors and tokenizers report a full disk in words of their own: "I/O error: No space left (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise disk_error(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step. MachineError leaves the old file as it was."""
    # One writer holds the run's lock, so a fixed name is safe, and what a killed run left is overwritten.
    part = path.with_name(f".{path.name}.tmp")
    try:
        with part.open("wb") as handle:
            handle.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def non_finite(value: object, key: str = "") -> tuple[str, float] | None:
    """The dotted key and value of the first NaN or infinity inside, if any.

    >>> non_finite({"loss": {"eval": [1.0, float("inf")]}})
    ('loss.eval.1', inf)
    """
    if isinstance(value, float):
        return None if math.isfinite(value) else (key, value)
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (non_finite(child, f"{key}.{name}" if key else str(name)) for name, child in children)
    return next((hit for hit in found if hit), None)


def to_json(obj: object, indent: int | None = None) -> bytes:
    """Strict JSON in UTF-8, keys in their own order. ValueError at NaN and infinity."""
    text = json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
    # A lone surrogate has no UTF-8; Python's escape of it is also JSON's.
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, obj: object) -> None:
    """Replace `path` by strict, readable JSON. NumberError names the key of a NaN or infinity."""
    if bad := non_finite(obj):
        raise NumberError(f"{bad[0]} is {bad[1]}: {path} was not written, it holds finite numbers only")
    write_atomic(path, to_json(obj, indent=2) + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. UsageError names a file that is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: an object is expected, and it holds {str(found)[:40]}")
    return found


def from_anywhere(path: str | Path) -> str:
    """A local path as it is found from every folder; a hub id as it is."""
    return Path(path).resolve().as_posix() if Path(path).exists() else str(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_tree(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file below `folder`, hidden ones left out, in the order of the paths."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix(): sha256_file(folder / path) for path in paths if not any(part.startswith(".") for part in path.parts)}
