"""What a run does to folders: nothing before the recipe, the data and the parent are right; nothing is ever lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import AutoModelForCausalLM

from rlhf_cli.runs.folder import open_run
from rlhf_cli.stages import training
from rlhf_cli.training import loop
from tests.data.tiny_tokenizer import CHATML
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe, write_rows


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 2 steps whose finished run is in `parent` beside it."""
    folder = tmp_path_factory.mktemp("folders")
    parts = make_model(folder / "model"), write_rows(folder / "rows.jsonl", 8)
    write_pairs(folder / "pairs.jsonl", 8)
    recipe = write_recipe(folder / "sft.yaml", *parts, folder / "parent", lora={"r": 4}, train={"steps": 2})
    assert rlhf("sft", recipe) == 0
    return recipe


@pytest.fixture
def parent(path: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(path.parent / "parent", tmp_path / "parent")


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forbid_weights(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    patch.setattr(training, "load_trained", refuse)
    patch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    patch.setattr(safetensors.torch, "load_file", refuse)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_an_existing_run_is_kept(parent: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(parent)
    assert rlhf("sft", path, "--output", parent) == 2
    assert errors(capsys).splitlines()[-2:] == [
        f"error: {parent} holds a finished run",
        f"  --resume continues it, --force moves it to {parent}.old-<n>, --output writes elsewhere",
    ]
    assert contents(parent) == before and [p.name for p in parent.parent.iterdir()] == ["parent"]


def test_force_moves_and_loses_nothing(parent: Path, path: Path) -> None:
    (parent / "notes.txt").write_text("mine")
    before = contents(parent)
    assert rlhf("sft", path, "--output", parent, "--force", "--set", "train.steps=1") == 0
    old = parent.with_name("parent.old-1")
    assert contents(old) == before
    assert json.loads((parent / "manifest.json").read_text())["steps"] == 1
    assert sorted(p.name for p in parent.parent.iterdir()) == ["parent", "parent.old-1"]


@pytest.mark.parametrize("flags", [[], ["--force"], ["--check"]], ids=["plain", "force", "check"])
@pytest.mark.parametrize("key", ["data.train", "model.path"])
def test_a_wrong_path_touches_nothing(
    path: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, flags: list[str]
) -> None:
    missing, before = tmp_path / "missing", contents(parent)
    for output in (tmp_path / "run", parent) if flags else (tmp_path / "run",):
        assert rlhf("sft", path, "--output", output, "--set", f"{key}={missing}", *flags) == 2
        assert str(missing) in errors(capsys)
    assert contents(parent) == before and [p.name for p in tmp_path.iterdir()] == ["parent"]


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ipo", "kto"])
@pytest.mark.parametrize("start", ["model", "parent"])
def test_check_creates_nothing_and_loads_no_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, start: str
) -> None:
    forbid_weights(monkeypatch)
    rows = path.parent / ("rows.jsonl" if stage == "sft" else "pairs.jsonl")
    settings = ["--set", f"model.path={path.parent / start}", "--set", f"data.train={rows}"]
    assert rlhf(stage, path, "--output", tmp_path / "deep" / "run", *settings, "--check") == 0
    assert "the recipe and the data are fine; nothing was trained" in capsys.readouterr().out.splitlines()[-2:]
    assert list(tmp_path.iterdir()) == []


def unfinished(parent: Path) -> str:
    (parent / "manifest.json").unlink()
    return f"{parent} is an unfinished run (no manifest.json)\n  finish it: the same command with --resume\n"


def changed(parent: Path) -> str:
    file = parent / "model" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fault = f"{parent} is not as it was when it finished: model/adapter_model.safetensors has changed"
    return f"{fault}\n  put the original back, or run that stage again with --force\n"


def other_stage(parent: Path) -> str:
    edit_manifest(parent, stage="train-rm")
    return f"{parent} is a run of train-rm, expected dpo or ipo or kto or ppo or sft\n"


def other_template(parent: Path) -> str:
    edit_manifest(parent, chat_template_hash="0" * 64)
    return "name the one you want in model.chat_template\n"


def other_base(parent: Path) -> str:
    manifest = json.loads((parent / "manifest.json").read_text())
    edit_manifest(parent, base_model=manifest["base_model"] | {"weights_hash": "0" * 32})
    return f"is not the model that {parent} was trained on: its weights differ\n"


def edit_manifest(parent: Path, **changes: Any) -> None:
    file = parent / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("fault", [unfinished, changed, other_stage, other_template, other_base])
def test_a_parent_that_cannot_be_one(
    path: Path,
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Path], str],
) -> None:
    message = fault(parent)
    forbid_weights(monkeypatch)
    assert rlhf("sft", path, "--output", tmp_path / "run", "--set", f"model.path={parent}") == 2
    assert errors(capsys).endswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_another_template_by_name_is_allowed(path: Path, parent: Path, tmp_path: Path) -> None:
    other_template(parent)
    (tmp_path / "own.jinja").write_text(CHATML)
    settings = ["--set", f"model.path={parent}", "--set", f"model.chat_template={tmp_path / 'own.jinja'}", "--check"]
    assert rlhf("sft", path, "--output", tmp_path / "run", *settings) == 0


