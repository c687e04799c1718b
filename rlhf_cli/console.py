"""What a person sees: lines, the plan, the first example, progress. On a terminal with colours, in a pipe as plain lines."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO

from rlhf_cli.metrics import Metric, in_order
from rlhf_cli.signals import BEFORE

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

ASCII = str.maketrans({"⟦": "[[", "⟧": "]]", "…": "...", "·": ".", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "’": "'"})
ASCII |= str.maketrans(dict.fromkeys("–—−─", "-") | dict.fromkeys("├│", "|") | {"└": "`"})
LEARNED, RESET, YELLOW, RED, BOLD = "\x1b[1;32m", "\x1b[0m", "\x1b[33m", "\x1b[31m", "\x1b[1m"
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)
LINES = 50
SHOWN_PIECE = 2000
"""Characters of one piece of the first example that are shown."""


class Console:
    """Output to a person. A lost terminal, a closed pipe or a poor encoding never ends a run. Silent when not enabled."""

    def __init__(self, enabled: bool = True, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.enabled = enabled
        self.out = out or sys.stdout or _void()
        self.err = err or sys.stderr or _void()
        self.live = enabled and _is_terminal(self.out)
        self._bar: Bar | None = None
        self._counted, self._counting = time.monotonic(), False  # when rows were last counted, and whether a line shows it

    def say(self, line: str) -> None:
        """A line on stdout."""
        if self.enabled:
            self._write(self.out, clean(line))

    def warn(self, message: str) -> None:
        """A line on stderr: the run goes on, but someone should know."""
        if self.enabled:
            self._write(self.err, _paint(self.err, YELLOW, f"warning: {clean(message)}"))

    def note(self, text: str) -> None:
        """Lines on stderr: how a run ended."""
        if self.enabled:
            self._write(self.err, clean(text.rstrip()))

    def error(self, message: str) -> None:
        """One to three lines on stderr: what, where, what to do. Each but an indented one says that it is an error."""
        if self.enabled:
            tag, lines = _paint(self.err, RED, "error:"), clean(message).splitlines()
            self._write(self.err, "\n".join(line if line.startswith(" ") else f"{tag} {line}" for line in lines))

    def example(self, pieces: list[tuple[str, bool]], marked: str = "is what the model learns to write") -> None:
        """Show the first example; pieces are (text, is it supervised?) in order, `marked` says what the supervised ones are."""
        if not self.enabled:
            return
        opened, closed = (LEARNED, RESET) if _has_colour(self.out) else ("⟦", "⟧")
        example = ""
        for supervised, neighbours in groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1]):
            text = _shorten(clean("".join(text for text, _ in neighbours)))
            example += f"{opened}{text}{closed}" if supervised else text
        self._write(self.out, f"First example; {opened}this{closed} {marked}:\n{example}\n")

    def plan(self, sections: list[tuple[str, list[tuple[str, object]]]]) -> None:
        """Titled lists of (label, value), the values aligned over all of them."""
        if not self.enabled:
            return
        width = max((len(label) for _, rows in sections for label, _ in rows), default=0) + 4
        columns = shutil.get_terminal_size().columns if self.live else None
        for title, rows in sections:
            self._write(self.out, _paint(self.out, BOLD, clean(title)))
            for label, value in rows:
                self._write(self.out, _fit(f"  {clean(label)}".ljust(width), clean(str(value)), columns))

    def progress(self, total: int, log_every: int | None = None) -> Progress:
        """Progress over `total` steps, as a context manager; without `log_every` in about LINES lines, however many steps."""
        return Progress(self, total, log_every or max(1, total // LINES))

    def count(self, done: str, rows: int, total: int | None = None) -> None:
        """How many rows are read or tokenised: in one line of a terminal that is written anew, else a line each half minute."""
        now = time.monotonic()
        line = f"{done} {rows:,}" + (f" of {total:,}" if total else "") + " rows"
        if rows == total and self._counting:
            self._counting = False
            self._write(self.out, "\r\x1b[K", end="")
        elif rows != total and self.enabled and now - self._counted >= (0.25 if self.live else 30):
            self._counted = now
            self._counting = self.live
            self._write(self.out, f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n")

    def _write(self, stream: TextIO, text: str, end: str = "\n") -> None:
        try:
            if self._bar and _is_terminal(stream):
                self._bar.console.print(_encodable(self.out, text), markup=False, highlight=False, soft_wrap=True)
            else:
                stream.write(_encodable(stream, text) + end)
                stream.flush()
        except (OSError, ValueError):
            self._mute(stream)

    def _mute(self, stream: TextIO) -> None:
        if stream is self.out:
            self.out, self.live, self._bar = _void(), False, None
        else:
            self.err = _void()
        silence(stream)


def of_rank(every: bool = False) -> Console:
    """Of this process, which rank 0 alone speaks on, or every rank."""
    return Console(every or os.environ.get("RANK", "0") == "0")


def leave(number: int, _: object) -> NoReturn:
    """A signal's handler that ends the process where it stands, whatever threads it has."""
    number = signal.SIGTERM if number == signal.SIGHUP else number
    of_rank().note(f"stopped by {signal.Signals(number).name} {BEFORE}")
    os._exit(128 + number)


