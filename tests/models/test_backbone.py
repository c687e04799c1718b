"""A row's log-probabilities are those of plain transformers, however it is laid out, on every kernel; roles stay apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig

from rlhf_cli import sections
from rlhf_cli.data.trees import Piece, Tree, build_batch, plan_passes, tree_length
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.attention import KERNELS
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from tests.models.tiny_backbone import SHAPE, draw_trees, make, make_backbone, packed_logps, plain_logps

TREES = [*draw_trees(3, branches=2, earlier=True), *draw_trees(2, seed=1, branches=1), *draw_trees(1, seed=2, branches=4)]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", "alone"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "qwen3"])
def test_logps_do_not_depend_on_layout_or_kernel(name: str, attention: str) -> None:
    backbone = Backbone(make(name), torch.float32, "auto" if attention == "alone" else attention)
    if attention == "alone":
        backbone.kernel = KERNELS["alone"]
        backbone._use(backbone.kernel)
    assert backbone.kernel.layout == {"auto": "long", "alone": "alone"}.get(attention, "packed")
    with torch.no_grad(), backbone.plain_attention() as model:
        wanted = plain_logps(model, TREES)
    for budget in (1, 50, 4096):
        with torch.no_grad():
            found = packed_logps(backbone, TREES, budget)
        assert float((found - wanted).abs().max()) < 1e-5, budget


BEGUN = [
    *draw_trees(3, branches=2, earlier=True, system=18),
    *draw_trees(2, seed=1, branches=1, system=18),
    *draw_trees(1, seed=2, branches=3, system=18),
]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "qwen3"])
def test_what_begins_all_prompts_is_computed_once_a_row_and_changes_nothing(name: str, attention: str) -> None:
    backbone = Backbone(make(name), torch.float32, attention)
    with torch.no_grad(), backbone.plain_attention() as model:
        wanted = plain_logps(model, BEGUN)
    for budget in (1, 90, 4096):
        rows = [row for part in plan_passes(BEGUN, 1, budget, "long")[0] for row in part]
        batch = build_batch(BEGUN, rows)
        assert batch.shared.tolist() == [18 if len(row) > 1 else 0 for row in rows]
        assert batch.tokens == sum(map(tree_length, BEGUN)) - 18 * (len(BEGUN) - len(rows))
        with torch.no_grad():
            logps, _ = backbone.logps("policy", batch)
        found = {}
        for number, name_ in enumerate((piece.tree, b) for row in rows for piece in row for b in piece.branches):
            found[name_] = logps[batch.owner == number]
        assert float((torch.cat([found[key] for key in sorted(found)]) - wanted).abs().max()) < 1e-5, budget


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_a_model_that_takes_no_mask_gets_every_response_in_a_row_of_its_own(name: str) -> None:
    backbone = Backbone(make(name), torch.float32)
    assert backbone.kernel == KERNELS["alone"]
    for budget in (1, 60):
        with torch.no_grad():
            assert float((packed_logps(backbone, TREES, budget) - plain_logps(backbone.model, TREES)).abs().max()) < 1e-5


def test_a_response_does_not_see_its_sibling_or_a_neighbouring_tree() -> None:
    backbone = make_backbone(make())
    changed = list(TREES)
    first, second = TREES[0].responses
    changed[0] = TREES[0]._replace(responses=(first, (second + 7) % 48))
    changed[1] = TREES[1]._replace(prompt=(TREES[1].prompt + 5) % 48)
    names = [(piece.tree, b) for piece in _one_row(TREES) for b in piece.branches]
    found = []
    for trees in (TREES, changed):
        batch = build_batch(list(trees), [_one_row(trees)])
        logps, _ = backbone.logps("policy", batch)
        found.append([logps[batch.owner == number] for number in range(len(names))])
    same = [float((a - b).abs().max()) < 1e-6 for a, b in zip(*found, strict=True)]
    assert [name for name, equal in zip(names, same, strict=True) if not equal] == [(0, 1), (1, 0), (1, 1)]


def _one_row(trees: list[Tree]) -> list[Piece]:
    return [Piece(i, tuple(range(len(tree.responses)))) for i, tree in enumerate(trees)]


def test_logits_that_no_rule_gives_are_refused() -> None:
    """ModernBERT's decoder has a layer and a norm between its body and its output head."""
    settings = SHAPE | {"global_attn_every_n_layers": 2, "local_attention": 8, "num_key_value_heads": None}
    torch.manual_seed(0)
    model = hf.ModernBertDecoderForCausalLM(hf.ModernBertDecoderConfig(**settings, pad_token_id=0)).eval()
    with pytest.raises(
        UsageError, match=r"the model's logits are not its head times its hidden states, scaled or .*this model is not supported"
    ):
        Backbone(model, torch.float32)


def test_broken_weights_are_refused() -> None:
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(NumberError, match="not finite before any training: its weights are damaged"):
        Backbone(model, torch.float32)


def _two_roles(**options: Any) -> Backbone:
    """A policy, and a frozen copy of it as the reference."""
    from peft import get_peft_model_state_dict

    backbone = make_backbone(make(), **options)
    state = {n: t.clone() for n, t in get_peft_model_state_dict(backbone.peft, adapter_name="policy").items()}
    backbone.add_lora("reference", backbone.peft.peft_config["policy"], state, trained=False)
    return backbone


