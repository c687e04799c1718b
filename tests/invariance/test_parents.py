"""A stage starts from exactly what its parent ended with, and plain PEFT or transformers load exactly what a stage trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.policy import load_trained
from rlhf_cli.recipe import schema
from rlhf_cli.runs.parents import resolve_start
from tests.models.tiny_backbone import draw_trees, packed_logps, plain_logps
from tests.tiny import make_model, read_lines, rlhf, write_recipe, write_rows

TREES = draw_trees(4, branches=2)
LORA, OTHER = schema.Lora(r=4, alpha=8), schema.Lora(r=2, alpha=8, merge_parent=True)
OWN = {"lora": LORA, "full": None, "merged": schema.Lora(r=2, alpha=8)}
SECTIONS: dict[str, Any] = {"lora": {"r": 4, "alpha": 8}, "full": None, "merged": {"r": 2, "alpha": 8, "merge_parent": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with large weights, rows to train and to evaluate on, and two trained parents: runs/lora and runs/full."""
    folder = tmp_path_factory.mktemp("parents")
    make_model(folder / "base", initializer_range=0.2)
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "eval.jsonl", 8, seed=1)
    for kind in ("lora", "full"):
        assert _train(folder, folder / "base", kind, folder / kind) == 0
    return folder


def _train(home: Path, start: Path, kind: str, output: Path) -> int:
    data = {"eval": str(home / "eval.jsonl")}
    train = {"learning_rate": 0.02, "eval_every": 1, "save_every": None}
    recipe = home / f"{output.name}.yaml"
    return rlhf("sft", write_recipe(recipe, start, home / "rows.jsonl", output, lora=SECTIONS[kind], data=data, train=train))


def _plain(home: Path, run: Path) -> Any:
    """The trained policy, as somebody without this package loads it."""
    if not (run / "model" / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    manifest = json.loads((run / "manifest.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(manifest["base_model"]["path"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "model")


def _policy(run: Path, lora: schema.Lora | None, merged: Path) -> Backbone:
    start = resolve_start(str(run), None, "model.path")
    device = torch.device("cpu")
    settings = schema.Model(path=str(run), dtype="float32")
    return load_trained(settings, lora, start.base, start.revision, start.adapter, device, 0, merged)[0]


@pytest.mark.parametrize(
    ("parent", "lora"),
    [("lora", LORA), ("full", LORA), ("lora", None), ("full", None), ("lora", OTHER)],
    ids=["lora-lora", "full-lora", "lora-full", "full-full", "lora-merged-lora"],
)
def test_a_child_starts_as_its_parent(parent: str, lora: schema.Lora | None, home: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        base = plain_logps(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32), TREES)
        wanted = plain_logps(_plain(home, home / parent).eval(), TREES)
        found = packed_logps(_policy(home / parent, lora, tmp_path / "base"), TREES, 60)
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((found - base).abs().max()) > 0.1


@pytest.mark.parametrize(("parent", "kind"), [("lora", "lora"), ("full", "lora"), ("lora", "full"), ("lora", "merged")])
def test_a_run_goes_on_where_its_parent_ended(parent: str, kind: str, home: Path, tmp_path: Path) -> None:
    """Held-out loss: the child's before step 1 is the parent's after its last; and what is saved is what was measured."""
    child = tmp_path / "child"
    assert _train(home, home / parent, kind, child) == 0
    evals = {
        run: [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "eval"] for run in (home / parent, child)
    }
    assert evals[child][0]["step"] == 0
    assert evals[child][0]["loss"] == pytest.approx(evals[home / parent][-1]["loss"], abs=1e-5)
    assert evals[child][-1]["loss"] < evals[child][0]["loss"] - 0.01

    with torch.no_grad():
        trained = plain_logps(_plain(home, child).eval(), TREES)
        reloaded = packed_logps(_policy(child, OWN[kind], tmp_path / "base"), TREES, 60)
    assert float((trained - reloaded).abs().max()) < 1e-5
    with torch.no_grad():
        before = plain_logps(_plain(home, home / parent).eval(), TREES)
    assert float((trained - before).abs().max()) > 0.01


def test_a_checkpoint_is_a_parent_too(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "lora", run)
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))
    with torch.no_grad():
        wanted = plain_logps(_plain(home, home / "lora").eval(), TREES)
        assert float((packed_logps(_policy(checkpoint, LORA, tmp_path / "base"), TREES, 60) - wanted).abs().max()) < 1e-5


def test_the_base_is_never_touched(home: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32).state_dict()
    make_model(home / "again", initializer_range=0.2)
    again = AutoModelForCausalLM.from_pretrained(home / "again", dtype=torch.float32).state_dict()
    assert all(torch.equal(base[name], again[name]) for name in again)
