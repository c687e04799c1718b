"""People judge on a page of 127.0.0.1: who may speak to it, and what it answers."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_cli.data.records import prompt_lines, spoken
from rlhf_cli.errors import MachineError, RunError
from rlhf_cli.labels.verdicts import Judging

LARGEST = 64 * 1024  # bytes of a request
HERE = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Site(ThreadingHTTPServer):
    """The page of every annotator under a secret path of their own."""

    daemon_threads = True
    page = Path(__file__).with_name("page.html")

    def __init__(self, judging: Judging, port: int) -> None:
        self.judging = judging
        self.tokens = {name: secrets.token_urlsafe(24) for name in judging.queues}
        self.ended = threading.Event()  # everybody has finished, or a verdict could not be written
        self.finished = set[str]()
        self.fault: RunError | None = None
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise MachineError(f"--port {port}: {error.strerror}\n  choose another port") from error

    @property
    def links(self) -> dict[str, str]:
        return {name: f"http://127.0.0.1:{self.server_port}/{token}" for name, token in self.tokens.items()}

    def annotator(self, token: str) -> str | None:
        """Whose token it is; all are compared, in constant time."""
        given = token.encode("utf-8", "replace")
        found = [name for name, own in self.tokens.items() if hmac.compare_digest(own.encode(), given)]
        return found[0] if found else None

    def state(self, name: str) -> dict[str, Any]:
        """What a page shows. Nothing of it tells who wrote a response, or that a question's answer is known."""
        shown, total, question = self.judging.ask(name), len(self.judging.queues[name]), None
        if shown is not None:
            prompt = shown.row.prompt
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            texts = [(turn["role"], prompt_lines([turn]).removeprefix(f"{turn['role']}: ")) for turn in turns]
            responses = [spoken(shown.row.responses[at]) for at in shown.order]
            question = {"id": shown.id, "prompt": [{"role": r, "text": text} for r, text in texts], "responses": responses}
        done = total - len(self.judging.left(name))
        return {"annotator": name, "done": done, "total": total, "finished": name in self.finished, "question": question}

    def obey(self, name: str, action: str, given: Mapping[str, Any]) -> HTTPStatus:
        """Do what a page asks. ValueError: it asks for nothing that can be done. RunError: it could not be written down."""
        if action == "verdict":
            reason = given.get("reason") or ""
            if not isinstance(reason, str):
                raise ValueError("a reason is text")
            taken = self.judging.judge(name, str(given.get("question")), given.get("verdict"), reason.strip())
            return HTTPStatus.OK if taken else HTTPStatus.CONFLICT
        if action == "undo":
            self.finished.discard(name)
            return HTTPStatus.OK if self.judging.undo(name) else HTTPStatus.CONFLICT
        if action != "finish" or self.judging.left(name):
            raise ValueError("no such action now")
        self.finished.add(name)
        return HTTPStatus.OK


class _Handler(BaseHTTPRequestHandler):
    """One connection. What is not asked for by our own page, from this machine, is refused before anything is read."""

    server: Site
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rlhf", ""
    timeout = 60

    def do_GET(self) -> None:
        name, action = self._who()
        if name is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        elif action == "":
            nonce = secrets.token_urlsafe(16)
            text = self.server.page.read_text(encoding="utf-8").replace("NONCE", nonce)
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", text, POLICY.format(nonce=nonce))
        elif action == "state":
            self._json(HTTPStatus.OK, self.server.state(name))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        name, action = self._who()
        length = self.headers.get("Content-Length", "")
        if name is None or self.headers.get("Content-Type") != "application/json":
            return self._refuse(HTTPStatus.NOT_FOUND)
        if not length.isdecimal() or int(length) > LARGEST:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            given = json.loads(self.rfile.read(int(length)))
            if not isinstance(given, dict):
                raise ValueError("not an object")
            status = self.server.obey(name, action, given)
        except (ValueError, RecursionError):
            return self._refuse(HTTPStatus.BAD_REQUEST)
        except RunError as error:
            self.server.fault = error
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
            return self.server.ended.set()
        self._json(status, self.server.state(name))
        if self.server.finished >= self.server.tokens.keys():
            self.server.ended.set()  # after the answer, which the end of the process would cut off
        return None

    def _who(self) -> tuple[str | None, str]:
        """(whose page asks for what); nobody's where a site that only points to this machine, or another page, asks."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            named = urlsplit(f"//{host}").hostname
        except ValueError:
            named = None
        ours = named in HERE and origin in (None, f"http://{host}")
        # A link from elsewhere, as from a mail, that somebody has followed to the page itself is fine.
        link = self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate"
        ours &= link or self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        token, _, action = urlsplit(self.path).path.removeprefix("/").partition("/")
        return (self.server.annotator(token) if ours else None), action

    def _json(self, status: HTTPStatus, body: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(body))

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send(status, "text/plain; charset=utf-8", f"{status.phrase}\n")

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = "default-src 'none'; frame-ancestors 'none'") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        own = {"Content-Security-Policy": policy, "Content-Type": kind, "Content-Length": str(len(body))}
        for header, value in (HEADERS | own).items():
            self.send_header(header, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a path has a secret in it."""


@contextmanager
def serving(judging: Judging, port: int) -> Iterator[Site]:
    """The site, answering. MachineError: the port is not free."""
    with Site(judging, port) as site:
        threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield site
        finally:
            site.shutdown()
