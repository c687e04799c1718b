"""Where the roles of a run live: together on as few frozen models as they allow."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.attention import PLAIN
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.load import Weights, is_reward_model, load_model, read_adapter
from rlhf_cli.models.memory import return_freed
from rlhf_cli.models.sharding import Shards
from rlhf_cli.ranks import Sharding


class FrozenModels:
    """Frozen models, each loaded once, whatever roles share it."""

    def __init__(
        self, settings: sections.Model, compute: torch.dtype, device: torch.device, sharding: Sharding | None = None
    ) -> None:
        self.hosts: dict[str, Backbone] = {}  # role → the backbone that holds its weights
        self._settings = settings
        self._compute = compute
        self._device = device if sharding is None else torch.device("cpu")
        self._sharding = sharding
        self._models: dict[tuple[str, str | None], Backbone] = {}
        self._temporary: tuple[str, str | None] | None = None

    def add(self, role: str, weights: Weights, *, head: bool = False) -> None:
        """Place frozen weights under `role`: an adapter on the base, or the base itself; with its scalar head if it has one.

        Raises UsageError if the adapter does not fit the base, or there is no head.
        """
        host = self._host(weights)
        if weights.adapter is not None:
            adapter = read_adapter(weights.adapter)
            host.add_lora(role, adapter.config, adapter.state, trained=False)
        else:
            host.alias[role] = BASE
        if head:
            host.add_head(role, weights.head, trained=False)
        self._place(role, host)

    def _place(self, role: str, host: Backbone) -> None:
        self.hosts[role] = host

    def _host(self, weights: Weights) -> Backbone:
        """The backbone on this base, loaded once."""
        key = _key(weights)
        if key not in self._models:
            headless = is_reward_model(weights.base, weights.revision)
            model = load_model(self._settings, weights.base, weights.revision, self._compute, self._device, headless)
            shards = None if self._sharding is None else Shards(model, self._sharding)
            self._models[key] = Backbone(model, self._compute, self._settings.attention, headless, shards)
            self._settings = _following(self._settings, self._models[key])
        return self._models[key]

    @contextlib.contextmanager
    def loaded(self, role: str, weights: Weights, *, head: bool = False) -> Iterator[Backbone]:
        """A backbone on which `role` has these weights as long as the block lasts, and the roles that were added theirs.

        A base that no added role uses is kept until weights come that sit on another: no more than one such is in memory.
        """
        key = _key(weights)
        if self._temporary not in (None, key):
            del self._models[self._temporary]
            self._temporary = None
            gc.collect()  # a backbone and its model refer to each other
            return_freed()
        if key not in self._models:
            self._temporary = key
        self.add(role, weights, head=head)
        host = self.hosts.pop(role)
        host.elsewhere = {other: place for other, place in self.hosts.items() if place is not host}
        try:
            yield host
        finally:
            host.remove(role)
            host.elsewhere = {}


class Placement(FrozenModels):
    """Gives roles a place: on the policy's base where that is frozen and theirs too, else on one frozen model a base."""

    def __init__(self, policy: Backbone, settings: sections.Model, base: Weights, device: torch.device) -> None:
        """`base` is what the policy's adapter sits on; a policy that trains all weights shares none of it."""
        sharding = policy.shards.sharding if policy.shards else None
        super().__init__(_following(settings, policy), policy.compute_dtype, device, sharding)
        self.policy = policy
        if policy.peft is not None:
            self._models[_key(base)] = policy

    def _place(self, role: str, host: Backbone) -> None:
        super()._place(role, host)
        if host is not self.policy:
            self.policy.elsewhere[role] = host

    def add_value(self, weights: Weights, lora: sections.Lora, head: Head) -> None:
        """Place the role "value": a trained copy of the adapter, or a fresh one, which changes nothing yet; and a head.

        Raises UsageError if its model and the policy's cannot take the same rows, or the adapter does not fit.
        """
        host, adapter = self._host(weights), read_adapter(weights.adapter) if weights.adapter is not None else None
        config = lora_config(lora, weights.base, weights.revision, adapter and adapter.config)
        if host.kernel.layout != self.policy.kernel.layout:
            raise UsageError(
                f"value: {weights.base} takes {host.kernel.layout} rows and the policy {self.policy.kernel.layout} ones: "
                "they cannot learn from the same passes; set value.init: policy"
            )
        host.add_head("value", head.weight, head.bias)
        host.add_lora("value", config, adapter and adapter.state, trained=True)
        if self._settings.gradient_checkpointing and host is not self.policy:
            host.enable_gradient_checkpointing()
        self._place("value", host)


@dataclasses.dataclass(frozen=True)
class Head:
    """A scalar head's numbers: what it makes of a hidden state h is weight · h + bias."""

    weight: torch.Tensor  # (1, D)
    bias: float


def _following(settings: sections.Model, first: Backbone) -> sections.Model:
    """Settings by which other models take this one's attention kernel, where they can: all get the same passes."""
    taken = settings.attention == "auto" and first.kernel.name != PLAIN
    return dataclasses.replace(settings, attention=cast(Any, first.kernel.name)) if taken else settings


def _key(weights: Weights) -> tuple[str, str | None]:
    """The base, the same for every way to write a folder."""
    folder = Path(weights.base)
    return (str(folder.resolve()), None) if folder.exists() else (weights.base, weights.revision)
