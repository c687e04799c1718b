"""Adapters folded into files: the weights that PEFT folds in memory, bit for bit; and what has to be folded in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_cli import sections
from rlhf_cli.models import policy
from rlhf_cli.models.load import Weights, read_adapter
from rlhf_cli.models.merged_files import merge_files
from rlhf_cli.models.policy import load_trained, merge_adapter
from tests.models.tiny_backbone import make, make_backbone

CPU = torch.device("cpu")


def save(folder: Path, name: str, size: str = "5GB", **changes: Any) -> None:
    """A base in bfloat16, and an adapter that changes it."""
    make(name, **changes).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size=size)
    make_backbone(make(name, **changes)).save("policy", folder / "adapter")


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [("llama", "5GB", {}), ("llama", "4KB", {"tie_word_embeddings": True}), ("qwen3", "4KB", {}), ("gemma3", "5GB", {})],
    ids=["one file", "several files, tied", "qwen3", "gemma3"],
)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_weights_are_those_of_peft(name: str, size: str, changes: dict[str, Any], rslora: bool, tmp_path: Path) -> None:
    save(tmp_path, name, size, **changes)
    adapter = read_adapter(tmp_path / "adapter")
    adapter = adapter._replace(config=dataclasses.replace(adapter.config, use_rslora=rslora))
    assert merge_files(tmp_path / "base", adapter, tmp_path / "merged")
    assert (len([*(tmp_path / "merged").glob("*.safetensors")]) > 1) == (size == "4KB")
    wanted = merge_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = merged.state_dict()
    assert merged.dtype == torch.float32 and wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    assert sum(not torch.equal(base[key], found[key]) for key in base) == 14, "seven linear layers of two layers"


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"fan_in_fan_out": True}])
def test_what_is_not_plain_is_left_to_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "llama")
    adapter = read_adapter(tmp_path / "adapter")
    assert not merge_files(
        tmp_path / "base", adapter._replace(config=dataclasses.replace(adapter.config, **changes)), tmp_path / "m"
    )
    assert not (tmp_path / "m").exists()


def test_transposed_weights_are_left_to_peft(tmp_path: Path) -> None:
    """GPT-2's layers are transposed: it is merged in memory, to the same end."""
    save(tmp_path, "gpt2")
    start, settings = Weights(str(tmp_path / "base"), None, tmp_path / "adapter"), sections.Model(path="", dtype="float32")
    assert not merge_files(tmp_path / "base", read_adapter(tmp_path / "adapter"), tmp_path / "m")
    lora = sections.Lora(r=2, merge_parent=True)
    _, base = load_trained(settings, lora, start, device=CPU, seeds={"policy": 0}, merged=tmp_path / "merged")
    assert base.base == str(tmp_path / "merged")
    adapter = read_adapter(tmp_path / "adapter")
    wanted = merge_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_a_stage_never_holds_the_base_to_merge_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "llama")
    monkeypatch.setattr(policy, "merge_adapter", None)
    start, settings = Weights(str(tmp_path / "base"), None, tmp_path / "adapter"), sections.Model(path="", dtype="float32")
    lora = sections.Lora(r=2, merge_parent=True)
    (tmp_path / ".merged.tmp").mkdir()  # of a start that was killed
    backbone, _ = load_trained(settings, lora, start, device=CPU, seeds={"policy": 0}, merged=tmp_path / "merged")
    assert isinstance(backbone.peft.peft_config["policy"], LoraConfig)
    assert load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert not (tmp_path / ".merged.tmp").exists()
