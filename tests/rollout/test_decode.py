"""What drawing costs a GPU that is rehearsed, kernel by kernel; that it draws what the CPU draws; and what is merged to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_cli import sections
from rlhf_cli.models import kv_cache
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.merging import KEPT, merged
from rlhf_cli.rollout import decoders, generate
from rlhf_cli.rollout.decoders import Aligned, Graphed, choose_decoder
from rlhf_cli.rollout.generate import READ_EVERY, Request, TransformersEngine
from rlhf_cli.rollout.next_token import choose
from rlhf_cli.sections import Warping
from tests.models.tiny_backbone import make, make_backbone
from tests.rehearsal import Counts, counts, rehearsal, to_gpu

PROMPTS = [np.arange(1, 2 + length, dtype=np.int32) for length in (8, 3, 5, 1)]
NO_END = [99]


def half(model: Any, size: float, **more: Any) -> Backbone:
    """A policy in bfloat16 with an adapter whose B has this size."""
    backbone = Backbone(model, torch.bfloat16, "sdpa", **more)
    torch.manual_seed(1)
    backbone.add_lora("policy", lora_config(sections.Lora(r=4, alpha=8, dropout=0.0), "", None), None, trained=True)
    with torch.no_grad():
        for name, parameter in backbone.trained_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return backbone


def request(tokens: int, ends: list[int], **more: Any) -> Request:
    return Request(PROMPTS, range(len(PROMPTS)), 2, tokens, 1.0, ends, 3, **more)


@pytest.mark.parametrize(("size", "kernels"), [(0.3, 22), (1e-6, 36)], ids=["merged", "apart"])
def test_a_token_of_an_adapter_in_half_precision(size: float, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 22 kernels a layer where the adapter is merged, 36 where it stays apart, and one sync whenever ends are read."""
    every = 4
    monkeypatch.setattr(generate, "READ_EVERY", every)
    spent: list[Counts] = []
    with rehearsal():
        for layers in (1, 2):
            engine = TransformersEngine(half(to_gpu(make(num_hidden_layers=layers).to(torch.bfloat16)), size), "policy")
            before = counts.copy()
            engine.generate(request(every, NO_END))
            short = counts - before
            engine.generate(request(2 * every, NO_END))
            spent.append(counts - before - short - short)  # of 4 tokens, with what comes once a draw taken off
            assert engine.kept is not None and (engine.kept >= KEPT) == (kernels == 22)
    one, two = spent
    assert kernels - 2 <= (two.kernels.total() - one.kernels.total()) / every <= kernels, two.kernels - one.kernels
    assert (2 * one.kernels.total() - two.kernels.total()) / every <= 62, "beside the layers"
    assert one.syncs.total() == two.syncs.total() == 1 and READ_EVERY == 16, two.syncs


