"""A judge behind an endpoint: questions in parallel, asked again where a server fails, and answers that are kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.judges.endpoint import SHOWN, Failure, Server, ask, connect
from rlhf_cli.judges.question import Mode, Question, Wording, read_answer, read_wording
from rlhf_cli.runs.folder import MetricsLog, read_metrics
from rlhf_cli.signals import Pause, no_pause

if TYPE_CHECKING:
    from rlhf_cli.sections import Judge

A = TypeVar("A")
Given = TypeVar("Given", contravariant=True)
Message = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation."""

BACKOFF = 1.0  # seconds before a question is asked for the second time; twice as long before each further time
MOST_BACKOFF = 30.0
GRACE = 0.5  # seconds that answers under way may still take when the judging ends early
KEPT = 2000  # characters of an answer that are kept, its end
UPDATES = 20  # how often the progress is told


class Answer(NamedTuple):
    value: float | None  # of a comparison P(the first response is better); of a score the number; None: it says neither
    text: str


class Nonsense(Failure):
    """The server answered, and its answer says nothing."""

    def __init__(self, what: str, answer: Any) -> None:
        super().__init__(what)
        self.answer = answer


class Verdicts:
    """Answers that were given, in an append-only file of one JSON object a line. For one thread.

    What a resumed run finds there is not asked again. A last line that a killed run tore is taken off.
    UsageError: another line is no verdict. MachineError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._log = MetricsLog(path)
        self._known: dict[str, float] = {}
        for number, line in enumerate(read_metrics(path), start=1):
            match line:
                case {"key": str(key), "value": int() | float() as value}:
                    self._known[key] = float(value)
                case {"key": str(), "value": None}:
                    pass
                case _:
                    raise UsageError(f"{path}:{number}: not a verdict\n  remove the line, or start anew with --force")
        self._log.truncate_after(path.read_bytes().rfind(b"\n") + 1)

    def get(self, key: str) -> float | None:
        return self._known.get(key)

    def keep(self, key: str, answer: Answer) -> None:
        """Write it at once."""
        self._log.append({"key": key, "value": answer.value, "answer": answer.text[-KEPT:]})
        if answer.value is not None:
            self._known[key] = answer.value

    def close(self) -> None:
        self._log.close()


@dataclass(frozen=True)
class EndpointJudge:
    """Whom to ask, and how."""

    asking: Asking[Answer]
    wording: Wording
    verdicts: Callable[[], Verdicts]  # what is in them is not asked again; every answer is added at once

    def answer(self, questions: Sequence[Question]) -> Mapping[Question, float]:
        """MachineError: a question got no verdict. No further one is asked, and what was answered is kept.

        Where `nonsense` is put up with, questions whose answer says nothing are missing.
        """
        model, template = self.asking.server.model, self.wording.template
        own = {each: [model, template, each.prompt, each.a, each.b, each.principle] for each in questions}
        # The same for the same question to the same model in the same words.
        keys = {hashlib.sha256(json.dumps(said).encode()).hexdigest(): question for question, said in own.items()}
        if not keys:
            return {}
        verdicts = self.verdicts()
        self.asking.ask_all({key: self.wording.filled(question) for key, question in keys.items()}, verdicts)
        return {question: found for key, question in keys.items() if (found := verdicts.get(key)) is not None}


def prepare(
    settings: Judge,
    mode: Mode,
    place: str,
    verdicts: Callable[[], Verdicts],
    say: Callable[[int, int], None] = lambda done, total: None,
    pause: Pause = no_pause,
) -> EndpointJudge:
    """The judge of the settings; nothing is sent. UsageError: its template, its endpoint or the key cannot be used."""
    wording, server = read_wording(settings, mode, place), connect(settings.endpoint, settings.model, settings.timeout, place)

    def answer(key: str, message: Message) -> Answer:
        reply = ask(server, message)
        found = Answer(read_answer(reply.text, reply.first, reply.logprobs, mode), server.without_key(reply.text))
        if found.value is not None:
            return found
        wanted = "score from 1 to 10" if mode == "score" else "verdict A, B or TIE"
        end = server.shown(found.text[-SHOWN:])
        raise Nonsense(f"no {wanted} at the end of its answer: {end or 'an empty one'}", found)

    asking = Asking(server, settings.retries, settings.parallel, place, answer, "verdicts", say, pause)
    return EndpointJudge(asking, wording, verdicts)


class Kept(Protocol[Given]):
    """Where answers are kept."""

    def get(self, key: str, /) -> object | None: ...
    def keep(self, key: str, answer: Given, /) -> None:
        """Write it at once."""


@dataclass(frozen=True)
class Asking(Generic[A]):
    """Messages to a server, several at once, each again where it gets no answer."""

    server: Server
    retries: int
    parallel: int
    place: str  # begins every message
    answer: Callable[[str, Any], A]  # to a message with its key. Failure: there is none
    noun: str  # what the answers are, of which those that came are kept; "": they are not
    say: Callable[[int, int], None] = lambda done, total: None  # told (answered, all) messages about UPDATES times
    pause: Pause = no_pause  # while answers are waited for
    nonsense: int = 0  # answers in a row that say nothing and are put up with

    def ask_all(self, messages: Mapping[str, Any], kept: Kept[A]) -> None:
        """Bring every message's answer into `kept`. MachineError: one got none; no further one is asked."""
        pending = deque((key, message) for key, message in messages.items() if kept.get(key) is None)
        done, total = len(messages) - len(pending), len(messages)
        answers: SimpleQueue[tuple[str, A | Exception]] = SimpleQueue()
        stop = threading.Event()
        # Daemons, and no pool: a pool waits at the end of the process for requests that hang.
        threads = [
            threading.Thread(target=self._work, args=(pending, answers, stop), daemon=True)
            for _ in range(min(self.parallel, len(pending)))
        ]
        failure: Exception | None = None
        row = 0  # of answers that say nothing
        try:
            for thread in threads:
                thread.start()
            while done < total and failure is None:
                self.pause()
                try:
                    key, answer = answers.get(timeout=GRACE)
                except Empty:
                    continue
                if isinstance(answer, Nonsense) and (row := row + 1) <= self.nonsense:
                    answer = answer.answer
                elif isinstance(answer, Exception):
                    failure = answer
                    continue
                else:
                    row = 0
                kept.keep(key, answer)
                done += 1
                if done == total or done % max(1, total // UPDATES) == 0:
                    self.say(done, total)
        finally:
            stop.set()
            deadline = time.monotonic() + GRACE  # the requests that hang are left to their timeout
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
            while not answers.empty():
                key, answer = answers.get()
                if not isinstance(answer, Exception):
                    kept.keep(key, answer)
        if isinstance(failure, Failure):
            there = sum(kept.get(key) is not None for key in messages)
            safe = f"{there:,} of {total:,} {self.noun} are kept: " if self.noun else ""
            raise MachineError(
                f"{self.place}: {self.server.name}: {failure}\n  {safe}mend the cause, then continue with --resume"
            )
        if failure is not None:
            raise failure

    def _work(
        self, pending: deque[tuple[str, Any]], answers: SimpleQueue[tuple[str, A | Exception]], stop: threading.Event
    ) -> None:
        """Ask one pending message after the other, until there is none, one fails, or `stop` is set."""
        with contextlib.suppress(IndexError):  # none is pending
            while not stop.is_set():
                key, message = pending.popleft()
                try:
                    answers.put((key, self._ask(key, message, stop)))
                except Exception as error:  # whoever waits for the answer has to hear of it, whatever it is
                    answers.put((key, error))
                    if not (isinstance(error, Nonsense) and self.nonsense):
                        return

    def _ask(self, key: str, message: Any, stop: threading.Event) -> A:
        """The answer to one message, asked up to 1 + retries times. Failure: the last of them got none, or `stop` is set."""
        for number in range(1 + self.retries):
            try:
                return self.answer(key, message)
            except Failure as error:
                wait = max(error.wait, min(BACKOFF * 2**number, MOST_BACKOFF))
                if not error.again or number == self.retries or stop.wait(wait):
                    error.args = (f"{error} (asked {number + 1} times)" if number else f"{error}",)
                    raise
        raise AssertionError("the last failure is raised")
