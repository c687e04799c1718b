"""Optimisers, their state as plain tensors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_cli import sections
from rlhf_cli.errors import MachineError
from rlhf_cli.models.sharding import alike, full, shard_like


def build_optimizer(roles: Mapping[str, Mapping[str, torch.nn.Parameter]], train: sections.Train) -> torch.optim.Optimizer:
    """The recipe's optimiser over float32 parameters, a group for each trained role; every step sets their learning rates."""
    values = [{"params": some, "role": role} for role, own in roles.items() for some in alike(own.values())]
    rate = train.learning_rate or 0.0
    if train.optimizer == "sgd":
        return torch.optim.SGD(values, lr=rate, weight_decay=train.weight_decay)
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MachineError("train.optimizer: adamw_8bit needs bitsandbytes: pip install 'rlhf-cli[quant]'") from error
        return AdamW8bit(values, lr=rate, betas=train.betas, weight_decay=train.weight_decay)  # type: ignore[no-any-return]
    fused = next(p for own in roles.values() for p in own.values()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(values, lr=rate, betas=train.betas, weight_decay=train.weight_decay, fused=fused)


def warmup_steps(warmup: float, steps: int) -> int:
    """A share of the run if below 1, else a number of steps."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def learning_rate(train: sections.Train, step: int, steps: int, peak: float | None = None) -> float:
    """The rate of step `step`, counted from 1: a linear rise to the peak, then the schedule towards 0.

    `peak`: by default the recipe's. With w warm-up steps, step k ≤ w has k/w of the peak. Cosine and linear fall so that a
    further step would have 0.
    """
    peak = train.learning_rate or 0.0 if peak is None else peak
    warm = warmup_steps(train.warmup, steps)
    if step <= warm:
        return peak * step / warm
    if train.schedule == "constant":
        return peak
    done = (step - 1 - warm) / max(1, steps - warm)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done)


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and how fast each role learns."""

    settings: sections.Train
    steps: int
    seed: int
    peaks: Mapping[str, float] = field(default_factory=dict)  # role → its highest learning rate, where it is not the recipe's

    def rates(self, step: int, roles: Iterable[str]) -> dict[str, float]:
        """Role → its learning rate at a step."""
        return {role: learning_rate(self.settings, step, self.steps, self.peaks.get(role)) for role in roles}


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state per parameter name: tensors under "name|entry", and plain numbers under the same keys.

    What is in shards is gathered, for which all ranks must ask.
    """
    state = {f"{name}|{entry}": value for name, p in parameters.items() for entry, value in optimizer.state[p].items()}
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        if torch.is_tensor(value):
            own = full(value.detach()).cpu().contiguous()
            place = own.untyped_storage().data_ptr()
            tensors[key] = own.clone() if place in seen else own  # a table that parameters share is of each of them in a file
            seen.add(place)
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_state`. The fused AdamW keeps its step counter on the device too."""
    for key, value in {**tensors, **numbers}.items():
        name, entry = key.rsplit("|", 1)
        p = parameters[name]
        optimizer.state[p][entry] = shard_like(value, p) if torch.is_tensor(value) else value
