"""A run that was stopped anywhere and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.signals import StopSignals
from rlhf_cli.training import loop
from tests.deaths import die_and_resume, die_before, die_everywhere, signal_before
from tests.ranks import launch, two_ranks, wait_for
from tests.tiny import make_model, own_signals, read_lines, rlhf, write_pairs, write_recipe, write_rows

LORA = {"r": 4, "dropout": 0.2}
TRAIN: dict[str, Any] = {"steps": 4, "tokens_per_device": 80, "eval_every": 2}
SECTIONS: dict[str, Any] = {"data": {"holdout": 0.2}, "train": TRAIN}

FUNCTION = """from math import sin

def wave(prompts, responses):
    return [sin(len(p) + len(r)) for p, r in zip(prompts, responses)]

def even(prompts, responses):
    return [len(r) % 2 for r in responses]
"""
"""A reward that tells responses apart, and one that often does not."""

DRAWN: dict[str, Any] = {
    "data": {"holdout": 0.2, "max_length": 60},
    "reward": [{"function": "${REWARDS}/wave.py:wave"}],
}

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "train-rm": ("train-rm", {}),
    "train-rm members": ("train-rm", {"objective": {"members": 2}}),
    "dpo": ("dpo", {"objective": {"kind": "bco"}}),
    "tdpo2": ("dpo", {"objective": {"kind": "tdpo2"}}),
    "aot": ("dpo", {"objective": {"kind": "aot"}}),
    "ipo": ("ipo", {"objective": {"normalize": "token_mean"}}),
    # A pair is two judged responses.
    "kto": ("kto", {"train": TRAIN | {"batch_size": 8}}),
    "kto bco": ("kto", {"objective": {"kind": "bco"}, "train": TRAIN | {"batch_size": 8}}),
    # Four updates a step, an adapted KL coefficient and a baseline that runs on.
    "ppo": (
        "ppo",
        DRAWN
        | {
            "objective": {"kind": "ppo", "epochs": 2, "minibatches": 2},
            "rollout": {"max_new_tokens": 6},
            "kl": {"target": 0.5, "horizon": 20},
            "train": TRAIN | {"steps": 3, "batch_size": 5, "eval_every": 3},
        },
    ),
    "reinforce": (
        "ppo",
        DRAWN
        | {
            "objective": {"kind": "reinforce", "baseline": "ema", "epochs": 1},
            "rollout": {"max_new_tokens": 6},
            "train": TRAIN,
        },
    ),
    # Prompts are drawn in several rounds.
    "DAPO": (
        "ppo",
        DRAWN
        | {
            "reward": [{"function": "${REWARDS}/wave.py:even"}],
            "objective": {"kind": "grpo", "mean_over": "tokens", "clip_high": 0.28, "ties": "redraw", "overlong": 2, "epochs": 1},
            "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
            "train": TRAIN | {"steps": 3},
        },
    ),
    # Every second step learns from what was drawn before the one before it.
    "online dpo": ("dpo", DRAWN | {"rollout": {"max_new_tokens": 6, "refresh": 2}}),
    "online kto": ("kto", DRAWN | {"rollout": {"max_new_tokens": 6, "refresh": 3}}),
}
"""Name → command, and what its recipe says beside the common keys."""

TIMES = ("seconds", "sampling_seconds", "peak_memory", "metrics_bytes", "metrics_hash")
"""What differs in state.json between equal runs."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_model(folder / "model", initializer_range=0.2)
    write_pairs(folder / "pairs.jsonl", 15)
    write_pairs(folder / "others.jsonl", 15, seed=7)
    write_rows(folder / "rows.jsonl", 15)
    (folder / "wave.py").write_text(FUNCTION)
    return folder


@pytest.fixture(scope="module")
def parts(home: Path) -> tuple[Path, Path]:
    return home / "model", home / "rows.jsonl"


def recipe(parts: tuple[Path, Path], folder: Path, lora: dict[str, Any] | None) -> Path:
    """12 training rows in batches of 4: the fourth step begins a second epoch; each takes several forward passes."""
    return write_recipe(folder / "sft.yaml", *parts, folder / "whole", lora=lora, **SECTIONS)


def stage(home: Path, folder: Path, name: str, lora: dict[str, Any] | None) -> list[str | Path]:
    """The command line of a stage, its recipe as that of `recipe`."""
    command, sections = STAGES[name]
    sections = yaml.safe_load(yaml.safe_dump(sections).replace("${REWARDS}", str(home)))
    rows = home / ("rows.jsonl" if command == "sft" else "pairs.jsonl")
    return [command, write_recipe(folder / "x.yaml", home / "model", rows, folder / "whole", lora=lora, **SECTIONS | sections)]


Whole = Callable[[str, Any], tuple[list[str | Path], Path]]


