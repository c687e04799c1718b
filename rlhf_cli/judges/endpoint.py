"""One question to a model behind an OpenAI-compatible interface, over HTTP, and what may go wrong with it."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, OpenerDirector, Request, build_opener

from rlhf_cli.console import clean
from rlhf_cli.errors import UsageError

if TYPE_CHECKING:
    pass

KEY = "OPENAI_API_KEY"
MOST_BYTES = 2**24  # of one answer; a server that sends more is not answering the question
MOST_WAIT = 60.0  # seconds that a server's Retry-After is obeyed at most
TOP = 20  # log-probabilities that are asked for, the most that the interface has
SHOWN = 200  # characters of a server's words in a message
BUSY = (408, 409, 425, 429)  # statuses below 500 after which the same question may be answered


class Reply(NamedTuple):
    """What a model said, and where the server tells them, its first token and the log-probabilities of tokens in its place."""

    text: str
    first: str = ""
    logprobs: Mapping[str, float] = MappingProxyType({})
    ended: bool = True  # False: cut off by a limit on its tokens


class Failure(Exception):
    """A question got no answer; its text says what came instead."""

    def __init__(self, what: str, again: bool = True, wait: float = 0.0, refused: str = "") -> None:
        super().__init__(what)
        self.again = again  # the same question may be answered later
        self.wait = wait  # seconds that the server asks for
        self.refused = refused  # all it said where it does not take the question as it is


class _AsItIs(HTTPErrorProcessor):
    """Every status is an answer: a redirect that is not followed cannot carry the key to another host."""

    def http_response(self, request: Request, response: HTTPResponse) -> HTTPResponse:
        return response

    https_response = http_response


@dataclass(frozen=True)
class Server:
    """Where a model answers."""

    url: str
    model: str  # "": its path says what it is asked for
    timeout: float  # seconds
    key: str | None = field(repr=False)
    opener: OpenerDirector = field(repr=False)
    plain: threading.Event = field(default_factory=threading.Event, repr=False)  # set: it refuses to tell log-probabilities

    @property
    def name(self) -> str:
        """For messages; a query may hold a secret."""
        return clean(self.url.partition("?")[0]) + (f", model {self.model!r}" if self.model else "")

    def shown(self, text: str) -> str:
        """The server's words as one short line that cannot steer a terminal, without the key."""
        line = clean(" ".join(self.without_key(text).split()))
        return line if len(line) <= SHOWN else f"{line[:SHOWN]} …"

    def without_key(self, text: str) -> str:
        """The text without the key, and without words that have its start or its end: servers mask only its middle."""
        if self.key is None:
            return text
        text = text.replace(self.key, "***")
        pieces = (self.key[:4], self.key[-4:]) if len(self.key) >= 12 else (self.key,)
        words = re.split(r"([\s\"'<>]+)", text)
        return "".join("***" if any(piece in word for piece in pieces) else word for word in words)


def connect(endpoint: str | None, model: str | None, timeout: float, place: str, path: str = "chat/completions") -> Server:
    """The server; nothing is sent. UsageError: the endpoint is no URL, or the key cannot stand in a header."""
    assert endpoint is not None and model is not None
    whole = False
    with suppress(ValueError):
        parts = urlsplit(endpoint)
        (parts.hostname or "").encode("idna")
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    if not whole or not re.fullmatch(r"[!-~]+", endpoint):
        raise UsageError(
            f"{place}.endpoint: expected a URL such as http://localhost:8000/v1, without a user or a password, "
            f"found {endpoint.rpartition('@')[2]!r}\n  a key belongs into the environment variable {KEY}"
        )
    url = parts._replace(path=f"{parts.path.rstrip('/')}/{path}", fragment="").geturl()
    key = os.environ.get(KEY, "").strip() or None
    # The standard library would quote the whole key in its complaint.
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UsageError(f"{KEY} holds a space or a character that no HTTP header can carry: set it again, or unset it")
    return Server(url, model, timeout, key, build_opener(_AsItIs))


