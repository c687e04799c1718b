"""Which of two responses is better, asked of a model behind an endpoint, in both orders."""

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
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.evaluation.endpoint import SHOWN, Failure, Server, ask, connect
from rlhf_cli.evaluation.question import PROMPT, Question, filled, read_template, read_verdict
from rlhf_cli.runs.folder import MetricsLog, read_metrics

if TYPE_CHECKING:
    from rlhf_cli.sections import Endpoint

BACKOFF = 1.0  # seconds before a question is asked for the second time; twice as long before each further time
MOST_BACKOFF = 30.0
GRACE = 0.5  # seconds that answers under way may still take when the judging ends early
KEPT = 2000  # characters of an answer that are kept, its end
VALUE = {"A": 1.0, "B": 0.0, "TIE": 0.5}  # of a verdict, for the response that stands first
UPDATES = 20  # how often the progress is told


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how."""

    server: Server
    template: str
    retries: int
    parallel: int

    def key(self, question: Question) -> str:
        """The same for the same question to the same model in the same words."""
        parts = [self.server.model, self.template, question.prompt, question.a, question.b]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare(settings: Endpoint) -> Judge:
    """The judge of the settings; nothing is sent. UsageError: its template, its endpoint or the key cannot be used."""
    template = PROMPT if settings.prompt is None else read_template(Path(settings.prompt))
    return Judge(connect(settings), template, settings.retries, settings.parallel)


class Answer(NamedTuple):
    verdict: str  # A, B or TIE
    text: str


class Verdicts:
    """Answers that were given, in an append-only file of one JSON object a line. For one thread.

    What a resumed run finds there is not asked again. A last line that a killed run tore is taken off.
    UsageError: another line is no verdict. MachineError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._log = MetricsLog(path)
        self._known: dict[str, str] = {}
        for number, line in enumerate(read_metrics(path), start=1):
            match line:
                case {"key": str(key), "verdict": "A" | "B" | "TIE" as verdict}:
                    self._known[key] = verdict
                case _:
                    raise UsageError(f"{path}:{number}: not a verdict\n  remove the line, or start anew with --force")
        self._log.truncate_after(path.read_bytes().rfind(b"\n") + 1)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def keep(self, key: str, answer: Answer) -> None:
        """Write it at once."""
        self._log.append({"key": key, "verdict": answer.verdict, "answer": answer.text[-KEPT:]})
        self._known[key] = answer.verdict

    def close(self) -> None:
        self._log.close()


@dataclass(frozen=True)
class Comparisons:
    """Outcomes of comparisons, and how often the judge contradicted itself."""

    outcomes: np.ndarray  # (N,) float64: 1 where a is better, 0 where b is, else 1/2
    asked: int  # comparisons of different texts
    contradicting: int  # of them: the response in the same place was better in both orders


def judge_all(
    settings: Endpoint, comparisons: Sequence[Question], verdicts: Verdicts, say: Callable[[int, int], None]
) -> Comparisons:
    """Ask about every comparison in both orders.

    A response wins if it is better in both orders; everything else is a tie, also a win in one order and a tie in the other
    (Zheng et al. 2023, section 3.4: a win only where both orders agree). Equal texts are a tie and are not asked about.

    Args:
        verdicts: what is in them is not asked again; every answer is added at once.
        say: told (answered, all) questions about UPDATES times, those of an earlier run included.

    UsageError: see `prepare`; nothing is sent.
    MachineError: a question got no verdict. No further one is asked, and what was answered is kept.
    """
    judge = prepare(settings)
    pairs = [(each, each.swapped()) for each in comparisons if each.a != each.b]
    questions = {judge.key(question): question for pair in pairs for question in pair}
    _ask_all(judge, questions, verdicts, say)
    given = np.array([[VALUE[verdicts.get(judge.key(question)) or ""] for question in pair] for pair in pairs]).reshape(-1, 2)
    own = np.stack([given[:, 0], 1 - given[:, 1]])  # (2, pairs): of a in both orders
    outcomes = np.full(len(comparisons), 0.5)
    outcomes[[each.a != each.b for each in comparisons]] = np.where(own[0] == own[1], own[0], 0.5)
    return Comparisons(outcomes, len(pairs), int((np.abs(own[0] - own[1]) == 1).sum()))


def _ask_all(judge: Judge, questions: Mapping[str, Question], verdicts: Verdicts, say: Callable[[int, int], None]) -> None:
    """Bring every question's verdict into `verdicts`, several questions at once. MachineError: see `judge_all`."""
    pending = deque((key, question) for key, question in questions.items() if verdicts.get(key) is None)
    done, total = len(questions) - len(pending), len(questions)
    answers: SimpleQueue[tuple[str, Answer | Exception]] = SimpleQueue()
    stop = threading.Event()
    # Daemons, and no pool: a pool waits at the end of the process for requests that hang.
    threads = [
        threading.Thread(target=_work, args=(judge, pending, answers, stop), daemon=True)
        for _ in range(min(judge.parallel, len(pending)))
    ]
    failure: Exception | None = None
    try:
        for thread in threads:
            thread.start()
        while done < total and failure is None:
            key, answer = answers.get()
            if isinstance(answer, Exception):
                failure = answer
                continue
            verdicts.keep(key, answer)
            done += 1
            if done == total or done % max(1, total // UPDATES) == 0:
                say(done, total)
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE  # the requests that hang are left to their timeout
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        while not answers.empty():
            key, answer = answers.get()
            if isinstance(answer, Answer):
                verdicts.keep(key, answer)
    if isinstance(failure, Failure):
        kept = sum(verdicts.get(key) is not None for key in questions)
        raise MachineError(
            f"winrate.judge: {judge.server.name}: {failure}\n"
            f"  {kept:,} of {total:,} verdicts are kept: mend the cause, then continue with --resume"
        )
    if failure is not None:
        raise failure


def _work(
    judge: Judge,
    pending: deque[tuple[str, Question]],
    answers: SimpleQueue[tuple[str, Answer | Exception]],
    stop: threading.Event,
) -> None:
    """Ask one pending question after the other, until there is none, one fails, or `stop` is set."""
    with contextlib.suppress(IndexError):  # none is pending
        while not stop.is_set():
            key, question = pending.popleft()
            try:
                answers.put((key, _ask(judge, question, stop)))
            except Exception as error:  # whoever waits for the answer has to hear of it, whatever it is
                answers.put((key, error))
                return


def _ask(judge: Judge, question: Question, stop: threading.Event) -> Answer:
    """The verdict on one question, asked up to 1 + retries times. Failure: the last of them got none, or `stop` is set."""
    message = filled(judge.template, question)
    for number in range(1 + judge.retries):
        try:
            text = ask(judge.server, message)
            if verdict := read_verdict(text):
                return Answer(verdict, judge.server.without_key(text))
            end = judge.server.shown(judge.server.without_key(text)[-SHOWN:])
            raise Failure(f"no verdict A, B or TIE at the end of its answer: {end or 'an empty one'}")
        except Failure as error:
            wait = max(error.wait, min(BACKOFF * 2**number, MOST_BACKOFF))
            if not error.again or number == judge.retries or stop.wait(wait):
                times = f" (asked {number + 1} times)" if number else ""
                raise Failure(f"{error}{times}", again=False) from None
    raise AssertionError("the last failure is raised")
