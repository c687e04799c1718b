"""The command line: exit codes, what is said and where, and that nothing heavy is loaded to say it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_cli import __version__, cli
from rlhf_cli.errors import MachineError, NumberError, RunError, Stopped, UsageError
from tests.tiny import make_model, write_rows

GOOD = "model: {path: m}\noutput: o\ndata: {train: x.jsonl}\n"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    return str(path)


def fake_stage(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    module = ModuleType("rlhf_cli.stages.sft")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_cli.stages.sft", module)


def rlhf(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *arguments], env=env, capture_output=True, text=True, timeout=30, **kwargs
    )


BAD_COMMAND_LINES = {
    ("stf", "x.yaml"): "rlhf stf: no such command. did you mean sft?",
    ("exprot",): "rlhf exprot: no such command. did you mean export?",
    ("banana",): f"rlhf banana: no such command. commands: {', '.join(str(own.name) for own in cli.app.registered_commands)}",
    ("sft",): "Missing argument 'RECIPE.yaml'. see rlhf --help",
    ("export", "run"): "Missing argument 'DEST'. see rlhf --help",
    (
        "sft",
        "x.yaml",
        "y.yaml",
    ): "y.yaml: after the recipe stand values, KEY=VALUE. a command reads one recipe, whose key base may name another",
    ("sft", "x.yaml", "--set"): "Option '--set' requires an argument. see rlhf --help",
    ("sft", "x.yaml", "--resume", "--force"): "--resume continues a run and --force starts a new one. give one of the two",
    ("sft", "no-such-folder/x.yaml"): "no-such-folder/x.yaml: no such file. there is no folder no-such-folder either",
}


@pytest.mark.parametrize("arguments", BAD_COMMAND_LINES)
def test_bad_command_lines(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {BAD_COMMAND_LINES[arguments]}\n")


def test_a_mistyped_option_is_suggested(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", recipe, "--chek"]) == 2
    assert "--check" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {__version__}\n"
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert (
        capsys.readouterr().out.count("Commands:\n  sft       Supervised fine-tuning on given responses, or distillation.\n") == 2
    )
    assert cli.main(["dpo", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "    kind: hinge                 with sft_weight: 0, beta: 0.1" in lines
    assert cli.main(["sft", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "    batch_size: 32              prompts (with all their responses) per" in lines
    assert "    path: *                     hub id, transformers folder, or the folder of" in lines
    assert "    betas: [0.9, 0.999]         AdamW's" in lines


def test_the_stage_receives_the_recipe_and_the_flags(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake_stage(monkeypatch, lambda loaded, **flags: calls.append((loaded, flags)))
    assert cli.main(["sft", recipe, "--set", "seed=3", "--output", "p", "--check", "--set", "train.steps=2", "--resume"]) == 0
    (loaded, flags), *more = calls
    assert more == []
    assert (loaded.stage, loaded.recipe.seed, loaded.recipe.train.steps, loaded.recipe.output) == ("sft", 3, 2, "p")
    assert flags == {"check": True, "resume": True, "force": False}


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UsageError("x.jsonl:3: empty. fill it"), 2, "error: x.jsonl:3: empty. fill it\n"),
        (NumberError("loss is nan\n  at step 3"), 3, "error: loss is nan\n  at step 3\n"),
        (MachineError("no disk space"), 4, "error: no disk space\n"),
        (RunError("other"), 1, "error: other\n"),
        (Stopped("stopped at step 3", signal.SIGINT), 130, "stopped at step 3\n"),
        (Stopped("stopped at step 3", signal.SIGTERM), 143, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, shown: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    fake_stage(monkeypatch, run)
    monkeypatch.setattr(cli, "silence", lambda stream: None)
    assert cli.main(["sft", recipe]) == code
    assert capsys.readouterr() == ("", shown)


def test_an_unforeseen_error_says_where_and_how_to_see_more(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise KeyError("lost")

    fake_stage(monkeypatch, run)
    assert cli.main(["sft", recipe]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: KeyError: 'lost'"
    line = run.__code__.co_firstlineno + 1
    assert second.startswith(f"error: at {__file__}:{line}, from {cli.__file__}:")
    assert second.endswith(". --debug shows the full traceback")
    assert cli.main(["sft", recipe, "--debug"]) == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):\n")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["sft", recipe]) == 1
    assert capsys.readouterr().err.startswith("error: rank 1: KeyError: 'lost'\n")


def test_other_ranks_are_silent(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["sft", recipe, "--set", "sed=1"]) == 2
    assert capsys.readouterr() == ("", "")


def test_colour_only_on_a_terminal_that_wants_it(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for term, no_color, begin in (("xterm", "", "\x1b[31merror:\x1b[0m "), ("dumb", "", "error: "), ("xterm", "1", "error: ")):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert cli.main(["sft", recipe, "--set", "sed=1"]) == 2
        assert capsys.readouterr().err.startswith(f"{begin}--set sed: unknown key")


LOADED = """
import contextlib, io, sys
from rlhf_cli.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(line.split()) for line in sys.argv[1].split(",")]
print(codes, [name for name in sys.argv[2].split() if name in sys.modules])
"""


def loaded_by(lines: str, names: str, folder: Path) -> str:
    """The exit codes of command lines in one process, and which of the modules it has loaded then."""
    command = [sys.executable, "-c", LOADED, lines, names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_help_loads_little_and_neither_it_nor_a_recipe_error_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("sed: 1\n")
    heavy = "torch transformers numpy datasets accelerate peft pyarrow rich matplotlib pandas"
    assert loaded_by("--version,--help", f"{heavy} yaml urllib.request pydantic", tmp_path) == "[0, 0] []\n"
    assert loaded_by("sft --help,dpo --help,export --help", f"{heavy} yaml urllib.request", tmp_path) == "[0, 0, 0] []\n"
    assert loaded_by("sft bad.yaml,sft none.yaml", heavy, tmp_path) == "[2, 2] []\n"


@pytest.mark.slow
def test_a_check_of_local_files_loads_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    write_rows(tmp_path / "x.jsonl", 20)
    (tmp_path / "r.yaml").write_text(GOOD)
    unused = "datasets matplotlib pandas sklearn scipy pyarrow rich tensorboard wandb vllm"
    assert loaded_by("sft r.yaml --check", unused, tmp_path) == "[0] []\n"


def test_as_a_module_in_narrow_ascii_surroundings(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("output: ö\nzzzzzzzzz: 1\n")
    narrow = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "40", "FORCE_COLOR": "1"}
    done = rlhf("sft", "bad.yaml", env=narrow, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: bad.yaml:2: zzzzzzzzz: unknown key. keys here: model, lora, data, train, objective, rollout, seed, output, env, "
        "trackers"
    )
    assert done.stderr.isascii()
    assert "\x1b" not in done.stderr
    shown = rlhf("sft", "--help", env=narrow)
    assert (shown.returncode, shown.stderr, "\x1b" in shown.stdout) == (0, "", False)


@pytest.mark.parametrize("closing", ["| head -1", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(closing: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("sed: 1\n")
    for arguments in ("sft --help", "sft bad.yaml"):
        script = f"{sys.executable} -m rlhf_cli {arguments} {closing}"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
        assert "Traceback" not in done.stdout + done.stderr
        assert "Exception" not in done.stdout + done.stderr
