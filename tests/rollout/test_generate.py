"""Drawn responses: the model's own distribution, one uniform a token, and nothing that depends on how rows are batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.errors import NumberError, Stopped, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.rollout import decoders, generate
from rlhf_cli.rollout.decoders import cut_prompts
from rlhf_cli.rollout.generate import Request, Response, TransformersEngine
from rlhf_cli.rollout.next_token import choose, draw_uniforms
from tests.models.tiny_backbone import VOCABULARY, make, make_backbone

MASKED = ["llama", "gpt2", "gemma3", "mistral", "qwen3"]
UNMASKED = ["mamba", "bloom"]


def draw_prompts(count: int, seed: int = 0, longest: int = 12) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, random.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def request(prompts: list[np.ndarray], **changes: Any) -> Request:
    settings: dict[str, Any] = {"samples": 3, "max_new_tokens": 9, "temperature": 1.0, "ends": [3, 5, 11], "seed": 7}
    return Request(prompts, **(settings | {"numbers": range(len(prompts))} | changes))


def draw(backbone: Backbone, asked: Request, role: str = "policy") -> list[list[Response]]:
    return TransformersEngine(backbone, role).generate(asked)


def plain_draw(model: Any, prompt: np.ndarray, uniforms: np.ndarray, asked: Request) -> tuple[list[int], bool]:
    """By hand: the whole sequence anew for every token, no cache, and a cumulative sum over the vocabulary."""
    ids = prompt.tolist()
    for uniform in uniforms:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        if asked.temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / asked.temperature)
            token = int((p.cumsum() <= uniform * p.sum()).sum())
        ids.append(token)
        if token in asked.ends:
            return ids[len(prompt) :], True
    return ids[len(prompt) :], False


def plain(drawn: list[list[Response]]) -> list[list[tuple[list[int], bool]]]:
    return [[(one.ids.tolist(), one.ended) for one in row] for row in drawn]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", [*MASKED, *UNMASKED])
def test_draws_are_those_of_whole_sequences_without_a_cache(name: str, temperature: float) -> None:
    asked = request(draw_prompts(7), temperature=temperature)
    with torch.no_grad():
        wanted = [
            [plain_draw(make(name), prompt, draw_uniforms(7, n, s, 9), asked) for s in range(3)]
            for n, prompt in enumerate(asked.prompts)
        ]
    drawn = draw(Backbone(make(name), torch.float32), asked)
    assert plain(drawn) == wanted
    lengths = {len(one.ids) for row in drawn for one in row}
    assert len(lengths) > 1, "the rows end at different times"
    assert all(one.ids.dtype == np.int32 for row in drawn for one in row)


@pytest.mark.parametrize("name", MASKED)
def test_logits_with_the_cache_are_those_of_a_forward_pass_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every logits that a token was chosen from, with rows that end on the way, against one pass over the whole sequence."""
    found: list[torch.Tensor] = []

    def record(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
        found.append(logits.clone())
        return choose(logits, temperature, uniforms)

    monkeypatch.setattr(generate, "choose", record)
    prompts = draw_prompts(6, seed=3)
    drawn = draw(Backbone(make(name), torch.float32), request(prompts, samples=2))
    wanted = []
    for prompt, row in zip(prompts, drawn, strict=True):
        for one in row:
            ids = torch.from_numpy(np.concatenate((prompt, one.ids)).astype(np.int64))[None]
            with torch.no_grad():
                wanted.append(make(name)(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
    for t, logits in enumerate(found):
        here = torch.stack([sequence[t] for sequence in wanted if len(sequence) > t])
        assert logits.shape == here.shape, "finished rows are left out"
        # Rows change their places; each has its own nearest one.
        assert float((here[:, None] - logits).abs().amax(-1).amin(1).max()) < 1e-5
    assert sum(map(len, found)) == sum(len(one.ids) for row in drawn for one in row)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_draws_do_not_depend_on_order_waves_passes_or_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = draw_prompts(9, seed=1)
    backbone = make_backbone(make(name), lora=False)
    whole = plain(draw(backbone, request(prompts)))
    order = np.random.default_rng(0).permutation(9)
    mixed = plain(draw(backbone, request([prompts[i] for i in order], numbers=order.tolist())))
    assert [mixed[list(order).index(i)] for i in range(9)] == whole
    dealt = [plain(draw(backbone, request(prompts[r::2], numbers=range(r, 9, 2)))) for r in range(2)]
    assert [dealt[i % 2][i // 2] for i in range(9)] == whole
    assert [row[:2] for row in whole] == plain(draw(backbone, request(prompts, samples=2)))
    monkeypatch.setattr(generate, "CPU_CACHE", 20_000)
    monkeypatch.setattr(decoders, "PROMPT_TOKENS", 20)
    assert len(list(TransformersEngine(backbone, "policy")._waves(request(prompts)))) > 4
    assert plain(draw(backbone, request(prompts))) == whole


def test_waves_cover_every_row_once_and_keep_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = draw_prompts(9, seed=1)
    engine = TransformersEngine(make_backbone(make()), "policy")
    # 2 layers × (keys and values) × 2 heads × 4 dimensions × 4 bytes
    assert (engine.fixed, engine.per_token) == (0, 2 * 2 * 2 * 4 * 4)
    row = 128 * (max(map(len, prompts)) + 9) + 4 * 4 * VOCABULARY
    monkeypatch.setattr(generate, "CPU_CACHE", 6 * row)
    waves = list(engine._waves(request(prompts)))
    assert [len(wave) for wave in waves] == [6, 6, 5, 5, 5]
    assert sorted(map(tuple, np.concatenate(waves).tolist())) == [(p, s) for p in range(9) for s in range(3)]
    lengths = [len(prompts[p]) for p, _ in np.concatenate(waves)]
    assert lengths == sorted(lengths, reverse=True)
    monkeypatch.setattr(generate, "CPU_CACHE", 1)
    assert {len(wave) for wave in engine._waves(request(prompts))} == {1}


def test_each_prompt_is_read_once_and_ended_rows_are_not_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(make(), torch.float32)
    prompts = draw_prompts(5)
    engine = TransformersEngine(backbone, "policy")
    shapes: list[tuple[int, ...]] = []
    backbone.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    drawn = engine.generate(request(prompts, samples=4))
    assert sum(rows for rows, width in shapes if width > 1) + (1 in map(len, prompts)) == 5
    alive = [sum(len(one.ids) > t for row in drawn for one in row) for t in range(1, 9)]
    assert [rows for rows, width in shapes[-len([n for n in alive if n]) :]] == [n for n in alive if n]


def test_prompts_are_cut_where_padding_costs_more_than_a_pass() -> None:
    assert cut_prompts([64, 60, 50, 40, 12, 10, 8]) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert cut_prompts([5000, 3000, 2990, 2980]) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]
    assert cut_prompts([16] * 512) == [slice(0, 256), slice(256, 512)]


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    """A chi-square test on 40 000 draws from 300 tokens, more than one block, with the samples' own uniforms."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    logits[[5, 280]] = -torch.inf
    count = 40_000
    uniforms = torch.from_numpy(np.concatenate([draw_uniforms(1, n, s, 20) for n in range(200) for s in range(10)]))
    drawn = choose(logits.expand(count, -1).clone(), 0.8, uniforms).bincount(minlength=300).double()
    expected = (logits.double() / 0.8).softmax(-1) * count
    common = expected > 5
    assert drawn[[5, 280]].tolist() == [0, 0]
    degrees = int(common.sum()) - 1
    statistic = float(((drawn - expected) ** 2 / expected)[common].sum())
    assert degrees > 100
    assert abs(statistic - degrees) < 3.5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("tokens", [3, 256, 700])
def test_no_uniform_draws_a_token_of_probability_zero(tokens: int) -> None:
    """At both ends of [0, 1), with nothing likely at both ends of the vocabulary; underflow is probability 0 too."""
    logits = torch.full((1, tokens), -1e4)
    logits[0, 1] = 0.0
    for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        assert choose(logits.clone(), 1.0, torch.tensor([uniform])).tolist() == [1]


def test_a_uniform_names_the_token_whose_interval_holds_it() -> None:
    logits = torch.log(torch.tensor([[1.0, 0.0, 2.0, 1.0]]))
    found = [choose(logits.clone(), 1.0, torch.tensor([u], dtype=torch.float64)).item() for u in (0, 0.249, 0.251, 0.749, 0.751)]
    assert found == [0, 0, 2, 2, 3]


def test_uniforms_differ_between_seeds_prompts_samples_and_positions() -> None:
    vectors = [draw_uniforms(*key, 50) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 0), (0, 1, 10))]
    values = np.concatenate(vectors)
    assert len(np.unique(values)) == 300
    assert 0 <= values.min() < 0.02
    assert 0.98 < values.max() < 1
    assert np.array_equal(draw_uniforms(0, 0, 0, 8), vectors[0][:8])


def test_the_adapter_is_sampled_with_and_everything_is_left_as_it_was() -> None:
    backbone = make_backbone(make(), dropout=0.5)
    bare, tuned = (plain(draw(backbone, request(draw_prompts(7)), role)) for role in ("base", "policy"))
    assert bare == plain(draw(Backbone(make(), torch.float32), request(draw_prompts(7))))
    assert tuned != bare
    assert backbone.model.config._attn_implementation == backbone.kernel.name
    assert torch.is_grad_enabled()
    assert not any("forward" in vars(m) for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))


def test_a_pause_between_tokens_may_raise_and_everything_is_left_as_it_was() -> None:
    backbone = make_backbone(make())
    merged: list[bool] = []

    def pause() -> None:
        merged.append(any("forward" in vars(m) for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)))
        if len(merged) == 3:
            raise Stopped("", 15)

    with pytest.raises(Stopped):
        TransformersEngine(backbone, "policy").generate(request(draw_prompts(4)), pause)
    assert merged == [True] * 3
    assert torch.is_grad_enabled()
    assert backbone.model.config._attn_implementation == backbone.kernel.name
    assert not any("forward" in vars(m) for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))


def test_gradient_checkpointing_does_not_take_the_cache_away() -> None:
    asked = request(draw_prompts(5))
    backbone = make_backbone(make(), gradient_checkpointing=True)
    backbone.train(True)
    assert plain(draw(backbone, asked)) == plain(draw(make_backbone(make()), asked))


def test_what_cannot_be_drawn_is_refused() -> None:
    backbone = make_backbone(make())
    with pytest.raises(UsageError, match=r"an empty prompt: .*give every prompt at least one"):
        draw(backbone, request([np.empty(0, np.int32)]))
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[3, 2] = float("nan")
    with pytest.raises(NumberError, match="logits are not finite while it samples"):
        draw(backbone, request(draw_prompts(2)))
