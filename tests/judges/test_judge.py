"""The judge behind an endpoint: verdicts in both orders, a server that fails in every way, and what is kept."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from rlhf_cli.data.records import prompt_lines
from rlhf_cli.errors import MachineError, RunError, Stopped, UsageError
from rlhf_cli.judges import asking as judge
from rlhf_cli.judges import endpoint
from rlhf_cli.judges.asking import Verdicts, prepare
from rlhf_cli.judges.judge import Comparisons, compare
from rlhf_cli.judges.question import PROMPT, Question, filled, read_verdict
from rlhf_cli.sections import Judge
from tests.judges.server import Model, Reply, Serve, always, error, longer, responses, said, serve

__all__ = ["serve"]

SECRET = "sk-proj-ghijklmnopabcdefWXYZ"


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no key and no waiting."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "BACKOFF", 0.0)


def settings(server: Model | str, **changed: Any) -> Judge:
    url = server if isinstance(server, str) else server.url
    return Judge(**{"endpoint": url, "model": "judge-7b", "timeout": 10.0, "retries": 2, "parallel": 2, **changed})


def judged(chosen: Judge, comparisons: list[Question], path: Path, **given: Any) -> Comparisons:
    with contextlib.closing(Verdicts(path)) as verdicts:
        return compare(prepare(chosen, "pairwise", "winrate.judge", lambda: verdicts, **given), comparisons)


def refused(kind: type[RunError], chosen: Judge, comparisons: list[Question], path: Path) -> str:
    with pytest.raises(kind) as caught:
        judged(chosen, comparisons, path)
    return str(caught.value)


def kept(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PAIR = [Question("Hi?", "long answer", "short")]
FOUR = [
    Question("Why?", "because of it", "no"),  # longer: wins
    Question("Why?", "no", "because of it"),  # shorter: loses
    Question("Why?", "abc", "xyz"),  # equally long: tie
    Question("Why?", "same", "same"),  # equal: not asked
]


def many(count: int) -> list[Question]:
    return [Question(f"prompt {n}", "x" * (n % 7 + 1), "y" * (n % 5 + 1)) for n in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "verdicts.jsonl"


class TestOutcomes:
    def test_a_fair_judge(self, serve: Serve, path: Path) -> None:
        """Win, loss, tie by lengths; the second comparison is the first one mirrored and asks nothing new: 2 + 2 questions."""
        model = serve(longer)
        found = judged(settings(model), FOUR, path)
        assert found.outcomes.tolist() == [1.0, 0.0, 0.5, 0.5]
        assert (found.asked.sum(), found.contradicting.sum()) == (3, 0)
        assert len(model.asked) == 4
        assert Counter(responses(message) for message in model.asked) == {
            ("because of it", "no"): 1,
            ("no", "because of it"): 1,
            ("abc", "xyz"): 1,
            ("xyz", "abc"): 1,
        }

    @pytest.mark.parametrize("verdict", ["A", "B"])
    def test_the_same_place_in_both_orders_is_a_tie_and_a_contradiction(self, serve: Serve, path: Path, verdict: str) -> None:
        found = judged(settings(serve(always(verdict))), FOUR, path)
        assert found.outcomes.tolist() == [0.5] * 4
        assert (found.asked.sum(), found.contradicting.sum()) == (3, 3)

    def test_a_tie_and_a_win_is_a_tie_without_a_contradiction(self, serve: Serve, path: Path) -> None:
        """The judge says TIE where "no" stands first, else A."""
        model = serve(lambda _, message: said("TIE" if responses(message)[0] == "no" else "A"))
        found = judged(settings(model), FOUR[:1], path)
        assert (found.outcomes.tolist(), found.contradicting.sum()) == ([0.5], 0)

    def test_half_contradict(self, serve: Serve, path: Path) -> None:
        """Fair about "fair", blind about the other; equal texts do not dilute the share."""
        pairs = [Question("fair", "xx", "y"), Question("blind", "xx", "y"), Question("blind", "z", "z")]
        model = serve(lambda m, message: longer(m, message) if "\nfair\n" in message else said("A"))
        found = judged(settings(model), pairs, path)
        assert (found.outcomes.tolist(), found.asked.sum(), found.contradicting.sum()) == ([1.0, 0.5, 0.5], 2, 1)

    def test_nothing_to_ask(self, path: Path) -> None:
        assert judged(settings("http://127.0.0.1:9/v1"), [], path).outcomes.shape == (0,)
        found = judged(settings("http://127.0.0.1:9/v1"), FOUR[3:], path)
        assert (found.outcomes.tolist(), found.asked.sum()) == ([0.5], 0)

    def test_any_number_of_workers_gives_the_same(self, serve: Serve, tmp_path: Path) -> None:
        """Answers come in any order: each waits between 0 and 8 ms."""

        def slow(model: Model, message: str) -> Reply:
            time.sleep(len(message) % 5 * 0.002)
            return longer(model, message)

        model = serve(slow)
        pairs = many(35)
        expected = [float(len(p.a) > len(p.b)) if len(p.a) != len(p.b) else 0.5 for p in pairs]
        for parallel in (1, 8):
            file = tmp_path / f"{parallel}.jsonl"
            assert judged(settings(model, parallel=parallel), pairs, file).outcomes.tolist() == expected
            assert len(kept(file)) == 70
        assert len(model.asked) == 140

    def test_several_questions_are_under_way_at_once_and_no_more(self, serve: Serve, path: Path) -> None:
        """The first three answers come only when three requests are there, so two workers would hang."""
        barrier = threading.Barrier(3, timeout=5)
        count, most = 0, 0

        def together(model: Model, message: str) -> Reply:
            nonlocal count, most
            with model.lock:
                count += 1
                most = max(most, count)
            barrier.wait()
            with model.lock:
                count -= 1
            return longer(model, message)

        judged(settings(serve(together), parallel=3), many(3), path)
        assert most == 3


class TestQuestion:
    def test_what_is_sent(self, serve: Serve, path: Path) -> None:
        model = serve(longer)
        judged(settings(model, endpoint=model.url + "/"), PAIR, path)
        assert set(model.paths) == {"/v1/chat/completions"}
        for body in model.bodies:
            assert body.keys() == {"model", "messages", "temperature", "logprobs", "top_logprobs"}
            assert (body["model"], body["temperature"], len(body["messages"])) == ("judge-7b", 0, 1)
        assert all("Authorization" not in headers for headers in model.headers)
        assert all(headers["User-Agent"] == "rlhf-cli" for headers in model.headers)

    def test_a_query_stays_at_the_end(self, serve: Serve, path: Path) -> None:
        model = serve(lambda *_: error(400, "no"))
        message = refused(MachineError, settings(model.url + "?token=hidden", retries=0), PAIR, path)
        assert set(model.paths) == {"/v1/chat/completions?token=hidden"}
        assert "hidden" not in message

    def test_texts_that_look_like_placeholders(self) -> None:
        question = Question("ask {a}", "say {b}", "or {prompt} {a}")
        assert filled("{prompt}|{a}|{b}|{a}|{c}", question) == "ask {a}|say {b}|or {prompt} {a}|say {b}|{c}"
        assert PROMPT.count("{prompt}") == PROMPT.count("{a}") == PROMPT.count("{b}") == 1

    def test_unicode_and_long_texts_arrive_as_they_are(self, serve: Serve, path: Path) -> None:
        model = serve(longer)
        texts = Question("Ist das… 好吗?", "Ж😀\u2028\x00\\{b}" * 50_000, 'a "quote"\n</response_b>')
        assert judged(settings(model), [texts], path).outcomes.tolist() == [1.0]
        assert sorted(model.asked) == sorted([filled(PROMPT, texts), filled(PROMPT, texts.swapped())])
        assert judged(settings(model), [texts], path).outcomes.tolist() == [1.0]
        assert len(model.asked) == 2

    def test_half_a_surrogate_pair_is_no_crash(self, serve: Serve, path: Path) -> None:
        """Byte-level tokens can be cut inside a character."""
        assert judged(settings(serve(longer)), [Question("p", "cut \ud83d", "x")], path).outcomes.tolist() == [1.0]

    def test_a_conversation(self) -> None:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nyou"}]
        assert prompt_lines(turns) == "system: Be brief.\nuser: Hi\nyou"
        assert prompt_lines("as it stands") == "as it stands"

    def test_a_template_of_ones_own(self, serve: Serve, path: Path, tmp_path: Path) -> None:
        file = tmp_path / "ask.txt"
        file.write_bytes("\ufeffÄ: {prompt} A: {a} B: {b}".encode())
        model = serve(always("A"))
        judged(settings(model, prompt=str(file)), [Question("q", "{b}", "two")], path)
        assert sorted(model.asked) == ["Ä: q A: two B: {b}", "Ä: q A: {b} B: two"]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"{prompt} {a}", "has no {b}\n"),
            (b"{a} {b }", "has no {prompt} and no {b}\n"),
            (b"\xff{prompt}{a}{b}", "not UTF-8 text"),
            (None, "No such file or directory"),
        ],
    )
    def test_a_template_that_cannot_be_used(self, path: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
        file = tmp_path / "ask.txt"
        if content is not None:
            file.write_bytes(content)
        message = refused(UsageError, settings("http://127.0.0.1:9/v1", prompt=str(file)), [], path)
        assert message.startswith(f"winrate.judge.prompt: {file}")
        assert words in message

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8000/v1",
            "ftp://host/v1",
            "file:///etc/x",
            "http://",
            "http:///v1",
            "http://host:port/v1",
            "http://ho st/v1",
            "http://a..b/v1",
            "http://hö/v1",
            "http://[::1/v1",
            "http://host/v1\n",
        ],
    )
    def test_no_url(self, path: Path, url: str) -> None:
        assert "winrate.judge.endpoint: expected a URL" in refused(UsageError, settings(url), [], path)

    def test_no_password_in_the_url(self, path: Path) -> None:
        message = refused(UsageError, settings("http://me:hunter2@host/v1"), [], path)
        assert "hunter2" not in message
        assert "OPENAI_API_KEY" in message


class TestReadVerdict:
    @pytest.mark.parametrize(
        ("answer", "verdict"),
        [
            ("A", "A"),
            ("b", "B"),
            (" tie.\n\n", "TIE"),
            ("B is more helpful than A.\n\nB", "B"),
            ("**A**", "A"),
            ("Reasons.\n[[B]]", "B"),
            ("First [[A]] seemed right. [[ tie ]] it is", "TIE"),
            ("Verdict: A", "A"),
            ("**Verdict:** B", "B"),
            ("Verdict: A because B is short", "A"),
            ("Verdict: A, it is longer", "A"),
            ("The verdict is a tie", "TIE"),
            ("Winner: Response B", "B"),
            ('{"verdict": "A"}', "A"),
            ("My final answer is B.", "B"),
            ("`TIE`", "TIE"),
            ("## Tie", "TIE"),
            ("- (A)", "A"),
            ("\\boxed{B}", "B"),
            ("A tie.", "TIE"),
            ("It is a tie", "TIE"),
            ("Response A", "A"),
            ("A\n\nI hope that helps!", "A"),
            ("<think>B is better\nB\n</think>\n\nA", "A"),
            ("See [[1, 2], [3, 4]].\nB", "B"),
            # nonsense
            ("", None),
            ("   \n", None),
            ("C", None),
            ("[[C]]", None),
            ("A is good, so [[C]]", None),
            ("A or B?", None),
            ("A, B or TIE", None),
            ("Verdict: A or B", None),
            ("Verdict: A, B or TIE", None),
            ("Verdict: A/B", None),
            ("It is a tie between A and B", None),
            ("Response A is worse", None),
            ("This is worse than A", None),
            ("This is worse than Response A.", None),
            ("I choose not B", None),
            ("Both give a good answer", None),
            ("This is a", None),
            ("Both wear a necktie", None),
            ("Plan-B", None),
            ("AB", None),
            ("**A**\nIt is good.\n**B**\nIt is good.\nI cannot choose.", None),
            ("<think>\nA", None),
            ("I cannot compare them.", None),
        ],
    )
    def test_answers(self, answer: str, verdict: str | None) -> None:
        assert read_verdict(answer) == verdict

    def test_a_very_long_line_takes_no_time(self) -> None:
        started = time.monotonic()
        for piece in ("A ", " ", "verdict ", "*", "[[", "a \t", "'"):
            read_verdict(piece * 200_000 + "?!")
        assert time.monotonic() - started < 20


class TestFailures:
    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (said("no idea"), "no verdict A, B or TIE at the end of its answer: no idea"),
            (said(""), "no verdict A, B or TIE at the end of its answer: an empty one"),
            (said(None), "no choices[0].message.content in"),
            (said("A", finish_reason="length"), "cut off by the server's limit on tokens"),
            ((200, {}, b"<html>busy</html>"), "not JSON: <html>busy</html>"),
            ((200, {}, b""), "not JSON: nothing at all"),
            ((200, {}, b'{"choices": [{"message": {"content": "A"}'), "not JSON: "),
            ((200, {}, b"[" * 100_000), "not JSON: "),
            ((200, {}, b"\xff\xfe"), "not JSON: "),
            ((200, {}, b'{"choices": []}'), 'no choices[0].message.content in {"choices": []}'),
            ((200, {}, b'{"error": {"message": "overloaded"}}'), "no choices[0].message.content in overloaded"),
            ((200, {}, b"[1]"), "no choices[0].message.content in [1]"),
            (error(500, "broke"), "HTTP 500: broke"),
            ((503, {}, b""), "HTTP 503 (asked"),
            ((502, {}, b'{"detail": "bad gateway"}'), "HTTP 502: bad gateway"),
            (error(429, "slow down"), "HTTP 429: slow down"),
            (error(408, "too late"), "HTTP 408: too late"),
        ],
    )
    def test_asked_again_and_then_given_up(self, serve: Serve, path: Path, reply: Reply, words: str) -> None:
        """1 + 2 retries of the first question; the second one is not asked by the only worker."""
        model = serve(lambda *_: reply)
        message = refused(MachineError, settings(model, parallel=1), PAIR, path)
        assert message.startswith(f"winrate.judge: {model.url}/chat/completions, model 'judge-7b': ")
        assert words in message
        assert "(asked 3 times)\n  0 of 2 verdicts are kept: mend the cause, then continue with --resume" in message
        assert len(message.splitlines()) == 2
        assert len(model.asked) == 3

    @pytest.mark.parametrize("status", [400, 403, 404, 422])
    def test_refused_at_once(self, serve: Serve, path: Path, status: int) -> None:
        model = serve(lambda *_: error(status, "no such\nmodel"))
        message = refused(MachineError, settings(model, parallel=1), PAIR, path)
        assert f": HTTP {status}: no such model\n" in message
        assert len(model.asked) == 1

    def test_words_of_the_server_are_short_and_cannot_steer_a_terminal(self, serve: Serve, path: Path) -> None:
        model = serve(lambda *_: error(400, "\x1b[31m" + "é" * 5000))
        message = refused(MachineError, settings(model), PAIR, path)
        assert "HTTP 400: \\x1b[31m" + "é" * 192 + " …\n" in message

    def test_no_key(self, serve: Serve, path: Path) -> None:
        model = serve(lambda *_: error(401, "who are you?"))
        message = refused(MachineError, settings(model), PAIR, path)
        assert "HTTP 401: who are you?; OPENAI_API_KEY is not set\n" in message

    @pytest.mark.parametrize("reply", [error(500, "broke"), said("hm"), (200, {}, b"{"), error(429, "busy")])
    def test_the_second_answer_counts(self, serve: Serve, path: Path, reply: Reply) -> None:
        """Every question fails once: 2 × 2 requests."""

        def once(model: Model, message: str) -> Reply:
            return reply if model.asked.count(message) == 1 else longer(model, message)

        model = serve(once)
        assert judged(settings(model), PAIR, path).outcomes.tolist() == [1.0]
        assert sorted(Counter(model.asked).values()) == [2, 2]

    def test_no_retries(self, serve: Serve, path: Path) -> None:
        model = serve(lambda *_: error(500, "broke"))
        message = refused(MachineError, settings(model, retries=0, parallel=1), PAIR, path)
        assert "HTTP 500: broke\n" in message
        assert len(model.asked) == 1

    def test_server_down(self, path: Path) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
            message = refused(MachineError, settings(url), PAIR, path)
        assert message.startswith(
            f"winrate.judge: {url}/chat/completions, model 'judge-7b': Connection refused (asked 3 times)\n"
        )

    def test_no_such_host(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        assert "Name or service not known (asked 3 times)" in refused(MachineError, settings("http://nowhere/v1"), PAIR, path)

    def test_hung_up(self, path: Path) -> None:
        """The connection is closed without an answer."""
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def hang_up() -> None:
                while True:
                    try:
                        connection, _ = listening.accept()
                    except OSError:
                        return
                    connection.recv(2**16)
                    connection.close()

            threading.Thread(target=hang_up, daemon=True).start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            message = refused(MachineError, settings(url, timeout=5.0), PAIR, path)
            listening.shutdown(socket.SHUT_RDWR)
        assert "(asked 3 times)" in message
        assert "closed connection" in message or "reset by peer" in message

    def test_no_http(self, path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def greet() -> None:
                connection, _ = listening.accept()
                connection.recv(2**16)
                connection.sendall(b"SSH-2.0-x\x1b\r\n\r\n")
                connection.close()

            threading.Thread(target=greet, daemon=True).start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            message = refused(MachineError, settings(url, retries=0, parallel=1), PAIR, path)
        assert "SSH-2.0-x\\x1b" in message

    def test_slow_server(self, serve: Serve, path: Path) -> None:
        late: list[str] = []

        def hang(model: Model, message: str) -> Reply:
            model.open.wait(10)
            late.append(message)
            return longer(model, message)

        model = serve(hang)
        message = refused(MachineError, settings(model, timeout=0.2, parallel=1), PAIR, path)
        assert "no answer in 0.2 s (asked 3 times)" in message
        assert (len(model.asked), late) == (3, [])

    def test_an_answer_that_comes_byte_by_byte(self, path: Path) -> None:
        """Each byte is in time for the socket's own timeout, all of them never."""
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def drip() -> None:
                connection, _ = listening.accept()
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(400):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    return

            threading.Thread(target=drip, daemon=True).start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            message = refused(MachineError, settings(url, timeout=0.3, retries=0, parallel=1), PAIR, path)
        assert "no answer in 0.3 s\n" in message

    def test_an_endless_answer(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoint, "MOST_BYTES", 2**20)
        model = serve(lambda *_: (200, {}, b" " * (2**20 + 1)))
        assert "an answer of more than 1 MiB\n" in refused(MachineError, settings(model, parallel=1), PAIR, path)

    def test_one_failing_question_stops_the_others(self, serve: Serve, path: Path) -> None:
        """Of 100 questions the third is refused: the one worker asks no more, and what two answered is kept."""

        def third(model: Model, message: str) -> Reply:
            return error(400, "no") if len(model.asked) >= 3 else longer(model, message)

        model = serve(third)
        message = refused(MachineError, settings(model, parallel=1), many(50), path)
        assert "\n  2 of 100 verdicts are kept" in message
        assert (len(model.asked), len(kept(path))) == (3, 2)

    def test_what_is_under_way_when_another_fails_is_kept(
        self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three questions at once: one is refused at once, the other two are answered 0.1 s later."""
        monkeypatch.setattr(judge, "GRACE", 5.0)
        barrier = threading.Barrier(3, timeout=5)

        def one(model: Model, message: str) -> Reply:
            if barrier.wait() == 0:
                return error(400, "no")
            time.sleep(0.1)
            return longer(model, message)

        message = refused(MachineError, settings(serve(one), parallel=3), many(20), path)
        assert len(kept(path)) == 2
        assert "\n  2 of 40 verdicts are kept" in message

    def test_an_error_of_ours_is_not_swallowed(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker's unforeseen exception reaches the caller instead of leaving it waiting."""

        def broken(*_: object) -> str:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(judge, "ask", broken)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            judged(settings(serve(longer)), PAIR, path)


class TestWaiting:
    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """Seconds waited before each further question; none of them passes."""
        waited: list[float] = []

        class Impatient(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                if timeout is None:
                    return super().wait()
                waited.append(timeout)
                return self.is_set()

        real = judge.Asking._work

        def work(chosen: Any, pending: Any, answers: Any, stop: Any) -> None:
            real(chosen, pending, answers, Impatient())

        monkeypatch.setattr(judge.Asking, "_work", work)
        return waited

    def test_twice_as_long_each_time(self, serve: Serve, path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(judge, "BACKOFF", 1.0)
        refused(MachineError, settings(serve(lambda *_: error(500, "")), retries=7, parallel=1), PAIR, path)
        assert waits == [1, 2, 4, 8, 16, 30, 30]

    @pytest.mark.parametrize(
        ("header", "low", "high"),
        [
            ("7", 7, 7),
            ("0.5", 0.5, 0.5),
            ("3600", 60, 60),
            ("tomorrow", 60, 60),
            ("a minute ago", 0.25, 0.25),
            ("-5", 0.25, 0.25),
            ("nan", 0.25, 0.25),
            ("inf", 0.25, 0.25),
            ("soon", 0.25, 0.25),
            ("Mon, 99 Foo 2000", 0.25, 0.25),
        ],
    )
    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after(
        self,
        serve: Serve,
        path: Path,
        waits: list[float],
        monkeypatch: pytest.MonkeyPatch,
        header: str,
        low: float,
        high: float,
        status: int,
    ) -> None:
        """What the server asks for, at most a minute, and never less than the back-off."""
        monkeypatch.setattr(judge, "BACKOFF", 0.25)
        if header in (dates := {"tomorrow": 86400, "a minute ago": -60}):
            header = formatdate(time.time() + dates[header], usegmt=True)
        model = serve(lambda *_: error(status, "", Retry_After=header))
        refused(MachineError, settings(model, retries=1, parallel=1), PAIR, path)
        assert len(waits) == 1
        assert low <= waits[0] <= high

    def test_a_date_soon(self) -> None:
        assert 15 <= endpoint._retry_after(formatdate(time.time() + 20, usegmt=True)) <= 20

    def test_the_server_is_really_left_alone(self, serve: Serve, path: Path) -> None:
        def busy(model: Model, message: str) -> Reply:
            return error(429, "", Retry_After="0.3") if len(model.asked) == 1 else longer(model, message)

        model = serve(busy)
        assert judged(settings(model, parallel=1), PAIR, path).outcomes.tolist() == [1.0]
        assert model.times[1] - model.times[0] >= 0.3


class TestKey:
    @pytest.fixture(autouse=True)
    def secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")

    def nothing_of_it(self, *texts: str) -> None:
        for text in texts:
            assert not [SECRET[n : n + 4] for n in range(len(SECRET) - 3) if SECRET[n : n + 4] in text]

    def test_goes_with_every_question(self, serve: Serve, path: Path) -> None:
        model = serve(longer)
        judged(settings(model), PAIR, path)
        assert [headers["Authorization"] for headers in model.headers] == [f"Bearer {SECRET}"] * 2
        self.nothing_of_it(path.read_text(), repr(prepare(settings(model), "pairwise", "winrate.judge", lambda: Verdicts(path))))

    @pytest.mark.parametrize(
        "words",
        [
            f"Incorrect API key provided: {SECRET}.",
            f"Incorrect API key provided: {SECRET[:8]}*******{SECRET[-4:]}.",
            f"bad header 'Bearer {SECRET}'",
            f"ends at {SECRET[-6:]}",
            "x" * 180 + f" {SECRET} {SECRET}",
        ],
    )
    @pytest.mark.parametrize("status", [200, 400, 401, 500])
    def test_a_server_that_repeats_it(self, serve: Serve, path: Path, words: str, status: int) -> None:
        model = serve(lambda *_: said(words) if status == 200 else error(status, words))
        message = refused(MachineError, settings(model, parallel=1), PAIR, path)
        assert "***" in message
        assert ("OPENAI_API_KEY is not the key that it expects" in message) == (status == 401)
        self.nothing_of_it(message, path.read_text())

    def test_the_chain_of_causes_has_none_of_it(self, serve: Serve, path: Path) -> None:
        with pytest.raises(MachineError) as caught:
            judged(settings(serve(lambda *_: error(401, SECRET))), PAIR, path)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None

    def test_a_judge_that_repeats_it(self, serve: Serve, path: Path) -> None:
        """Its answers are kept, without the key."""
        judged(settings(serve(always(f"The key {SECRET} came along\nTIE"))), PAIR, path)
        assert [line["answer"] for line in kept(path)] == ["The key *** came along\nTIE"] * 2

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_is_not_carried_to_another_host(self, serve: Serve, path: Path, status: int) -> None:
        other = serve(longer)
        model = serve(lambda *_: (status, {"Location": f"{other.url}/chat/completions?k={SECRET}"}, b""))
        message = refused(MachineError, settings(model, parallel=1), PAIR, path)
        assert f"HTTP {status}; it points to {other.url}/chat/completions?k=***: give the address that answers\n" in message
        assert (len(model.asked), other.asked) == (1, [])
        self.nothing_of_it(message)

    def test_where_a_redirect_points_to(self, serve: Serve, path: Path) -> None:
        model = serve(lambda *_: (308, {"Location": "https://elsewhere/v1"}, b""))
        assert "it points to https://elsewhere/v1: give" in refused(MachineError, settings(model), PAIR, path)

    @pytest.mark.parametrize("extra", [" and more", "\nX-Evil: 1", "é", "\x7f"])
    def test_one_that_no_header_can_carry(self, path: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET + extra + "x")
        message = refused(UsageError, settings("http://127.0.0.1:9/v1"), PAIR, path)
        assert message.startswith("OPENAI_API_KEY holds a space or a character that no HTTP header can carry")
        self.nothing_of_it(message)

    def test_a_short_one_hides_itself_only(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
        judged(settings(serve(always("EMPTY EM PTY\nA"))), PAIR, path)
        assert kept(path)[0]["answer"] == "*** EM PTY\nA"

    def test_a_cut_answer_has_no_half_of_it(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message has an answer's last 200 characters, which begin inside the key."""
        monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
        message = refused(MachineError, settings(serve(always("hunter2" + "x" * 195))), PAIR, path)
        assert "its answer: ***" + "x" * 195 + " (asked" in message

    def test_an_empty_one_is_none(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "")
        model = serve(longer)
        judged(settings(model), PAIR, path)
        assert all("Authorization" not in headers for headers in model.headers)


class TestKeeping:
    def test_the_server_dies_and_comes_back(
        self, serve: Serve, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After seven answers all is an error; the second run asks the rest only, and both together give the whole."""
        monkeypatch.setattr(judge, "GRACE", 5.0)
        pairs = many(20)
        whole = judged(settings(serve(longer)), pairs, tmp_path / "whole.jsonl")

        def dying(model: Model, message: str) -> Reply:
            return error(500, "dying") if model.asked.index(message) >= 7 else longer(model, message)

        for parallel in (1, 4):
            path.unlink(missing_ok=True)
            model = serve(dying)
            message = refused(MachineError, settings(model, retries=0, parallel=parallel), pairs, path)
            assert "7 of 40 verdicts are kept" in message
            assert len(kept(path)) == 7
            again = serve(longer)
            found = judged(settings(again, parallel=parallel), pairs, path)
            assert len(again.asked) == 33
            assert not set(again.asked) & set(model.asked[:7])
            assert (found.outcomes == whole.outcomes).all()
            assert (found.asked.sum(), found.contradicting.sum()) == (whole.asked.sum(), whole.contradicting.sum())

    def test_each_line_is_there_at_once(self, serve: Serve, path: Path) -> None:
        """With one worker the answer before last is in the file when a question arrives."""
        lines: list[int] = []

        def count(model: Model, message: str) -> Reply:
            time.sleep(0.05)
            lines.append(len(kept(path)))
            return longer(model, message)

        judged(settings(serve(count), parallel=1), many(2), path)
        assert lines == [0, 1, 2, 3]

    def test_what_a_line_holds(self, serve: Serve, path: Path) -> None:
        judged(settings(serve(always("ü" * 3000 + "\nA"))), PAIR, path)
        for line in kept(path):
            assert line.keys() == {"key", "value", "answer"}
            assert re.fullmatch("[0-9a-f]{64}", line["key"])
            assert line["value"] == 1.0
            assert line["answer"] == "ü" * 1998 + "\nA"

    def test_a_torn_last_line_is_asked_again(self, serve: Serve, path: Path) -> None:
        model = serve(longer)
        judged(settings(model), PAIR, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert judged(settings(model), PAIR, path).outcomes.tolist() == [1.0]
        assert len(model.asked) == 3
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())

    @pytest.mark.parametrize("line", ['{"key": "k", "value": "C"}', '{"value": 1}', "[]", '{"key": 1, "value": 1}'])
    def test_a_line_that_is_no_verdict(self, path: Path, line: str) -> None:
        path.write_text('{"key": "k", "value": 1, "answer": "A"}\n' + line + "\n")
        with pytest.raises(UsageError, match=re.escape(f"{path}:2: not a verdict")):
            Verdicts(path)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="cannot write"):
            Verdicts(tmp_path / "missing" / "verdicts.jsonl")

    def test_another_model_or_template_or_text_asks_anew(self, serve: Serve, path: Path, tmp_path: Path) -> None:
        """Another server or timeout does not."""
        file = tmp_path / "ask.txt"
        file.write_text(PROMPT + " ")
        first, model = serve(longer), serve(longer)
        judged(settings(first), PAIR, path)
        judged(settings(model, timeout=9.0, parallel=1, retries=0), PAIR, path)
        assert len(model.asked) == 0
        judged(settings(model, model="judge-70b"), PAIR, path)
        assert len(model.asked) == 2
        judged(settings(model, prompt=str(file)), PAIR, path)
        assert len(model.asked) == 4
        judged(settings(model), [Question("Hi!", PAIR[0].a, PAIR[0].b)], path)
        assert len(model.asked) == 6
        judged(settings(model), [Question("Hi?", PAIR[0].a + " ", PAIR[0].b)], path)
        assert len(model.asked) == 8

    def test_a_text_cannot_pass_its_end_for_another_ones_start(self, serve: Serve, path: Path) -> None:
        model = serve(longer)
        judged(settings(model), [Question("p", "ab", "c"), Question("p", "a", "bc")], path)
        assert len(model.asked) == 4

    def test_a_full_disk(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise MachineError("cannot write: the disk is full")

        monkeypatch.setattr(judge.MetricsLog, "append", full)
        assert refused(MachineError, settings(serve(longer)), PAIR, path) == "cannot write: the disk is full"


class TestProgress:
    def test_now_and_then_and_at_the_end(self, serve: Serve, path: Path) -> None:
        """100 questions, told at every fifth."""
        told: list[tuple[int, int]] = []
        pairs = [Question(str(n), "aa", "b") for n in range(50)]
        judged(settings(serve(longer)), pairs, path, say=lambda done, total: told.append((done, total)))
        assert told == [(done, 100) for done in range(5, 101, 5)]

    def test_counts_what_an_earlier_run_asked(self, serve: Serve, path: Path) -> None:
        told: list[tuple[int, int]] = []
        pairs = [Question(str(n), "aa", "b") for n in range(3)]
        model = serve(longer)
        judged(settings(model), pairs[:2], path)
        judged(settings(model), pairs, path, say=lambda done, total: told.append((done, total)))
        assert told == [(5, 6), (6, 6)]


class TestStopping:
    def test_a_signal_while_requests_hang(self, serve: Serve, path: Path) -> None:
        """Two questions are answered, the others hang: SIGALRM after 0.4 s ends the wait, long before the timeout of 30 s."""

        def hang(model: Model, message: str) -> Reply:
            if model.asked.index(message) >= 2:
                model.open.wait(30)
            return longer(model, message)

        def stop(number: int, _: FrameType | None) -> None:
            raise Stopped("stopped by a test", number)

        model = serve(hang)
        before = signal.signal(signal.SIGALRM, stop)
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        try:
            with pytest.raises(Stopped, match="stopped by a test"):
                judged(settings(model, timeout=30.0, parallel=4), many(20), path)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - started < 5
        assert len(kept(path)) == 2
        hanging = [thread for thread in threading.enumerate() if "_work" in thread.name]
        assert len(hanging) == 4
        assert all(thread.daemon for thread in hanging)
        asked = len(model.asked)
        model.open.set()
        for thread in hanging:
            thread.join(5)
        assert len(model.asked) == asked
        assert len(kept(path)) == 2

    def test_a_worker_that_waits_to_ask_again_goes_home(self, serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One question is answered with 500 and would wait a minute, the other is refused."""
        monkeypatch.setattr(judge, "BACKOFF", 20.0)
        barrier = threading.Barrier(2, timeout=5)

        def one(model: Model, message: str) -> Reply:
            if barrier.wait() == 0:
                return error(500, "later")
            time.sleep(0.1)
            return error(400, "never")

        started = time.monotonic()
        assert ": HTTP 400: never\n" in refused(MachineError, settings(serve(one)), PAIR, path)
        assert time.monotonic() - started < 10
        assert not [thread for thread in threading.enumerate() if "_work" in thread.name]
