"""Checkpoints: complete or absent, proven readable, and never the only copy that is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.files import disk_errors, hash_tree, read_json, sync_folder, write_json
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.runs.folder import member_folder, require_space
from rlhf_cli.training.optim import restore_optimizer
from rlhf_cli.training.partial_step import PartialStep, load_partial_step, save_partial_step
from rlhf_cli.training.watch import Watched

HASHES, STATE, OPTIMIZER, NUMBERS, MODEL = "hashes.json", "state.json", "optimizer.safetensors", "optimizer.json", "model"
ROLES = "roles.safetensors"
"""The trained weights of the roles beside those that the run is for, e.g. the value's."""


@dataclass(frozen=True)
class Usage:
    """What a run took so far, over all its processes."""

    tokens: int = 0
    seconds: float = 0.0
    sampling_seconds: float = 0.0  # of these, for samples.jsonl
    peak_memory: float = 0.0  # GiB


@dataclass(frozen=True)
class LogSizes:
    """Where metrics.jsonl and samples.jsonl end, in bytes, and the SHA-256 of all before; None: of a release without it."""

    metrics_bytes: int = 0
    samples_bytes: int = 0
    metrics_hash: str | None = None
    samples_hash: str | None = None


@dataclass(frozen=True)
class State:
    """Where a run stands. Data order, learning rate and randomness are functions of the step and the seed."""

    planned: int  # steps that the learning rate's schedule was made for
    budget: int  # tokens_per_device in force
    asked: int  # tokens_per_device of the recipe
    step: int = 0
    evaluated: int = -1  # the last step whose held-out figures are in the log; -1: not even those of the start
    usage: Usage = field(default_factory=Usage)
    logs: LogSizes = field(default_factory=LogSizes)
    watched: Watched = field(default_factory=Watched)
    memory: dict[str, float] = field(default_factory=dict)  # the objective's own numbers, e.g. BCO's running means


GROUPS = {"usage": Usage, "logs": LogSizes, "watched": Watched}
"""Fields of a state whose own fields stand beside the others in state.json."""


def write_state(path: Path, state: State) -> None:
    numbers = asdict(state)
    for name in GROUPS:
        numbers |= numbers.pop(name)
    write_json(path, numbers)


def load_state(checkpoint: Path) -> State:
    numbers = read_json(checkpoint / STATE)
    groups = {
        name: kind(**{own.name: numbers.pop(own.name) for own in fields(kind) if own.name in numbers})
        for name, kind in GROUPS.items()
    }
    return State(**numbers, **groups)


def checkpoint_path(folder: Path, step: int, updates: int = 0) -> Path:
    """Where the weights after `step` are, or those after so many `updates` of the next one, which sort behind them."""
    return folder / (f"step-{step:08d}-{updates:04d}" if updates else f"step-{step:08d}")


def save_checkpoint(
    folder: Path,
    backbone: Backbone,
    roles: Sequence[str],
    save_model: Callable[[Path], None],
    optimizer: tuple[dict[str, torch.Tensor], dict[str, Any]],
    state: State,
    partial: PartialStep | None = None,
) -> None:
    """Write step-<n> beside its place, sync it, read it back against its hashes, and rename it into place.

    `save_model` writes the weights of `roles`, as they are handed on; those of other trained roles lie beside them.
    `optimizer` is its `optimizer_state`.

    MachineError: the disk is full or fails; what was there before is untouched.
    """
    from safetensors.torch import save_file

    final = checkpoint_path(folder, state.step, partial.updates if partial else 0)
    part = folder / f".{final.name}.tmp"
    parameters = backbone.trained_parameters()
    tensors, numbers = optimizer
    try:
        with disk_errors(final):
            folder.mkdir(parents=True, exist_ok=True)
            require_space(folder, sum(t.numel() * t.element_size() for t in [*parameters.values(), *tensors.values()]))
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            save_model(part / MODEL)
            if others := _other_roles(backbone, roles):
                save_file({name: p.detach().cpu().contiguous() for name, p in others.items()}, part / ROLES)
            if partial is not None:
                save_partial_step(part, partial)
            save_file(tensors, part / OPTIMIZER)
            write_json(part / NUMBERS, numbers)
            write_state(part / STATE, state)
            hashes = hash_tree(part)
            for name in hashes:
                with (part / name).open("rb") as file:
                    os.fsync(file.fileno())
            write_json(part / HASHES, hashes)
            if not is_intact(part):
                raise MachineError(f"{part}: what was written reads back differently; the disk or the memory is faulty")
            if final.exists():
                final.rename(folder / f".{final.name}.replaced.tmp")
            part.rename(final)
            sync_folder(folder)
    except MachineError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    remove_leftovers(folder)


def is_intact(checkpoint: Path) -> bool:
    """Does every file match its hash, with none missing and none added?"""
    try:
        recorded, found = read_json(checkpoint / HASHES), hash_tree(checkpoint)
    except (OSError, UsageError):
        return False
    found.pop(HASHES, None)
    return bool(recorded == found)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest intact checkpoint, and the damaged ones that are newer; leftovers of a killed process are cleared.

    MachineError: there are checkpoints, and all are damaged: a silent restart would lose work.
    """
    remove_leftovers(folder)
    damaged: list[Path] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_intact(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise MachineError(
            f"{folder}: every checkpoint is damaged ({names})\nrestore one from a backup, or start anew with --force"
        )
    return None, []


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name under which nobody takes it for one, or counts it among those that are kept."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def restore(checkpoint: Path, backbone: Backbone, roles: Sequence[str], optimizer: torch.optim.Optimizer) -> PartialStep | None:
    """Put all trained weights and the optimiser back as they were saved, bit for bit; returns what was under way."""
    from safetensors.torch import load_file

    parameters = backbone.trained_parameters()
    for member, role in enumerate(roles):
        backbone.load(role, member_folder(checkpoint / MODEL, member) if member else checkpoint / MODEL)
    if others := _other_roles(backbone, roles):
        saved = load_file(checkpoint / ROLES)
        with torch.no_grad():
            for name, parameter in others.items():
                parameter.copy_(saved[name])
    restore_optimizer(optimizer, parameters, load_file(checkpoint / OPTIMIZER), read_json(checkpoint / NUMBERS))
    return load_partial_step(checkpoint)


def _other_roles(backbone: Backbone, roles: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    return {name: p for other, own in backbone.trained_roles.items() if other not in roles for name, p in own.items()}


def prune(folder: Path, keep: int, protected: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the protected one. A folder loses its name before its content."""
    kept = {checkpoint_path(folder, protected)} if protected is not None else set()
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path not in kept:
            path.rename(path.with_name(f".{path.name}.old.tmp"))
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Clear what a killed process left half-written or half-removed."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
