"""Greedy continuations of a few fixed prompts, to look at while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf_cli.models.backbone import Backbone


def end_ids(model: Any, *more: int) -> list[int]:
    """The ids that end a response: those of the model's generation config, which may be a list, and `more`."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own] if own is not None else []), *more})


@torch.no_grad()
def continue_greedily(
    backbone: Backbone, role: str, prompts: Sequence[np.ndarray], ends: Sequence[int], max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """For every prompt its most likely continuation, without the ending token, and whether it ended."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    backbone.activate(role)
    backbone.model.eval()
    with backbone.plain_attention() as model, backbone.autocast():
        stored = model.generation_config
        # Only the ends are taken from it: its temperature, penalties and lengths are not what is trained.
        model.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=ends[0])
        try:
            out = model.generate(
                ids.to(backbone.device),
                attention_mask=mask.to(backbone.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                use_cache=True,
            )
        finally:
            model.generation_config = stored
    return [_until_end(row, ends) for row in out[:, width:].tolist()]


def _until_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    return (ids, False) if at is None else (ids[:at], True)
