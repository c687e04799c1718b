"""SIGINT and SIGTERM: at once while nothing is trained, at the next safe point afterwards."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rlhf_cli.errors import Stopped

BEFORE = "before the first step; nothing was trained"

Pause = Callable[[], None]
"""What long work calls between two tokens or passes, where everything may be left: it may raise `Stopped`."""


def no_pause() -> None:
    """A `Pause` at which nothing stops."""


def stopping() -> tuple[signal.Signals, ...]:
    """The signals that stop a run. A terminal that closes is as SIGTERM, unless the run was started to outlive it (nohup)."""
    outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if outlives else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Holds the signal that asked the run to stop.

    Until `defer()` a signal ends the run where it stands, by `Stopped`; after it at the next `pause()` of a run of one rank, and
    in any case where the loop looks at `received`, until `obey_at_once()`. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._alone = False
        self._remark = BEFORE

    def install(self) -> None:
        for number in stopping():
            signal.signal(number, self._handle)

    def say(self, remark: str) -> None:
        """What follows "stopped by SIGTERM" in the message from now on."""
        self._remark = remark

    def defer(self, *, alone: bool = False) -> None:
        """Let no signal interrupt from now on. `alone`: no other rank waits for this one, so that `pause` may stop it."""
        self._deferred, self._alone = True, alone

    def pause(self) -> None:
        """A `Pause`. Raises Stopped if a deferred signal is here and this rank is alone."""
        if self._deferred and self._alone and self.received is not None:
            self._stop(self.received)

    def obey_at_once(self, remark: str) -> None:
        """End the run where it stands at a signal from now on; `remark` follows "stopped by SIGTERM" in the message.

        Stopped: a signal is here already.
        """
        self._deferred = False
        self.say(remark)
        if self.received is not None:
            self._stop(self.received)

    def _stop(self, number: int) -> NoReturn:
        raise Stopped(f"stopped by {signal.Signals(number).name} {self._remark}", number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self._deferred:
            self._stop(number)


def end_with_launcher() -> None:
    """A launcher that is killed leaves its trainers running, or waiting for each other: the kernel tells them instead.

    First of all, because one that dies while libraries are imported must be noticed too.
    """
    if sys.platform != "linux" or not os.environ.keys() & {"RANK", "ACCELERATE_MIXED_PRECISION"}:
        return
    import ctypes

    launcher = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher or _adopted(launcher):
        raise SystemExit(128 + signal.SIGTERM)


def _adopted(parent: int) -> bool:
    """Has torchrun died before this process could ask to be told? It is a Python program; init or systemd adopts its orphans."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        program = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False  # hidden from this user
    return (parent == 1 or b"systemd" in program) and b"python" not in program
