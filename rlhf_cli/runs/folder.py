"""The folder of a run: who may write to it, where its files are, and its line-by-line logs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_cli.errors import MachineError, NumberError, UsageError
from rlhf_cli.files import disk_error, disk_errors, non_finite, to_json

LOCK = ".lock"
OWN_FILES = {"recipe.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "data.json", "report.md", "report.html"}
OWN_NAMES = OWN_FILES | {"plots", "model", "checkpoints"}
LEAST_SPACE = 64 * 2**20
"""Bytes that must be free before a run starts; the logs and the report alone want a few MiB."""


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """The paths of a run, and the lock on it where `open_run` took one."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.manifest = path / "manifest.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.result = path / "eval.json"
        self.verdicts = path / "verdicts.jsonl"
        self.preferences = path / "preferences.jsonl"
        self.labels = path / "label.json"
        self.selected = path / "selected.jsonl"
        self.revisions = path / "revisions.jsonl"
        self.supervised = path / "sft.jsonl"
        self.pairs = path / "pairs.jsonl"
        self.data = path / "data.json"
        self.report = path / "report.md"
        self.page = path / "report.html"
        self.plots = path / "plots"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.failed = path / "failed"
        self._lock = lock

    @property
    def moved(self) -> MachineError:
        """What ends a run whose files are no longer where it began to write them."""
        return MachineError(
            f"{self.path} was moved, renamed or removed while the run wrote to it\n  put it back, then continue with --resume"
        )

    def close(self) -> None:
        """Let another process have the folder. May be called twice."""
        if self._lock is not None:
            _unlock(self.path, self._lock)
            self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def member_folder(model: Path, member: int) -> Path:
    """Where a run's folder of weights has a member of an ensemble, counted from 0."""
    return model / f"member-{member}"


def member_folders(model: Path) -> list[Path]:
    """Those of all members; none of a single model."""
    return list(takewhile(Path.is_dir, map(partial(member_folder, model), count())))


def open_run(output: Path, *, resume: bool, force: bool) -> RunFolder:
    """Create, continue or replace the run folder and lock it. For rank 0 alone.

    UsageError: it exists, or another process has it. MachineError: it cannot be created, written or locked.
    """
    if resume and force:
        raise UsageError("--resume continues a run, --force starts it anew: give one of them")
    try:
        with disk_errors(output):
            if force and _content(output):
                _move_aside(output)
            refuse_occupied(output, resume)
            output.mkdir(parents=True, exist_ok=True)
            run = RunFolder(output, _lock(output))
    except ValueError as error:
        raise MachineError(f"{str(output)!r} cannot be the name of a folder ({error})\n  choose another output") from error
    try:
        # Another process may have used and left the folder since the first look.
        refuse_occupied(output, resume)
        require_space(output, LEAST_SPACE)
    except BaseException:
        run.close()
        raise
    return run