@pytest.mark.parametrize("warping", [Warping(), Warping(top_k=20, repetition_penalty=1.3)], ids=["plain", "warped"])
def test_a_gpu_draws_what_the_cpu_draws(warping: Warping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it asks every 16th token alone which rows have ended, goes on with some of them, and sees columns that are empty."""
    monkeypatch.setattr(kv_cache, "STEP", 8)
    asked = request(40, list(range(4)), warping=warping)
    engine = TransformersEngine(make_backbone(make(), attention="sdpa"), "policy")
    wanted = engine.generate(asked)
    assert engine.kept is None, "nothing is rounded in float32"
    lengths = [len(each.ids) for several in wanted for each in several]
    assert min(lengths) < READ_EVERY < max(lengths) and len(set(lengths)) > 4
    with rehearsal():
        backbone = make_backbone(to_gpu(make()), attention="sdpa")
        found = TransformersEngine(backbone, "policy").generate(asked)
    for here, there in zip(wanted, found, strict=True):
        assert [(each.ids.tolist(), each.ended) for each in here] == [(each.ids.tolist(), each.ended) for each in there]


def test_the_share_of_an_adapter_that_is_left() -> None:
    """By plain sums in float64: rounded, W + B A is off by less than a tenth of B A, and by nearly all of a young one."""
    for size, low, high in ((0.3, KEPT, 1.0), (1e-6, -1.0, 0.1)):
        backbone = half(make().to(torch.bfloat16), size)
        layers = [m for m in backbone.model.modules() if hasattr(m, "lora_A") and m.lora_A]
        own = {layer: layer.base_layer.weight.detach().clone() for layer in layers}
        lost = whole = 0.0
        for layer in layers:
            delta = 2 * layer.lora_B["policy"].weight.double() @ layer.lora_A["policy"].weight.double()
            rounded = (own[layer].float() + delta.float()).bfloat16()
            lost += float((rounded.double() - own[layer].double() - delta).square().sum())
            whole += float(delta.square().sum())
        with merged(backbone, "policy") as kept:
            assert kept == pytest.approx(1 - (lost / whole) ** 0.5, abs=1e-3) and low < kept < high
            for layer in layers:
                assert torch.equal(layer.base_layer.weight, own[layer]) == (kept < KEPT)
        assert all(torch.equal(layer.base_layer.weight, own[layer]) for layer in layers)


def test_an_adapter_beside_its_layers_gives_what_peft_gives() -> None:
    backbone, ids = half(make().to(torch.bfloat16), 0.003), torch.arange(2, 14)[None]

    def states() -> torch.Tensor:
        with torch.no_grad(), backbone.autocast():
            found: torch.Tensor = backbone.body(input_ids=ids, use_cache=False).last_hidden_state.float()
        return found

    backbone.activate("base")
    bare = states()
    backbone.activate("policy")
    wanted = states()
    with merged(backbone, "policy") as kept:
        found = states()
    assert kept is not None and kept < KEPT
    assert float((found - wanted).norm()) < 0.6 * float((wanted - bare).norm())
    assert torch.equal(states(), wanted)


def test_weights_that_train_are_cast_once() -> None:
    backbone = Backbone(make(), torch.bfloat16, "sdpa")
    backbone.train_all_weights()
    weight = backbone.model.model.layers[0].mlp.up_proj.weight
    place = weight.data_ptr()
    with merged(backbone, "policy") as kept:
        assert kept is None and weight.dtype == torch.bfloat16
        assert backbone.model.model.embed_tokens.weight.dtype == torch.float32
    assert weight.dtype == torch.float32 and weight.data_ptr() == place


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.zeros(3, 300)
    logits[1, 7], logits[2, 5] = torch.nan, torch.inf
    for temperature in (0.0, 1.0):
        tokens = choose(logits.clone(), temperature, torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64))
        assert tokens.tolist() == [0, -1, -1]


class Trace(TorchDispatchMode):
    """What a step calls on which tensors, and those among them that it has not made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.made: dict[int, torch.Tensor] = {}
        self.taken: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken += [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and id(x) not in self.made]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        self.made |= {id(x): x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out

    def again(self) -> None:
        """As a CUDA graph: the same calls on the same memory, and no line of Python between them."""
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
def test_a_step_that_is_replayed_draws_what_it_drew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once for 8, 4, 2 and 1 rows and every 8 columns; it takes weights and what stays where it is, and nothing else."""
    monkeypatch.setattr(kv_cache._Place, "seen", property(lambda own: min(own.width, -(-(own.column + 1) // 8) * 8)))
    recorded, replayed = [], []

    def place(tensor: torch.Tensor) -> int:
        return 0 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()  # a CPU packs weights while it draws

    def record(step: Any) -> Any:
        step()  # as the real one does
        with Trace() as trace:
            found = step()
        decoder = step.func.__self__
        cache = [kept for layer in decoder.cache.layers for kept in (layer.keys, layer.values)]
        model = decoder.backbone.model
        still = [*model.parameters(), *model.buffers(), *cache, decoder.cache.place.at]
        known = {0, *map(place, (*still, decoder.tokens, decoder.start, decoder.columns))}
        assert all(place(x) in known for x in trace.taken), [x.shape for x in trace.taken]
        recorded.append((len(step.args[0]), decoder.cache.place.seen))

        def replay() -> torch.Tensor:
            replayed.append(1)
            trace.again()
            return found

        return replay

    monkeypatch.setattr(decoders, "record", record)
    asked = request(40, list(range(4)))
    engine = TransformersEngine(make_backbone(make(name)), "policy")
    assert engine.decoder is Aligned
    wanted = engine.generate(asked)
    engine.decoder = Graphed
    found = engine.generate(asked)
    for here, there in zip(wanted, found, strict=True):
        assert [(each.ids.tolist(), each.ended) for each in here] == [(each.ids.tolist(), each.ended) for each in there]
    rows = {each for each, _ in recorded}
    assert rows <= {8, 4, 2, 1} and len(rows) > 2 and len(set(recorded)) == len(recorded) < len(replayed) / 2


def test_steps_that_cannot_be_recorded_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    decoders._warn.cache_clear()
    engine = TransformersEngine(make_backbone(make()), "policy")
    wanted = engine.generate(request(6, NO_END))
    engine.decoder = Graphed
    for _ in range(2):
        found = engine.generate(request(6, NO_END))
        assert [one.ids.tolist() for own in found for one in own] == [one.ids.tolist() for own in wanted for one in own]
    assert capsys.readouterr().err.count("warning: tokens are drawn without CUDA graphs, which takes longer (") == 1


def test_graphs_are_for_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal():
        backbone = make_backbone(to_gpu(make()), attention="sdpa")
        assert choose_decoder(backbone) is Aligned
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose_decoder(backbone) is Graphed
