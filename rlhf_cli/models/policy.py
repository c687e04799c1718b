"""What a stage trains: a base, the parent's adapter or a fresh one, or all weights; of a reward model also a head."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.hub import model_folder
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.heads import save_full_reward
from rlhf_cli.models.load import Adapter, Weights, is_reward_model, load_model, read_adapter, resolve_dtype
from rlhf_cli.models.merged_files import merge_files
from rlhf_cli.models.sharding import Shards
from rlhf_cli.ranks import Ranks


def resolve_lora(setting: sections.Lora | str | None, parent: sections.Lora | None, place: str) -> sections.Lora | None:
    """The adapter's settings in force: the parent's go on where the recipe says auto.

    Raises UsageError if the recipe asks for another shape than the parent's, and not for a merge.
    """
    if isinstance(setting, str):
        return parent or sections.Lora()
    if setting is not None and parent is not None and not setting.merge_parent and _shape(setting) != _shape(parent):
        raise UsageError(
            f"{place}: lora: the parent's adapter has r {parent.r}, alpha {parent.alpha:g}, modules {parent.target_modules}, "
            f"tokens {parent.train_tokens}; "
            "the recipe asks for others. use lora: auto, or lora.merge_parent: true to start anew on the merged parent"
        )
    return setting


def parent_lora(adapter: Path | None, recorded: dict[str, Any] | None) -> sections.Lora | None:
    """The settings of the parent's adapter: as its manifest records them, else as its adapter_config.json lists them."""
    if adapter is None:
        return None
    if recorded is not None:
        return dataclasses.replace(sections.Lora(**recorded), merge_parent=False)
    config, _, _ = read_adapter(adapter)
    modules = config.target_modules
    return sections.Lora(
        config.r, config.lora_alpha, config.lora_dropout, modules if isinstance(modules, str) else sorted(modules)
    )


def _shape(lora: sections.Lora) -> tuple[Any, ...]:
    modules = lora.target_modules
    return lora.r, lora.alpha, modules if isinstance(modules, str) else tuple(sorted(modules)), sorted(lora.train_tokens)


def load_trained(
    settings: sections.Model,
    lora: sections.Lora | None,
    start: Weights,
    *,
    device: torch.device,
    seeds: Mapping[str, int],
    merged: Path,
    ranks: Ranks | None = None,
    labels: int = 1,
) -> tuple[Backbone, Weights]:
    """The backbone with the role that is trained, and the base that the adapter sits on.

    `seeds`: role → seed; beside "policy" or "reward" the other members of an ensemble, whose adapters and heads are their own.
    They start as the first one does, but for what is drawn at random.

    An adapter that cannot go on, because all weights are trained or its shape changes, is merged into the base in float32;
    with LoRA that merged base is saved in `merged`, so that the new adapter has a base on disk. A reward model's head goes on
    where the start has one, else it is fresh, of so many `labels`. Raises UsageError if a policy is to start from a reward
    model, or a reward model from one whose head has another number of labels.
    """
    compute = resolve_dtype(settings.dtype, device)
    adapter, role = read_adapter(start.adapter) if start.adapter is not None else None, next(iter(seeds))
    merge = adapter is not None and (lora is None or lora.merge_parent)
    classifier = is_reward_model(start.base, start.revision)
    head = adapter.head if adapter else start.head if classifier else None
    if head is not None and role == "policy":
        raise UsageError(f"{start.adapter or start.base} is a reward model, not a policy; model.path must name a language model")
    if head is not None and len(head) != labels:
        what = f"its head gives {len(head)} numbers a response, and this objective wants {labels}"
        raise UsageError(f"{start.adapter or start.base}: {what}. start from a language model")
    headless = classifier and head is not None  # the base of a reward model's adapter may be a reward model too
    base = dataclasses.replace(start, adapter=None)
    if merge and lora is not None and adapter is not None:
        if ranks is None or ranks.main:
            _save_merged(settings, base, adapter, head if classifier else None, device, merged)
        if ranks is not None:
            ranks.barrier()
        base, adapter = Weights(str(merged), None, None), None
    dtype, sharding = torch.float32 if lora is None else compute, None if ranks is None else ranks.sharding
    # What lies in shards is read as it is in its files, and of these no more than becomes a shard.
    as_stored = sharding is not None and lora is None and adapter is None
    place = device if sharding is None else torch.device("cpu")
    model = load_model(settings, base.base, base.revision, "auto" if as_stored else dtype, place, headless)
    if merge and adapter is not None:
        model = merge_adapter(model, adapter)
    shards = None if sharding is None else Shards(model, sharding, None if lora else dtype)
    backbone = Backbone(model, compute, settings.attention, headless, shards)
    for own, seed in seeds.items():
        torch.manual_seed(seed)
        if role == "reward":
            backbone.add_head(own, head, labels=labels)
        if lora is None:
            backbone.train_all_weights(own)
        else:
            config = lora_config(lora, base.base, base.revision, adapter and adapter.config)
            backbone.add_lora(own, config, adapter and adapter.state, trained=True)
    if settings.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    return backbone, Weights(base.base, base.revision, None)


def _save_merged(
    settings: sections.Model, base: Weights, adapter: Adapter, head: torch.Tensor | None, device: torch.device, folder: Path
) -> None:
    """Write base and adapter as one model, a reward model where there is a head; none of it stays in memory."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)  # of a start that was killed
    if head is not None or not merge_files(model_folder(base.base, base.revision), adapter, part):
        plain = dataclasses.replace(settings, quantize=None)
        model = load_model(plain, base.base, base.revision, torch.float32, device, head is not None)
        model = merge_adapter(model, adapter)
        if head is None:
            model.save_pretrained(str(part))
        else:
            save_full_reward(model, head, None, part)
    part.rename(folder)


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter folded into its weights, in the model's dtype."""
    adapted = get_peft_model(model, adapter.config)
    set_peft_model_state_dict(adapted, adapter.state)
    return adapted.merge_and_unload()
