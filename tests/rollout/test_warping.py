"""Warped distributions are those of transformers' own processors, and a neutral warping changes no draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_cli.models.backbone import Backbone
from rlhf_cli.rollout.next_token import choose, draw_uniforms, warp
from rlhf_cli.sections import Warping
from tests.models.tiny_backbone import VOCABULARY, make
from tests.rollout.test_generate import draw, draw_prompts, plain, request

WARPINGS = [
    Warping(repetition_penalty=1.3),
    Warping(repetition_penalty=0.8),
    Warping(top_k=7),
    Warping(top_p=0.6),
    Warping(min_p=0.05),
    Warping(top_k=40, top_p=0.8),
    Warping(top_p=0.9, min_p=0.02),
    Warping(repetition_penalty=1.2, top_k=30, top_p=0.85, min_p=0.03),
]


def theirs(warping: Warping, temperature: float) -> LogitsProcessorList:
    """As `generate` of transformers orders them."""
    found: Any = [RepetitionPenaltyLogitsProcessor(warping.repetition_penalty), TemperatureLogitsWarper(temperature)]
    found += [TopKLogitsWarper(warping.top_k)] if warping.top_k else []
    found += [TopPLogitsWarper(warping.top_p), MinPLogitsWarper(warping.min_p)]
    return LogitsProcessorList(found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("warping", WARPINGS, ids=str)
def test_probabilities_are_those_of_transformers_processors(warping: Warping, temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=random) * 3
    ids = torch.randint(300, (64, 20), generator=random)
    seen = torch.zeros(64, 300, dtype=torch.bool).scatter(1, ids, True)
    found = (warp(logits.clone(), temperature, warping, seen) / temperature).softmax(-1)
    wanted = theirs(warping, temperature)(ids, logits.clone()).softmax(-1)
    assert float((found - wanted).abs().max()) < 1e-6
    whole = (logits / temperature).softmax(-1)
    assert float((found - whole).abs().max()) > 0.01


def test_equally_likely_tokens_at_the_border() -> None:
    """top_p takes no more of them than it needs, those with lower ids first; top_k keeps all."""
    logits, seen = torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 5, dtype=torch.bool)
    share = float(logits.softmax(-1)[0, 1] + logits.softmax(-1)[0, 0])
    assert warp(logits, 1.0, Warping(top_p=share + 0.01), seen).isfinite().tolist() == [[True, True, True, False, False]]
    assert warp(logits, 1.0, Warping(top_k=2), seen).isfinite().tolist() == [[True] * 5]
    assert warp(logits, 1.0, Warping(top_p=1e-6), seen).isfinite().tolist() == [[False, True, False, False, False]]


def test_frequencies_are_those_of_the_warped_distribution() -> None:
    """A chi-square test on 40 000 draws, and nothing is drawn that is cut off."""
    warping, count = Warping(top_k=60, top_p=0.9, min_p=0.01), 40_000
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    seen = torch.zeros(1, 300, dtype=torch.bool)
    uniforms = torch.from_numpy(np.concatenate([draw_uniforms(1, n, s, 20) for n in range(200) for s in range(10)]))
    warped = warp(logits.clone(), 0.8, warping, seen).expand(count, -1).clone()
    drawn = choose(warped, 0.8, uniforms).bincount(minlength=300).double()
    expected = theirs(warping, 0.8)(torch.zeros(1, 0, dtype=torch.long), logits)[0].double().softmax(-1) * count
    assert drawn[expected == 0].sum() == 0
    there = expected > 0
    degrees = int(there.sum()) - 1
    statistic = float(((drawn - expected) ** 2 / expected)[there].sum())
    assert 10 < degrees < 60
    assert abs(statistic - degrees) < 3.5 * (2 * degrees) ** 0.5


@torch.no_grad()
def by_hand(model: Any, prompt: np.ndarray, uniforms: np.ndarray, warping: Warping, temperature: float) -> list[int]:
    """The whole sequence anew for every token, through transformers' processors; at temperature 0 the penalty alone."""
    ids = prompt.tolist()
    for uniform in uniforms:
        given = torch.tensor([ids])
        logits = model(input_ids=given, use_cache=False).logits[:, -1].float()
        if temperature == 0:
            ids.append(int(RepetitionPenaltyLogitsProcessor(warping.repetition_penalty)(given, logits).argmax()))
        else:
            p = theirs(warping, temperature)(given, logits)[0].double().softmax(-1).numpy()
            ids.append(int((p.cumsum() <= uniform * p.sum()).sum()))
        if ids[-1] in (3, 5, 11):
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_draws_are_those_of_whole_sequences_through_transformers(name: str, temperature: float) -> None:
    """With rows that end on the way: the tokens that a row has already are its own, prompt and response."""
    warping = Warping(repetition_penalty=1.4, top_k=20, top_p=0.9, min_p=0.02)
    prompts = draw_prompts(7)
    drawn = draw(Backbone(make(name), torch.float32), request(prompts, temperature=temperature, warping=warping))
    wanted = [
        [by_hand(make(name), prompt, draw_uniforms(7, n, s, 9), warping, temperature) for s in range(3)]
        for n, prompt in enumerate(prompts)
    ]
    assert [[one.ids.tolist() for one in row] for row in drawn] == wanted
    assert len({len(one) for row in wanted for one in row}) > 1
    assert plain(drawn) != plain(draw(Backbone(make(name), torch.float32), request(prompts, temperature=temperature)))


def test_a_warping_that_changes_nothing_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral options take the path without any; one that keeps every token takes the other, to the same draws."""
    prompts, backbone = draw_prompts(7), Backbone(make(), torch.float32)
    wanted = plain(draw(backbone, request(prompts)))
    assert plain(draw(backbone, request(prompts, warping=Warping(top_k=VOCABULARY)))) == wanted
    monkeypatch.delattr("rlhf_cli.rollout.generate.warp")
    assert plain(draw(backbone, request(prompts, warping=Warping(top_p=1.0, top_k=None)))) == wanted
