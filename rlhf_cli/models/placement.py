"""Where the roles of a run live: together on as few frozen models as they allow."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.load import is_reward_model, load_model, local_folder, read_adapter, read_head
from rlhf_cli.models.memory import return_freed


class FrozenModels:
    """Frozen models, each loaded once, whatever roles share it."""

    def __init__(self, settings: sections.Model, compute: torch.dtype, device: torch.device) -> None:
        self.places: dict[str, Backbone] = {}
        """Role → the backbone that holds its weights."""
        self._settings = settings
        self._compute = compute
        self._device = device
        self._models: dict[tuple[str, str | None], Backbone] = {}
        self._temporary: tuple[str, str | None] | None = None

    def add(self, role: str, base: str, revision: str | None, adapter: Path | None, *, head: bool = False) -> None:
        """Place frozen weights under `role`: an adapter on the base, or the base itself; with its scalar head if it has one.

        Raises:
            UsageError: the adapter does not fit the base, or there is no head.
        """
        host = self.host(base, revision)
        weight = None
        if adapter is not None:
            config, state, weight = read_adapter(adapter)
            host.add_lora(role, config, state, trained=False)
        else:
            host.alias[role] = BASE
        if head:
            weight = read_head(adapter or local_folder(base, revision)) if weight is None else weight
            host.add_head(role, weight, trained=False)
        self.places[role] = host

    def host(self, base: str, revision: str | None) -> Backbone:
        """The backbone on this base, loaded once."""
        key = _key(base, revision)
        if key not in self._models:
            settings = self._settings
            headless = is_reward_model(base, revision)
            model = load_model(settings, base, revision, self._compute, self._device, headless)
            self._models[key] = Backbone(model, self._compute, settings.attention, headless)
        return self._models[key]

    @contextlib.contextmanager
    def visit(
        self, role: str, base: str, revision: str | None, adapter: Path | None, *, head: bool = False
    ) -> Iterator[Backbone]:
        """A backbone on which `role` has these weights as long as the block lasts, and the roles that were added theirs.

        A base that only visitors use is kept until one comes that sits on another: no more than one such is in memory.
        """
        key = _key(base, revision)
        if self._temporary not in (None, key):
            del self._models[self._temporary]
            self._temporary = None
            gc.collect()  # a backbone and its model refer to each other
            return_freed()
        if key not in self._models:
            self._temporary = key
        self.add(role, base, revision, adapter, head=head)
        host = self.places.pop(role)
        host.elsewhere = {other: place for other, place in self.places.items() if place is not host}
        try:
            yield host
        finally:
            host.remove(role)
            host.elsewhere = {}


class Placement(FrozenModels):
    """Gives roles a place: on the policy's base where that is frozen and theirs too, else on one frozen model a base."""

    def __init__(self, policy: Backbone, settings: sections.Model, base: str, revision: str | None, device: torch.device) -> None:
        """`base` and `revision` are what the policy's adapter sits on; a policy that trains all weights shares none of them."""
        super().__init__(settings, policy.compute_dtype, device)
        self.policy = policy
        if policy.peft is not None:
            self._models[_key(base, revision)] = policy

    def add(self, role: str, base: str, revision: str | None, adapter: Path | None, *, head: bool = False) -> None:
        super().add(role, base, revision, adapter, head=head)
        self._attach(role)

    def add_value(self, base: str, revision: str | None, adapter: Path | None, lora: sections.Lora, head: Head) -> None:
        """Place the role "value": a trained copy of the adapter, or a fresh one, which changes nothing yet; and a head.

        Raises:
            UsageError: its model and the policy's cannot take the same rows, or the adapter does not fit.
        """
        host = self.host(base, revision)
        config, state = lora_config(lora, base, revision), None
        if adapter is not None:
            parent, state, _ = read_adapter(adapter)
            config = dataclasses.replace(parent, lora_dropout=lora.dropout, inference_mode=False)
        if host.kernel.layout != self.policy.kernel.layout:
            raise UsageError(
                f"value: {base} takes {host.kernel.layout} rows and the policy {self.policy.kernel.layout} ones: they cannot "
                "learn from the same passes; set value.init: policy"
            )
        host.add_lora("value", config, state, trained=True)
        host.add_head("value", head.weight, head.bias)
        if self._settings.gradient_checkpointing and host is not self.policy:
            host.enable_gradient_checkpointing()
        self.places["value"] = host
        self._attach("value")

    def _attach(self, role: str) -> None:
        if self.places[role] is not self.policy:
            self.policy.elsewhere[role] = self.places[role]


@dataclasses.dataclass(frozen=True)
class Head:
    """A scalar head's numbers: what it makes of a hidden state h is weight · h + bias."""

    weight: torch.Tensor  # (1, D)
    bias: float


def _key(base: str, revision: str | None) -> tuple[str, str | None]:
    """The same for every way to write a folder."""
    return (str(Path(base).resolve()), None) if Path(base).exists() else (base, revision)
