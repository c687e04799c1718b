"""A packed weight is the same weight, and it is gone afterwards."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.models.merging import packed
from tests.models.tiny_backbone import make


@pytest.mark.parametrize("shape", [(1, 19), (3, 19), (70, 19), (2, 5, 19)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products_are_those_of_the_weight(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = make()
    layer = model.model.layers[0].mlp.up_proj = torch.nn.Linear(19, 7, bias=bias)
    x = torch.randn(shape)
    wanted = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
    with packed(model, {}):
        found = layer(x)
    assert (found.shape, found.dtype) == (wanted.shape, torch.float32)
    assert float((found - wanted).abs().max()) < 1e-5


@torch.no_grad()
def test_a_model_computes_the_same_inside_and_is_left_as_it_was() -> None:
    model, ids = make(), torch.arange(2, 14)[None]
    before = model(input_ids=ids).logits
    with packed(model, {}):
        assert sum("forward" in vars(module) for module in model.modules()) == 15, "7 in each of 2 layers, and the head"
        assert float((model(input_ids=ids).logits - before).abs().max()) < 1e-5
    with pytest.raises(RuntimeError, match="on the way"), packed(model, {}):
        raise RuntimeError("on the way")
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_half_precision_stays_as_it_is() -> None:
    model = make().to(torch.bfloat16)
    with packed(model, {}):
        assert not any("forward" in vars(module) for module in model.modules())
