"""Did-you-mean for keys: typos, keys of another section, and names that other tools use."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.suggest import closest, likeness

FROM_OTHER_TOOLS = {
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.tokens_per_device",
    "gradient_accumulation_steps": "train.batch_size",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "load_best_model_at_end": "train.keep_best",
    "report_to": "trackers",
    "output_dir": "output",
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "val_set_size": "data.holdout",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "bf16": "model.dtype",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "load_in_4bit": "model.quantize",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "loss_type": "objective.kind",
    "pref_loss": "objective.kind",
    "pref_beta": "objective.beta",
    "rpo_alpha": "objective.sft_weight",
    "desirable_weight": "objective.lambda_d",
    "undesirable_weight": "objective.lambda_u",
    "center_rewards_coefficient": "objective.center_coef",
    "ref_model": "reference.model",
    "reference_model": "reference.model",
    "precompute_ref_log_probs": "reference.cache",
    "num_ppo_epochs": "objective.epochs",
    "ppo_epochs": "objective.epochs",
    "num_mini_batches": "objective.minibatches",
    "cliprange": "objective.clip",
    "cliprange_value": "objective.value_clip",
    "vf_coef": "objective.value_coef",
    "whiten_advantages": "objective.whiten",
    "kl_coef": "kl.coef",
    "init_kl_coef": "kl.coef",
    "kl_estimator": "kl.estimator",
    "target_kl": "kl.target",
    "response_length": "rollout.max_new_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "num_generations": "rollout.responses_per_prompt",
    "rloo_k": "rollout.responses_per_prompt",
    "use_vllm": "rollout.engine",
    "reward_funcs": "reward",
    "reward_model": "reward",
    "reward_model_path": "reward",
    "reward_weights": "reward.weight",
    "ptx_coef": "ptx.coef",
    "max_tokens": "rollout.max_new_tokens",
    "num_return_sequences": "rollout.responses_per_prompt",
    "url": "winrate.judge.endpoint",
    "base_url": "winrate.judge.endpoint",
}
"""Names that people bring along from other trainers → ours."""


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
    if word in FROM_OTHER_TOOLS and FROM_OTHER_TOOLS[word] in known:
        return FROM_OTHER_TOOLS[word]
    if sibling is not None:
        return here
    far = closest(word, list(leaves))
    return leaves[far] if far is not None and len(word) > 3 else None
