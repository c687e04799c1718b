"""What --resume and a parent compare: settings beside the weights, files that are gone or edited, and functions that changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.test_old_runs import OLD
from tests.tiny import make_base, rlhf, write_pairs, write_recipe, write_rows

STEPS: dict[str, Any] = {"train": {"steps": 4, "save_every": 1, "keep_checkpoints": 9}, "lora": {"r": 2}}
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft of four steps, and its files as after a stop behind the second."""
    folder = tmp_path_factory.mktemp("guard")
    make_base(folder / "base")
    write_rows(folder / "rows.jsonl", 16)
    write_pairs(folder / "pairs.jsonl", 16)
    assert rlhf("sft", write_recipe(folder / "r.yaml", folder / "base", folder / "rows.jsonl", folder / "whole", **STEPS)) == 0
    run = shutil.copytree(folder / "whole", folder / "run")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "manifest.json").unlink()
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """The stopped run in a place of its own, with a base of its own."""
    shutil.copytree(home / "base", tmp_path / "base")
    folder = shutil.copytree(home / "run", tmp_path / "run")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(str(home / "base"), str(tmp_path / "base")))
    write_recipe(tmp_path / "r.yaml", tmp_path / "base", home / "rows.jsonl", folder, **STEPS)
    return folder


def resume(run: Path) -> int:
    return rlhf("sft", run.parent / "r.yaml", "--resume")


def edit(path: Path, **changes: Any) -> None:
    """Other bytes; the tokenizer's own reader takes no key that it does not know."""
    known = {} if path.name == "tokenizer.json" else changes
    path.write_text(json.dumps(json.loads(path.read_text()) | known))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_base_are_compared(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run.parent / "base" / name, note="changed")
    assert resume(run) == 2
    said = capsys.readouterr().err
    assert "--resume: what the run was started with has changed" in said and "\nerror: " not in said.replace("\n  ", "  ")
    assert "base settings: " in said


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_parents_base_are_compared(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, parent = shutil.copytree(home / "base", tmp_path / "base"), shutil.copytree(home / "whole", tmp_path / "whole")
    manifest = json.loads((parent / "manifest.json").read_text())
    edit(parent / "manifest.json", base_model=manifest["base_model"] | {"path": str(base)})
    recipe = write_recipe(tmp_path / "dpo.yaml", parent, home / "pairs.jsonl", tmp_path / "dpo", **STEPS)
    assert rlhf("dpo", recipe, "--check") == 0
    edit(base / name, note="changed")
    assert rlhf("dpo", recipe, "--check") == 2
    assert f"{base} is not the model that {parent} was trained on: its settings (config.json, " in capsys.readouterr().err


@pytest.mark.parametrize("names", [("recipe.yaml",), ("inputs.json",), ("recipe.yaml", "inputs.json")])
def test_records_that_are_gone_are_no_licence(names: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names:
        (run / name).unlink()
    assert resume(run) == 2
    gone = " and no ".join(names)
    assert f"{run} has checkpoints but no {gone}: nothing tells what it was started with." in capsys.readouterr().err


def test_checkpoints_that_are_gone_are_said(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert resume(run) == 0
    assert f"warning: {run / 'checkpoints'} has no checkpoint: the run begins anew" in capsys.readouterr().err
    assert (run / "model" / "adapter_model.safetensors").read_bytes() == (
        home / "whole" / "model" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("damage", ["edited", "cut", "torn", "gone"])
def test_logs_that_were_changed_are_set_aside(name: str, damage: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        edited = {"edited": content.replace(b"1", b"2", 1), "cut": content[:40], "torn": b"\xff{" + content[2:]}
        path.write_bytes(edited[damage])
    assert resume(run) == 0
    said = f"warning: {path} is not what the checkpoint was written with; it is set aside as damaged-{name}"
    assert said in capsys.readouterr().err
    assert (run / f"damaged-{name}").exists() and (run / "manifest.json").exists()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["step"] for line in lines} <= {3, 4}


def test_a_reward_that_changed_is_said_and_recorded(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function = tmp_path / "f.py"
    function.write_text("def worth(prompts, responses):\n    return [1.0 * len(r) for r in responses]\n")
    reward = {"reward": [{"function": f"{function}:worth"}], "rollout": {"max_new_tokens": 4}}
    path = write_recipe(tmp_path / "ppo.yaml", home / "base", home / "rows.jsonl", tmp_path / "run", **STEPS, **reward)
    assert rlhf("ppo", path, "--set", "train.steps=1") == 0
    assert "changed_code" not in json.loads((tmp_path / "run" / "manifest.json").read_text())
    function.write_text(function.read_text().replace("1.0", "2.0"))
    assert rlhf("ppo", path, "--resume", "--set", "train.steps=2") == 0
    assert f"warning: function {function}:worth has changed (" in capsys.readouterr().err
    assert rlhf("ppo", path, "--resume", "--set", "train.steps=3") == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (change,) = manifest["changed_code"]
    assert change["what"] == f"function {function}:worth"
    assert change["to"] == manifest["reward"][0]["hash"] != change["from"]


def test_runs_of_the_release_before_are_not_refused_for_what_they_did_not_record() -> None:
    assert "base settings" not in json.loads((OLD / "runs" / "dpo" / "inputs.json").read_text())
    assert "settings_hash" not in json.loads((OLD / "runs" / "sft" / "manifest.json").read_text())["base_model"]
