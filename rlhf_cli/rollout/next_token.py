"""The next token of each row, by the inverse of a cumulative distribution: a function of logits and one uniform number alone."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch.nn import functional as F

from rlhf_cli.sections import Warping

BLOCK = 256
"""Tokens whose probabilities are summed before they are searched one by one."""


def draw_uniforms(seed: int, number: int, sample: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): one for each token of a prompt's sample, the same however many are asked for."""
    key = blake2b(f"{seed},{number},{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def warp(logits: torch.Tensor, temperature: float, warping: Warping, seen: torch.Tensor) -> torch.Tensor:
    """The logits (B, V) with −∞ for tokens that are not to be drawn at this temperature.

    seen (B, V) bool: what each row has already. The most likely token always stays. Of equally likely ones at the border
    `top_k` keeps all, and `top_p` those with the lower ids.
    """
    if warping.repetition_penalty != 1:
        penalised = torch.where(logits < 0, logits * warping.repetition_penalty, logits / warping.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits
    if warping.top_k is not None and warping.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(warping.top_k).values[:, -1:], -torch.inf)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    if warping.top_p < 1:
        ordered, order = weights.sort(stable=True, dim=-1, descending=True)
        ends = ordered.cumsum(-1, dtype=torch.float64)
        beyond = ends - ordered >= warping.top_p * ends[:, -1:]
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits.masked_fill(weights < warping.min_p, -torch.inf)


def choose(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """The next token of every row, (B,) int64: the first whose cumulative probability exceeds the row's uniform.

    logits (B, V) float32 are overwritten, uniforms (B,) are float64; probabilities ∝ exp(logits / temperature), summed in
    float64. A token of probability 0 is never drawn. Temperature 0: the most likely token. −1 where the logits are not
    finite, which whoever reads the tokens must look for.
    """
    top = logits.amax(-1, keepdim=True)
    finite = top.isfinite()[:, 0]
    if temperature == 0:
        return torch.where(finite, logits.argmax(-1), -1)
    weights = logits.sub_(top).div_(temperature).exp_()
    if weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = weights.view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    block, rest = _search(ends, uniforms * ends[:, -1])
    block = block.clamp_max(blocks.shape[1] - 1)  # what is not finite lies beyond all of them
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double().cumsum(-1)
    return torch.where(finite, block * BLOCK + _search(inside, rest)[0], -1)


def _search(ends: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first interval of each row whose end (B, n) exceeds its point (B,), and how far into it the point lies.

    A point that rounding moved to the last end or beyond counts as just before it.
    """
    point = torch.minimum(point, torch.nextafter(ends[:, -1], torch.zeros_like(point)))[:, None]
    at = torch.searchsorted(ends, point, right=True)
    begin = F.pad(ends, (1, 0)).gather(1, at)
    return at[:, 0], (point - begin)[:, 0]
