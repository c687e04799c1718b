"""A tiny random model of every family of causal language models that is trained here: one row a family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.tiny_backbone import VOCABULARY

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    # Large enough that what a token sees moves its log-probability by far more than a test's tolerance.
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0),
    **dict.fromkeys(("activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "emb_pdrop"), 0.0),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 4,  # shorter than the sequences of the tests
    "state_size": 4,
    "pad_token_id": None,  # an embedding of padding would get no gradient
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Whatever a configuration calls it."""

TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = TWO_KINDS | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
GRANITE = {"logits_scaling": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "linear_conv_kernel_dim": 3,
}
MAMBA2 = {
    **{"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8},
}
MIXERS = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 4}
ZAMBA |= {"attention_head_dim": 8, "attention_hidden_size": 32}
EARLY = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 4.0},
    "cohere2": {"logit_scale": 4.0} | TWO_KINDS,
    "cwm": TWO_KINDS,
    "deepseek_v2": LATENT | {"num_key_value_heads": 4},
    "deepseek_v3": LATENT | {"num_key_value_heads": 4},
    "diffllama": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_layer_end_index": 1}
    },
    "exaone4": TWO_KINDS | {"sliding_window_pattern": "LG"},
    "falcon": {"multi_query": True, "alibi": False},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 32, "lm_head_multiplier": 3.0},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0},
    "gemma3_text": GEMMA,
    "gemma3n_text": TWO_KINDS
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "laurel_rank": 4}
    | {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [32, 32]}
    | {"final_logit_softcapping": 2.0},
    "gemma4_text": {"layer_types": 2 * TWO_KINDS["layer_types"], "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_oss": TWO_KINDS,
    "gptj": {"rotary_dim": 4},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"], "logits_scaling": 0.25},
    "granitemoeshared": GRANITE,
    "helium": {"head_dim": 4},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": EARLY | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {},
    "lfm2": {
        **{
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 8,
            "block_auto_adjust_ff_dim": False,
            "conv_L_cache": 3,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": {
        **{"intermediate_size_mlp": 32, "attention_chunk_size": 4, "no_rope_layers": [1, 0], "interleave_moe_layer_step": 1},
        **{"moe_layers": [0, 1], "layer_types": ["chunked_attention", "full_attention"]},
    },
    "mamba": {},
    "mamba2": MIXERS,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "ministral": TWO_KINDS,
    "mistral": {},
    "mixtral": {},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nanochat": {"final_logit_softcapping": 2.0},
    "nemotron": {},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4},
        **{"n_groups": 1, "chunk_size": 8},
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": TWO_KINDS,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": DELTA,
    "recurrent_gemma": {
        **{"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "logits_soft_cap": 2.0}
    },
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": GEMMA,
    "xglm": {},
    "zamba": EARLY | ZAMBA | {"n_mamba_heads": 2},
    "zamba2": ZAMBA
    | {"n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4},
}
"""transformers' model_type → what its tiny configuration has beside SIZES."""

COMMON = (
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mamba",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Those of the quick tests."""


def make_config(name: str, **changes: Any) -> Any:
    """A configuration with the sizes that it knows."""
    kind = CONFIG_MAPPING[name]
    known, synonyms = set(kind().to_dict()) | set(kind.attribute_map), kind.attribute_map
    sizes = {key: value for key, value in SIZES.items() if key in known and synonyms.get(key) not in SIZES.keys() & known}
    return AutoConfig.for_model(name, **(sizes | FAMILIES[name] | changes))


def make_family(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose norms, biases and gates are not what they are initialised to, so that none of them does nothing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or float(parameter.std()) == 0:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif float(parameter.std()) > 3:  # uninitialised
                parameter.normal_(0, 0.3)
    return model
