"""The other order of a product is the same product, and it is gone afterwards."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.models.few_rows import FEW, few_rows, linear
from tests.models.tiny_backbone import make

IDS = torch.arange(2, 14)[None]


@pytest.mark.parametrize("shape", [(1,), (FEW,), (FEW + 1,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_orders_give_the_same_product(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((*shape, 16), (7, 16), (7,)))
    wanted = x.double() @ weight.double().t() + biased * bias.double()
    found = linear(x, weight, bias if biased else None)
    assert (found.dtype, found.is_contiguous()) == (dtype, True)
    assert float((found - wanted).abs().max()) < (1e-5 if dtype == torch.float32 else 0.1)


@torch.no_grad()
def test_a_model_computes_the_same_inside_and_is_left_as_it_was() -> None:
    model = make()
    before = model(input_ids=IDS).logits
    with few_rows(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 15, "7 in each of 2 layers, and the head"
        assert float((model(input_ids=IDS).logits - before).abs().max()) < 1e-5
    with pytest.raises(RuntimeError, match="on the way"), few_rows(model):
        raise RuntimeError("on the way")
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, before)
