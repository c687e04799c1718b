"""One optimiser step: plain cross-entropy and plain AdamW, whatever the passes; memory that runs out; numbers that break."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rlhf_cli import sections
from rlhf_cli.data.trees import Batch, Tree, supervised_tokens, tree_length
from rlhf_cli.errors import MachineError, NumberError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import NonFinite, StepResult, Sums, Update, evaluate, is_out_of_memory, optimise
from tests.models.tiny_backbone import draw_trees, largest_difference, make, make_backbone, plain_logps, sequences, weights
from tests.ranks import launch

ALONE = Ranks(expected=False)
BATCHES = [draw_trees(6, seed=step, earlier=True, system=17 * (step % 2)) for step in range(6)]
"""Every second batch has prompts that begin alike, as under a system prompt."""

RATE, CLIP = 0.01, 0.5


def train(
    backbone: Backbone, batches: list[list[Tree]] = BATCHES, *, budget: int = 40, rate: float = RATE, settings: Any = None
) -> list[StepResult]:
    optimizer = build_optimizer(backbone.trained_roles, settings or sections.Train(weight_decay=0.1, betas=(0.8, 0.95)))
    results = []
    for step, trees in enumerate(batches, 1):
        update = Update(step, trees, {"policy": rate}, CLIP, seed=0)
        results.append(optimise(Passes(backbone, budget, ALONE), Sft(), optimizer, update))
        budget = results[-1].budget
    return results


def padded(trees: list[Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels of rows that are padded on the right, as everybody's trainer makes them."""
    rows = [row for tree in trees for row in sequences(tree)]
    length = max(ids.shape[1] for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for r, (row, supervised) in enumerate(rows):
        end = row.shape[1]
        ids[r, :end], mask[r, :end] = row[0], 1
        labels[r, 1:end] = row[0, 1:].where(supervised, torch.tensor(-100))
    return ids, mask, labels


def cross_entropy(model: Any, trees: list[Tree]) -> torch.Tensor:
    ids, mask, labels = padded(trees)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def plain_model(lora: bool, folder: Any) -> Any:
    """The same start in plain transformers, or in plain PEFT from the saved adapter."""
    model = make()
    if not lora:
        return model
    from peft import PeftModel

    make_backbone(make()).save("policy", folder)
    return PeftModel.from_pretrained(model, str(folder), adapter_name="policy", is_trainable=True)


@pytest.mark.parametrize("lora", [True, False])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(lora: bool, tmp_path: Any) -> None:
    plain = plain_model(lora, tmp_path)
    loss = cross_entropy(plain, BATCHES[0])
    loss.backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in plain.named_parameters() if p.requires_grad}
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))

    backbone = make_backbone(make(), lora=lora)
    start = weights(backbone)
    # With SGD at rate 1 and no effective clipping, the step is the gradient.
    optimizer = build_optimizer(backbone.trained_roles, sections.Train(optimizer="sgd"))
    result = optimise(Passes(backbone, 40, ALONE), Sft(), optimizer, Update(1, BATCHES[0], {"policy": 1.0}, 1e9, seed=0))
    moved = {n: start[n] - w for n, w in weights(backbone).items()}
    assert largest_difference(moved, gradients) < 1e-6 * max(1.0, norm)
    assert result.metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_six_steps_are_those_of_a_plain_loop(lora: bool, tmp_path: Any) -> None:
    plain = plain_model(lora, tmp_path).train()
    parameters = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=(0.8, 0.95), weight_decay=0.1)
    losses = []
    for trees in BATCHES:
        loss = cross_entropy(plain, trees)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        losses.append(float(loss))
    backbone = make_backbone(make(), lora=lora)
    results = train(backbone)
    wanted = {n.removeprefix("base_model.model."): p.detach() for n, p in parameters.items()}
    assert [r.metrics["loss"] for r in results] == pytest.approx(losses, abs=1e-5)
    assert largest_difference(weights(backbone), wanted) < 1e-5
    assert any(r.metrics["grad_norm"] > CLIP for r in results)


