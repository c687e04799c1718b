"""What `all-linear` and lists of names adapt, what is left out, and adapters on experts beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.memory import estimate
from rlhf_cli.models.targets import find_targets, with_targets
from tests.models.families import make_config, make_family
from tests.models.tiny_backbone import draw_trees, make_backbone, packed_logps
from tests.tiny import rlhf, write_pairs, write_recipe, write_rows

TREES = [*draw_trees(2, branches=2), *draw_trees(1, seed=1)]


def test_layers_whose_names_peft_would_take_for_experts_are_adapted_as_parameters() -> None:
    found = find_targets(make_family("deepseek_v3"))
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name.rpartition(".")[2] for name in found.modules} == attention
    shared = [f"model.layers.1.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    dense = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert sorted(found.parameters) == sorted(
        [*dense, *shared, "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    )


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("llama", {}),
        ("mixtral", {"routers": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]}),
        ("mamba", {"state-space": [f"backbone.layers.{i}.mixer.{n}_proj" for i in (0, 1) for n in ("x", "dt", "out")]}),
        (
            "jetmoe",
            {"routers": [f"model.layers.{i}.{n}.router.layer" for i in (0, 1) for n in ("mlp", "self_attention.experts")]},
        ),
    ],
)
def test_what_is_left_out_has_a_reason(family: str, left_out: dict[str, list[str]]) -> None:
    found = find_targets(make_family(family)).left_out
    assert {next(word for word in left_out if word in why): sorted(names) for why, names in found.items()} == {
        why: sorted(names) for why, names in left_out.items()
    }


@pytest.mark.parametrize(
    ("asked", "modules", "parameters"),
    [
        (["q_proj", "experts.down_proj"], ["q_proj"], ["model.layers.1.mlp.experts.down_proj"]),
        (["mlp.up_proj"], [], ["model.layers.0.mlp.up_proj.weight"]),
        (["o_proj", "gate"], ["gate", "o_proj"], None),
    ],
)
def test_a_list_names_layers_and_experts(asked: list[str], modules: list[str], parameters: list[str] | None) -> None:
    model = make_family("deepseek_v2", q_lora_rank=None)
    found = with_targets(LoraConfig(target_modules=asked), model)
    assert (sorted(found.target_modules), found.target_parameters) == (modules, parameters)


def test_a_name_of_nothing_and_dropout_on_experts_are_refused() -> None:
    model = make_family("mixtral")
    with pytest.raises(UsageError, match=r"lora.target_modules: up is the name of nothing in this model"):
        with_targets(LoraConfig(target_modules=["q_proj", "up"]), model)
    with pytest.raises(UsageError, match=r"lora.dropout: model.layers.0.mlp.experts.gate_up_proj takes none; set it to 0"):
        with_targets(LoraConfig(target_modules="all-linear", lora_dropout=0.1), model)


def two_roles(model: Any, **options: Any) -> Backbone:
    backbone = make_backbone(model, **options)
    backbone.add_lora("value", lora_config(sections.Lora(r=2), "", None), None, trained=True)
    with torch.no_grad():
        for name, parameter in backbone.trained_roles["value"].items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return backbone


def test_adapters_on_experts_do_not_see_each_other() -> None:
    with torch.no_grad():
        alone = packed_logps(make_backbone(make_family("qwen3_moe")), TREES, 4096)
        bare = packed_logps(Backbone(make_family("qwen3_moe"), torch.float32), TREES, 4096, BASE)
        backbone = two_roles(make_family("qwen3_moe"))
        found = {role: packed_logps(backbone, TREES, 4096, role) for role in ("policy", "value", BASE, "policy")}
    assert torch.equal(found["policy"], alone) and torch.equal(found[BASE], bare)
    assert float((found["value"] - alone).abs().max()) > 1e-2 < float((bare - alone).abs().max())
    packed_logps(backbone, TREES, 4096).sum().backward()
    learned = {role: {n for n, p in own.items() if p.grad is not None} for role, own in backbone.trained_roles.items()}
    assert learned == {"policy": set(backbone.trained_roles["policy"]), "value": set()}
    backbone.trained.pop("value")
    backbone.remove("value")
    with torch.no_grad():
        assert torch.equal(packed_logps(backbone, TREES, 4096), alone)


def test_gradient_checkpointing_changes_no_gradient_of_experts() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = two_roles(make_family("mixtral"), gradient_checkpointing=checkpointing)
        backbone.model.train()
        for role, weight in (("policy", 1.0), ("value", 0.5)):
            (weight * packed_logps(backbone, TREES, 4096, role).sum()).backward()
        gradients.append({n: p.grad for n, p in backbone.trained_parameters().items()})
    plain, again = gradients
    size = max(float(g.abs().max()) for g in plain.values())
    assert max(float((plain[n] - again[n]).abs().max()) for n in plain) < 1e-5 * size


def test_experts_count_in_memory() -> None:
    """Mixtral of 2 layers and 4 experts: A and B of each matrix, and a second copy of the experts during a pass."""
    found = estimate(make_config("mixtral"), sections.Model(path=""), rank=2, dtype=torch.float32)
    attention = (16 + 32) + 2 * (16 + 16) + (32 + 16)
    experts = 4 * (16 + 64) + 4 * (32 + 16)
    assert found.trained == 2 * 2 * (attention + experts)
    stacks = 2 * 4 * (16 * 64 + 32 * 16)
    parameters = sum(p.numel() for p in make_family("mixtral").parameters())
    assert found.weights == 4 * (parameters + stacks) + 4 * found.trained
    checkpointing = sections.Model(path="", gradient_checkpointing=True)
    again = estimate(make_config("mixtral"), checkpointing, rank=2, dtype=torch.float32)
    assert again.weights == found.weights - 4 * stacks // 2


def test_a_mixture_is_trained_continued_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer

    tokenizer = tiny_tokenizer(eos="<|im_end|>", template=CHATML)
    make_family("mixtral", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    settings = {"lora": {"r": 4}, "train": {"steps": 2}, "data": {"max_length": 128}}
    assert rlhf("sft", write_recipe(tmp_path / "sft.yaml", tmp_path / "base", rows, tmp_path / "sft", **settings)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lora: 2 weights have no adapter, the first is model.layers.0.mlp.gate (routers stay as they are" in said
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    recipe = write_recipe(
        tmp_path / "dpo.yaml", tmp_path / "sft", pairs, tmp_path / "dpo", train={"steps": 2}, data={"max_length": 128}
    )
    assert rlhf("dpo", recipe) == 0
    assert "have no adapter" not in capsys.readouterr().out
    assert rlhf("export", tmp_path / "dpo", tmp_path / "merged", "--merge") == 0
    assert "of the run's" in capsys.readouterr().out
