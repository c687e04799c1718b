"""Signals and deaths of processes: one alone, two gloo ranks, and two that torchrun has launched."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import launch
from tests.tiny import children, gone, make_model, read_lines, rlhf, spawn, write_recipe, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 24)
    return write_recipe(tmp_path / "x.yaml", model, rows, tmp_path / "run", train={"steps": 4000, "save_every": None})


def wait_for_steps(run: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 5:
            return
        time.sleep(0.05)
    pytest.fail("the run did not come to its fifth step within two minutes")


def catches(process: int, number: signal.Signals) -> bool:
    """Has it a handler for this signal, as it has from before it imports libraries?"""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[0], 16) >> (number - 1) & 1)


def torchrun(*words: str) -> int:
    """The launcher in a warm process; it starts its two ranks as ever."""
    from torch.distributed.run import main

    main(["--standalone", "--nproc_per_node", "2", "-m", "rlhf_cli", *words])
    return 0


def test_one_process(recipe: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = tmp_path / signal.Signals(number).name
        process = launch("sft", recipe, "--output", run)
        wait_for_steps(run)
        process.send_signal(number)
        found = process.wait(60)
        done = len([line for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"])
        assert found == (code, f"stopped after step {done} of 4000; continue with --resume\n")
        assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]


def test_while_loading(recipe: Path, tmp_path: Path) -> None:
    process = spawn("sft", recipe)
    deadline = time.monotonic() + 30
    while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "stopped by SIGTERM before the first step; nothing was trained\n")
    assert not (tmp_path / "run").exists()


def test_signal_to_the_launcher(recipe: Path, tmp_path: Path) -> None:
    launcher = launch("sft", recipe, function=torchrun)
    wait_for_steps(tmp_path / "run")
    pids = children(launcher.pids[0])
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.wait(30)
    assert gone(pids, 5)
    done = max(line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert errors.splitlines().count(f"stopped after step {done} of 4000; continue with --resume") == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert rlhf("sft", recipe, "--resume", "--set", f"train.steps={done + 1}") == 2, "steps may only grow"


def test_launcher_killed(recipe: Path, tmp_path: Path) -> None:
    launcher = launch("sft", recipe, function=torchrun)
    wait_for_steps(tmp_path / "run")
    pids = children(launcher.pids[0])
    launcher.send_signal(signal.SIGKILL)
    assert gone(pids, 5)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("delay", [0.0, 0.5, 3.0])
def test_launcher_killed_before_the_ranks_have_met(delay: float, recipe: Path) -> None:
    """Before they can ask to be told, while they import libraries, and while they wait for each other inside one."""
    launcher = launch("sft", recipe, function=torchrun)
    deadline = time.monotonic() + 30
    while len(children(launcher.pids[0])) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    pids = children(launcher.pids[0])
    launcher.send_signal(signal.SIGKILL)
    assert len(pids) >= 2
    assert gone(pids, 10)


def test_a_rank_dies(recipe: Path, tmp_path: Path) -> None:
    """The other one finds it out by itself, also without a launcher that would end it."""
    two = launch("sft", recipe, ranks=2)
    wait_for_steps(tmp_path / "run")
    os.kill(two.pids[1], signal.SIGKILL)
    assert gone(two.pids, 30)
    code, errors = two.wait()
    assert code in (4, -signal.SIGKILL)
    assert sum("error: another rank ended or cannot be reached" in line for line in errors.splitlines()) == 1