@pytest.fixture(scope="module")
def whole(home: Path) -> Whole:
    """The command line of a stage, and its uninterrupted run, made once."""

    def find(name: str, lora: dict[str, Any] | None) -> tuple[list[str | Path], Path]:
        folder = home / f"{name}-{'lora' if lora else 'full'}"
        if folder.exists():
            return [STAGES[name][0], folder / "x.yaml"], folder / "whole"
        folder.mkdir()
        words = stage(home, folder, name, lora)
        assert rlhf(*words) == 0
        return words, folder / "whole"

    return find


def same_bytes(a: Path, b: Path) -> None:
    last = sorted((a / "checkpoints").iterdir())[-1].name
    for folder in (Path("model"), Path("checkpoints") / last):
        names = {p.relative_to(a) for p in (a / folder).rglob("*.safetensors")}
        assert names and names == {p.relative_to(b) for p in (b / folder).rglob("*.safetensors")}
        for name in names:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    times = [f"time/{what}" for what in ("rollout", "score", "update")]
    assert read_lines(a / "metrics.jsonl", *times) == read_lines(b / "metrics.jsonl", *times)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    one, other = (json.loads((run / "checkpoints" / last / "state.json").read_text()) for run in (a, b))
    assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    cards = [json.loads((run / "manifest.json").read_text()).get("reward_model") for run in (a, b)]
    assert cards[0] == cards[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora"),
    [("sft", None), ("train-rm", LORA), ("dpo", LORA), ("kto bco", None), ("ppo", LORA), ("online dpo", LORA)],
)
def test_from_every_step(whole: Whole, tmp_path: Path, name: str, lora: Any) -> None:
    """And from between any two: before an update, before held-out figures or a reward, before a checkpoint.

    Every way through the loop is here with one kind of weights, and in `test_from_one_step_several_passes_and_dropout` with
    the other; what else a kind remembers is in the same file of the same checkpoint, and is there too.
    """
    words, uninterrupted = whole(name, lora)
    deaths = die_everywhere(words, tmp_path / "again")
    steps, every = (STAGES[name][1].get("train", TRAIN)[key] for key in ("steps", "eval_every"))
    rollouts, looks = steps // 2 if name == "online dpo" else steps, 1 + steps // every
    measured = {"gather_shares": 2 * (rollouts + looks)} if STAGES[name][1].keys() >= DRAWN.keys() else {"evaluate": looks}
    assert deaths == {"optimise": 4 * steps if name == "ppo" else steps, "save_checkpoint": steps} | measured
    same_bytes(uninterrupted, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "lora", "function", "call"),
    [
        ("sft", LORA, "evaluate", 3),  # between update 4 and its held-out figures
        ("train-rm", None, "optimise", 4),
        ("train-rm members", LORA, "optimise", 3),
        ("dpo", None, "optimise", 3),
        ("kto", LORA, "optimise", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("tdpo2", None, "optimise", 3),
                ("aot", LORA, "optimise", 3),
                ("ipo", LORA, "save_checkpoint", 3),
                ("kto bco", LORA, "optimise", 4),
                ("ppo", None, "optimise", 11),  # the third update of step 3
                ("reinforce", LORA, "optimise", 3),  # its baseline has run on with the scores of step 3
                ("reinforce", LORA, "save_checkpoint", 2),
                ("DAPO", LORA, "gather_shares", 4),  # before the third round of the first step
                ("online kto", LORA, "optimise", 3),  # drawn before step 1
            )
        ),
    ],
)
def test_from_one_step_several_passes_and_dropout(
    whole: Whole, tmp_path: Path, name: str, lora: Any, function: str, call: int
) -> None:
    words, uninterrupted = whole(name, lora)
    die_and_resume(words, tmp_path / "again", function, call)
    same_bytes(uninterrupted, tmp_path / "again")


def test_the_running_means_are_in_every_checkpoint(home: Path, tmp_path: Path) -> None:
    """Without them δ would be 0 after a resume: they are not 0, and differ from step to step."""
    assert (
        rlhf(*stage(home, tmp_path, "dpo", LORA), "--set", "train.keep_checkpoints=4", "--set", "train.learning_rate=0.02") == 0
    )
    files = sorted((tmp_path / "whole" / "checkpoints").glob("step-*/state.json"))
    means = [json.loads(file.read_text())["memory"] for file in files]
    assert len(means) == 4 and all(mean.keys() == {"reward/good", "reward/bad"} for mean in means)
    assert len({mean["reward/good"] for mean in means}) == 4 and abs(means[-1]["reward/good"] - means[-1]["reward/bad"]) > 1e-3


