"""Did-you-mean for keys: typos, keys of another section, and names that other tools use."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.suggest import closest, likeness

OTHER_NAMES = {
    "seed": ("seed",),
    "train.learning_rate": ("lr", "learning_rate"),
    "train.weight_decay": ("weight_decay",),
    "train.max_grad_norm": ("max_grad_norm",),
    "train.epochs": ("num_epochs", "num_train_epochs"),
    "train.steps": ("max_steps",),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler"),
    "train.warmup": ("warmup_ratio", "warmup_steps"),
    "train.optimizer": ("optim", "optimizer"),
    "train.batch_size": ("per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size"),
    "train.log_every": ("logging_steps",),
    "train.eval_every": ("eval_steps", "eval_strategy", "evals_per_epoch"),
    "train.save_every": ("save_steps", "save_strategy", "saves_per_epoch"),
    "train.keep_checkpoints": ("save_total_limit",),
    "train.keep_best": ("load_best_model_at_end",),
    "trackers": ("report_to",),
    "output": ("output_dir",),
    "model.path": ("base_model", "model_name", "model_name_or_path"),
    "model.revision": ("model_revision", "revision_of_model"),
    "data.train": ("dataset", "datasets", "dataset_name", "dataset_mixture", "dataset_mixer"),
    "data.eval": ("eval_dataset", "test_datasets"),
    "data.holdout": ("val_set_size", "val_size", "test_split_size"),
    "data.max_length": ("max_length", "max_seq_length", "sequence_len", "cutoff_len"),
    "data.train.limit": ("max_samples",),
    "model.dtype": ("bf16", "fp16", "torch_dtype", "pure_bf16"),
    "model.attention": ("attention", "attn_implementation", "flash_attn", "flash_attention"),
    "model.quantize": ("load_in_4bit", "load_in_8bit", "quantization_bit"),
    "model.gradient_checkpointing": ("gradient_checkpointing", "disable_gradient_checkpointing"),
    "lora": ("use_peft", "finetuning_type", "adapter"),
    "lora.r": ("lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.target_modules": ("lora_target", "lora_target_modules", "lora_target_linear"),
    "objective.kind": ("loss_type", "pref_loss"),
    "objective.beta": ("beta", "pref_beta", "rl_beta", "dpo_beta", "orpo_alpha"),
    "objective.teacher": ("teacher_model_name_or_path",),
    "objective.label_smoothing": ("label_smoothing", "dpo_label_smoothing"),
    "objective.gamma": ("simpo_gamma",),
    "objective.tau": ("discopop_tau",),
    "objective.sft_weight": ("rpo_alpha", "pref_ftx", "cpo_alpha"),
    "objective.lambda_d": ("desirable_weight", "kto_chosen_weight", "kto_desirable_weight"),
    "objective.lambda_u": ("undesirable_weight", "kto_rejected_weight", "kto_undesirable_weight"),
    "objective.center_coef": ("center_rewards_coefficient",),
    "reference.model": ("ref_model", "reference_model"),
    "reference.cache": ("precompute_ref_log_probs",),
    "objective.epochs": ("num_ppo_epochs", "ppo_epochs"),
    "objective.minibatches": ("num_mini_batches",),
    "objective.clip": ("cliprange",),
    "objective.clip_high": ("epsilon_high", "clip_ratio_high"),
    "objective.scale": ("scale_rewards",),
    "objective.ratio": ("importance_sampling_level",),
    "objective.value_clip": ("cliprange_value",),
    "objective.value_coef": ("vf_coef",),
    "objective.whiten": ("whiten_advantages",),
    "kl.coef": ("kl_coef", "init_kl_coef"),
    "kl.estimator": ("kl_estimator",),
    "kl.target": ("target_kl",),
    "rollout.max_new_tokens": ("response_length", "max_completion_length", "max_tokens"),
    "rollout.responses_per_prompt": ("num_generations", "rloo_k", "num_return_sequences"),
    "rollout.engine": ("use_vllm",),
    "rollout.correction": ("vllm_importance_sampling_correction",),
    "reward": ("reward_funcs", "reward_model", "reward_model_path"),
    "reward.weight": ("reward_weights",),
    "ptx.coef": ("ptx_coef",),
    "winrate.judge.endpoint": ("url", "base_url"),
}
"""Keys of ours, and the names that people bring along for them from other trainers."""

PRODUCT = "write the product: rows of a device × accumulation steps × devices"
REMARKS = {
    **dict.fromkeys(OTHER_NAMES["train.batch_size"], PRODUCT),
    "log_level": "what is said cannot be chosen; train.log_every says how often",
}
"""Names of other trainers → what to know beside the key that is meant."""

_TRUNCATED = "has no place in ppo: the ratio and the KL would compare a truncated distribution with whole ones. remove it"
REASONS = dict.fromkeys(("rollout.top_p", "rollout.top_k", "rollout.min_p", "rollout.repetition_penalty"), _TRUNCATED)
REASONS["rollout.correction"] = "weighs the policy gradients of ppo, and this stage has none. remove it"
"""Keys of other stages → why they are not of one whose recipe has the section they stand in."""

OTHER_VALUES = {
    "attention": {
        **dict.fromkeys(("flash_attention_2", "flash_attention_3", "fa2", "fa3", "kernels-community/flash-attn2"), "flash"),
        **{"flex_attention": "flex", "disabled": "eager"},
    },
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"},
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adam", "paged_adamw_32bit", "paged_adamw"), "adamw"),
        **dict.fromkeys(("paged_adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    },
    "schedule": {
        "constant_with_warmup": "constant, with train.warmup",
        "cosine_with_min_lr": "cosine",
        "linear_warmup": "linear",
    },
    "quantize": {"4": "4bit", "8": "8bit", "nf4": "4bit", "int8": "8bit", "int4": "4bit"},
    "kind": {
        **{"sigmoid": "dpo", "bco_pair": "bco", "loss_dpo": "dpo", "nca_pair": "nca", "exo_pair": "exo"},
        **{"apo_zero_unpaired": "apo_zero", **dict.fromkeys(("aot_pair", "aot_unpaired"), "aot, with pairing: unpaired")},
    },
    "trackers": {"none": "[]", "None": "[]"},
}
"""Name of a key of ours → values that other trainers write for it → ours, and after a comma what else to write."""


def closest_key(word: str, siblings: Sequence[str], prefix: str, known: Sequence[str]) -> str | None:
    """The full dotted key a mistyped one stands for.

    A sibling one letter away is a typo; else the same name in another section is a misplaced key; else other tools'
    names and farther typos are tried. `known` holds every dotted key of the recipe.
    """
    sibling = closest(word, siblings)
    here = f"{prefix}.{sibling}" if prefix else sibling
    if sibling is not None and likeness(word, sibling) >= 1 - 1 / max(len(word), len(sibling)):
        return here
    leaves: dict[str, str] = {}
    for dotted in known:
        leaves.setdefault(dotted.rpartition(".")[2], dotted)
    if word in leaves:
        return leaves[word]
    ours = next((ours for ours, names in OTHER_NAMES.items() if word in names), None)
    if ours in known:
        return ours
    if sibling is not None:
        return here
    far = closest(word, list(leaves))
    return leaves[far] if far is not None and len(word) > 3 else None
