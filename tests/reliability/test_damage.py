"""Damaged checkpoints, a full disk, and what is kept."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli.training import checkpoint
from tests.deaths import die_before
from tests.tiny import make_model, read_lines, rlhf, write_recipe, write_rows


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose uninterrupted run is in `whole` beside it."""
    folder = tmp_path_factory.mktemp("damage")
    parts = make_model(folder / "model"), write_rows(folder / "rows.jsonl", 15)
    recipe = write_recipe(folder / "sft.yaml", *parts, folder / "whole", lora={"r": 4}, train={"steps": 4})
    assert rlhf("sft", recipe) == 0
    return recipe


def flip(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model" / "adapter_model.safetensors", 1000)


def remove(folder: Path) -> None:
    (folder / "state.json").unlink()


def add(folder: Path) -> None:
    (folder / "model" / "adapter_model.bin").write_bytes(b"x")


def weights(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", [flip, truncate, remove, add])
def test_the_previous_checkpoint_is_used(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_before(patch, "optimise", 4)
        assert rlhf("sft", path, "--output", run, "--set", "train.keep_checkpoints=3") == 130
    damage(run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / ".step-00000004.tmp").mkdir()
    capsys.readouterr()
    # Were the damaged one counted among the kept, keeping one would remove the checkpoint just written.
    assert rlhf("sft", path, "--output", run, "--resume", "--set", "train.keep_checkpoints=1") == 0
    found = capsys.readouterr()
    damaged = run / "checkpoints" / "step-00000003"
    message = f"warning: {damaged} is damaged; it is set aside as damaged-step-00000003 and the one before it is used"
    assert message in found.err.splitlines()
    assert f"resuming after step 2 from {run / 'checkpoints' / 'step-00000002'}" in found.out.splitlines()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["damaged-step-00000003", "step-00000004"]
    assert weights(run) == weights(path.parent / "whole")
    assert read_lines(run / "metrics.jsonl") == read_lines(path.parent / "whole" / "metrics.jsonl")


def test_all_damaged_is_no_silent_restart(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_before(patch, "optimise", 3)
        assert rlhf("sft", path, "--output", run) == 130
    for folder in (run / "checkpoints").iterdir():
        flip(folder)
    before = (run / "metrics.jsonl").read_bytes()
    assert rlhf("sft", path, "--output", run, "--resume") == 4
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"error: {run / 'checkpoints'}: every checkpoint is damaged (step-00000002, step-00000001)",
        "error: restore one from a backup, or start anew with --force",
    ]
    assert (run / "metrics.jsonl").read_bytes() == before and not (run / "model").exists()


class RustError(Exception):
    """How safetensors reports what the system refused."""


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (checkpoint, "os", OSError(errno.ENOSPC, "No space left on device")),
        ("safetensors.torch", "save_file", RustError("I/O error: No space left on device (os error 28)")),
    ],
    ids=["fsync", "safetensors"],
)
def test_full_disk(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    name: str,
    error: Exception,
) -> None:
    import safetensors.torch

    module = safetensors.torch if module == "safetensors.torch" else module
    run, original = tmp_path / "run", os.fsync if module is checkpoint else getattr(module, name)

    def full(*arguments: Any, **settings: Any) -> Any:
        if (run / "checkpoints" / "step-00000002").exists():
            raise error
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, SimpleNamespace(fsync=full) if module is checkpoint else full)
        assert rlhf("sft", path, "--output", run) == 4
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"error: cannot write {run / 'checkpoints' / 'step-00000003'}: the disk is full",
        "  free some space, then continue with --resume",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert all(checkpoint.is_intact(p) for p in (run / "checkpoints").iterdir())
    assert rlhf("sft", path, "--output", run, "--resume") == 0
    assert weights(run) == weights(path.parent / "whole")
    assert read_lines(run / "metrics.jsonl") == read_lines(path.parent / "whole" / "metrics.jsonl")


def test_stop_if_survives_a_kill_before_the_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    settings = ["--output", run, "--set", "train.stop_if={loss: {above: 1}}"]
    from rlhf_cli.stages import training

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_report", killed)
        assert rlhf("sft", path, *settings) == 130
    assert rlhf("sft", path, *settings, "--resume") == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert (
        manifest["steps"] == 1
        and manifest["status"].startswith("stopped: loss 5.")
        and manifest["status"].endswith(" is above 1")
    )


def test_keep_best_keeps_the_best_by_held_out_rows(path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [
        "train.keep_best={metric: loss, mode: max}",
        "train.keep_checkpoints=1",
        "data.holdout=0.2",
        "train.eval_every=1",
    ]
    assert rlhf("sft", path, "--output", run, *(word for o in overrides for word in ("--set", o))) == 0
    figures = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "eval"}
    best = max(figures, key=lambda step: figures[step])
    expected = {f"step-{step:08d}" for step in {best, 4}}
    assert {p.name for p in (run / "checkpoints").iterdir()} == expected


@pytest.mark.parametrize("place", ["build_manifest", "write_report"])
def test_a_signal_between_the_last_step_and_the_manifest_is_obeyed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """While the manifest or the report is made; what goes on then has the bytes of a run that nobody stopped."""
    from rlhf_cli.stages import training

    run, original = tmp_path / "run", getattr(training, place)

    def signalled(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, place, signalled)
        assert rlhf("sft", path, "--output", run, "--set", "train.save_every=null") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM after the last step; continue with --resume"
    assert not (run / "manifest.json").exists()
    assert rlhf("sft", path, "--output", run, "--resume") == 0
    assert weights(run) == weights(path.parent / "whole")


def test_a_batch_larger_than_the_data_is_said(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size, said in ((16, True), (15, False)):
        assert rlhf("sft", path, "--output", tmp_path / "run", "--set", f"train.batch_size={size}", "--check") == 0
        warning = "train.batch_size 16 is more than the 15 rows there are: every step sees all of them"
        assert (warning in capsys.readouterr().err) == said
