"""Merging is exact enough to sample with, and leaves the base as it was, bit for bit and in the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from rlhf_cli import sections
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.merging import merged
from tests.models.tiny_backbone import make, make_backbone

IDS = torch.arange(2, 14)[None]


def logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad(), backbone.plain_attention() as model:
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def memory(backbone: Backbone) -> dict[str, tuple[int, bytes]]:
    own = {name: p.detach() for name, p in backbone.model.named_parameters()}
    return {name: (p.data_ptr(), p.numpy().tobytes()) for name, p in own.items()}


def two_roles(name: str = "llama", **changes: Any) -> Backbone:
    """A policy, and a reference of another rank and scaling (rslora)."""
    backbone = make_backbone(make(name))
    config = lora_config(sections.Lora(r=2, alpha=3), "", None)
    config.use_rslora = True
    for key, value in changes.items():
        setattr(config, key, value)
    backbone.add_lora("reference", config, None, trained=False)
    with torch.no_grad():
        for key, parameter in backbone.model.named_parameters():
            if "lora_B.reference" in key:
                parameter.normal_(std=0.1)
    return backbone


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_merged_logits_are_those_of_the_adapter(name: str, role: str) -> None:
    backbone = two_roles(name)
    backbone.activate(BASE)
    bare = logits(backbone)
    backbone.activate(role)
    wanted = logits(backbone)
    assert float((wanted - bare).abs().max()) > 0.05
    with merged(backbone, role):
        assert float((logits(backbone) - wanted).abs().max()) < 1e-5
    backbone.activate(role)
    assert torch.equal(logits(backbone), wanted)


def test_packed_weights_leave_the_base_where_it_is() -> None:
    backbone = two_roles()
    before = memory(backbone)
    with merged(backbone, "policy"):
        assert memory(backbone) == before
    assert not any("forward" in vars(m) for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))


def test_the_base_is_the_same_memory_after_any_number_of_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is packed, as on a GPU."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    backbone = two_roles()
    before = memory(backbone)
    for role in ("policy", "reference", "policy"):
        with merged(backbone, role):
            changed = [name for name, found in memory(backbone).items() if found != before[name]]
            assert len(changed) == 14, "7 linear layers in each of 2 layers"
            assert all(name.endswith("base_layer.weight") for name in changed)
        assert memory(backbone) == before
    with pytest.raises(RuntimeError, match="on the way"), merged(backbone, "policy"):
        raise RuntimeError("on the way")
    assert memory(backbone) == before


def test_half_precision_keeps_a_young_adapter_apart() -> None:
    """B A of a few updates is less than half a step of a bfloat16 weight: folded and rounded, it would be gone."""
    backbone = make_backbone(make().to(torch.bfloat16).float())
    backbone.compute_dtype = torch.bfloat16
    for module in backbone.model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer.weight.data = module.base_layer.weight.data.bfloat16()
            with torch.no_grad():
                module.lora_B["policy"].weight.mul_(1e-4)
    layer = backbone.model.model.layers[0].mlp.up_proj
    before = layer.base_layer.weight.clone()
    folded = (before.float() + layer.get_delta_weight("policy")).bfloat16()
    assert float((folded == before).float().mean()) > 0.9, "folding would lose nearly all of it"
    with merged(backbone, "policy"):
        assert torch.equal(layer.base_layer.weight, before)
        assert not layer.disable_adapters and layer.active_adapters == ["policy"]


def test_roles_switch_as_before_afterwards() -> None:
    backbone = two_roles()
    trained = {n for n, p in backbone.model.named_parameters() if p.requires_grad}
    assert trained == set(backbone.trained_parameters())
    backbone.activate("reference")
    wanted = logits(backbone)
    with merged(backbone, "policy"):
        assert {n for n, p in backbone.model.named_parameters() if p.requires_grad} == trained
    backbone.activate("reference")
    assert torch.equal(logits(backbone), wanted)
    assert {n for n, p in backbone.model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("role", [BASE, "old"])
def test_a_role_without_an_adapter_needs_nothing(role: str) -> None:
    backbone = two_roles()
    backbone.alias["old"] = BASE
    backbone.activate(BASE)
    before, wanted = memory(backbone), logits(backbone)
    with merged(backbone, role):
        assert memory(backbone) == before
        assert float((logits(backbone) - wanted).abs().max()) < 1e-5


def test_all_weights_trained_needs_nothing() -> None:
    backbone = make_backbone(make(), lora=False)
    before = memory(backbone)
    with merged(backbone, "policy"):
        assert memory(backbone) == before


def test_what_cannot_be_folded_stays_an_adapter() -> None:
    backbone = two_roles(use_dora=True)
    backbone.activate("reference")
    before, wanted = memory(backbone), logits(backbone)
    with merged(backbone, "reference"):
        assert memory(backbone) == before
        assert float((logits(backbone) - wanted).abs().max()) < 1e-5
