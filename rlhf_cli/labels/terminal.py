"""People judge in a terminal, a key a verdict; or from a pipe, a character a key."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.text import Text

from rlhf_cli.console import Console, clean
from rlhf_cli.data.records import prompt_lines, spoken
from rlhf_cli.figures import count
from rlhf_cli.labels.questions import Shown
from rlhf_cli.labels.verdicts import Judging

PAIR = "a A is better · b B is better · t tie · x both bad · s skip"
RANK = "digits from the best to the worst, = before one that ties with the last · x all bad · s skip"
ALWAYS = "u undo · r reason · q stop"
WORDS = {"a": "a", "b": "b", "t": "tie", "x": "both-bad", "s": "skip"}
END = ("", "q", "\x04")  # of a pipe, a person, Ctrl-D

Key = Callable[[], str]
"""The next key, in small; empty at the end of a pipe."""


def judge_in_terminal(judging: Judging, console: Console) -> None:
    """Ask until everything is judged, or somebody stops."""
    out = RichConsole(file=console.out, highlight=False, width=None if console.live else 80)
    with keys() as key:
        for name in iter(lambda: _who(judging, out), None):
            if not _ask(judging, name, out, key):
                return


def _who(judging: Judging, out: RichConsole) -> str | None:
    """Whose questions are next; None where nobody has any, or nobody says."""
    waiting = {name: len(judging.left(name)) for name in judging.queues if judging.left(name)}
    if len(judging.queues) == 1 or not waiting:
        return next(iter(waiting), None)
    told = ", ".join(f"{name} ({count(left, 'question')} left)" for name, left in waiting.items())
    while (said := _line(out, f"Who are you? {told}; an empty line ends: ")) not in waiting:
        if not said:
            return None
    return said


def _ask(judging: Judging, name: str, out: RichConsole, key: Key) -> bool:
    """One annotator's questions; False where they stop before the end. The last verdict may be taken back like any other."""
    reason, fresh = "", True
    while True:
        shown = judging.ask(name)
        if shown is None:
            out.print("All is judged. u takes the last verdict back; any other key ends.", markup=False)
            if key() != "u":
                return True
            judging.undo(name)
            continue
        if fresh:
            _show(judging, name, shown, out)
        verdict = _verdict(shown, out, key)
        fresh = verdict != "r"
        if verdict in END:
            return False
        if verdict == "u":
            out.print("taken back" if judging.undo(name) else "there is nothing to take back", markup=False)
        elif verdict == "r":
            reason = _line(out, "reason, then Enter: ")
        else:
            judging.judge(name, shown.id, verdict, reason)
            reason = ""


def _show(judging: Judging, name: str, shown: Shown, out: RichConsole) -> None:
    total = len(judging.queues[name])
    out.rule(f"question {total - len(judging.left(name)) + 1} of {total} · {name}", align="left")
    out.print(Text(clean(prompt_lines(shown.row.prompt))))
    pair = len(shown.order) == 2
    for place, response in enumerate(shown.order):
        text = Text(clean(spoken(shown.row.responses[response])))
        out.print(Panel(text, title="AB"[place] if pair else str(place + 1), title_align="left"))
    out.print(f"{PAIR if pair else RANK}\n{ALWAYS}", markup=False)


def _verdict(shown: Shown, out: RichConsole, key: Key) -> Any:
    """What is pressed: a verdict, u, r, or one of END. Keys without a meaning are passed over."""
    size, ranks, tied = len(shown.order), dict[int, int](), False
    while True:
        pressed = key()
        if pressed in ("u", "r", *END):
            return pressed
        if pressed in WORDS and (size == 2 or pressed in "xs"):
            out.print(WORDS[pressed], markup=False)
            return WORDS[pressed]
        tied = (tied or pressed in "=t") and size > 2 and bool(ranks)
        place = int(pressed) - 1 if pressed.isdecimal() else -1
        if size > 2 and 0 <= place < size and place not in ranks:
            ranks[place] = max(ranks.values(), default=0) + (not tied)
            out.print(f"{'=' if tied else '>' if len(ranks) > 1 else ''}{pressed}", end=" ", markup=False)
            tied = False
            if len(ranks) == size:
                out.print()
                return [ranks[place] for place in range(size)]


@contextlib.contextmanager
def keys() -> Iterator[Key]:
    """From a terminal as they are pressed, without Enter; what sends several characters, like an arrow, is no key."""
    if not sys.stdin.isatty():
        yield lambda: next((each.lower() for each in iter(lambda: sys.stdin.read(1), "") if not each.isspace()), "")
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def key() -> str:
        while (pressed := os.read(terminal, 1)) == b"\x1b":
            # An introducer, [ or O, and all up to a letter or ~; nothing follows the key Esc itself.
            follows = [os.read(terminal, 1)] if select.select([terminal], [], [], 0.05)[0] else []
            while follows in ([b"["], [b"O"]) and os.read(terminal, 1) < b"@":
                pass
        return pressed.decode("ascii", "replace").lower()

    try:
        tty.setcbreak(terminal, termios.TCSADRAIN)
        yield key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _line(out: RichConsole, question: str) -> str:
    """What is typed before Enter; of a pipe the next line that is not blank, empty at its end."""
    typed = sys.stdin.isatty()
    before = termios.tcgetattr(sys.stdin) if typed else []
    if typed:
        line = [*before[:3], before[3] | termios.ICANON | termios.ECHO, *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, line)
    try:
        out.print(question, end="", markup=False, soft_wrap=True)
        if not typed:
            return next((line.strip() for line in iter(sys.stdin.readline, "") if line.strip()), "")
        return os.read(sys.stdin.fileno(), 4096).decode("utf-8", "replace").strip()
    finally:
        if typed:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
