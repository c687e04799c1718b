"""`token_logps` is log_softmax and gather, values and gradients, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rlhf_cli.models import logps as module
from rlhf_cli.models.logps import Head, LogitRule, token_logps
from tests.rehearsal import Gpu, counts, rehearsal

N, D, V = 50, 8, 12
RULES = [LogitRule(), LogitRule(0.3), LogitRule(1.7, 2.0)]
"""Plain, scaled (Cohere, Granite) and capped so low that most logits are near it (Gemma 2)."""


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rule: LogitRule) -> torch.Tensor:
    """By the definition, with autograd's own derivatives."""
    scaled = rule.scale * F.linear(hidden, weight, bias)
    return scaled if rule.cap is None else rule.cap * torch.tanh(scaled / rule.cap)


def _inputs(dtype: torch.dtype = torch.float32, *, trained: bool, bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_(trained)
    target = torch.randint(V, (N,), generator=generator)
    return hidden, weight, draw(V).requires_grad_(trained) if bias else None, target, draw(N).float()


def test_by_hand() -> None:
    """Two states, the head is the identity: logits (0, ln 3) and (ln 2, 0), so the probabilities are 1/4, 3/4 and 2/3, 1/3."""
    hidden = torch.tensor([[0.0, 3.0], [2.0, 1.0]]).log().nan_to_num(neginf=0.0)
    logps, hits = token_logps(hidden, Head(torch.eye(2), None), torch.tensor([1, 1]))
    assert logps.exp().tolist() == pytest.approx([3 / 4, 1 / 3])
    assert hits.tolist() == [True, False]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [1, 20 * V, 2**23])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_log_softmax_and_gather(
    trained: bool, bias: bool, chunk: int, rule: LogitRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    results = []
    for ours in (True, False):
        hidden, weight, offset, target, upstream = _inputs(trained=trained, bias=bias)
        if ours:
            logps, hits = token_logps(hidden, Head(weight, offset, rule), target)
        else:
            logits = _logits(hidden, weight, offset, rule)
            logps, hits = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0], logits.argmax(-1) == target
        (logps * upstream).sum().backward()
        results.append((logps, hidden.grad, weight.grad, None if offset is None else offset.grad, hits))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a.float() - b.float()).detach().abs().max()) < 1e-5
    assert (results[0][2] is not None) == trained


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck(trained: bool, rule: LogitRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; the function's own log-softmax is float32, so it is kept at float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    hidden, weight, bias, target, _ = _inputs(torch.float64, trained=trained, bias=True)
    function = lambda h, w, b: token_logps(h[:5], Head(w, b, rule), target[:5])[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_the_log_softmax_of_bfloat16_states_is_float32() -> None:
    hidden, weight, _, target, _ = _inputs(torch.bfloat16, trained=False, bias=False)
    logps, _ = token_logps(hidden, Head(weight, None), target)
    wanted = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    assert logps.dtype == torch.float32
    assert float((logps - wanted).detach().abs().max()) < 1e-6


def test_logits_hundreds_apart_stay_finite() -> None:
    hidden = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    logps, _ = token_logps(hidden, Head(torch.eye(2), None), torch.tensor([0, 0]))
    logps.sum().backward()
    assert logps.tolist() == [0.0, -600.0]
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize("rule", RULES)
def test_a_temperature_divides_what_the_rule_gives(rule: LogitRule) -> None:
    hidden, weight, _, target, _ = _inputs(trained=False, bias=False)
    with torch.no_grad():
        logps, _ = token_logps(hidden, Head(weight, None, rule.at(0.7)), target)
        wanted = (_logits(hidden, weight, None, rule) / 0.7).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    assert float((logps - wanted).abs().max()) < 1e-5


def test_a_gpu_reads_a_head_of_128_k_entries_once_where_it_read_it_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows are one chunk there; by the chunks of a CPU, of 65 rows, they are four. The numbers are the CPU's."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(200, 4), torch.randn(128256, 4), torch.randint(128256, (200,))
    own = hidden.clone().requires_grad_()
    wanted = token_logps(own, Head(weight, None), target)[0]
    wanted.sum().backward()
    spent = []
    for on_cuda in (module.ON_CUDA, 1):
        monkeypatch.setattr(module.Head.of, "__defaults__", (on_cuda,))
        with rehearsal():
            before, states = counts.copy(), Gpu(hidden).requires_grad_()
            found: Any = token_logps(states, Head(Gpu(weight), None), Gpu(target))[0]
            found.sum().backward()
            kernels = (counts - before).kernels
        spent.append((kernels["mm"], kernels.total()))
        grad: Any = states.grad
        assert own.grad is not None
        assert float((found.held - wanted).detach().abs().max()) < 1e-5 > float((grad.held - own.grad).abs().max())
    assert spent == [(2, 21), (8, 75)]