def require_space(folder: Path, size: int) -> None:
    """MachineError unless `size` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise MachineError(
            f"{folder}: {free / 2**20:,.0f} MiB of disk are free, at least {size / 2**20:,.0f} MiB are needed\n"
            "  free some space, or choose another output"
        )


def _content(folder: Path) -> set[str]:
    """Names in the folder, without the lock and what a killed writer left."""
    if not os.path.lexists(folder):
        return set()
    if not folder.exists():
        raise UsageError(f"{folder} is a link to nothing\n  remove it, or choose another output")
    if folder.exists() and not folder.is_dir():
        raise MachineError(f"{folder} is a file, a run needs a folder\n  choose another output")
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name != LOCK and not (name.startswith(".") and name.endswith(".tmp"))}


def refuse_occupied(output: Path, resume: bool) -> None:
    """UsageError where `open_run` without --force would give one; touches nothing."""
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(output)!r} is not UTF-8, and could not be written down\n  choose another output") from None
    names = _content(output)
    if not names or (resume and names & OWN_NAMES):
        return
    if resume:
        raise UsageError(f"{output} holds files but no run: there is nothing to resume\n  choose another output")
    if other := holder(output):
        raise _in_use(output, other)
    what = "holds a finished run" if "manifest.json" in names else "exists and is not empty"
    raise UsageError(f"{output} {what}\n  --resume continues it, --force moves it to {output}.old-<n>, --output writes elsewhere")


def _move_aside(output: Path) -> None:
    """Rename the folder, which nobody else may have."""
    old = output.absolute()  # not resolved: of a link, the link is moved
    if Path.cwd().is_relative_to(old.resolve()):
        raise UsageError(f"--force would move {output}, which is or contains the working directory\n  choose another output")
    lock = _lock(output)
    try:
        new = move_aside(old)
    except BaseException:
        _unlock(output, lock)
        raise
    _unlock(new, lock)


def move_aside(path: Path) -> Path:
    """Rename a file or folder to the first free <path>.old-<n>."""
    candidates = (path.with_name(f"{path.name}.old-{n}") for n in count(1))
    return path.rename(next(new for new in candidates if not os.path.lexists(new)))


def _lock(folder: Path) -> int:
    """Take the folder's lock at once, or UsageError. The kernel drops it when the process ends, however it ends."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former owner may have removed or moved the file between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.ftruncate(handle, 0)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                    return handle
            os.close(handle)
        except BlockingIOError as error:
            holder = _read_holder(handle)
            os.close(handle)
            raise _in_use(folder, holder) from error
        except BaseException:
            os.close(handle)
            raise


def _unlock(folder: Path, lock: int) -> None:
    (folder / LOCK).unlink(missing_ok=True)
    os.close(lock)


def holder(folder: Path) -> str | None:
    """Who has the folder now; touches nothing."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return _read_holder(handle)
    finally:
        os.close(handle)


def _read_holder(handle: int) -> str:
    return os.pread(handle, 300, 0).decode("utf-8", "replace").strip() or "another process"


def _in_use(folder: Path, holder: str) -> UsageError:
    return UsageError(f"{folder} is in use by {holder}\n  wait for it, stop it, or choose another output")


class MetricsLog:
    """An append-only file of one strict JSON object a line: metrics.jsonl and samples.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._file = path.open("ab", buffering=0)
        self.position = self._file.tell()
        """Bytes so far."""
        self._digest = hashlib.sha256()

    def append(self, obj: dict[str, Any]) -> None:
        """Add a line that readers see at once. NumberError names a metric that is not finite; nothing is then written."""
        if bad := non_finite(obj):
            place = f" at step {obj['step']}" if "step" in obj else ""
            raise NumberError(f"{bad[0]} is {bad[1]}{place}: not written to {self.path}, which holds finite numbers only")
        line = to_json(obj) + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self.position)  # takes back a half-written line where the file allows it
            raise disk_error(self.path, error) from error
        self.position += len(line)
        self._digest.update(line)

    def sync(self) -> tuple[int, str]:
        """Bring the lines to the disk; the position and the hash of all before it, which a checkpoint may then record."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
        return self.position, self._digest.hexdigest()

    def truncate_after(self, position: int, digest: str | None = None) -> bool:
        """Keep the first `position` bytes: what a resumed run had written by its checkpoint.

        False if they are not there, or not what they were (`digest`; None: not known): the log is then as it was.
        """
        kept = self.path.read_bytes()[:position]
        found = hashlib.sha256(kept)
        if len(kept) < position or (kept and not kept.endswith(b"\n")) or digest not in (None, found.hexdigest()):
            return False
        os.ftruncate(self._file.fileno(), position)
        self.position, self._digest = position, found
        return True

    def is_in_place(self) -> bool:
        """Is the file that is written to still the one at its path? A folder that is renamed takes it along."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            return False

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line without its end, torn by a crash, is left out, and a missing file is empty."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: not JSON ({error})") from error
    return lines
