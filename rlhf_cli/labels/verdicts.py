"""What was judged: a log to which lines are only ever added, what of it stands, and what it says about pairs of responses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.files import sync_folder
from rlhf_cli.labels.questions import Question, Shown
from rlhf_cli.runs.folder import MetricsLog, read_metrics

CHANCES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both-bad": 0.5, "skip": None}
"""A verdict → the probability that the response shown first is the better one; None: nothing is said."""


@dataclass(frozen=True)
class Verdict:
    """A line of verdicts.jsonl. Of lines by one annotator on one question the last one counts."""

    row: int
    order: list[int]  # the responses of the row as they were shown
    verdict: str | list[int]  # of CHANCES, or a rank for each response as shown, the best has 1
    p: float | None  # that the response shown first is the better one; None: skipped, or ranked
    annotator: str
    seconds: float
    time: str
    hash: str  # of the row's prompt and responses
    gold: bool = False
    undo: bool = False  # the question is open again, as if it had not been asked
    reason: str = ""
    first: list[float] | None = None  # of a model: p where the first response stood first, and where it stood second
    principles: list[str] = field(default_factory=list)  # that a model was asked with

    @property
    def question(self) -> Question:
        return self.gold, self.row, frozenset(self.order)

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(i, j, which is better) of the row's responses i < j: 1 the first, −1 the second, 0 neither; nothing if skipped."""
        if self.verdict == "skip":
            return
        ranks = self.verdict if isinstance(self.verdict, list) else {"a": [1, 2], "b": [2, 1]}.get(self.verdict)
        own = dict(zip(self.order, ranks or [1] * len(self.order), strict=True))
        for i, j in combinations(sorted(own), 2):
            yield i, j, (own[i] < own[j]) - (own[i] > own[j])


def check_verdict(shown: Shown, verdict: Any) -> str | list[int]:
    """A verdict as it is written down: equal ranks are a tie, no rank is left out. ValueError: it is no verdict on it."""
    size = len(shown.order)
    if isinstance(verdict, str) and verdict in (CHANCES if size == 2 else ("skip", "both-bad")):
        return verdict
    if isinstance(verdict, list) and len(verdict) == size > 2 and all(type(rank) is int for rank in verdict):
        known = sorted(set(verdict))
        return [1 + known.index(rank) for rank in verdict]
    raise ValueError(f"{str(verdict)[:40]} is no verdict on {size} responses")


class Judging:
    """The questions of all annotators and what they said: every verdict is on the disk before it is taken for said.

    UsageError: the log is of other rows. MachineError: it cannot be written.
    """

    def __init__(self, queues: Mapping[str, Sequence[Shown]], log: Path) -> None:
        self.queues = queues
        self.lines = read_lines(log)
        rows = {shown.question[:2]: shown.row.hash for own in queues.values() for shown in own}
        for number, line in enumerate(self.lines, start=1):
            if rows.get(line.question[:2]) != line.hash:
                raise UsageError(
                    f"{log}:{number}: was said of another row {line.row} than there is now\n"
                    "  put the rows back as they were, or start anew with --output"
                )
        self._log = MetricsLog(log)
        sync_folder(log.parent)
        self._log.truncate_after(log.read_bytes().rfind(b"\n") + 1)  # the rest is of a line that nobody took for written
        self._lock = threading.Lock()
        self._since = dict.fromkeys(queues, time.monotonic())
        self._open = dict[str, str]()

    def standing(self) -> list[Verdict]:
        """The verdicts that count."""
        return [line for name in self.queues for line in self.said(name)]

    def said(self, annotator: str) -> list[Verdict]:
        """Those of one annotator that count, the latest last."""
        last: dict[Question, Verdict] = {}
        for line in self.lines:
            if line.annotator == annotator:
                last.pop(line.question, None)
                last[line.question] = line
        return [line for line in last.values() if not line.undo]

    def left(self, annotator: str) -> list[Shown]:
        """The questions that are open, the next one first."""
        done = {line.question for line in self.said(annotator)}
        return [shown for shown in self.queues[annotator] if shown.question not in done]

    def ask(self, annotator: str) -> Shown | None:
        """The next question, whose time begins when it is asked for the first time."""
        shown = next(iter(self.left(annotator)), None)
        if shown is not None and self._open.get(annotator) != shown.id:
            self._open[annotator], self._since[annotator] = shown.id, time.monotonic()
        return shown

    def judge(self, annotator: str, question: str, verdict: Any, reason: str = "") -> bool:
        """Write down what was said of the question with this id; False where it is not the one that is asked.

        ValueError: it is no verdict on that question.
        """
        with self._lock:
            shown = self.ask(annotator)
            if shown is None or shown.id != question:
                return False
            own, took = check_verdict(shown, verdict), time.monotonic() - self._since[annotator]
            chance = CHANCES[own] if isinstance(own, str) and len(shown.order) == 2 else None
            gold, number, _ = shown.question
            line = Verdict(number, [*shown.order], own, chance, annotator, round(took, 2), now(), shown.row.hash, gold)
            self.add(replace(line, reason=reason))
            return True

    def undo(self, annotator: str) -> bool:
        """Open the annotator's last question again, by a line more; False where there is none."""
        with self._lock:
            said = self.said(annotator)
            if said:
                self.add(replace(said[-1], verdict="skip", p=None, seconds=0.0, time=now(), undo=True, reason=""))
            return bool(said)

    def add(self, line: Verdict) -> None:
        """Write a line down."""
        self._log.append(asdict(line))
        self._log.sync()
        self.lines.append(line)

    def close(self) -> None:
        """Nothing more is written. A verdict that is being written is finished first."""
        with self._lock:
            self._log.close()


def now() -> str:
    """The time of a verdict."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_lines(path: Path) -> list[Verdict]:
    """All lines of a log. UsageError: one is no verdict."""
    try:
        return [Verdict(**line) for line in read_metrics(path)]
    except TypeError as error:
        raise UsageError(
            f"{path}: a line is no verdict ({error})\n  put the file back as it was, or start anew with --output"
        ) from error


def by_pair(verdicts: Iterable[Verdict]) -> dict[tuple[int, int, int], dict[str, int]]:
    """(row, i, j) → what each annotator said of its responses i < j: 1 for the first, −1 for the second, 0 for neither."""
    found: dict[tuple[int, int, int], dict[str, int]] = {}
    for line in verdicts:
        for i, j, better in line.pairs():
            found.setdefault((line.row, i, j), {})[line.annotator] = better
    return dict(sorted(found.items()))
