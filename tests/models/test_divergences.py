"""`token_divergences` is what torch.distributions says of the whole distributions, values and gradients, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import rlhf_cli.models.logps as module
from rlhf_cli.models.divergences import Divergence, token_divergences
from rlhf_cli.models.logps import Head, LogitRule

N, D, V, SPARE = 37, 6, 23, 4
CAPPED = LogitRule(scale=1.5, cap=3.0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the policy, and those of another model, whose vocabulary is padded."""
    generator = torch.Generator().manual_seed(0)
    shapes = (N, D), (V, D), (N, D + 1), (V + SPARE, D + 1)
    hidden, weight, other_hidden, other_weight = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return hidden.requires_grad_(), weight, other_hidden, other_weight


def by_distributions(policy: Categorical, other: Categorical, kind: Divergence, beta: float) -> torch.Tensor:
    if kind == "jsd":
        mixed = Categorical(beta * other.probs + (1 - beta) * policy.probs)
        return beta * kl_divergence(other, mixed) + (1 - beta) * kl_divergence(policy, mixed)
    return kl_divergence(other, policy) if kind == "forward" else kl_divergence(policy, other)


@pytest.mark.parametrize("chunk", [1, 2**23])
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_that_of_whole_distributions(
    trained: bool, kind: Divergence, beta: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    upstream, results = torch.linspace(0.5, 2, N), []
    for ours in (True, False):
        hidden, weight, other_hidden, other_weight = inputs()
        weight.requires_grad_(trained)
        if ours:
            found, alike = token_divergences(
                hidden, Head(weight, None, CAPPED), other_hidden, Head(other_weight, None), kind, beta
            )
        else:
            policy = 3 * torch.tanh(1.5 * hidden @ weight.T / 3)
            other = (other_hidden @ other_weight.T)[:, :V]
            found = by_distributions(Categorical(logits=policy), Categorical(logits=other), kind, beta)
            alike = policy.argmax(-1) == other.argmax(-1)
        (found * upstream).sum().backward()
        results.append((found.detach(), hidden.grad, weight.grad, alike))
    (mine, mine_grad, mine_weight, mine_alike), (known, known_grad, known_weight, known_alike) = results
    assert torch.allclose(mine, known, atol=2e-6)
    assert torch.allclose(mine_grad, known_grad, atol=2e-6)
    assert (mine_weight is not None) == trained
    assert not trained or torch.allclose(mine_weight, known_weight, atol=1e-5)
    assert torch.equal(mine_alike, known_alike)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_distributions_that_share_nothing_stay_finite(kind: Divergence) -> None:
    hidden = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    found, _ = token_divergences(hidden, Head(torch.eye(2), None), -hidden.detach(), Head(torch.eye(2), None), kind)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.6931472 if kind == "jsd" else 2e4, 0.0])
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
