"""A reward model's score is that of plain transformers on the same text, reloads bit for bit, and never sees padding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import choose_pad_id
from rlhf_cli.models.load import read_head
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.models.tiny_backbone import draw_trees, make, make_backbone, passes

TREES = [*draw_trees(3, branches=2), *draw_trees(2, seed=1, branches=4)]
PAD = 47


def reward_backbone(name: str = "llama", *, lora: bool = True, **changes: Any) -> Backbone:
    """A reward model with a random head and, with LoRA, a random adapter."""
    return make_backbone(make(name, **changes), lora=lora, role="reward")


def packed_scores(backbone: Backbone, budget: int) -> torch.Tensor:
    """Scores by tree and response."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    with torch.no_grad():
        for batch, names in passes(backbone, TREES, budget):
            found |= dict(zip(names, backbone.scores("reward", batch), strict=True))
    return torch.stack([found[name] for name in sorted(found)])


def texts(trees: list[Tree]) -> list[np.ndarray]:
    return [np.concatenate((tree.prompt, response)).astype(np.int64) for tree in trees for response in tree.responses]


@torch.no_grad()
def classifier_scores(model: Any, batch_size: int) -> torch.Tensor:
    """Plain transformers on batches padded at the right, as everybody scores."""
    rows, found = texts(TREES), []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = torch.full((len(part), max(map(len, part))), model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for r, row in enumerate(part):
            ids[r, : len(row)], mask[r, : len(row)] = torch.from_numpy(row), 1
        found.append(model(input_ids=ids, attention_mask=mask).logits[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral"])
def test_scores_do_not_depend_on_the_layout_and_are_read_at_the_last_token(name: str) -> None:
    backbone = reward_backbone(name)
    with torch.no_grad(), backbone.plain_attention() as model:
        states = [
            model.base_model(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state[0, -1]
            for row in texts(TREES)
        ]
        wanted = torch.stack([backbone.heads["reward"](state)[0] for state in states])
    for budget in (1, 50, 4096):
        assert float((packed_scores(backbone, budget) - wanted).abs().max()) < 1e-5
    assert float(wanted.std()) > 0.1


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("qwen3", False)])
def test_plain_transformers_scores_the_same(name: str, tied: bool, lora: bool, tmp_path: Path) -> None:
    model = make(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    backbone = make_backbone(model, lora=lora, role="reward")
    backbone.pad_id = PAD
    backbone.save("reward", tmp_path / "model")
    wanted = packed_scores(backbone, 60)
    if lora:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=PAD)
        plain = PeftModel.from_pretrained(base, tmp_path / "model")
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert (plain.config.num_labels, plain.config.pad_token_id) == (1, PAD)
    for batch_size in (1, 4):
        assert float((classifier_scores(plain.eval(), batch_size) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    backbone = reward_backbone(lora=lora)
    backbone.save("reward", tmp_path)
    wanted = packed_scores(backbone, 60)
    with torch.no_grad():
        for parameter in backbone.trained_parameters().values():
            parameter.add_(0.1)
    assert float((packed_scores(backbone, 60) - wanted).abs().max()) > 0.1
    backbone.load("reward", tmp_path)
    assert torch.equal(packed_scores(backbone, 60), wanted)
    assert torch.equal(read_head(tmp_path), backbone.heads["reward"].weight)


def test_the_head_is_small_float32_and_trained() -> None:
    model = make(hidden_size=512, num_attention_heads=8)
    backbone = Backbone(model.to(torch.bfloat16), torch.bfloat16)
    torch.manual_seed(0)
    backbone.add_head("reward", None)
    head = backbone.heads["reward"].weight
    assert (head.dtype, tuple(head.shape), backbone.heads["reward"].bias) == (torch.float32, (1, 512), None)
    assert float(head.detach().std()) == pytest.approx(513**-0.5, rel=0.1)
    assert list(backbone.trained_parameters()) == ["reward.score.weight"]


@pytest.mark.parametrize("lora", [True, False])
def test_a_reward_models_head_is_trained(lora: bool) -> None:
    names = list(reward_backbone(lora=lora).trained_parameters())
    assert names[-1] == "reward.score.weight"
    assert len(names) > 10


def test_an_untied_output_head_is_not_trained_in_a_reward_model() -> None:
    names = set(reward_backbone(lora=False, tie_word_embeddings=False).trained_parameters())
    assert "lm_head.weight" not in names
    assert {"reward.score.weight", "model.embed_tokens.weight"} <= names
    assert "model.embed_tokens.weight" in reward_backbone(lora=False, tie_word_embeddings=True).trained_parameters()


def test_a_folder_without_a_head_is_no_reward_model(tmp_path: Path) -> None:
    make_backbone(make()).save("policy", tmp_path)
    with pytest.raises(UsageError, match=r"no reward head \(score.weight\) is in it"):
        read_head(tmp_path)


def test_the_pad_id_never_ends_a_response() -> None:
    """The tokenizer's pad is its EOS, as in many models: plain transformers would read the score before the EOS."""
    tokenizer = copy.deepcopy(tiny_tokenizer(eos="<|im_end|>", template=CHATML))
    tokenizer.pad_token = tokenizer.eos_token
    ends = [tokenizer.eos_token_id]
    chosen = choose_pad_id(tokenizer, ends)
    assert chosen is not None and chosen not in ends
    assert chosen in tokenizer.added_tokens_decoder
    tokenizer.pad_token = "<|im_start|>"
    assert choose_pad_id(tokenizer, ends) == tokenizer.pad_token_id
