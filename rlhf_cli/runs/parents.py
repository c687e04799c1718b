"""What a stage starts from: any hub id, transformers folder, PEFT folder, run or checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.data.templates import Template, choose_template
from rlhf_cli.errors import UsageError, prefixed
from rlhf_cli.files import SETTINGS, hash_tree, read_json, sha256_file
from rlhf_cli.hub import is_meant_as_path, model_folder
from rlhf_cli.models.load import Weights, check_tensors, is_reward_model
from rlhf_cli.recipe.stages import POLICY_STAGES, REWARD_STAGES
from rlhf_cli.runs.folder import member_folders
from rlhf_cli.runs.manifest import BaseModel, Parent, read_manifest, settings_hash, weights_hash
from rlhf_cli.suggest import closest_path


@dataclass(frozen=True)
class Start(Weights):
    """The weights before step 1: a base, and an adapter on it where the parent was trained with LoRA."""

    tokenizer: str  # where the tokenizer and its template are
    parent: Parent | None
    manifest: dict[str, Any] | None  # the parent's
    template: str | None = None  # hash of a checkpoint's chat template

    @property
    def template_hash(self) -> str | None:
        return self.template if self.manifest is None else self.manifest["chat_template_hash"]

    @property
    def adapter_hash(self) -> str | None:
        """Of the adapter's weights, of an ensemble those of all members; None without one."""
        found = [weights_hash(own.adapter) for own in self.members or [self] if own.adapter is not None]
        return "+".join(found) or None

    @property
    def members(self) -> list[Start]:
        """Of an ensemble each member alone; none of a single model."""
        folders = member_folders(self.adapter) if self.adapter is not None else []
        return [dataclasses.replace(self, adapter=folder) for folder in folders]


def resolve_start(path: str, revision: str | None, place: str, stages: Collection[str] = POLICY_STAGES) -> Start:
    """What `model.path` means; `place` begins every message.

    UsageError: a mistyped path, an unfinished or changed run, a run of a stage that is not one of `stages`, a reward model
        where `stages` makes none.
    """
    folder = Path(path)
    if (folder / "manifest.json").exists() or (folder / "recipe.yaml").exists():
        with prefixed(place):
            manifest = read_manifest(folder, stages=stages)
        base, parent = manifest["base_model"], Parent(path, sha256_file(folder / "manifest.json"))
        model = folder / "model"
        if (model / "adapter_config.json").exists():
            return Start(base["path"], base["revision"], model, str(model), parent, manifest)
        return Start(str(model), None, None, str(model), parent, manifest)
    if (folder / "hashes.json").exists() and (folder / "model").is_dir():
        if read_json(folder / "hashes.json") != {k: v for k, v in hash_tree(folder).items() if k != "hashes.json"}:
            raise UsageError(f"{place}: the checkpoint {path} is damaged: its files do not match its hashes")
        inputs = folder.parent.parent / "inputs.json"
        template = read_json(inputs).get("template") if inputs.exists() else None
        return dataclasses.replace(resolve_start(str(folder / "model"), revision, place, stages), template=template)
    on_hub = not folder.exists()
    if on_hub:
        if is_meant_as_path(path):
            near = closest_path(path)
            raise UsageError(f"{place}: there is no folder {path}" + (f". did you mean {near}?" if near else ""))
        with prefixed(place):
            folder = model_folder(path, revision, weights=False)
            if (folder / "adapter_config.json").exists():
                folder = model_folder(path, revision)
    kept = [name for name in ("adapter_config.json", "config.json") if (folder / name).exists()]
    if kept and not set(REWARD_STAGES) & set(stages):
        with prefixed(place):
            scores = is_reward_model(str(folder), None)
        if scores:
            raise UsageError(f"{place}: {path} is a reward model, not a policy; name a language model")
    if "adapter_config.json" in kept:
        config = read_json(folder / "adapter_config.json")
        if not isinstance(config.get("base_model_name_or_path"), str):
            raise UsageError(f"{place}: {folder / 'adapter_config.json'} does not name the adapter's base_model_name_or_path")
        base, of_base = config["base_model_name_or_path"], config.get("revision")
        with prefixed(f"{place}: the base of the adapter {path}"):
            model_folder(base, of_base, weights=False)
        return Start(base, of_base, folder, str(folder) if (folder / "tokenizer_config.json").exists() else base, None, None)
    if not kept:
        raise UsageError(f"{place}: {path} is neither a model (config.json), an adapter nor a run (manifest.json)")
    return Start(path, revision if on_hub else None, None, path, None, None)


def recorded_template(start: Start, tokenizer: Any, path: str, place: str) -> Template:
    """The chat template that a model was trained with. UsageError: its tokenizer has another one."""
    with prefixed(f"{place}: {path}"):
        own = choose_template(tokenizer, None)
    if start.template_hash in (None, own.hash):
        return own
    without = choose_template(tokenizer, "none")
    if start.template_hash == without.hash:
        return without
    raise UsageError(f"{place}: {path} was trained with another chat template than its tokenizer has; train it again")


def merged_base(base: Weights) -> BaseModel:
    """What the manifest says of a base that a run made itself, of its start's base and adapter."""
    return base_model(Start(base.base, base.revision, None, base.base, None, None))


def base_if_here(start: Start, check: bool, imagined: bool) -> BaseModel | None:
    """`base_model`; None where --check would have to fetch it from the hub, or plans for `imagined` devices without weights."""
    folder = Path(start.base)
    absent = (check and not folder.exists()) or (imagined and not any(folder.glob("*.safetensors")))
    return None if absent else base_model(start)


def base_model(start: Start) -> BaseModel:
    """The base, fetched if it is on the hub, with the hash of its weights; a parent's record of them must still hold.

    UsageError: the base has changed since the parent was trained on it, or a file of tensors is none.
    """
    folder = model_folder(start.base, start.revision)
    for own in (folder, start.adapter):
        if own is not None:
            check_tensors(own)
    base = BaseModel(start.base, start.revision, weights_hash(folder), settings_hash(folder))
    if start.adapter and start.manifest:
        before, parent = start.manifest["base_model"], start.parent.path if start.parent else ""
        for key, what in (("weights_hash", "weights"), ("settings_hash", f"settings ({', '.join(SETTINGS)})")):
            if before.get(key) not in (None, vars(base)[key]):
                raise UsageError(f"{start.base} is not the model that {parent} was trained on: its {what} differ")
    return base
