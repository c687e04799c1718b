"""Where the roles of a run live: together on as few frozen models as they allow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.models.load import is_classifier, load_model, local_folder, read_adapter, read_head
from rlhf_cli.recipe import schema


class Homes:
    """Gives roles a place: on the policy's base where that is frozen and theirs too, else on one frozen model a base."""

    def __init__(self, policy: Backbone, settings: schema.Model, base: str, revision: str | None, device: torch.device) -> None:
        """`base` and `revision` are what the policy's adapter sits on; a policy that trains all weights shares none of them."""
        self.policy = policy
        self._settings = settings
        self._device = device
        self._models: dict[tuple[str, str | None], Backbone] = {}
        if policy.peft is not None:
            self._models[_key(base, revision)] = policy

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
        self._settle(role, host)

    def add_value(self, base: str, revision: str | None, adapter: Path | None, lora: schema.Lora, head: Head) -> None:
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
        self._settle("value", host)

    def host(self, base: str, revision: str | None) -> Backbone:
        """The backbone on this base, loaded once."""
        key = _key(base, revision)
        if key not in self._models:
            settings, compute = self._settings, self.policy.compute_dtype
            headless = is_classifier(base, revision, settings.trust_remote_code)
            model = load_model(settings, base, revision, compute, self._device, headless)
            self._models[key] = Backbone(model, compute, settings.attention, headless)
        return self._models[key]

    def _settle(self, role: str, host: Backbone) -> None:
        if host is not self.policy:
            self.policy.elsewhere[role] = host


@dataclasses.dataclass(frozen=True)
class Head:
    """A scalar head's numbers: what it makes of a hidden state h is weight · h + bias."""

    weight: torch.Tensor  # (1, D)
    bias: float


def _key(base: str, revision: str | None) -> tuple[str, str | None]:
    """The same for every way to write a folder."""
    return (str(Path(base).resolve()), None) if Path(base).exists() else (base, revision)
