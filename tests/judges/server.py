"""A server that speaks as a model behind an endpoint does, and what it was asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = tuple[int, dict[str, str], bytes]
Behaviour = Callable[["Model", str], Reply]


def said(text: object, **choice: object) -> Reply:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, **choice}]}
    return 200, {}, json.dumps(body).encode()


def error(status: int, message: str, **headers: str) -> Reply:
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"error": {"message": message}}).encode(),
    )


def responses(message: str) -> tuple[str, str]:
    """The two responses in the built-in prompt."""
    a = re.search(r"<response_a>\n(.*)\n</response_a>", message, re.DOTALL)
    b = re.search(r"<response_b>\n(.*)\n</response_b>", message, re.DOTALL)
    assert a and b
    return a[1], b[1]


def longer(model: Model, message: str) -> Reply:
    """A fair judge: the longer response is better, wherever it stands."""
    a, b = responses(message)
    return said("I looked at A and B.\n" + ("TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"))


def always(text: object) -> Behaviour:
    return lambda model, message: said(text)


class Model(ThreadingHTTPServer):
    """A server that answers as `behave` says, and what it was asked."""

    daemon_threads = True

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self.open = threading.Event()  # set: requests that hang go on
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = body["messages"][-1]["content"] if "messages" in body else json.dumps([self.path, body])
        with self.server.lock:
            self.server.asked.append(message)
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.times.append(time.monotonic())
            self.server.paths.append(self.path)
        status, headers, content = self.server.behave(self.server, message)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            return  # who asked is gone

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Model]]:
    running: list[Model] = []

    def start(behave: Behaviour) -> Model:
        running.append(Model(behave))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return running[-1]

    yield start
    for model in running:
        model.open.set()
        model.shutdown()
        model.server_close()


Serve = Callable[[Behaviour], Model]
