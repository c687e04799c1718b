"""Attention on a GPU that is rehearsed: all sequences of a pass in one call, without a mask; and which kernel `auto` keeps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf_cli import sections
from rlhf_cli.data.trees import build_batch, plan_passes, visible
from rlhf_cli.models import body
from rlhf_cli.models.attention import KERNELS, Kernel, lay_sequences
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.body import MEASURED_LAYERS, Body
from rlhf_cli.models.load import Weights
from rlhf_cli.models.placement import Placement
from tests import rehearsal as there
from tests.models.test_attention import _batch, _begun
from tests.models.tiny_backbone import draw_trees, make, make_backbone, packed_logps, plain_logps
from tests.rehearsal import counts, rehearsal, to_gpu
from tests.tiny import make_model, rlhf, write_recipe, write_rows

TREES = [*draw_trees(3, branches=2, earlier=True), *draw_trees(2, seed=1), *draw_trees(1, seed=2, branches=4)]
BEGUN = [*draw_trees(3, branches=2, system=18), *draw_trees(2, seed=1, system=18)]


def clocks(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Kernels take these seconds, or are broken where none are given."""

    def read(own: Body, batch: Any) -> float:
        (name,) = (name for name, kernel in KERNELS.items() if kernel is own.kernel)
        if name not in seconds:
            raise RuntimeError(f"no {name} here")
        return seconds[name]

    monkeypatch.setattr(Body, "_seconds", read)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "qwen3"])
def test_the_numbers_and_gradients_are_those_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of heads, windows, and prompts that begin alike; in float32, which the real kernel does not take."""
    monkeypatch.setattr(there, "FLASH", {torch.float32})
    clocks(monkeypatch, varlen=1.0, trees=2.0)
    found = []
    for trees in (TREES, BEGUN):
        here = make_backbone(make(name))
        with torch.no_grad(), here.plain_attention() as model:
            here.activate("policy")
            wanted = plain_logps(model, trees)
        packed_logps(here, trees, 90).square().sum().backward()
        with rehearsal():
            backbone = make_backbone(to_gpu(make(name)))
            assert backbone.kernel is KERNELS["varlen"]
            found = packed_logps(backbone, trees, 90)
            before = counts.copy()
            found.square().sum().backward()
            assert (counts - before).kernels["varlen_attn_backward"] > 0
            held: Any = found
            assert float((held.held - wanted).detach().abs().max()) < 1e-5
        for own, other in zip(here.trained_parameters().values(), backbone.trained_parameters().values(), strict=True):
            grad: Any = other.grad
            assert own.grad is not None and float((grad.held - own.grad).abs().max()) < 1e-4 * (1 + float(own.grad.abs().max()))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_pass_makes_no_mask(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 nothing is larger than a few vectors a token; with a mask the square of the tokens is."""
    clocks(monkeypatch, varlen=1.0)
    trees = draw_trees(1, branches=3, longest=400)
    trees = [tree._replace(prompt=tree.prompt.repeat(300)[:300]) for tree in trees]
    with rehearsal():
        backbone = Backbone(to_gpu(make().to(torch.bfloat16)), torch.bfloat16, attention)
        batch = build_batch(trees, plan_passes(trees, 1, 4096, backbone.kernel.layout)[0][0]).to(backbone.device)
        counts.largest, before = 0, counts.copy()
        backbone.states(batch)
        spent = counts - before
    if attention == "auto":
        assert counts.largest <= 64 * batch.tokens < batch.tokens**2
        assert spent.kernels["varlen_attn"] == 2 and spent.kernels["index_select"] == 4 and not spent.syncs
    else:
        assert counts.largest >= batch.tokens**2


