"""SIGINT and SIGTERM: at once while nothing is trained, at the next safe point afterwards."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from rlhf_cli.errors import Stopped

BEFORE = "before the first step; nothing was trained"


class StopSignals:
    """Holds the signal that asked the run to stop.

    Until `defer()` a signal ends the run where it stands, by `Stopped`. After it, the loop looks at `received` between two
    passes, until `obey_at_once()`. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._remark = BEFORE

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def say(self, remark: str) -> None:
        """What follows "stopped by SIGTERM" in the message from now on."""
        self._remark = remark

    def defer(self) -> None:
        self._deferred = True

    def obey_at_once(self, remark: str) -> None:
        """End the run where it stands at a signal from now on; `remark` follows "stopped by SIGTERM" in the message.

        Raises:
            Stopped: a signal is here already.
        """
        self._deferred = False
        self.say(remark)
        if self.received is not None:
            self._stop(self.received)

    def _stop(self, number: int) -> NoReturn:
        raise Stopped(f"stopped by {signal.Signals(number).name} {self._remark}", number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self._deferred:
            self._stop(number)