@pytest.mark.slow
def test_whatever_became_of_the_reference_store(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again, cache, words = tmp_path / "again", tmp_path / "cache", stage(home, tmp_path, "dpo", LORA)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "first"))
    assert rlhf(*words) == 0
    monkeypatch.setenv("RLHF_CACHE", str(cache))
    with monkeypatch.context() as patch:
        die_before(patch, "optimise", 4)
        assert rlhf(*words, "--output", again) == 130
    shutil.copytree(again, tmp_path / "stopped")
    (shard,) = (cache / "reference").glob("*/rows-*.safetensors")

    def resume_finds(number: int) -> None:
        shutil.rmtree(again)
        shutil.copytree(tmp_path / "stopped", again)
        capsys.readouterr()
        assert rlhf(*words, "--output", again, "--resume") == 0
        assert f"reference log-probabilities: {number} of 30 from the store" in capsys.readouterr().out
        same_bytes(tmp_path / "whole", again)

    others = [f"data.train={home / 'others.jsonl'}", "train.steps=1", "train.eval_every=null"]
    assert rlhf(*words, "--output", tmp_path / "others", *(word for o in others for word in ("--set", o))) == 0
    assert len(list(shard.parent.glob("rows-*.safetensors"))) == 2
    resume_finds(30)
    shard.write_bytes(shard.read_bytes()[:-7])
    resume_finds(0)
    shutil.rmtree(cache)
    resume_finds(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_two_ranks(home: Path, tmp_path: Path, name: str) -> None:
    """Stopped by a signal after a few steps, and taken up by two ranks again."""
    words = [*stage(home, tmp_path, name, LORA), "--set", "train.steps=9", "--set", "train.save_every=1"]
    two_ranks(*words)
    again = tmp_path / "again"
    stopped = launch(*words, "--output", again, ranks=2)
    wait_for(again / "checkpoints" / "step-00000003", stopped)
    stopped.send_signal(signal.SIGTERM)
    assert re.search(r"stopped after step \d+ of 9; continue with --resume", stopped.wait()[1])
    assert not (again / "manifest.json").exists()
    two_ranks(*words, "--output", again, "--resume")
    same_bytes(tmp_path / "whole", again)


def test_a_signal_between_two_passes_saves_and_resumes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command, path), uninterrupted = whole("sft", None)
    again = tmp_path / "again"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_before(patch, 3)
        assert rlhf(command, path, "--output", again, "--set", "train.save_every=null") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped after step 3 of 4; continue with --resume"
    assert [p.name for p in (again / "checkpoints").iterdir()] == ["step-00000003"]
    assert rlhf(command, path, "--output", again, "--resume") == 0
    same_bytes(uninterrupted, again)


@pytest.mark.parametrize("update", [0, 1, 2])
def test_a_signal_between_two_updates_of_a_step_saves_and_resumes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], update: int
) -> None:
    """A step of ppo makes four updates: the rollout, and what they were until then, are in the checkpoint of the step before."""
    words, uninterrupted = whole("ppo", LORA)
    words = [*words, "--set", "train.save_every=null"]
    again = tmp_path / "again"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_before(patch, 3, update)
        assert rlhf(*words, "--output", again) == 143
    (checkpoint,) = (again / "checkpoints").iterdir()
    saved = json.loads((checkpoint / "underway.json").read_text())
    assert (checkpoint.name, saved["first"], saved["updates"]) == (f"step-00000002-{update + 1:04d}", 3, update + 1)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped in step 3 of 3, after {update + 1} of its updates; continue with --resume"
    )
    assert rlhf(*words, "--output", again, "--resume") == 0
    assert f"resuming after step 2 and {update + 1} updates of the next" in capsys.readouterr().out
    same_bytes(uninterrupted, again)


def test_another_budget_is_allowed_and_used(parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(parts, tmp_path, {"r": 4})
    seen: list[int] = []
    original = loop.optimise

    def noting(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments[0].budget)
        if arguments[-1].step == 3 and len(seen) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(loop, "optimise", noting)
    assert rlhf("sft", path) == 130
    assert rlhf("sft", path, "--resume", "--set", "train.tokens_per_device=400") == 0
    assert seen == [80, 80, 80, 400, 400]


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
def test_killed_process(parts: tuple[Path, Path], tmp_path: Path) -> None:
    path = recipe(parts, tmp_path, LORA)
    settings = ["--set", "train.steps=40"]
    assert rlhf("sft", path, *settings) == 0
    for delay in (0.05, 0.6):
        again = tmp_path / f"after {delay} s"
        killed = launch("sft", path, *settings, "--output", again)
        wait_for(again / "checkpoints", killed)
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert rlhf("sft", path, *settings, "--output", again, "--resume") == 0
        assert list((again / "checkpoints").glob(".*")) == []
        same_bytes(tmp_path / "whole", again)


def test_received_is_kept_when_a_library_swallows_the_exception() -> None:
    signals = StopSignals()
    with own_signals():
        signals.install()
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            assert str(error) == "stopped by SIGTERM before the first step; nothing was trained"
    assert signals.received == signal.SIGTERM
