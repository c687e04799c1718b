"""What a finished run says of itself, and what its children check."""

import hashlib
import json
import subprocess
import sys

import pytest
import xxhash

from rlhf_cli.errors import UsageError
from rlhf_cli.files import write_json
from rlhf_cli.runs.folder import MetricsLog, RunFolder
from rlhf_cli.runs.manifest import (
    build_manifest,
    final_metrics,
    git_commit,
    read_manifest,
    weights_hash,
)

OWN = {"steps": 4, "accuracy": {"mean": 0.7, "low": 0.6, "high": 0.8}}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.model.mkdir(parents=True)
    (run.model / "adapter_model.safetensors").write_bytes(b"weights")
    log = MetricsLog(run.metrics)
    log.append({"step": 0, "split": "eval", "time": 1.0, "loss": 3.0})
    log.append({"step": 4, "split": "train", "time": 2.0, "loss": 2.0, "grad_norm": 0.5})
    log.append({"step": 4, "split": "eval", "time": 3.0, "loss": 2.5})
    write_json(run.manifest, build_manifest(run, "sft", "finished", 7, OWN))
    return run


def test_the_fields(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    manifest = build_manifest(run, "sft", "finished", 7, OWN)
    assert list(manifest["versions"]) == ["rlhf_cli", "python", "torch", "transformers", "datasets", "peft", "accelerate"]
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert (manifest["stage"], manifest["status"], manifest["seed"], manifest["steps"]) == ("sft", "finished", 7, 4)
    assert final_metrics(run) == {"eval": {"step": 4, "loss": 2.5}, "train": {"step": 4, "loss": 2.0, "grad_norm": 0.5}}
    assert manifest["accuracy"]["low"] == 0.6
    assert manifest["model_files"] == {"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert "hf_secret" not in json.dumps(manifest)
    assert read_manifest(run.path, stages=["sft"])["seed"] == 7


def test_a_changed_parent_is_refused(run):
    weights = run.model / "adapter_model.safetensors"
    weights.write_bytes(b"weightz")
    with pytest.raises(UsageError, match=r"is not as it was when it finished: model/adapter_model\.safetensors has changed\n"):
        read_manifest(run.path)
    (run.model / "chat_template.jinja").touch()
    weights.unlink()
    with pytest.raises(UsageError, match=r"model/adapter_model\.safetensors is missing \(and 1 more\)"):
        read_manifest(run.path)


def test_a_parent_of_another_stage_is_refused(run):
    with pytest.raises(UsageError, match="is a run of sft, expected dpo or train-rm"):
        read_manifest(run.path, stages=["train-rm", "dpo"])


@pytest.mark.parametrize("content", ["{", "[]", '{"stage": "sft"}', '{"stage": "sft", "model_files": 3}', "\xff"])
def test_a_damaged_manifest_is_refused(run, content):
    run.manifest.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        read_manifest(run.path)


def test_an_unfinished_run_is_not_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run: it has neither manifest\.json nor recipe\.yaml"):
        read_manifest(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(
        UsageError, match=r"is an unfinished run \(no manifest\.json\)\n  finish it: the same command with --resume"
    ):
        read_manifest(tmp_path)


def test_git_commit_only_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(["git", "log", "--format=%H"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == head
    assert len(head) == 40


def test_weights_hash_covers_names_and_bytes(tmp_path):
    with pytest.raises(UsageError, match=r"has no \*\.safetensors"):
        weights_hash(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"22")
    (tmp_path / "a.safetensors").write_bytes(b"1" * (2**22 + 3))  # longer than one read
    (tmp_path / "config.json").write_bytes(b"{}")
    first = weights_hash(tmp_path)
    expected = b"a.safetensors\x004194307\x00" + b"1" * (2**22 + 3) + b"b.safetensors\x002\x0022"
    assert first == xxhash.xxh3_128_hexdigest(expected)
    (tmp_path / "config.json").write_bytes(b"{1}")
    assert weights_hash(tmp_path) == first
    (tmp_path / "b.safetensors").write_bytes(b"23")
    assert weights_hash(tmp_path) != first
