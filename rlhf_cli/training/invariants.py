"""What must hold before the first update: the same rows give the same numbers, and the policy is its reference."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from rlhf_cli.data.trees import Tree, tree_length
from rlhf_cli.errors import NumberError
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.base import Objective
from rlhf_cli.training.step import evaluate

TOLERANCE = 1e-4
"""Largest difference in float32 of a token's log-probability or of a score, relative to 1 + its size; of a sum over T tokens
√T times as much, as independent roundings add up."""

ZERO_AT_START = (
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/desirable",
    "rewards/undesirable",
    "logratio/mean",
    "kl",
)

COMPARED = 4
"""Trees of the first batch, the shortest, that are also run one response at a time."""

Values = dict[tuple[int, int], torch.Tensor]
"""(tree, response) → log-probabilities of its tokens (T,), or what its head gives, (labels,)."""


def check_start(passes: Passes, objective: Objective, trees: list[Tree], *, reference_is_start: bool) -> None:
    """Check the first global batch before any update, with dropout off.

    Packed responses must have the numbers they have alone, from the model's own logits, without our masks and positions; two
    passes must agree; and where the reference is the start, every log-ratio, implicit reward and margin must be 0.

    NumberError: with what was measured, and what it points to.
    """
    passes.backbone.model.eval()
    error, noise = None, TOLERANCE
    try:
        noise = _check_numbers(passes, objective, trees, reference_is_start)
    except NumberError as found:
        error = str(found)
    # Devices may differ: what one of them finds ends the run on all, in order.
    if errors := [words for words in passes.ranks.gather(error) if words]:
        raise NumberError(errors[0])
    if objective.reference and reference_is_start and objective.rows.responses != "none":
        metrics = evaluate(passes, objective, trees)
        for name in ZERO_AT_START:
            if abs(metrics.get(name, 0.0)) > 1e3 * noise:  # a coarse bound, for beta scales rounding
                raise NumberError(
                    f"before step 1: {name} is {metrics[name]:.3g}, where 0 is right: is the reference another model?"
                )
        if not math.isfinite(metrics["loss"]):
            raise NumberError(f"before step 1: the loss is {metrics['loss']}")


@torch.no_grad()
def _check_numbers(passes: Passes, objective: Objective, trees: list[Tree], reference_is_start: bool) -> float:
    """What this rank can see by itself; returns what counts as rounding."""
    backbone, budget = passes.backbone, passes.budget
    few = sorted(trees, key=tree_length)[:COMPARED]
    packed = _packed(backbone, objective.role, few, budget)
    noise = TOLERANCE
    if backbone.compute_dtype != torch.float32:  # four times what another cut of the same rows changes
        noise = max(1e-2, 4 * _difference(packed, _packed(backbone, objective.role, few, 1)))
    _same(packed, _packed(backbone, objective.role, few, budget), noise, "two passes over the same rows", "dropout is on?")
    alone = _alone(backbone, objective.role, few)
    _same(packed, alone, noise, "packed rows and single ones", "the mask, the positions or the targets of packed rows are wrong")
    if objective.reference and reference_is_start:
        _check_reference(passes, trees, noise)
    return noise


def _difference(found: Values, wanted: Values) -> float:
    """The largest, relative to 1 + the size of what is wanted."""
    return float(torch.cat([(found[name] - values).abs() / (1 + values.abs()) for name, values in wanted.items()]).max())


def _same(found: Values, wanted: Values, tolerance: float, what: str, why: str) -> None:
    if not (worst := _difference(found, wanted)) <= tolerance:
        raise NumberError(
            f"before step 1: {what} give different numbers, by up to {worst:.2g} where {tolerance:.2g} is rounding\n  {why}"
        )


def _packed(backbone: Backbone, role: str, trees: list[Tree], budget: int) -> Values:
    found: Values = {}
    for batch in backbone.batches(trees, budget):
        names = [(tree, k) for tree, count in zip(batch.trees, batch.counts, strict=True) for k in range(count)]
        if role in backbone.heads:
            values = list(backbone.vectors(role, batch))
        else:
            logps, _ = backbone.logps(role, batch)
            values = [logps[batch.owner == number] for number in range(len(names))]
        found |= {name: value.double().cpu() for name, value in zip(names, values, strict=True)}
    return found


def _alone(backbone: Backbone, role: str, trees: list[Tree]) -> Values:
    """One response at a time through the model as transformers knows it: no mask, no positions, no packing of ours."""
    found: Values = {}
    backbone.activate(role)
    with backbone.plain_attention() as model, backbone.autocast():
        for number, tree in enumerate(trees):
            for k, response in enumerate(tree.responses):
                ids = torch.from_numpy(np.concatenate((tree.prompt, response)).astype(np.int64)).to(backbone.device)
                if role in backbone.heads:
                    state = (
                        backbone.run(partial(backbone.body, input_ids=ids[None], use_cache=False))
                        .last_hidden_state[0, -1]
                        .float()
                    )
                    found[number, k] = (backbone.heads[role].weight @ state).cpu().double()
                    continue
                logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                earlier = tree.supervised if k == 0 else np.zeros(len(tree.prompt), bool)
                learned = torch.from_numpy(np.concatenate((earlier, np.ones(len(response), bool)))[1:]).to(backbone.device)
                found[number, k] = logps.gather(-1, ids[1:, None])[:, 0][learned].cpu().double()
    return found


def _check_reference(passes: Passes, trees: list[Tree], noise: float) -> None:
    """Every response's log-ratio is 0 up to rounding; the message names what the reference looks like instead."""
    backbone = passes.backbone
    # In shards all ranks check the same passes, so that they all come to the same end.
    for batch in passes.over(trees) if backbone.shards is None else backbone.batches(trees, passes.budget):
        policy = backbone.logps("policy", batch)[0]
        known = batch.reference if batch.reference is not None else backbone.logps("reference", batch)[0]
        sums = torch.zeros(3, len(batch.last), dtype=torch.float64, device=policy.device)
        sums.index_add_(1, batch.owner, torch.stack((policy - known, policy.abs(), torch.ones_like(policy))).double())
        ratio, size, length = sums
        of_sums = (ratio.abs() / (1 + size / length) / length.sqrt()).max()
        of_tokens = ((policy - known).abs() / (1 + policy.abs())).max()
        if max(float(of_sums), float(of_tokens)) <= noise:
            continue
        if batch.reference is None and not torch.equal(known, backbone.logps("reference", batch)[0]):
            why = "the reference gives other numbers every time: is dropout on in it?"
        elif backbone.peft is not None and float((backbone.logps(BASE, batch)[0] - known).abs().max()) <= noise:
            why = "the reference is the bare base model, without the adapter that the policy starts from"
        else:
            why = "the reference has other weights than the policy starts from, or its values belong to other tokens"
        token, response = float((policy - known).abs().max()), float(ratio.abs().max())
        raise NumberError(
            f"before step 1: the policy and its reference differ: log-ratios of up to {token:.3g} nats a token "
            f"and {response:.3g} a response, where 0 is right\n  {why}"
        )
