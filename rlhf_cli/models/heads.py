"""Heads of reward models: how they are written so that plain transformers and PEFT read a sequence classifier; pair scores."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf_cli.errors import UsageError

Vectors = TypeVar("Vectors", np.ndarray, torch.Tensor)
SCORE = "score.weight"  # the name of the head's weight in transformers' sequence classifiers


def classifier_class(config: Any) -> Any:
    """The sequence classifier of transformers for a model's configuration; None where it has none."""
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)


def choose_pad_id(tokenizer: Any, ends: list[int]) -> int | None:
    """A token that never ends a response, to be named as padding: a classifier reads its score at the last other token.

    None where the tokenizer has no such token; then only one row at a time can be scored without padding.
    """
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    special = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return next((int(i) for i in (*named, *special) if i is not None and i not in ends), None)


def save_full_reward(
    model: Any, head: torch.Tensor, pad_id: int | None, folder: Path, held: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a causal language model's body and a head (labels, D) as a sequence classifier.

    `held`: the weights, where the model's own are in shards.
    """
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = len(head), pad_id
    unused = {id(p) for p in model.get_output_embeddings().parameters()} if not config.tie_word_embeddings else set()
    state = {
        name: held[name] if held else p.detach() for name, p in model.state_dict(keep_vars=True).items() if id(p) not in unused
    }
    with torch.device("meta"):
        classifier = classifier_class(config)(config)
    classifier.load_state_dict(state | {SCORE: head.detach()}, strict=False, assign=True)
    if lost := [name for name, p in classifier.state_dict(keep_vars=True).items() if p.is_meta]:
        raise UsageError(f"the reward model cannot be written as {type(classifier).__name__}: {lost[0]} has no value")
    classifier.save_pretrained(str(folder))


def pair_scores(first: Vectors, second: Vectors, tau: float) -> Vectors:
    """s(y ≻ y') = (R u)ᵀu'/τ, (…) of (…, W) and (…, W): u = v/|v|, R of blocks [[0, −1], [1, 0]]; P(y ≻ y') = σ(s).

    s(y ≻ y') is −s(y' ≻ y), and s(y ≻ y) is 0, to the bit: both orders multiply and add the same numbers.
    """
    u, other = (v / (v * v).sum(-1)[..., None] ** 0.5 for v in (first, second))
    found: Vectors = (u[..., ::2] * other[..., 1::2] - u[..., 1::2] * other[..., ::2]).sum(-1) / tau
    return found
