"""manifest.json: what a finished run is made of. Its presence means that the run is complete."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.errors import UsageError
from rlhf_cli.files import hash_tree
from rlhf_cli.runs.folder import RunFolder, read_metrics

LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate")


@dataclass(frozen=True)
class BaseModel:
    """The frozen weights that everything sits on."""

    path: str  # hub id or folder
    revision: str | None
    weights_hash: str  # of `weights_hash`


@dataclass(frozen=True)
class Parent:
    """An earlier run that this one used."""

    path: str
    manifest_hash: str  # SHA-256 of its manifest.json


@dataclass(frozen=True)
class Outcome:
    """What only the stage knows about its run; the rest of the manifest is read from the folder and the machine."""

    stage: str
    seed: int
    base_model: BaseModel
    data: dict[str, str]  # source path → fingerprint
    chat_template_hash: str | None
    steps: int
    tokens: int
    seconds: float
    peak_memory: float  # GiB
    parents: tuple[Parent, ...] = ()
    status: str = "finished"  # or how it ended early, e.g. "stopped: objective/kl above 20"
    extra: dict[str, Any] = field(default_factory=dict)  # a stage's own figures, e.g. a reward model's accuracy


def build_manifest(run: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """The manifest of a run whose model, metrics and data.json are in place."""
    return {
        "stage": outcome.stage,
        "status": outcome.status,
        "versions": versions(),
        "git_commit": git_commit(),
        "seed": outcome.seed,
        "base_model": asdict(outcome.base_model),
        "parents": [asdict(parent) for parent in outcome.parents],
        "data": outcome.data,
        "chat_template_hash": outcome.chat_template_hash,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 3),
        "tokens_per_second": round(outcome.tokens / outcome.seconds, 1) if outcome.seconds else 0.0,
        "peak_memory": round(outcome.peak_memory, 3),
        "final_metrics": {
            line["split"]: {key: value for key, value in line.items() if key not in ("split", "time")}
            for line in read_metrics(run.metrics)
        },  # the last line of each split
        **outcome.extra,
        "model_files": hash_tree(run.model),
    }


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