def test_the_reference_stays_while_the_policy_learns() -> None:
    backbone = _two_roles()
    frozen = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".policy." not in n}
    assert sum(".reference." in n for n in frozen) == len(backbone.trained_parameters()) == 28
    with torch.no_grad():
        before = {role: packed_logps(backbone, TREES, 60, role) for role in ("policy", "reference")}
    assert torch.equal(before["policy"], before["reference"])
    with torch.no_grad():
        bare = packed_logps(backbone, TREES, 60, BASE)
        assert float((bare - before["policy"]).abs().max()) > 0.05
        assert torch.equal(packed_logps(backbone, TREES, 60), before["policy"])
        assert torch.equal(packed_logps(make_backbone(make(), lora=False), TREES, 60), bare)

    optimizer = torch.optim.SGD(backbone.trained_parameters().values(), lr=0.1)
    (-packed_logps(backbone, TREES, 60).mean()).backward()
    optimizer.step()
    with torch.no_grad():
        after = {role: packed_logps(backbone, TREES, 60, role) for role in ("policy", "reference")}
    assert torch.equal(after["reference"], before["reference"])
    assert float(after["policy"].mean()) > float(before["policy"].mean()) + 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in backbone.model.named_parameters() if n in frozen)


def test_switching_roles_leaves_requires_grad_as_it_was() -> None:
    backbone = _two_roles()
    for role in ("reference", "policy", "reference", "reference", "policy"):
        backbone.activate(role)
        assert {n for n, p in backbone.model.named_parameters() if p.requires_grad} == set(backbone.trained_parameters())
        assert all(".policy." in n for n in backbone.trained_parameters())


def test_a_role_that_comes_back_forwards_as_the_first_time() -> None:
    """Adapters of layers and of tokens, and none; a third adapter in between changes nothing of the others."""
    backbone, seen = make_backbone(make()), dict[str, torch.Tensor]()
    tokens = lora_config(sections.Lora(r=2, train_tokens=(3, 7)), "", None)
    for added in ("tokens", "more", "last"):
        for role in (*backbone.peft.peft_config, BASE) * 2:
            found = packed_logps(backbone, TREES, 4096, role).detach()
            assert torch.equal(seen.setdefault(role, found), found)
        backbone.add_lora(added, tokens, None, trained=False)
        for name, p in backbone.model.named_parameters():
            if f".{added}" in name:
                torch.nn.init.normal_(p, std=0.1)
    assert len(seen) == 4
    assert all(float((one - other).abs().max()) > 1e-3 for one, other in itertools.combinations(seen.values(), 2))


def test_a_new_adapter_has_no_dropout_where_the_model_is_evaluated() -> None:
    backbone = _two_roles()
    for mode in (True, False):
        backbone.train(mode)
        backbone.add_lora(f"third_{mode}", lora_config(sections.Lora(r=2, dropout=0.5), "", None), None, trained=True)
        assert {module.training for module in backbone.model.modules()} == {mode}


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient_when_roles_alternate(attention: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = _two_roles(attention=attention, gradient_checkpointing=checkpointing)
        backbone.trained["reference"] = frozenset(n for n, _ in backbone.model.named_parameters() if ".reference." in n)
        backbone.active = None
        backbone.model.train()
        for role, weight in (("policy", 1.0), ("reference", 0.5), ("policy", -0.3)):
            (weight * packed_logps(backbone, TREES, 4096, role).sum()).backward()
        gradients.append({n: p.grad for n, p in backbone.trained_parameters().items()})
    plain, recomputed = gradients
    assert len(plain) == 56
    assert all(float(g.abs().max()) > 0 for g in plain.values())
    assert max(float((plain[n] - recomputed[n]).abs().max()) for n in plain) < 1e-6 * max(
        float(g.abs().max()) for g in plain.values()
    )


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    backbone = make_backbone(make(), lora=lora)
    backbone.save("policy", tmp_path)
    with torch.no_grad():
        wanted = packed_logps(backbone, TREES, 60)
        for parameter in backbone.trained_parameters().values():
            parameter.add_(0.1)
        assert float((packed_logps(backbone, TREES, 60) - wanted).abs().max()) > 0.1
        backbone.load("policy", tmp_path)
        assert torch.equal(packed_logps(backbone, TREES, 60), wanted)


def test_an_adapter_of_another_base_does_not_fit(tmp_path: Path) -> None:
    make_backbone(make(num_hidden_layers=1)).save("policy", tmp_path)
    with pytest.raises(
        UsageError, match=r"the adapter does not fit the base model: 14 tensors differ, the first is base_model\.model\."
    ):
        make_backbone(make()).load("policy", tmp_path)


def test_an_empty_prompt_leaves_the_first_token_without_a_loss() -> None:
    tree = Tree(np.zeros(0, np.int32), np.zeros(0, bool), (np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)), 0)
    backbone = make_backbone(make())
    with torch.no_grad():
        found = packed_logps(backbone, [tree], 60)
        with backbone.plain_attention() as model:
            assert float((found - plain_logps(model, [tree])).abs().max()) < 1e-5
    assert found.shape == (3,)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_tied_embeddings_is_refused(tied: bool) -> None:
    """Merged, it would change the output head too; on embeddings of their own it may be."""
    backbone = Backbone(make("llama", tie_word_embeddings=tied), torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    if tied:
        with pytest.raises(UsageError, match=r"are its output head too \(tie_word_embeddings\)"):
            backbone.add_lora("policy", config, None, trained=True)
    else:
        backbone.add_lora("policy", config, None, trained=True)
        assert any("embed_tokens" in name for name in backbone.trained_parameters())
