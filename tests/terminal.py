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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Terminal:
    """What a command says in a terminal, and what is typed there."""

    def __init__(self, process: subprocess.Popen[bytes], parent: int) -> None:
        self.process, self._parent = process, parent
        self.shown = ""
        self._bytes, self._at = b"", 0

    def type(self, keys: str) -> None:
        os.write(self._parent, keys.encode())

    def read_until(self, text: str, again: str = "") -> str:
        """All that is shown after what was read before, to the end of this text.

        `again`: keys that are typed where nothing comes. Python overlooks a Ctrl-C that comes just when its prompt is drawn.
        """
        while (found := self.shown.find(text, self._at)) < 0:
            if again and not select.select([self._parent], [], [], 6)[0]:
                self.type(again)
            assert self._read(), f"it ended without {text!r}: {self.shown[self._at :]!r}"
        begin, self._at = self._at, found + len(text)
        return self.shown[begin : self._at]

    def read_more(self, letters: int) -> None:
        """Read so many letters after what was read before."""
        while len(self.shown) < self._at + letters:
            assert self._read(), f"it ended: {self.shown[self._at :]!r}"
        self._at += letters

    def end(self) -> int:
        """Read to the end; the exit code, negative for a signal."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bool:
        """Read what there is. AssertionError: for a minute there is nothing more."""
        assert select.select([self._parent], [], [], 60)[0], f"nothing comes after {self.shown!r}"
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
