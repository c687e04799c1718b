"""Tiny models in memory, trees to put through them, and what plain transformers makes of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf

from rlhf_cli import sections
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.backbone import Backbone, lora_config

VOCABULARY = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough that what a token sees moves its log-probability by far more than a test's tolerance.
    "initializer_range": 0.3,
}
GEMMA = SHAPE | {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SHAPE),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GEMMA),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, SHAPE | {"sliding_window": 5}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, SHAPE | {"head_dim": 8}),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, BLOOM | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, MAMBA),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GEMMA | {"final_logit_softcapping": 2.0}),
}


def make(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode; nothing of it but its architecture is real."""
    model, config, settings = MODELS[name]
    torch.manual_seed(seed)
    return model(config(**(settings | changes))).eval()


def make_backbone(
    model: Any,
    *,
    lora: bool = True,
    attention: str = "auto",
    dropout: float = 0.0,
    seed: int = 1,
    gradient_checkpointing: bool = False,
    role: str = "policy",
) -> Backbone:
    """A backbone with one trained role, "reward" with a head; with LoRA, B is random, for with B = 0 an adapter does nothing."""
    backbone = Backbone(model, torch.float32, attention)
    torch.manual_seed(seed)
    if role == "reward":
        backbone.add_head(role, None)
    if lora:
        config = lora_config(sections.Lora(r=4, alpha=8, dropout=dropout), "", None)
        torch.manual_seed(seed)
        backbone.add_lora(role, config, None, trained=True)
        with torch.no_grad():
            for name, parameter in backbone.trained_parameters().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    else:
        backbone.train_all_weights(role)
    if gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    return backbone


def draw_trees(
    count: int, seed: int = 0, *, branches: int = 1, earlier: bool = False, longest: int = 9, system: int = 0
) -> list[Tree]:
    """Random prompts, each with `branches` responses; with `earlier`, some tokens of a prompt are supervised.

    All prompts begin with the same `system` tokens.
    """
    random = np.random.default_rng(seed)
    ids = lambda: random.integers(0, VOCABULARY, random.integers(1, longest + 1)).astype(np.int32)  # noqa: E731
    trees = []
    for row in range(count):
        prompt = np.concatenate((np.random.default_rng(99).integers(0, VOCABULARY, system).astype(np.int32), ids()))
        supervised = random.random(len(prompt)) < 0.4 if earlier else np.zeros(len(prompt), bool)
        trees.append(Tree(prompt, supervised, tuple(ids() for _ in range(branches)), row))
    return trees


def sequences(tree: Tree) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each response after its prompt as (1, T) ids, and which of the tokens 1 … T − 1 have a loss, (T − 1,)."""
    found = []
    for number, response in enumerate(tree.responses):
        earlier = tree.supervised if number == 0 else np.zeros(len(tree.prompt), bool)
        mask = np.concatenate((earlier, np.ones(len(response), bool)))
        ids = np.concatenate((tree.prompt, response)).astype(np.int64)
        found.append((torch.from_numpy(ids)[None], torch.from_numpy(mask)[1:]))
    return found


def plain_logps(model: Any, trees: Sequence[Tree]) -> torch.Tensor:
    """Log-probabilities of all supervised tokens by tree and response, one sequence at a time, from the model's own logits."""
    found = []
    for tree in trees:
        for ids, mask in sequences(tree):
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            found.append(logps.gather(-1, ids[0, 1:, None])[:, 0][mask])
    return torch.cat(found)


def packed_logps(backbone: Backbone, trees: list[Tree], budget: int, role: str = "policy") -> torch.Tensor:
    """The backbone's log-probabilities in the order of `plain_logps`."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for batch, names in passes(backbone, trees, budget):
        logps, _ = backbone.logps(role, batch)
        for number, name in enumerate(names):
            found[name] = logps[batch.owner == number]
    return torch.cat([found[name] for name in sorted(found)])


def passes(backbone: Backbone, trees: list[Tree], budget: int) -> Any:
    """(batch, [(tree, response) by owner]) of every pass."""
    from rlhf_cli.data.trees import build_batch, plan_passes

    for rows in plan_passes(trees, 1, budget, backbone.kernel.layout)[0]:
        yield build_batch(trees, rows), [(piece.tree, b) for row in rows for piece in row for b in piece.branches]


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {name: parameter.detach().clone() for name, parameter in backbone.trained_parameters().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