@pytest.mark.parametrize("made", [_batch, _begun])
def test_each_token_asks_for_what_is_visible(made: Any) -> None:
    """The keys up to its own, counted from the end of its sequence, are those of the mask."""
    batch = made()
    found, seen, (rows, length) = lay_sequences(batch), [], batch.ids.shape
    for (a, b), (c, d) in zip(pairwise(found.queries.tolist()), pairwise(found.keys.tolist()), strict=True):
        seen += [set(found.places[c : d - back].tolist()) for back in reversed(range(b - a))]
    assert len(seen) == rows * length
    for row, number in (batch.tree >= 0).nonzero().tolist():
        columns = visible(batch)[row, 0, number].nonzero()[:, 0]
        assert seen[row * length + number] == {row * length + column for column in columns.tolist()}


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"varlen": 1.0, "sdpa": 2.0, "eager": 3.0, "trees": 4.0}, "varlen"),
        ({"varlen": 5.0, "sdpa": 2.0, "eager": 3.0, "trees": 1.0}, "trees"),
        ({"sdpa": 2.0, "eager": 1.0}, "eager"),
        ({"alone": 0.1, "trees": 9.0}, "trees"),
        ({}, "varlen"),
    ],
)
def test_auto_keeps_the_fastest(seconds: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that work; rows of single responses only where nothing else does; where none can be measured, the first."""
    clocks(monkeypatch, **seconds)
    with rehearsal():
        assert Backbone(to_gpu(make().to(torch.bfloat16)), torch.bfloat16).kernel is KERNELS[chosen]


def test_auto_passes_over_a_fast_kernel_that_gives_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks(monkeypatch, sdpa=1.0, eager=2.0)
    wrong = Kernel("sdpa", "packed", lambda batch, *_: torch.ones_like(visible(batch)))
    monkeypatch.setitem(KERNELS, "sdpa", wrong)
    with rehearsal():
        assert Backbone(to_gpu(make()), torch.float32).kernel is KERNELS["eager"]


def test_the_slowest_rank_decides_so_that_all_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here sdpa is the fastest, and broken on another rank, where eager takes 3 seconds and trees 2."""
    clocks(monkeypatch, varlen=9.0, sdpa=1.0, eager=1.5, trees=1.7)
    others = torch.tensor([9.0, torch.inf, 3.0, 2.0, torch.inf])

    def reduce(mine: Any, operation: Any) -> None:
        assert operation == dist.ReduceOp.MAX
        mine.held.copy_(torch.maximum(mine.held, others))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    with rehearsal():
        assert Backbone(to_gpu(make()), torch.float32).kernel is KERNELS["trees"]


def test_what_is_measured_is_forward_and_backward_of_the_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts kernels: 3 passes of about 4,000 tokens on each kernel, and afterwards all layers are there."""
    model = to_gpu(make(num_hidden_layers=5, max_position_embeddings=40).to(torch.bfloat16))
    ticks: list[tuple[int, int]] = []

    def clock() -> float:
        ticks.append((counts.kernels["varlen_attn"], counts.kernels["varlen_attn_backward"]))
        return float(counts.kernels.total())

    monkeypatch.setattr(body, "perf_counter", clock)
    with rehearsal():
        backbone = Backbone(model, torch.bfloat16)
    assert backbone.kernel is KERNELS["varlen"] and len(model.model.layers) == 5
    first, second = ticks[:2]
    assert (second[0] - first[0], second[1] - first[1]) == (MEASURED_LAYERS, MEASURED_LAYERS)
    assert len(ticks) == 5 * 3 * 2 and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("attention", "followed"), [("sdpa", "sdpa"), ("alone", "rlhf_trees")])
def test_other_models_take_the_kernel_of_the_policy(attention: str, followed: str, tmp_path: Path) -> None:
    """So that a value learns from the policy's passes; not rows of single responses, which others may not need."""
    folder, policy = str(make_model(tmp_path / "m")), Backbone(make(), torch.float32, "sdpa")
    policy.kernel = KERNELS[attention]
    placement = Placement(policy, sections.Model(folder), Weights("elsewhere", None, None), torch.device("cpu"))
    placement.add("other", Weights(folder, None, None))
    assert placement.hosts["other"].kernel.name == followed


def test_a_run_that_goes_on_keeps_its_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows, out = make_model(tmp_path / "m"), write_rows(tmp_path / "x.jsonl", 12), tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", model, rows, out)
    said = []
    for steps, recorded in ((1, None), (2, "sdpa"), (3, "rlhf_varlen"), (4, None)):
        path = out / "inputs.json"
        if recorded is not None:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"attention": recorded}))
        assert rlhf("sft", recipe, *(["--resume"] if steps > 1 else []), f"train.steps={steps}") == 0
        captured = capsys.readouterr()
        said.append([line for line in (captured.out + captured.err).splitlines() if "attention: " in line])
        recorded = json.loads(path.read_text())["attention"]
        assert recorded == ("sdpa" if steps == 2 else "rlhf_trees")
    assert said[0] == said[3] == ["attention: rlhf_trees, long rows"] and said[1] == ["attention: sdpa, packed rows"]
    assert "the run has used rlhf_varlen until now, which does not work here: the last digits may change" in said[2][1]
