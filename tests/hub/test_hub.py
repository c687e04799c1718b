"""Whether a hub answers, and what is seen while something is fetched."""

from __future__ import annotations

import os
import signal
import socket
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from rlhf_cli import hub as ours
from rlhf_cli.console import leave
from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.hub import Found, fetching, find, why_silent
from tests.hub.conftest import start_again
from tests.hub.server import Hub


def silence_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    why_silent.cache_clear()
    return why_silent()


def test_the_hub_is_probed_at_its_endpoint_or_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert silence_at(hub.endpoint, monkeypatch) == "" and not constants.HF_HUB_OFFLINE
    assert silence_at("https://hub.invalid/", monkeypatch) == "https://hub.invalid cannot be reached"
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("https_proxy", hub.endpoint)
    assert silence_at("https://hub.invalid", monkeypatch) == ""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    assert silence_at(closed, monkeypatch) == f"{closed} cannot be reached"


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_work_asks_nothing(switch: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "yes")
    assert find("org/tiny", "model", None) == Found(None, {}, f"{switch} is set")
    assert hub.requests == []
    with pytest.raises(UsageError, match=r"^there is no model /no/such/folder, neither here nor on the hub\."):
        find("/no/such/folder", "model", None)


def test_of_answers_that_are_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question each: a hub that is overrun or down, a page of something else, and one that takes too long."""
    hub.add("model", "org/tiny", {})
    for status, said in ((429, "answers 429"), (502, "answers 502"), (200, "does not answer (JSONDecodeError)")):
        hub.fault = {"GET /api/models/org/tiny": status}.get
        assert find("org/tiny", "model", None) == Found(None, {}, f"{hub.endpoint} {said}")
    assert hub.requests == ["GET /api/models/org/tiny"] * 3
    monkeypatch.setattr(ours, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        start_again()
        assert find("org/tiny", "model", None).silence == f"{endpoint} does not answer (ReadTimeout)"


@pytest.mark.parametrize(("terminal", "rank", "bars", "said"), [(True, 0, True, 1), (True, 1, False, 0), (False, 0, False, 1)])
def test_what_is_seen_of_a_download(
    terminal: bool,
    rank: int,
    bars: bool,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, and on a terminal the library's bars; a signal ends the process although threads are fetching."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", str(rank))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(MachineError, match=r"^org/big could not be fetched: No space left\n"), fetching("org/big", 2_147_000_000):
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is leave
        assert are_progress_bars_disabled() is not bars
        raise OSError("No space left")
    assert are_progress_bars_disabled() and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "fetching org/big (2,147.0 MB)\n" * said
    with fetching("org/small", 0):
        assert are_progress_bars_disabled()
    assert capsys.readouterr().out == ""
