"""manifest.json: what a finished run is made of. Its presence means that the run is complete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.errors import UsageError
from rlhf_cli.files import SETTINGS, hash_tree, sha256_file
from rlhf_cli.runs.folder import RunFolder, read_metrics

LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate")


@dataclass(frozen=True)
class BaseModel:
    """The frozen weights that everything sits on."""

    path: str  # hub id or folder
    revision: str | None
    weights_hash: str  # of `weights_hash`
    settings_hash: str | None = None  # of `settings_hash`; None: of a release that did not record it


@dataclass(frozen=True)
class Parent:
    """An earlier run that this one used."""

    path: str
    manifest_hash: str  # SHA-256 of its manifest.json


def build_manifest(run: RunFolder, stage: str, status: str, seed: int, own: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run whose model is in place. `status`: "finished", or how it ended early; `own`: what its stage says."""
    begin = {"stage": stage, "status": status, "versions": versions(), "git_commit": git_commit(), "seed": seed}
    return {**begin, **own, "model_files": hash_tree(run.model)}


def final_metrics(run: RunFolder) -> dict[str, dict[str, Any]]:
    """The last line of each split."""
    lines = read_metrics(run.metrics)
    return {line["split"]: {key: value for key, value in line.items() if key not in ("split", "time")} for line in lines}


def read_manifest(folder: Path, *, stages: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of an earlier run, its model files compared with their hashes.

    UsageError: no such run, unfinished, broken, not of one of `stages` (if any are given), or changed since.
    """
    run = RunFolder(folder)
    if not run.manifest.exists():
        if not run.recipe.exists():
            raise UsageError(f"{folder} is not a run: it has neither manifest.json nor recipe.yaml")
        raise UsageError(f"{folder} is an unfinished run (no manifest.json)\n  finish it: the same command with --resume")
    try:
        manifest = json.loads(run.manifest.read_bytes())
        stage, recorded = str(manifest["stage"]), dict(manifest["model_files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run.manifest} is damaged ({error!r})\n  run that stage again with --force") from error
    if stages and stage not in stages:
        raise UsageError(f"{folder} is a run of {stage}, expected {' or '.join(sorted(stages))}")
    found = hash_tree(run.model)
    changes = [f"{name} is missing" for name in recorded if name not in found]
    changes += [f"{name} has changed" for name in recorded if name in found and found[name] != recorded[name]]
    changes += [f"{name} was added" for name in found if name not in recorded]
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise UsageError(
            f"{folder} is not as it was when it finished: model/{changes[0]}{more}\n"
            "  put the original back, or run that stage again with --force"
        )
    return dict(manifest)


def versions() -> dict[str, str | None]:
    """rlhf_cli, Python and the libraries that decide numbers."""
    return {"rlhf_cli": __version__, "python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # built without metadata; no reason to lose a run at its end


def git_commit() -> str | None:
    """The commit of the working directory, if that is a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def settings_hash(folder: Path) -> str:
    """SHA-256 of the names and hashes of SETTINGS, those that the folder has."""
    found = [[name, sha256_file(folder / name)] for name in SETTINGS if (folder / name).exists()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def weights_hash(folder: Path) -> str:
    """xxh3-128 of the names and bytes of the folder's safetensors files, in hex. UsageError where there are none."""
    import xxhash

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UsageError(f"{folder} has no *.safetensors: weights in other formats are not read")
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb", buffering=0) as handle:
            while part := handle.read(2**22):
                digest.update(part)
    return digest.hexdigest()
