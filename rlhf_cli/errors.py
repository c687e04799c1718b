"""The ways a run may end early, each with its exit code. Messages say what, where and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Self


class RunError(Exception):
    """Base of every error that is shown to a person in one to three lines, without a traceback."""

    exit_code = 1
    one_rank = False
    """Of several processes one alone found it, and has to tell it itself; what all find is told by rank 0."""

    def on_one_rank(self) -> Self:
        self.one_rank = True
        return self


class UsageError(RunError):
    """The recipe, the data or the command line is wrong; nothing was trained or changed."""

    exit_code = 2


@contextlib.contextmanager
def prefixed(place: str) -> Iterator[None]:
    """Says the place in the recipe before what a UsageError or MachineError of the block says."""
    try:
        yield
    except (UsageError, MachineError) as error:
        raise type(error)(f"{place}: {error}") from error


class NumberError(RunError):
    """A number is wrong: a non-finite loss or gradient, or a broken invariant."""

    exit_code = 3


class MachineError(RunError):
    """The environment is wrong: no such model, no disk space, memory that splitting cannot mend."""

    exit_code = 4


class Stopped(RunError):
    """SIGINT or SIGTERM arrived; what was trained so far is in a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.number = signal_number
        self.exit_code = 128 + signal_number
