"""The linear layer with an adapter: PEFT's numbers and gradients, by fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_cli.models.fused import ROTARY, SIBLINGS, LoraLinear, Rotary, _Gated, _RmsNorm, _Turn, fuse, fuse_lora


class Two(torch.nn.Module):
    """Linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 20), torch.nn.Linear(20, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return found


def with_adapters(**changes: Any) -> tuple[Any, Any]:
    """The same model twice: PEFT's layers, and ours."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["first", "second"], init_lora_weights=False, **changes)
    plain = get_peft_model(Two().requires_grad_(False), config)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    return plain, fused


def numbers(model: Any, *, half: bool = False, learns_x: bool = True) -> list[torch.Tensor]:
    """Outputs, and the gradients of their squares for x and for all that trains."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 12).requires_grad_(learns_x)
    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("learns_x", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_numbers_of_peft(half: bool, learns_x: bool, dropout: float) -> None:
    plain, fused = with_adapters(lora_dropout=dropout)
    assert [type(m) for m in fused.modules() if isinstance(m, Linear)] == [LoraLinear] * 2
    wanted, found = (numbers(model.train(), half=half, learns_x=learns_x) for model in (plain, fused))
    assert len(found) == len(wanted) == 5 + learns_x
    for one, other in zip(wanted, found, strict=True):
        assert one.dtype == other.dtype
        assert float((other - one).norm() / one.norm()) < (0.02 if half else 1e-6)


def test_gradients_by_differences() -> None:
    _, fused = with_adapters()
    model, x = fused.double(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_an_adapter_is_left_to_peft(changes: dict[str, Any]) -> None:
    plain, fused = with_adapters(**changes)
    assert all(map(torch.equal, numbers(plain), numbers(fused)))


def test_without_the_adapter_and_with_two() -> None:
    plain, fused = with_adapters()
    for model in (plain, fused):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    for one, other in zip(numbers(plain), numbers(fused), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    with plain.disable_adapter(), fused.disable_adapter():
        x = torch.randn(4, 12)
        assert torch.equal(plain(x), fused(x))


def small(name: str, **more: Any) -> Any:
    """A random model of one of transformers' families."""
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name](
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
        | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | more
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def step(model: Any) -> list[torch.Tensor]:
    out = model(input_ids=torch.arange(3, 17).view(2, 7), use_cache=False).logits
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("name", "norms", "gated", "turns"),
    [("llama", 5, 2, True), ("qwen3", 9, 2, True), ("gemma2", 0, 0, True), ("glm", 5, 0, False), ("gpt_neox", 0, 0, True)],
)
def test_a_model_is_what_transformers_makes_of_it(
    name: str, norms: int, gated: int, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other norms (of weights 1 + w), gates (GELU, one weight for both) and turns (of neighbours) are left alone."""
    plain = small(name)
    where = next(m.forward.__globals__ for m in plain.modules() if ROTARY in getattr(m.forward, "__globals__", {}))
    own = getattr(where[ROTARY], "plain", where[ROTARY])
    monkeypatch.setitem(where, ROTARY, own)
    wanted = step(plain)
    model = small(name)
    fuse(model)
    changed = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert (sum(n.endswith("RMSNorm") for n in changed), sum(n.endswith("MLP") for n in changed)) == (norms, gated)
    assert isinstance(where[ROTARY], Rotary) is turns
    fuse(model)
    assert not turns or where[ROTARY].plain is own, "once is enough"
    for one, other in zip(wanted, step(model), strict=True):
        assert float((other - one).norm()) <= 1e-5 * float(one.norm())


class Attending(torch.nn.Module):
    """Three layers that read one input, or another for two of them; with biases, and of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(12, wide) for wide in (8, 4, 4))
        self.other: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        source = x if self.other is None else self.other
        return self.q_proj(x) + torch.cat((self.k_proj(source), self.v_proj(source).tanh()), -1)


def attending(**changes: Any) -> tuple[Any, Any]:
    """The same twice, as `with_adapters`; the value's adapter has another rank and so another scale."""
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 10, "rank_pattern": {"v_proj": 3}, "init_lora_weights": False} | changes
    plain = get_peft_model(Attending().requires_grad_(False), LoraConfig(target_modules=list(SIBLINGS[0]), **given))
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    return plain, fused


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("learns_x", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_of_one_input_have_the_numbers_of_peft(half: bool, learns_x: bool, dropout: float) -> None:
    plain, fused = attending(lora_dropout=dropout)
    wanted, found = (numbers(model.train(), half=half, learns_x=learns_x) for model in (plain, fused))
    assert len(found) == len(wanted) == 7 + learns_x
    for one, other in zip(wanted, found, strict=True):
        assert one.dtype == other.dtype
        assert float((other - one).norm() / one.norm()) < (0.02 if half else 1e-6)
    layer = fused.base_model.model.q_proj
    assert layer.siblings is fused.base_model.model.v_proj.siblings
    assert layer.siblings.waiting is None, "nothing is kept for later"


def test_one_product_for_all_adapters_of_an_input() -> None:
    """Of three layers with adapters: three frozen products, and the thin one in one, before three that add to the outputs."""
    _, fused = attending()
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        fused(torch.randn(5, 12))
    counts = {event.key: event.count for event in seen.key_averages()}
    assert (counts["aten::mm"], counts["aten::addmm"], counts["aten::addmm_"]) == (1, 3, 3)


def test_layers_of_two_inputs_have_the_numbers_of_peft() -> None:
    plain, fused = attending()
    plain.base_model.model.other = fused.base_model.model.other = torch.randn(2, 5, 12)
    for _ in range(2):
        for one, other in zip(numbers(plain), numbers(fused), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_an_input_that_changed_in_between_is_read_again() -> None:
    _, fused = attending()
    layers, x = fused.base_model.model, torch.randn(5, 12)
    with torch.no_grad():
        layers.q_proj(x)
        x += 1
        assert torch.equal(layers.k_proj(x), layers.k_proj(x.clone()))


def test_gradients_of_layers_of_one_input_by_differences() -> None:
    _, fused = attending()
    model, x = fused.double(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained))


def test_a_gated_layer_keeps_its_two_inputs_alone() -> None:
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: _Gated.apply(gate, up), (gate, up))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        found = _Gated.apply(gate, up)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up)
    assert [each is own for each, own in zip(kept, (gate, up), strict=True)] == [True, True]


def test_gradients_of_a_norm_and_a_turn_by_differences() -> None:
    model = small("llama")
    fuse(model)
    norm = model.model.norm
    x, weight, q = torch.randn(3, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64), torch.randn(2, 3, 5, 8).double()
    angles = torch.randn(2, 1, 5, 4).double().repeat(1, 1, 1, 2)
    assert torch.autograd.gradcheck(lambda x, w: _RmsNorm.apply(x, w, 1e-6), (x.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradcheck(lambda q: _Turn.apply(q, angles.cos(), angles.sin()), q.requires_grad_())
    assert norm(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32, "the model's own: its weights are in float32"
