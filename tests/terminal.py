"""The command line in a pseudo-terminal of 80 columns, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Terminal:
    """What a command says in a terminal, and what is typed there."""

    def __init__(self, process: subprocess.Popen[bytes], parent: int) -> None:
        self.process, self._parent = process, parent
        self.shown = ""
        self._bytes = b""

    def type(self, keys: str) -> None:
        os.write(self._parent, keys.encode())

    def read_until(self, text: str, seconds: float = 60) -> str:
        """All that is shown from the last call on, until this text is there."""
        before, deadline = len(self.shown), time.monotonic() + seconds
        while text not in self.shown[before:]:
            assert time.monotonic() < deadline, f"{text!r} does not come: {self.shown[before:]!r}"
            assert self._read(), f"it ended without {text!r}: {self.shown[before:]!r}"
        return self.shown[before:]

    def end(self) -> int:
        """Read to the end; the exit code, negative for a signal."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bool:
        if not select.select([self._parent], [], [], 1.0)[0]:
            return True
        try:
            part = os.read(self._parent, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            return False
        self._bytes += part
        self.shown = self._bytes.decode("utf-8", "replace")
        return bool(part)


@contextmanager
def terminal(*arguments: str | Path, folder: Path, columns: int = 80) -> Iterator[Terminal]:
    """A command line of rlhf whose terminal is its session's own, so that Ctrl-C is a signal."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES"):
        env.pop(name, None)

    def own() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "rlhf_cli", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=env, cwd=folder, start_new_session=True, preexec_fn=own
    )
    os.close(child)
    try:
        yield Terminal(process, parent)
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def on_terminal(*arguments: str | Path, folder: Path, columns: int = 80) -> tuple[str, int]:
    """What a command shows that asks for nothing, and its exit code."""
    with terminal(*arguments, folder=folder, columns=columns) as shell:
        code = shell.end()
        return shell.shown.replace("\r\n", "\n"), code