class Progress:
    """A bar on a terminal, else one line every `log_every` steps."""

    def __init__(self, console: Console, total: int, log_every: int) -> None:
        self._console, self._total, self._log_every = console, total, log_every
        self._task: TaskID | None = None
        self._since: tuple[float, int] | None = None  # the moment of this process's first update, and its step
        self._started = 0.0

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._console.live:
            self._console._bar = _bar(self._console)
            self._task = self._console._bar.add_task("", total=self._total, line="")
            self._console._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console._bar:
            with contextlib.suppress(OSError):
                self._console._bar.stop()
            self._console._bar = None

    def update(self, step: int, total: int, metrics: Mapping[str, float], memory_gib: float | None = None) -> None:
        """Step `step` of `total` is done. `memory_gib`: peak on the GPU; default: this process's."""
        now, is_first = time.monotonic(), self._since is None
        # What comes before the first step (held-out rows, samples) comes once and says little of the rest.
        since, done = self._since or (self._started, step - 1)
        left = (now - since) / (step - done) * (total - step)
        self._since = self._since or (now, step)
        memory = f"{memory_gib or peak_memory_gib():.1f} GiB"
        told = [(text, 3 if row.spare else 1) for row, text in _described(metrics)]
        words = [(f"step {step}/{total}", 0), *told, (f"{clock(left)} left", 0), (memory, 2)]
        if self._console._bar and self._task is not None:
            width = self._console._bar.console.width
            line = _encodable(self._console.out, _within(words, width - _bar_width(width) - 1))
            self._console._bar.update(self._task, completed=step, total=total, line=line)
        elif step % self._log_every == 0 or step == total or is_first:
            self._console.say(" ".join(word for word, _ in words))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line with the held-out figures after `step` steps."""
        self._console.say(" ".join([f"step {step}/{self._total} held-out", *describe(metrics)]))
        if self._since is None:
            self._started = time.monotonic()


def describe(metrics: Mapping[str, float]) -> list[str]:
    """Metrics as words.

    >>> describe({"loss": 1.2341, "learning_rate": 2e-4, "tokens_per_second": 1234.5})
    ['loss 1.234', 'lr 2.0e-04', '1,234 tok/s']
    """
    return [text for _, text in _described(metrics)]


def _described(metrics: Mapping[str, float]) -> list[tuple[Metric, str]]:
    training = "learning_rate" in metrics
    shown = [(row, name) for row, name in in_order(metrics) if row.progress and not (training and row.held_out_only)]
    return [(row, row.progress.format(metrics[name], name=name)) for row, name in shown]


def _within(words: Sequence[tuple[str, int]], room: int) -> str:
    """(word, rank), less those of the highest rank above 0, the last first, until they fit.

    >>> _within([("step 1/9", 0), ("loss 1.000", 1), ("lr 2.0e-04", 2), ("00:10 left", 0)], 30)
    'step 1/9 loss 1.000 00:10 left'
    """
    kept = list(words)
    while len(" ".join(word for word, _ in kept)) > room and (highest := max(rank for _, rank in kept)):
        kept.pop(max(index for index, (_, rank) in enumerate(kept) if rank == highest))
    return " ".join(word for word, _ in kept)


def _bar_width(columns: int) -> int:
    return min(20, columns // 5)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours when there are any.

    >>> clock(42), clock(3725)
    ('00:42', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def peak_memory_gib() -> float:
    """The most memory this process has held so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clean(text: str) -> str:
    """Characters made visible that control a terminal, turn the direction of a line, end it or have no width, but for joiners.

    >>> clean("a\\x1b[31mb\\u202ec")
    'a\\\\x1b[31mb\\\\u202ec'
    """
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _encodable(stream: TextIO, text: str) -> str:
    """The text, or its nearest form in the stream's encoding (LANG=C)."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def silence(stream: TextIO | None) -> None:
    """Send the rest to nowhere: the reader is gone (closed pipe), and Python's own flush at exit must not fail either."""
    with contextlib.suppress(OSError, ValueError):  # not a real file, or closed already
        if stream is not None:
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, stream.fileno())
            os.close(handle)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    except ValueError:
        return False


def _has_colour(stream: TextIO) -> bool:
    return _is_terminal(stream) and not os.environ.get("NO_COLOR")


def _paint(stream: TextIO, code: str, text: str) -> str:
    return f"{code}{text}{RESET}" if _has_colour(stream) else text


def _void() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _shorten(text: str) -> str:
    if len(text) <= SHOWN_PIECE:
        return text
    half = SHOWN_PIECE // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _fit(label: str, value: str, columns: int | None) -> str:
    """Label and value; wrapped below the value's start where a terminal is too narrow."""
    if columns is None or len(label) + len(value) <= columns:
        return label + value
    indent = min(len(label), columns // 2)
    first = label if len(label) <= indent else label.rstrip() + "\n" + " " * indent
    return first + ("\n" + " " * indent).join(textwrap.wrap(value, max(10, columns - indent)))


def _bar(owner: Console) -> Bar:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = RichConsole(file=owner.out, highlight=False)
    text = TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    bar = BarColumn(bar_width=_bar_width(console.width))
    # Redirecting would move what others write to stderr into stdout, also where stderr goes to a file.
    return Progress(bar, text, console=console, refresh_per_second=4, redirect_stderr=_is_terminal(owner.err))