def ask(server: Server, message: str | Sequence[Mapping[str, Any]], drawing: Mapping[str, Any] | None = None) -> Reply:
    """The model's answer to one message, or to a conversation. Failure says what came instead.

    A judge answers at temperature 0, without a bound on its tokens: a reasoning model would spend it before it says a word, and
    some servers refuse the key. `timeout` bounds it. Log-probabilities are asked for until the server refuses the key.
    `drawing`: the keys of the interface that say how another answer is drawn; it may be cut off.
    """
    turns = [{"role": "user", "content": message}] if isinstance(message, str) else [*message]
    body = {"model": server.model, "messages": turns, **({"temperature": 0} if drawing is None else drawing)}
    asks = drawing is None and not server.plain.is_set()
    if asks:
        body |= {"logprobs": True, "top_logprobs": TOP}
    try:
        reply = _content(server, post(server, body))
    except Failure as failure:
        if not asks or "logprobs" not in failure.refused:
            raise
        server.plain.set()
        return ask(server, message)
    if drawing is None and not reply.ended:
        raise Failure("the answer was cut off by the server's limit on tokens")
    return reply


def post(server: Server, body: Mapping[str, Any]) -> str:
    """What the server answers. Failure says what came instead."""
    # Without it a common shield in front of servers takes Python's own name for a robot's and refuses it.
    headers = {"Content-Type": "application/json", "User-Agent": "rlhf-cli"}
    request = Request(server.url, json.dumps(body).encode(), headers, method="POST")
    if server.key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {server.key}")
    deadline = time.monotonic() + server.timeout
    try:
        with server.opener.open(request, timeout=server.timeout) as response:
            status, answer_headers, content = response.status, response.headers, _read(response, deadline)
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            raise Failure(f"no answer in {server.timeout:g} s") from None
        words = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise Failure(server.shown(words) or type(cause).__name__) from None
    text = content.decode("utf-8", "replace")
    if 200 <= status < 300:
        return text
    words = f"HTTP {status}: {server.shown(_complaint(text))}".rstrip(": ")
    if status == 401:
        words += f"; {KEY} is not set" if server.key is None else f"; {KEY} is not the key that it expects"
    if 300 <= status < 400:
        words += f"; it points to {server.shown(answer_headers.get('Location', 'nowhere'))}: give the address that answers"
    wait = _retry_after(answer_headers.get("Retry-After", ""))
    raise Failure(words, status in BUSY or status >= 500, wait, text if status in (400, 422) else "")


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """All of the body. The socket's own timeout starts anew with every byte, so the clock is looked at here too."""
    body = bytearray()
    while part := response.read1(2**16):
        body += part
        if len(body) > MOST_BYTES:
            raise Failure(f"an answer of more than {MOST_BYTES // 2**20} MiB", again=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _content(server: Server, body: str) -> Reply:
    match _parsed(body):
        case {"choices": [{"finish_reason": "length", "message": {"content": text}}, *_]}:
            return Reply(text if isinstance(text, str) else "", ended=False)
        case {"choices": [{"message": {"content": str(text)}, **more}, *_]}:
            match more.get("logprobs"):
                case {"content": [{"token": str(first), "top_logprobs": list(tops)}, *_]}:
                    found = ((top.get("token"), top.get("logprob")) for top in tops if isinstance(top, dict))
                    known = {k: float(v) for k, v in found if isinstance(k, str) and isinstance(v, (int, float))}
                    return Reply(text, first, known)
            return Reply(text)
        case None:
            raise Failure(f"not JSON: {server.shown(body) or 'nothing at all'}")
        case _:
            raise Failure(f"no choices[0].message.content in {server.shown(_complaint(body))}")


def _complaint(body: str) -> str:
    """What a server says of an error, in the forms that are in use; else all it sent."""
    match _parsed(body):
        case {"error": {"message": str(words)}} | {"error": str(words)} | {"message": str(words)} | {"detail": str(words)}:
            return words
        case _:
            return body


def _parsed(body: str) -> object:
    """None where it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _retry_after(header: str) -> float:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3), at most MOST_WAIT; 0 where it makes no sense."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), MOST_WAIT) if math.isfinite(seconds) else 0.0
