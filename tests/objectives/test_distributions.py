"""wpo and tdpo2, which read the whole distribution before every token: against plain transformers, and what has no gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_cli.data.trees import Tree
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.tdpo2 import Tdpo2
from rlhf_cli.objectives.wpo import Wpo
from tests.models.tiny_backbone import draw_trees, largest_difference, make, make_backbone, sequences
from tests.objectives.lookup import Lookup, lengths, make_trees, run, table

TREES = draw_trees(4, seed=3, branches=2)


def distributions(model: Any, trees: list[Tree]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every response, one sequence at a time: log-probabilities of the vocabulary (T, V), and the tokens (T,)."""
    found = []
    for tree in trees:
        for ids, mask in sequences(tree):
            whole = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found.append((whole[mask], ids[0, 1:][mask]))
    return found


def own_logps(whole: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return whole.gather(-1, tokens[:, None])[:, 0]


def plain_loss(name: str, policy: Any, reference: Any) -> torch.Tensor:
    """As the papers write them, token by token over full logits; β = 0.3, α = 0.7."""
    with torch.no_grad():
        known = distributions(reference, TREES)
    ratios, kls, weights = [], [], []
    for (whole, tokens), (other, _) in zip(distributions(policy, TREES), known, strict=True):
        ratios.append((own_logps(whole, tokens) - own_logps(other, tokens)).sum())
        kls.append((other.exp() * (other - whole)).sum())
        with torch.no_grad():
            weights.append((own_logps(whole, tokens).exp() / (whole.exp() ** 2).sum(-1)).log().mean().exp())
    losses = []
    for chosen in range(0, 8, 2):
        rejected = chosen + 1
        z = 0.3 * (ratios[chosen] - ratios[rejected])
        if name == "tdpo2":
            losses.append(-torch.nn.functional.logsigmoid(z - 0.7 * 0.3 * (kls[rejected] - kls[chosen].detach())))
        else:
            weight = min(torch.tensor(1.0), weights[chosen] * weights[rejected])
            losses.append(-weight * torch.nn.functional.logsigmoid(z))
    return torch.stack(losses).mean()


KINDS = {"tdpo2": Tdpo2(beta=0.3, alpha=0.7), "wpo": Wpo(beta=0.3)}


def full(model: Any, reference: Any) -> Backbone:
    """All weights train, and the reference is another model."""
    backbone, other = make_backbone(model, lora=False), Backbone(reference, torch.float32)
    other.alias["reference"] = BASE
    backbone.elsewhere["reference"] = other
    return backbone


@pytest.mark.parametrize("budget", [4096, 1])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradient_of_all_weights_are_the_papers(name: str, architecture: str, budget: int) -> None:
    """Its own head, one that is the embeddings too, and capped logits; the reference is a model apart, recomputed."""
    plain, reference = make(architecture), make(architecture, seed=7)
    wanted = plain_loss(name, plain, reference)
    wanted.backward()
    backbone = full(make(architecture), reference)
    found = run(KINDS[name], backbone, TREES, budget=budget).loss
    found.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for key, parameter in backbone.trained_parameters().items():
        assert float((parameter.grad - gradients[key]).abs().max()) < 1e-5 * max(1.0, largest), key
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_learns_against_its_own_base(name: str) -> None:
    """The reference is the bare base under the adapter, with the one frozen head; plain transformers run the same layers."""
    backbone = make_backbone(make(), seed=2)
    backbone.alias["reference"] = BASE
    gradients = []
    backbone.activate("policy")
    with backbone.plain_attention() as plain:
        wanted = plain_loss(name, plain, make())
        wanted.backward()
    gradients.append({n: p.grad.clone() for n, p in backbone.trained_parameters().items() if p.grad is not None})
    backbone.model.zero_grad()
    found = run(KINDS[name], backbone, TREES, budget=30).loss
    found.backward()
    gradients.append({n: p.grad for n, p in backbone.trained_parameters().items() if p.grad is not None})
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert largest_difference(*gradients) < 1e-5 and len(gradients[0]) > 10


def model_of(ratios: Any, **figures: Any) -> Lookup:
    tables = {name: table(values).requires_grad_() for name, values in figures.items()}
    return Lookup(policy=table(ratios), reference=torch.zeros_like(table(ratios)), **tables)


def test_only_the_rejected_response_is_held_back() -> None:
    """KLs 0.5 + 1 and 2, α = ½, β = 1, ρ 1 and −1: z = 2 − ½(2 − 1.5); the gradient of D_l is ασ(−z), that of D_w is 0."""
    ratios, kl = [[[0.5, 0.5], [-1.0]]], [[[0.5, 1.0], [2.0]]]
    model = model_of(ratios, kl=kl)
    found = run(Tdpo2(beta=1.0, alpha=0.5), model, make_trees(lengths(ratios)))
    doubt = 1 / (1 + math.exp(1.75))
    assert float(found.loss) == pytest.approx(-math.log(1 - doubt), abs=1e-12)
    (gradient,) = torch.autograd.grad(found.loss, model.tables["kl"])
    assert gradient.tolist() == pytest.approx([0, 0, 0, doubt / 2], abs=1e-12)
    assert found.metrics["rewards/margins"] == 2.0  # of the implicit rewards alone


def test_tdpo2_without_alpha_is_dpo() -> None:
    ratios, kl = [[[0.5, 0.5], [-1.0]]], [[[0.5, 1.0], [2.0]]]
    losses = [run(kind, model_of(ratios, kl=kl), make_trees(lengths(ratios))).means["loss"] for kind in (Tdpo2(alpha=0.0), Dpo())]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("rejected", "weight"), [(-1.0, math.exp(-1.3)), (0.1, math.exp(-0.2)), (0.4, 1.0)])
def test_the_weight_of_a_pair(rejected: float, weight: float) -> None:
    """Means over tokens, −0.3 and `rejected`, added; never above 1, though each response's own may be."""
    ratios, typicality = [[[1.0, 1.0], [0.5]]], [[[-0.1, -0.5], [rejected]]]
    model = model_of(ratios, typicality=typicality)
    found = run(Wpo(beta=1.0), model, make_trees(lengths(ratios)))
    assert float(found.loss) == pytest.approx(weight * math.log1p(math.exp(-1.5)), abs=1e-12)


def test_wpo_saturates_where_dpo_does() -> None:
    """The weight is no part of how much of the gradient is left."""
    for z, wanted in ((math.log(39) - 1e-6, 0.0), (math.log(39) + 1e-6, 1.0)):
        model = model_of([[[z], [0.0]]], typicality=[[[-3.0], [-3.0]]])
        assert run(Wpo(beta=1.0), model, make_trees([[1, 1]])).metrics["rewards/saturated"] == wanted
