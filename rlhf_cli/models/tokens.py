"""Tokens whose embeddings a model never learned, such as those of a chat template that was put on a base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlhf_cli.errors import UsageError

UNTOUCHED = 0.05
"""Tokens that no text has ever had move together while a model is trained, or stay near 0: their rows differ by less than this
share of the median row's length. In SmolLM2-135M-Instruct those of unused control tokens are equal; those of its chat template,
learned late, are 0.12 and 0.15 from their next, and of 3,000 ordinary tokens the nearest pair is 0.10 apart."""


def token_ids(tokenizer: Any, named: Sequence[str | int]) -> list[str | int]:
    """The ids of `lora.train_tokens`. UsageError: one is no token of the tokenizer."""
    ids = tokenizer.get_vocab()
    if unknown := [token for token in named if token not in ids and token not in ids.values()]:
        raise UsageError(f"lora.train_tokens: {unknown[0]!r} is no token of this tokenizer; write it as the chat template does")
    return sorted({ids.get(token, token) for token in named})


@torch.no_grad()
def untouched(embeddings: Sequence[torch.Tensor], ids: Iterable[int]) -> list[int]:
    """Those of `ids` whose rows in one of the `embeddings`, (V, D) each, are near 0 or near another row."""
    found = set()
    for weight in embeddings:
        lengths = torch.cat([part.float().norm(dim=1) for part in torch.split(weight, 4096)])
        for index in ids:
            apart = torch.cat([(part - weight[index]).float().norm(dim=1) for part in torch.split(weight, 4096)])
            apart[index] = lengths[index]
            if apart.min() < UNTOUCHED * lengths.median():
                found.add(index)
    return sorted(found)
