"""Which model a policy is compared with: the one the recipe names, without dropout, and the same after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe

LN2 = 0.6931472


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs, and two parents that have moved from it: `lora`, with dropout, and `full`."""
    folder = tmp_path_factory.mktemp("references")
    make_model(folder / "base", initializer_range=0.2)
    write_pairs(folder / "pairs.jsonl", 16)
    for name, lora in {"lora": {"r": 4, "dropout": 0.5}, "full": None}.items():
        words = _recipe(folder, folder / name, folder / "base", lora=lora, learning_rate=0.02)
        assert rlhf("sft", *words) == 0
    return folder


def _recipe(home: Path, output: Path, start: Path, lora: Any = "auto", rate: float = 1e-9, **train: Any) -> list[str | Path]:
    settings = {"learning_rate": rate, "save_every": 2, "steps": 4} | train
    return [write_recipe(output.with_suffix(".yaml"), start, home / "pairs.jsonl", output, lora=lora, train=settings)]


def _set(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def _losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "train"]


@pytest.mark.parametrize("lora", ["auto", None], ids=["lora", "full"])
def test_a_frozen_reference_has_no_dropout(lora: Any, home: Path, tmp_path: Path) -> None:
    """The parent was trained with dropout 0.5, and its adapter is the reference in every step; the rate is next to nothing."""
    words = _recipe(home, tmp_path / "run", home / "lora", lora=lora)
    dropout = [] if lora is None else _set("lora={r: 4, dropout: 0.0}")
    assert rlhf("dpo", *words, *_set("reference.cache=false"), *dropout) == 0
    assert _losses(tmp_path / "run") == pytest.approx([LN2] * 4, abs=1e-5)


def test_another_reference_is_refused_on_resume(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "other", seed=1, initializer_range=0.2)
    words = [*_recipe(home, tmp_path / "run", home / "base", lora={"r": 4}), *_set(f"reference.model={tmp_path / 'other'}")]
    assert rlhf("dpo", *words) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["reference"]["model"] == str(tmp_path / "other")
    assert abs(_losses(tmp_path / "run")[0] - LN2) > 1e-3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "manifest.json").unlink()
    make_model(tmp_path / "other", seed=2, initializer_range=0.2)
    capsys.readouterr()
    assert rlhf("dpo", *words, "--resume") == 2
    error = capsys.readouterr().err
    assert "what the run was started with has changed" in error and "reference:" in error


def test_base_needs_an_adapter_to_be_under(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _recipe(home, tmp_path / "run", home / "full", lora={"r": 4})
    assert rlhf("dpo", *words, *_set("reference.model=base"), "--check") == 2
    error = capsys.readouterr().err
    assert "reference.model: base is the model under an adapter" in error and "name the model by its path" in error
    assert rlhf("dpo", *words, *_set(f"reference.model={home / 'base'}")) == 0
    assert abs(_losses(tmp_path / "run")[0] - LN2) > 1e-3


def test_the_start_by_another_name_is_the_start(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    words = _recipe(home, tmp_path / "run", Path("lora"), lora={"r": 4, "dropout": 0.0})
    assert rlhf("dpo", *words, *_set(f"reference.model={home / 'lora'}/")) == 0
    assert "reference: the weights this run starts from" in capsys.readouterr().out
    assert _losses(tmp_path / "run")[0] == pytest.approx(LN2, abs=1e-5)


def test_a_merged_start_has_values_of_its_own(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merging rounds: what the adapter's values were must not serve the merged model."""
    assert rlhf("dpo", *_recipe(home, tmp_path / "a", home / "lora")) == 0
    capsys.readouterr()
    assert rlhf("dpo", *_recipe(home, tmp_path / "b", home / "lora", lora=None)) == 0
    assert "reference log-probabilities: 0 of 32 from the store" in capsys.readouterr().out
    assert rlhf("dpo", *_recipe(home, tmp_path / "c", home / "lora", lora={"r": 2, "merge_parent": True})) == 0
    assert "reference log-probabilities: 0 of 32 from the store" in capsys.readouterr().out
    assert rlhf("dpo", *_recipe(home, tmp_path / "d", home / "lora", lora=None), *_set("objective.beta=0.5")) == 0
    assert "reference log-probabilities: 32 of 32 from the store" in capsys.readouterr().out


@pytest.mark.parametrize("lora", ["auto", None], ids=["lora", "full"])
def test_whole_distributions_are_not_stored(lora: Any, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tdpo2's reference runs in every step, whatever `reference.cache` says; at the start its KL is 0, and the loss ln 2."""
    losses = []
    for name, more in {"kept": [], "again": _set("reference.cache=false")}.items():
        words = _recipe(home, tmp_path / name, home / "full", lora=lora and {"r": 4}, rate=1e-3)
        assert rlhf("dpo", *words, *more, *_set("objective.kind=tdpo2")) == 0
        out = capsys.readouterr().out
        assert "tdpo2 compares whole distributions: the reference runs in every step, and nothing of it is stored" in out
        assert "from the store" not in out
        losses.append(_losses(tmp_path / name))
    assert losses[0] == losses[1] and losses[0][0] == pytest.approx(LN2, abs=1e-5) and losses[0][-1] < LN2 - 1e-3


def test_a_refused_start_leaves_a_folder_that_can_be_used(home: Path, tmp_path: Path) -> None:
    words = _recipe(home, tmp_path / "run", home / "base", lora={"r": 4, "target_modules": ["nope"]})
    assert rlhf("dpo", *words) == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    assert rlhf("dpo", *words, *_set("lora.target_modules=all-linear")) == 0
