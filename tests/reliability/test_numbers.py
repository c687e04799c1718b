"""NaN and infinity: refused before they reach a weight, with the step, the rows and the tensor named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_cli.objectives.base import LossTerm
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.training import loop, step
from tests.tiny import make_model, read_lines, rlhf, write_recipe, write_rows

TENSOR = "layers.1.mlp.down_proj"
REFUSED = 3
ONCE_AT_THE_END = {"steps": 4, "save_every": None, "tokens_per_device": 80}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 4 steps, each of several forward passes, whose uninterrupted run is in `whole` beside it."""
    folder = tmp_path_factory.mktemp("numbers")
    parts = make_model(folder / "model", num_hidden_layers=2), write_rows(folder / "rows.jsonl", 15)
    recipe = write_recipe(folder / "sft.yaml", *parts, folder / "whole", lora={"r": 4}, train=ONCE_AT_THE_END)
    assert rlhf("sft", recipe) == 0
    return recipe


def nan_loss(patch: pytest.MonkeyPatch, tree: int) -> None:
    """The loss of the pass with this tree of the global batch is NaN at the refused step."""
    now, update, terms = [0], loop.optimise, Sft.terms

    def noting(*arguments: Any, **settings: Any) -> Any:
        now[0] = arguments[-1].step
        return update(*arguments, **settings)

    def broken(self: Sft, backbone: Any, batch: Any, given: Any) -> Iterator[LossTerm]:
        spoil = float("nan") if now[0] == REFUSED and tree in batch.trees else 1.0
        for term in terms(self, backbone, batch, given):
            yield LossTerm({unit: loss * spoil for unit, loss in term.losses.items()}, term.sums)

    patch.setattr(loop, "optimise", noting)
    patch.setattr(Sft, "terms", broken)


def infinite_gradient(patch: pytest.MonkeyPatch, name: str) -> None:
    """One element of one tensor's gradient is infinite at the refused step; every loss is finite."""
    calls, backward = [0], step._backward

    def broken(passes: Any, *arguments: Any) -> Any:
        found = backward(passes, *arguments)
        calls[0] += 1
        if calls[0] == REFUSED:
            (tensor,) = [p for n, p in passes.backbone.trained_parameters().items() if name in n and "lora_B" in n]
            tensor.grad[0, 0] = float("inf")
        return found

    patch.setattr(step, "_backward", broken)


def assert_state_before(run: Path) -> None:
    """Updates 1 and 2 are in the log and in a checkpoint of finite tensors; nothing claims that the run is finished."""
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    files = list((run / "checkpoints" / "step-00000002").rglob("*.safetensors"))
    assert {p.name for p in files} == {"adapter_model.safetensors", "optimizer.safetensors"}
    assert all(torch.isfinite(value).all() for file in files for value in load_file(file).values())
    assert not (run / "manifest.json").exists() and not (run / "model").exists()


def assert_resumes(path: Path, run: Path) -> None:
    """Without the fault the run ends as one that never had it."""
    whole = path.parent / "whole"
    assert rlhf("sft", path, "--output", run, "--resume") == 0
    assert read_lines(run / "metrics.jsonl") == read_lines(whole / "metrics.jsonl")
    a, b = (folder / "model" / "adapter_model.safetensors" for folder in (run, whole))
    assert a.read_bytes() == b.read_bytes()


def test_damaged_weights_are_refused_before_training(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model") / "model.safetensors"
    weights = load_file(model)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model, metadata={"format": "pt"})
    run = tmp_path / "run"
    assert rlhf("sft", write_recipe(tmp_path / "sft.yaml", model.parent, path.parent / "rows.jsonl", run)) == 3
    message = "error: the model's logits are not finite before any training: its weights are damaged"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (run / "checkpoints").exists() and not (run / "model").exists() and not (run / "manifest.json").exists()


def test_a_loss_that_is_nan(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        nan_loss(patch, tree=1)
        assert rlhf("sft", path, "--output", run) == 3
    evidence = run / "failed" / "step-00000003.json"
    found = json.loads(evidence.read_text())
    rows = [entry["row"] for entry in found["batch"]]
    assert found["step"] == 3 and len(rows) == 4
    lines = {f"{path.parent / 'rows.jsonl'}:{number}" for number in range(1, 16)}
    assert len(set(rows)) == 4 and set(rows) <= lines
    assert rows[1] in found["suspects"] and set(found["suspects"]) < set(rows)
    assert all(entry["prompt"] and entry["responses"][0] for entry in found["batch"])
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "error: step 3: the loss is nan; the update was refused and the weights are as before it",
        f"error: rows of the passes concerned: {', '.join(found['suspects'])}",
        f"error: the batch is in {evidence}; lower train.learning_rate or look at the rows",
    ]
    assert_state_before(run)
    assert_resumes(path, run)


def test_one_infinite_gradient_element(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        infinite_gradient(patch, TENSOR)
        assert rlhf("sft", path, "--output", run) == 3
    first, second, last = capsys.readouterr().err.splitlines()[-3:]
    assert first.startswith("error: step 3: the gradient norm is ") and f"{TENSOR}.lora_B" in first
    assert second == "error: every loss was finite"
    assert str(run / "failed" / "step-00000003.json") in last
    assert_state_before(run)
    assert_resumes(path, run)


def test_the_same_fault_again_stops_at_the_same_step(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_loss(monkeypatch, tree=0)
    for flags in ([], ["--resume"]):
        assert rlhf("sft", path, "--output", tmp_path / "run", *flags) == 3
        assert_state_before(tmp_path / "run")