def pickled_adapter(path: Path, folder: Path) -> str:
    shutil.copytree(path.parent / "parent" / "model", folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return f"error: {folder}: no adapter_model.safetensors (pickled adapters are not loaded)"


def pickled_model(path: Path, folder: Path) -> str:
    shutil.copytree(path.parent / "model", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return f"error: {folder} has no *.safetensors: weights in other formats are not read"


@pytest.mark.parametrize("pickled", [pickled_adapter, pickled_model])
def test_pickles_are_not_loaded(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pickled: Callable[[Path, Path], str]
) -> None:
    start = tmp_path / "start"
    message = pickled(path, start)
    assert rlhf("sft", path, "--output", tmp_path / "run", "--set", f"model.path={start}") == 2
    assert errors(capsys).splitlines()[-1] == message
    assert [p.name for p in tmp_path.iterdir()] == ["start"]


def test_a_token_is_written_nowhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "notARealToken" * 2
    monkeypatch.setenv("HF_TOKEN", token)
    assert rlhf("sft", path, "--output", tmp_path / "run", "--set", "train.steps=1") == 0
    found = contents(tmp_path)
    assert Path("run/manifest.json") in found and Path("run/recipe.yaml") in found
    assert [name for name, content in found.items() if token.encode() in content] == []


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--force"]], ids=["plain", "resume", "force"])
def test_two_runs_on_one_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    forbid_weights(monkeypatch)
    run = tmp_path / "run"
    with open_run(run, resume=False, force=False) as held:
        held.samples.touch()
        before = contents(run)
        assert rlhf("sft", path, "--output", run, *flags) == 2
        first, second = errors(capsys).splitlines()[-2:]
        assert first.startswith(f"error: {run} is in use by process {os.getpid()} on ")
        assert second == "  wait for it, stop it, or choose another output"
        assert contents(run) == before and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("step", [3, 4])
def test_a_folder_that_is_renamed_while_a_run_writes_to_it(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the run would lie here and half there. Put back, it goes on as if nothing had been."""
    parts, run = (make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 15)), tmp_path / "run"
    recipe = write_recipe(tmp_path / "x.yaml", *parts, run, train={"steps": 4})
    assert rlhf("sft", recipe, "--output", tmp_path / "whole") == 0
    original = loop.optimise

    def renaming(*arguments: Any, **settings: Any) -> Any:
        if arguments[-1].step == step:
            run.rename(tmp_path / "elsewhere")
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimise", renaming)
        assert rlhf("sft", recipe) == 4
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"error: {run} was moved, renamed or removed while the run wrote to it",
        "  put it back, then continue with --resume",
    ]
    assert not (run / "manifest.json").exists() and not (run / "checkpoints").exists()
    shutil.rmtree(run, ignore_errors=True)
    (tmp_path / "elsewhere").rename(run)
    assert rlhf("sft", recipe, "--resume") == 0
    names = ("model/adapter_model.safetensors", "metrics.jsonl")
    assert (run / names[0]).read_bytes() == (tmp_path / "whole" / names[0]).read_bytes()
    assert read_lines(run / names[1]) == read_lines(tmp_path / "whole" / names[1])
