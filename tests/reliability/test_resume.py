"""A run that was stopped anywhere and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.training import loop
from rlhf_cli.training.signals import StopSignals
from tests.tiny import make_model, read_lines, rlhf, spawn, write_recipe, write_rows

LORA = {"r": 4, "dropout": 0.2}
SECTIONS: dict[str, Any] = {"data": {"holdout": 0.2}, "train": {"steps": 6, "tokens_per_device": 80, "eval_every": 2}}


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return make_model(folder / "model"), write_rows(folder / "rows.jsonl", 15)


def recipe(parts: tuple[Path, Path], folder: Path, lora: dict[str, Any] | None) -> Path:
    """12 training rows in batches of 4: six steps are two epochs, each of several forward passes."""
    return write_recipe(folder / "sft.yaml", *parts, folder / "whole", lora=lora, **SECTIONS)


def same_bytes(a: Path, b: Path) -> None:
    last = sorted((a / "checkpoints").iterdir())[-1].name
    for folder in (Path("model"), Path("checkpoints") / last):
        names = {p.relative_to(a) for p in (a / folder).rglob("*.safetensors")}
        assert names and names == {p.relative_to(b) for p in (b / folder).rglob("*.safetensors")}
        for name in names:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert read_lines(a / "metrics.jsonl") == read_lines(b / "metrics.jsonl")
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """The process dies, as far as the run folder can tell, before the `call`-th call of `loop.name`."""
    original, calls = getattr(loop, name), [0]

    def dying(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(loop, name, dying)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_from_every_step(parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    path = recipe(parts, tmp_path, lora)
    assert rlhf("sft", path) == 0
    for name, calls in {"optimise": 6, "evaluate": 4, "save_checkpoint": 6}.items():
        for call in range(1, calls + 1):
            again = tmp_path / f"{name}-{call}"
            with monkeypatch.context() as patch:
                interrupt(patch, name, call)
                assert rlhf("sft", path, "--output", again) == 130
            assert not (again / "manifest.json").exists()
            assert rlhf("sft", path, "--output", again, "--resume") == 0
            same_bytes(tmp_path / "whole", again)


def test_from_one_step_several_passes_and_dropout(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(parts, tmp_path, LORA)
    assert rlhf("sft", path) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 3)  # between update 4 and its held-out figures
        assert rlhf("sft", path, "--output", tmp_path / "again") == 130
    assert rlhf("sft", path, "--output", tmp_path / "again", "--resume") == 0
    same_bytes(tmp_path / "whole", tmp_path / "again")


def test_a_signal_between_two_passes_saves_and_resumes(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(parts, tmp_path, None)
    assert rlhf("sft", path) == 0
    original = loop.optimise

    def signalled(*arguments: Any, **settings: Any) -> Any:
        if settings["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **settings)

    again = tmp_path / "again"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimise", signalled)
        assert rlhf("sft", path, "--output", again, "--set", "train.save_every=null") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped after step 3 of 6; continue with --resume"
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["step-00000003"]
    assert rlhf("sft", path, "--output", again, "--resume") == 0
    same_bytes(tmp_path / "whole", again)


def test_another_budget_is_allowed_and_used(parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(parts, tmp_path, {"r": 4})
    seen: list[int] = []
    original = loop.optimise

    def noting(*arguments: Any, **settings: Any) -> Any:
        seen.append(settings["budget"])
        if settings["step"] == 3 and len(seen) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(loop, "optimise", noting)
    assert rlhf("sft", path) == 130
    assert rlhf("sft", path, "--resume", "--set", "train.tokens_per_device=400") == 0
    assert seen == [80, 80, 80, 400, 400, 400, 400]


def test_a_finished_run_says_so_and_changes_are_refused(
    parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = recipe(parts, tmp_path, {"r": 4}), tmp_path / "whole"
    assert rlhf("sft", path) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert rlhf("sft", path, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run} is finished: {run / 'manifest.json'}"
    assert rlhf("sft", path, "--resume", "--set", "train.learning_rate=0.002", "--set", "seed=7") == 2
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "  key                  old    new",
        "  train.learning_rate  0.001  0.002",
        "  seed                 0      7",
    ]
    parts[1].write_text(parts[1].read_text() + '{"prompt": "one", "completion": "two"}\n')
    try:
        assert rlhf("sft", path, "--resume") == 2
    finally:
        write_rows(parts[1], 15)
    assert "what the run was started with has changed" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_longer_steps(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str) -> None:
    path = recipe(parts, tmp_path, {"r": 4})
    settings = ["--set", f"train.schedule={schedule}", "--set", "train.warmup=2", "--set", "train.eval_every=null"]
    assert rlhf("sft", path, *settings, "--set", "train.steps=4") == 0
    capsys.readouterr()
    assert rlhf("sft", path, *settings, "--set", "train.steps=6", "--resume") == 0
    warned = "steps 1 to 4 followed the learning rates of a run of 4 steps" in capsys.readouterr().err
    assert warned == (schedule == "cosine")
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.3, 0.7])
def test_killed_process(parts: tuple[Path, Path], tmp_path: Path, delay: float) -> None:
    path = recipe(parts, tmp_path, LORA)
    settings = ["--set", "train.steps=40"]
    assert rlhf("sft", path, *settings) == 0
    again = tmp_path / "again"
    process = spawn("sft", path, *settings, "--output", again)
    deadline = time.monotonic() + 60
    while not (again / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=30)
    assert rlhf("sft", path, *settings, "--output", again, "--resume") == 0
    assert list((again / "checkpoints").glob(".*")) == []
    same_bytes(tmp_path / "whole", again)


def test_received_is_kept_when_a_library_swallows_the_exception() -> None:
    signals = StopSignals()
    signals.install()
    try:
        signal.raise_signal(signal.SIGTERM)
    except Exception as error:
        assert str(error) == "stopped by SIGTERM before the first step; nothing was trained"
    assert signals.received == signal.SIGTERM
