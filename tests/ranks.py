"""Processes that are forked from one which has imported everything: ranks with a launcher's environment, without its start.

A launch costs a tenth of what torchrun's does.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WARM = ("tests.warm",)


class Launched:
    """Processes of one command; as under torchrun, one that fails ends the others."""

    def __init__(self, processes: list[ForkServerProcess], outputs: list[Path]) -> None:
        self.processes = processes
        self.outputs = outputs

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid or 0, number)

    def wait(self, timeout: float = 120) -> tuple[int, str]:
        """(exit code of the first that failed, or 0; what all wrote to stderr)."""
        deadline = time.monotonic() + timeout
        code = 0
        while self.running and time.monotonic() < deadline:
            if not code and (failed := [process.exitcode for process in self.processes if process.exitcode]):
                code = failed[0]
                deadline = min(deadline, time.monotonic() + 30)  # for an end in order, as torchrun does
            time.sleep(0.02)
        late = self.running
        for process in self.processes:
            process.kill()
            process.join()
        assert code or not late, f"still running after {timeout} s: {self.errors}"
        return code or next((process.exitcode for process in self.processes if process.exitcode), 0), self.errors

    @property
    def errors(self) -> str:
        return "".join(output.with_suffix(".err").read_text() for output in self.outputs)

    @property
    def said(self) -> str:
        """What rank 0 wrote to stdout."""
        return self.outputs[0].with_suffix(".out").read_text()


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` tells processes whose models are to lie in shards."""


def launch(
    *words: str | Path, ranks: int = 1, function: Callable[..., int] | None = None, settings: Mapping[str, str] | None = None
) -> Launched:
    """`rlhf` with these words, or a function of a module with them, in so many processes; more than one meet over gloo.

    `settings`: of their environment.
    """
    folder = Path(mkdtemp(dir=_outputs().name))
    known, place = os.environ | {"ACCELERATE_USE_CPU": "1"} | (settings or {}), Path.cwd()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    context = _context()
    processes, outputs = [], []
    for rank in range(ranks):
        own = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        outputs.append(folder / str(rank))
        arguments = (known | own, place, outputs[-1], function or _command, [str(word) for word in words])
        processes.append(context.Process(target=_live, args=arguments))
        processes[-1].start()
    return Launched(processes, outputs)


def two_ranks(*words: str | Path) -> None:
    """A command on two ranks, to its good end."""
    code, errors = launch(*words, ranks=2).wait()
    assert code == 0, errors


def in_shards(*words: str | Path, ranks: int = 2) -> None:
    """A command on ranks that share every model, to its good end."""
    launched = launch(*words, ranks=ranks, settings=SHARDED)
    code, errors = launched.wait()
    assert code == 0, errors
    assert f"{ranks} × cpu, weights in shards" in launched.said


def wait_for(path: Path, launched: Launched, timeout: float = 120) -> None:
    """Until there is such a file or folder, while the processes run."""
    deadline = time.monotonic() + timeout
    while not path.exists() and launched.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists() and launched.running, launched.errors


@cache
def _outputs() -> TemporaryDirectory[str]:
    """Where processes write what they say; removed with this one."""
    return TemporaryDirectory(prefix="rlhf-ranks-")


def _context() -> Any:
    """Started once: it imports while the caller goes on, and outlives every test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)
        forkserver.ensure_running()
    return context


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _live(environment: dict[str, str], place: Path, output: Path, function: Callable[..., int], words: list[str]) -> None:
    assert set(WARM) <= sys.modules.keys(), "what is forked from has not imported what it should"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(ending), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    sys.exit(function(*words))


def _command(*words: str) -> int:
    from rlhf_cli.cli import main

    return main(words)
