"""Every stage, through the command line: the same weights for any cut into passes, for one process and two, cached or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_model, read_lines, rlhf, spawn, write_pairs, write_ranked, write_recipe

STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "train-rm": ("train-rm", "pairs", {}),
    "train-rm K-wise": ("train-rm", "ranked", {"objective": {"kind": "plackett_luce"}}),
    "dpo": ("dpo", "pairs", {"objective": {"sft_weight": 0.1}}),
    "dpo bco": ("dpo", "pairs", {"objective": {"kind": "bco"}}),
    "dpo simpo": ("dpo", "pairs", {"objective": {"kind": "simpo"}}),
    "dpo K-wise": ("dpo", "ranked", {"objective": {"kind": "plackett_luce"}}),
    "ipo": ("ipo", "pairs", {"objective": {"normalize": "token_mean"}}),
    "kto": ("kto", "pairs", {}),
    "kto bco": ("kto", "pairs", {"objective": {"kind": "bco"}}),
}
"""Name → command, rows, and what its recipe says beside the common keys."""

SOME = ("train-rm K-wise", "dpo", "kto")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_model(folder / "base", initializer_range=0.2)
    for name, write in {"pairs": write_pairs, "ranked": write_ranked}.items():
        write(folder / f"{name}.jsonl", 20)
        write(folder / f"{name}-eval.jsonl", 5, seed=1)
    return folder


def recipe(home: Path, name: str, output: Path, lora: Any = None, **train: Any) -> list[str | Path]:
    """The command line of a stage of 6 steps of 5 rows, with batches and shares that do not come out even."""
    command, rows, sections = STAGES[name]
    settings: dict[str, Any] = {
        "lora": lora or {"r": 4},
        "data": {"eval": str(home / f"{rows}-eval.jsonl")},
        "train": {"batch_size": 5, "save_every": None, "eval_every": 3, "learning_rate": 1e-3} | train,
        **sections,
    }
    return [command, write_recipe(output.with_suffix(".yaml"), home / "base", home / f"{rows}.jsonl", output, **settings)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "model").glob("*.safetensors")))


def agree(a: Path, b: Path, tolerance: float = 3e-6) -> None:
    lines = [read_lines(run / "metrics.jsonl") for run in (a, b)]
    assert len(lines[0]) == 9
    for one, other in zip(*lines, strict=True):
        assert one.pop("split") == other.pop("split")
        # Before the first step implicit rewards are rounding and nothing else, so are the accuracies that follow from them.
        started = one["step"] > 1
        for key in one:
            if started or not key.startswith(("rewards/", "logratio/", "margin/")):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (one["step"], key)
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < tolerance


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in STAGES])
def test_tokens_per_device_changes_nothing(name: str, home: Path, tmp_path: Path) -> None:
    assert rlhf(*recipe(home, name, tmp_path / "a", tokens_per_device=4096)) == 0
    assert rlhf(*recipe(home, name, tmp_path / "b", tokens_per_device=30)) == 0
    agree(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("layout", ["alone", "packed"])
def test_neither_packing_nor_shared_prefixes_change_anything(
    name: str, layout: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alone`: every response in a row of its own, its prompt repeated; `packed`: rows of several trees under a dense mask."""
    from rlhf_cli.models import backbone

    assert rlhf(*recipe(home, name, tmp_path / "a")) == 0
    candidates = {"alone": ("alone",), "packed": ("sdpa",)}[layout]
    monkeypatch.setattr(backbone, "CANDIDATES", {"sdpa": candidates})
    words = recipe(home, name, tmp_path / "b", tokens_per_device=200)
    assert rlhf(*words, "--set", "model.attention=sdpa") == 0
    agree(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_are_one(name: str, home: Path, tmp_path: Path) -> None:
    assert rlhf(*recipe(home, name, tmp_path / "one")) == 0
    process = spawn(*recipe(home, name, tmp_path / "two"), ranks=2)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_that_is_computed_in_the_step_gives_the_same(name: str, lora: Any, home: Path, tmp_path: Path) -> None:
    """LoRA: the bare base under the adapter; all weights: a second, frozen model."""
    settings = ["--set", f"lora={json.dumps(lora)}"]
    assert rlhf(*recipe(home, name, tmp_path / "a"), *settings) == 0
    assert rlhf(*recipe(home, name, tmp_path / "b"), *settings, "--set", "reference.cache=false") == 0
    agree(tmp_path / "a", tmp_path / "b")


def test_the_start_is_its_own_reference(home: Path, tmp_path: Path) -> None:
    """Continuing a LoRA run, `start` is its frozen adapter, `base` the bare base and a path that run."""
    assert rlhf(*recipe(home, "dpo", tmp_path / "parent", learning_rate=0.02)) == 0
    losses = {}
    for name, reference in {"start": "start", "live": "start", "path": str(tmp_path / "parent"), "base": "base"}.items():
        words = recipe(home, "dpo", tmp_path / name)
        cache = "false" if name == "live" else "true"
        settings = [f"model.path={tmp_path / 'parent'}", "lora=auto", f"reference.model={reference}", f"reference.cache={cache}"]
        settings += ["objective.sft_weight=0"]
        assert rlhf(*words, *(word for setting in settings for word in ("--set", setting))) == 0
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses["start"][0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses["live"] == pytest.approx(losses["start"], rel=1e-5)
    assert losses["path"] == pytest.approx(losses["start"], rel=1e-5)
    assert losses["base"][0] < 0.68  # the parent has learned something since it left the base
