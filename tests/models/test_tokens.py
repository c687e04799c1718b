"""Tokens that a base never learned: they are found by their rows, and train beside LoRA when a recipe names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli import sections
from rlhf_cli.data.trees import Piece, Tree, build_batch
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.merging import merged
from rlhf_cli.models.tokens import untouched
from rlhf_cli.rollout.generate import Request, TransformersEngine
from tests.models.families import make_family
from tests.models.tiny_backbone import draw_trees, packed_logps, plain_logps
from tests.tiny import make_model, rlhf, write_pairs, write_recipe, write_rows

TOKENS = [3, 40]
IDS = torch.arange(2, 46).reshape(2, 22)
TREES = draw_trees(3, branches=2)
TREES = [*TREES, Tree(np.array(TOKENS, np.int32), np.zeros(2, bool), (np.array([5, 40, 3], np.int32),), 3)]


def make_backbone(model: Any, tokens: list[int] = TOKENS, seed: int = 1) -> Backbone:
    backbone = Backbone(model, torch.float32)
    add(backbone, "policy", tokens, seed)
    return backbone


def add(backbone: Backbone, role: str, tokens: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    backbone.add_lora(role, lora_config(sections.Lora(r=4, alpha=8, train_tokens=[*tokens]), "", None), None, trained=True)
    with torch.no_grad():
        for name, parameter in backbone.trained_roles[role].items():
            if "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_plain_peft_and_the_merged_model_give_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    base = make_family(family, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    backbone = make_backbone(base)
    names = {name for name in backbone.trained_parameters() if ".lora_" not in name}
    assert names == {
        f"{end}.token_adapter.trainable_tokens_delta.policy" for end in ("model.embed_tokens", *(() if tied else ("lm_head",)))
    }
    with torch.no_grad():
        with backbone.plain_attention() as model:
            wanted, logps = model(IDS).logits, plain_logps(model, TREES)
        assert float((packed_logps(backbone, TREES, 40) - logps).abs().max()) < 1e-5
        with merged(backbone, "policy"), backbone.plain_attention() as model:
            assert float((model(IDS).logits - wanted).abs().max()) < 1e-4
        backbone.save("policy", tmp_path / "adapter")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        assert float((whole(IDS).logits - wanted).abs().max()) > 1e-2
        adapted = PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
        assert float((adapted(IDS).logits - wanted).abs().max()) < 1e-5
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert float((again(IDS).logits - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_only_rows_of_the_tokens_learn_and_by_their_own_gradients(tied: bool, tmp_path: Path) -> None:
    """The gradient is that of the same rows in the merged model, where plain autograd gives it to all rows."""
    backbone = make_backbone(make_family("llama", tie_word_embeddings=tied))
    backbone.save("policy", tmp_path)
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}
    (-packed_logps(backbone, TREES, 40).mean()).backward()
    found = {n.split(".token_adapter")[0]: p.grad for n, p in backbone.trained_parameters().items() if ".lora_" not in n}
    plain = PeftModel.from_pretrained(make_family("llama", tie_word_embeddings=tied), str(tmp_path)).merge_and_unload()
    plain.requires_grad_(True)
    (-plain_logps(plain, TREES).mean()).backward()
    wanted = {name: plain.get_submodule(name).weight.grad for name in found}
    assert len(found) == 2 - tied
    for name, gradient in found.items():
        assert float((gradient - wanted[name][TOKENS]).abs().max()) < 1e-5 * float(wanted[name].abs().max())
    torch.optim.SGD(backbone.trained_parameters().values(), lr=0.1).step()
    changed = {n for n, p in backbone.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(backbone.trained_parameters())


def test_roles_have_rows_of_their_own(tmp_path: Path) -> None:
    with torch.no_grad():
        alone = packed_logps(make_backbone(make_family("llama")), TREES, 40)
        bare = packed_logps(Backbone(make_family("llama"), torch.float32), TREES, 40, BASE)
        backbone = make_backbone(make_family("llama"))
        state = {n: t.clone() for n, t in get_peft_model_state_dict(backbone.peft, adapter_name="policy").items()}
        backbone.add_lora("reference", backbone.peft.peft_config["policy"], state, trained=False)
        add(backbone, "value", [], 2)
        add(backbone, "other", TOKENS, 3)
        plain = make_backbone(make_family("llama"), [], 2)
        for role in ("policy", BASE, "value", "reference", "other", "policy", BASE):
            found = packed_logps(backbone, TREES, 40, role)
            wanted = {BASE: bare, "value": packed_logps(plain, TREES, 40)}.get(role, alone)
            assert torch.equal(found, wanted) == (role != "other"), role
        for role in ("policy", "value"):
            backbone.save(role, tmp_path / role)
            before = {n: p.clone() for n, p in backbone.trained_roles[role].items()}
            for parameter in backbone.trained_roles[role].values():
                parameter.add_(1.0)
            backbone.load(role, tmp_path / role)
            assert all(torch.equal(p, before[n]) for n, p in backbone.trained_roles[role].items())
        for parameter in backbone.trained_roles["policy"].values():
            parameter.add_(0.05)
        assert torch.equal(packed_logps(backbone, TREES, 40, "reference"), alone)
        assert float((packed_logps(backbone, TREES, 40) - alone).abs().max()) > 1e-2
        backbone.remove("reference")
        assert torch.equal(packed_logps(backbone, TREES, 40, BASE), bare)


@pytest.mark.parametrize("tied", [False, True])
def test_samples_are_drawn_with_the_rows(tied: bool) -> None:
    backbone = make_backbone(make_family("llama", tie_word_embeddings=tied))
    drawn = TransformersEngine(backbone, "policy").generate(Request([TREES[3].prompt], [0], 1, 8, 0.0, [2], 0))
    ids = torch.from_numpy(TREES[3].prompt.astype(np.int64))[None]
    with backbone.plain_attention() as model:
        backbone.activate("policy")
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert plain[0, 2:].tolist() == drawn[0][0].ids.tolist()


def test_rows_near_zero_or_near_another_are_untouched() -> None:
    weight = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert untouched([weight], range(200)) == []
    changed = weight.clone()
    changed[7] *= 1e-3
    changed[11] = changed[150] + 0.01
    changed[20] = changed[21] + 1.0
    assert untouched([changed], [3, 7, 11, 20]) == [7, 11]
    assert untouched([weight, changed], [3, 7, 11]) == [7, 11]


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_comes_back_and_a_reward_model_is_a_plain_classifier(role: str, tied: bool, tmp_path: Path) -> None:
    base = make_family("llama", tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    backbone = Backbone(base, torch.float32)
    torch.manual_seed(0)
    if role == "reward":
        backbone.add_head(role, None)
    add(backbone, role, TOKENS, 1)
    backbone.save(role, tmp_path / "model")
    wanted = {n: p.detach().clone() for n, p in backbone.trained_parameters().items()}
    assert sum(".token_adapter." in n for n in wanted) == (2 if role == "policy" and not tied else 1)
    with torch.no_grad():
        states = backbone.hidden(role, _whole(IDS))
        for parameter in backbone.trained_parameters().values():
            parameter.add_(0.1)
        backbone.load(role, tmp_path / "model")
    assert all(torch.equal(p, wanted[n]) for n, p in backbone.trained_parameters().items())
    if role == "reward":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
        with torch.no_grad():
            scores = PeftModel.from_pretrained(plain, str(tmp_path / "model")).eval()(IDS).logits[:, 0]
            assert float((scores - backbone.heads[role](states[[21, 43]])[:, 0]).abs().max()) < 1e-5


def _whole(ids: torch.Tensor) -> Any:
    trees = [
        Tree(row[:1].numpy().astype(np.int32), np.zeros(1, bool), (row[1:].numpy().astype(np.int32),), i)
        for i, row in enumerate(ids)
    ]
    return build_batch(trees, [[Piece(i, (0,))] for i in range(len(trees))])


def test_a_base_that_never_saw_its_template_is_told_of_and_taught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model(tmp_path / "base", initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows = write_rows(tmp_path / "rows.jsonl", 16)

    def run(name: str, start: Path, stage: str = "sft", data: Path = rows, **sections: Any) -> tuple[int, str]:
        recipe = write_recipe(tmp_path / f"{name}.yaml", start, data, tmp_path / name, train={"steps": 2}, **sections)
        code, said = rlhf(stage, recipe), capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    code, said = run("ordinary", base)
    assert code == 0 and "never learned" not in said
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data[turns] = weight.data[turns[0]] * torch.tensor([[1.0], [1.001]])
    model.save_pretrained(base)
    code, said = run("told", base, lora={"r": 4})
    assert (
        code == 0 and "the model has never learned <|im_start|>, <|im_end|>, and LoRA leaves embeddings as they are: set " in said
    )
    assert 'lora.train_tokens: ["<|im_start|>", "<|im_end|>"], or start from' in said
    assert "never learned" not in run("full", base, lora=None)[1]
    code, said = run("unknown", base, lora={"train_tokens": ["<|im_begin|>"]})
    assert code == 2 and "lora.train_tokens: '<|im_begin|>' is no token of this tokenizer" in said
    code, said = run("taught", base, lora={"r": 4, "train_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert code == 0 and "never learned" not in said
    state = load_file(tmp_path / "taught/model/adapter_model.safetensors")
    for end, embeddings in (("model.embed_tokens", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
        learned = state[f"base_model.model.{end}.token_adapter.trainable_tokens_delta"]
        assert float((learned - embeddings.weight[turns]).detach().abs().min(1).values.max()) > 0 < float(learned.std())
    code, said = run("dpo", tmp_path / "taught", "dpo", write_pairs(tmp_path / "pairs.jsonl", 16))
    assert code == 0 and "never learned" not in said
    assert load_file(tmp_path / "dpo/model/adapter_model.safetensors").keys() == state.keys()
    code, said = run("other", tmp_path / "taught", lora={"r": 4})
    assert code == 2 and "the parent's adapter has r 4" in said and f"tokens {turns}" in said
    assert run("rm", tmp_path / "taught", "train-rm", tmp_path / "pairs.jsonl")[0] == 0
    kept = json.loads((tmp_path / "rm/model/adapter_config.json").read_text())["trainable_token_indices"]
    assert kept == {"model.embed_tokens": turns}, "a classifier has no output head"
    for name in ("dpo", "rm"):
        for options in ([], ["--merge"]):
            assert rlhf("export", tmp_path / name, tmp_path / f"{name}{len(options)}", *options) == 0