@pytest.mark.parametrize("lora", [True, False])
def test_passes_and_kernels_change_nothing(lora: bool) -> None:
    backbone = make_backbone(make(), lora=lora)
    wanted, reference = train(backbone, budget=1, settings=sections.Train(optimizer="sgd")), weights(backbone)
    for attention, budget, checkpointing in (("auto", 40, False), ("auto", 4096, False), ("sdpa", 40, False), ("auto", 40, True)):
        other = make_backbone(make(), lora=lora, attention=attention, gradient_checkpointing=checkpointing)
        results = train(other, budget=budget, settings=sections.Train(optimizer="sgd"))
        assert largest_difference(weights(other), reference) < 1e-6
        for a, b in zip(results, wanted, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_adamw_agrees_across_budgets(budget: int) -> None:
    backbone, other = make_backbone(make()), make_backbone(make())
    train(backbone, budget=60)
    train(other, budget=budget)
    assert largest_difference(weights(backbone), weights(other)) < 1e-5


def test_gradients_are_clipped_to_the_norm() -> None:
    backbone = make_backbone(make())
    start = weights(backbone)
    result = train(backbone, BATCHES[:1], rate=1.0, settings=sections.Train(optimizer="sgd"))[0]
    moved = math.sqrt(sum(float((start[n] - w).double().pow(2).sum()) for n, w in weights(backbone).items()))
    assert result.metrics["grad_norm"] > CLIP
    assert moved == pytest.approx(CLIP, rel=1e-4)
    assert result.metrics["learning_rate"] == 1.0


def test_metrics_are_means_over_all_tokens_of_the_batch() -> None:
    """Not means of means of passes: the trees of a batch have 1 to 9 supervised tokens, and go through one by one."""
    backbone = make_backbone(make())
    trees = BATCHES[0]
    with torch.no_grad(), backbone.plain_attention() as model:
        logps = plain_logps(model, trees)
        rows = [row for tree in trees for row in sequences(tree)]
        hits = [(model(input_ids=ids).logits[0, :-1].argmax(-1) == ids[0, 1:])[mask] for ids, mask in rows]
    metrics = train(backbone, [trees], budget=1)[0].metrics
    assert len(logps) == sum(map(supervised_tokens, trees))
    assert metrics["loss"] == pytest.approx(-float(logps.mean()), abs=1e-6)
    assert metrics["token_accuracy"] == pytest.approx(float(torch.cat(hits).float().mean()))
    assert metrics["perplexity"] == pytest.approx(math.exp(-float(logps.mean())), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_evaluation_says_what_a_step_says(batch_size: int) -> None:
    backbone = make_backbone(make(), dropout=0.5)
    before = weights(backbone)
    passes: list[None] = []
    pause = lambda: passes.append(None)  # noqa: E731
    figures = evaluate(Passes(backbone, 30, ALONE), Sft(), BATCHES[0], batch_size=batch_size, pause=pause)
    assert len(passes) > 1
    assert largest_difference(weights(backbone), before) == 0
    metrics = train(make_backbone(make()), BATCHES[:1])[0].metrics
    assert figures == pytest.approx({name: metrics[name] for name in ("loss", "token_accuracy", "perplexity")}, abs=1e-4)


def test_dropout_differs_from_update_to_update() -> None:
    """At a learning rate of 0 the masks alone change the gradient, and they follow from the step and its update."""
    backbone = make_backbone(make(), dropout=0.5)
    optimizer = build_optimizer(backbone.trained_roles, sections.Train())
    norms = []
    for step, number in ((1, 0), (1, 1), (2, 0), (1, 1)):
        update = Update(step, BATCHES[0], {"policy": 0.0}, CLIP, seed=0, number=number)
        norms.append(optimise(Passes(backbone, 40, ALONE), Sft(), optimizer, update).metrics["grad_norm"])
    assert len(set(norms[:3])) == 3
    assert norms[3] == norms[1]


def limit_memory(backbone: Backbone, tokens: int, monkeypatch: pytest.MonkeyPatch, error: Any) -> list[int]:
    """Passes of more than `tokens` tokens fail after they were computed; the sizes of all that were tried."""
    tried: list[int] = []
    hidden = backbone.hidden

    def limited(role: str, batch: Batch) -> torch.Tensor:
        tried.append(batch.ids.numel())
        found = hidden(role, batch)
        if batch.ids.numel() > tokens:
            raise error("no more memory")
        return found

    monkeypatch.setattr(backbone, "hidden", limited)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_budget_and_replays_the_step(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest pass that fits has 50 tokens, so 160 → 80 → 40. Dropout is on: the replay must begin with the same masks."""
    straight, limited = make_backbone(make(), dropout=0.3), make_backbone(make(), dropout=0.3)
    wanted = train(straight, budget=40)
    tried = limit_memory(limited, 50, monkeypatch, error)
    results = train(limited, budget=160)
    assert [r.budget for r in results] == [40] * 6
    assert sum(size > 50 for size in tried) == 2
    assert [r.metrics for r in results] == [r.metrics for r in wanted]
    assert largest_difference(weights(limited), weights(straight)) == 0


def test_a_failure_in_the_second_pass_leaves_no_gradient_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    straight, limited = make_backbone(make()), make_backbone(make())
    train(straight, BATCHES[:1], budget=20)
    hidden, calls = limited.hidden, iter(range(100))

    def fails_once(role: str, batch: Batch) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("no more memory")
        return hidden(role, batch)

    monkeypatch.setattr(limited, "hidden", fails_once)
    result = train(limited, BATCHES[:1], budget=40)[0]
    assert result.budget == 20
    assert largest_difference(weights(limited), weights(straight)) == 0


def test_a_failure_between_layers_of_one_input_leaves_no_activations_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first query makes keys and values, too; the pass breaks off before they are asked for."""
    backbone = make_backbone(make("qwen3"))
    keys = next(module for name, module in backbone.model.named_modules() if name.endswith("1.self_attn.k_proj"))
    read, hidden, calls = list[weakref.ref[torch.Tensor]](), backbone.hidden, iter(range(100))

    def fails_once(module: Any, given: tuple[torch.Tensor]) -> None:
        if not read:
            read.append(weakref.ref(given[0]))
            raise torch.OutOfMemoryError("no more memory")

    def replayed(role: str, batch: Batch) -> torch.Tensor:
        assert next(calls) == 0 or read[0]() is None
        return hidden(role, batch)

    monkeypatch.setattr(backbone, "hidden", replayed)
    keys.register_forward_pre_hook(fails_once)
    assert train(backbone, BATCHES[:1], budget=40)[0].budget == 20
    assert read


def test_a_tree_that_does_not_fit_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(make())
    before = weights(backbone)
    limit_memory(backbone, 5, monkeypatch, torch.OutOfMemoryError)
    longest = max(map(tree_length, BATCHES[0]))  # 40 and 20 are more than that, 10 is not
    assert 10 < longest < 20
    with pytest.raises(MachineError) as caught:
        train(backbone, budget=40)
    assert str(caught.value) == (
        f"out of memory with one tree of {longest} tokens in the pass; set train.tokens_per_device below 10, "
        "shorten data.max_length or set model.gradient_checkpointing: true"
    )
    assert largest_difference(weights(backbone), before) == 0


def test_another_error_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(make())
    limit_memory(backbone, 0, monkeypatch, RuntimeError)
    with pytest.raises(RuntimeError, match="no more memory"):
        train(backbone)


def test_what_counts_as_out_of_memory() -> None:
    cpu = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes. Error code 12"
    assert [is_out_of_memory(e) for e in (torch.OutOfMemoryError(), MemoryError(), RuntimeError(cpu), RuntimeError("shape"))] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_refused(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tree 2 of the batch breaks the loss of its own pass; the weights and AdamW's moments stay."""
    backbone = make_backbone(make())
    optimizer = build_optimizer(backbone.trained_roles, sections.Train())
    before, logps = weights(backbone), backbone.logps

    def breaks(role: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values, hits = logps(role, batch)
        return values * (broken if 2 in batch.trees else 1.0), hits

    monkeypatch.setattr(backbone, "logps", breaks)
    update = Update(1, BATCHES[0], {"policy": 0.1}, 1.0, seed=0)
    with pytest.raises(NonFinite, match=r"step 1: the loss is (nan|-?inf); the update was refused") as caught:
        optimise(Passes(backbone, 1, ALONE), Sft(), optimizer, update)
    assert caught.value.rows == [2]
    assert largest_difference(weights(backbone), before) == 0
    assert len(optimizer.state) == 0
    assert all(p.grad is None for p in backbone.trained_parameters().values())


def test_an_adapter_that_is_cut_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(make())
    layer = backbone.model.model.layers[1].mlp.down_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(NumberError, match=r"2 trained tensors have no gradient, the first is model\.layers\.1\.mlp\.down_proj"):
        train(backbone, BATCHES[:1])


def test_a_metric_with_several_units_is_the_sum_of_its_means() -> None:
    """2/2 of the pairs and 9/3 of the tokens; two updates add up before they are divided: (2 + 4)/(2 + 2) and (9 + 3)/(3 + 1)."""
    one = Sums({("loss", "pairs"): 2.0, ("loss", "tokens"): 9.0}, {"pairs": 2, "tokens": 3})
    other = Sums({("loss", "pairs"): 4.0, ("loss", "tokens"): 3.0}, {"pairs": 2, "tokens": 1})
    assert one.means == {"loss": 4.0}
    assert (one + other).means == {"loss": 4.5}


def short_of_memory(folder: str, limit: str) -> int:
    """A rank of two that train for six steps; on the second one, passes of more than `limit` tokens fail. 0: none do."""
    ranks = Ranks()
    backbone = make_backbone(make())
    optimizer, budget, results = build_optimizer(backbone.trained_roles, sections.Train()), 160, []
    with pytest.MonkeyPatch.context() as patch:
        if int(limit) and not ranks.main:
            limit_memory(backbone, int(limit), patch, torch.OutOfMemoryError)
        for step, trees in enumerate(BATCHES, 1):
            update = Update(step, trees, {"policy": RATE}, CLIP, seed=0)
            results.append(optimise(Passes(backbone, budget, ranks), Sft(), optimizer, update))
            budget = results[-1].budget
    told = {"budgets": [r.budget for r in results], "metrics": [r.metrics for r in results]}
    (Path(folder) / f"{limit}-{ranks.rank}.json").write_text(json.dumps(told))
    torch.save(weights(backbone), Path(folder) / f"{limit}-{ranks.rank}.pt")
    ranks.close()
    return 0


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_is_replayed_on_all(tmp_path: Path) -> None:
    """With half of the budget, until it fits; the result is the same, and nobody dies."""
    for limit in ("0", "50"):
        code, errors = launch(tmp_path, limit, ranks=2, function=short_of_memory).wait()
        assert code == 0, errors
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0-0", "0-1", "50-0", "50-1")}
    assert found["0-0"]["budgets"] == [160] * 6
    assert found["50-0"]["budgets"] == found["50-1"]["budgets"] and found["50-0"]["budgets"][-1] < 160
    for one, other in zip(found["0-0"]["metrics"], found["50-0"]["metrics"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    first, second, straight = (torch.load(tmp_path / f"{name}.pt") for name in ("50-0", "50-1", "0-0"))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, straight) < 1e-5
