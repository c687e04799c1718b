"""The ways a run may end early, each with its exit code. Messages say what, where and what to do."""


class RunError(Exception):
    """Base of every error that is shown to a person in one to three lines, without a traceback."""

    exit_code = 1


class UsageError(RunError):
    """The recipe, the data or the command line is wrong; nothing was trained or changed."""

    exit_code = 2


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
        self.exit_code = 128 + signal_number
