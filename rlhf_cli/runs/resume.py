"""What a run was started with, and whether a resumed one is still the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import UsageError
from rlhf_cli.files import read_json, write_atomic, write_json
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.dump import differences, dump_recipe, refuse_changes
from rlhf_cli.runs.folder import RunFolder, open_run
from rlhf_cli.runs.manifest import read_manifest

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where pyyaml has it
CODE, CHANGED, ATTENTION = "code", "changed code", "attention"
INPUTS = "inputs.json"
"""Hashes of the base model, the parent, the template and the data of a run."""


def record_inputs(run: RunFolder, recipe: recipes.Recipe, stage: str, inputs: dict[str, Any]) -> None:
    write_atomic(run.recipe, dump_recipe(recipe, stage))
    write_json(run.path / INPUTS, inputs)


@contextmanager
def opened(recipe: recipes.Recipe, stage: str, inputs: dict[str, Any], *, resume: bool, force: bool) -> Iterator[RunFolder]:
    """The locked folder of a run of one process, with the recipe and the inputs recorded in it."""
    with open_run(Path(recipe.output), resume=resume, force=force) as run:
        if resume:
            refuse_other_inputs(run, recipe, inputs)
        run.manifest.unlink(missing_ok=True)
        record_inputs(run, recipe, stage, inputs)
        yield run


def changed_code(run: RunFolder, code: Mapping[str, str]) -> list[dict[str, str]]:
    """What of a run's own code (what it is → hash) is another than when it was last started: {"what", "from", "to"} each."""
    before = (_recorded(run) or {}).get(CODE, {})
    return [{"what": what, "from": before[what], "to": now} for what, now in code.items() if before.get(what, now) != now]


def all_changes(run: RunFolder) -> list[dict[str, str]]:
    """Of all times that the run was continued."""
    return list((_recorded(run) or {}).get(CHANGED, ()))


def recorded_attention(run: RunFolder) -> str | None:
    """The attention kernel that the run has used."""
    return (_recorded(run) or {}).get(ATTENTION)


def record_attention(run: RunFolder, kernel: str) -> None:
    write_json(run.path / INPUTS, (_recorded(run) or {}) | {ATTENTION: kernel})


def forget_inputs(run: RunFolder) -> None:
    """Take back what was written before a run that never began."""
    for path in (run.recipe, run.path / INPUTS, run.data):
        path.unlink(missing_ok=True)


def refuse_other_inputs(run: RunFolder, recipe: recipes.Recipe, inputs: dict[str, Any], *, may_grow: bool = False) -> None:
    """Raises UsageError when the recipe, the data or the parent changed since the run was started.

    may_grow: inputs may come and go, and only what the run had before must be the same.
    """
    work = [path for path in (run.checkpoints, run.samples, run.manifest) if path.exists()]
    if work and (missing := [path.name for path in (run.recipe, run.path / INPUTS) if not path.exists()]):
        raise UsageError(
            f"--resume: {run.path} has {work[0].name} but no {' and no '.join(missing)}: nothing tells what it was started with. "
            "put back what is missing, or start another run with --output"
        )
    if not run.recipe.exists():
        return
    refuse_changes(run.recipe.read_text(encoding="utf-8"), recipe, str(run.recipe))
    old = _recorded(run)
    if old is None:
        return
    keys = (old.keys() & inputs.keys() if may_grow else {**old, **inputs}.keys()) - {CODE, CHANGED, ATTENTION}
    if "base settings" not in old:
        keys -= {"base settings"}  # a release that did not record them began the run
    changed = [key for key in {**old, **inputs} if key in keys and old.get(key) != inputs.get(key)]
    if changed:
        rows = [f"  {key}: {_differing(old.get(key), inputs.get(key))}" for key in changed]
        said = "--resume: what the run was started with has changed. start another run with --output"
        raise UsageError("\n".join([said, *rows]))


def _differing(old: Any, new: Any) -> str:
    """Of two hashes their beginnings, of two records in JSON the fields that differ."""
    try:
        before, after = json.loads(old), json.loads(new)
        fields = [field for field in {**before, **after} if before.get(field) != after.get(field)]
    except (TypeError, ValueError, AttributeError):
        return f"{str(old)[:16]} → {str(new)[:16]}"
    return ", ".join(f"{field} {str(before.get(field))[:40]} → {str(after.get(field))[:40]}" for field in fields)


def is_as_before(run: RunFolder, recipe: recipes.Recipe, inputs: dict[str, Any]) -> bool:
    """Are the recipe and all inputs those that the run was last started with, but for what has no effect on its results?"""
    if not run.recipe.exists():
        return False
    changed = {key for key, _, _ in differences(run.recipe.read_text(encoding="utf-8"), recipe)}
    return changed <= {"output", "tokens_per_device"} and _recorded(run) == inputs


def _recorded(run: RunFolder) -> dict[str, Any] | None:
    path = run.path / INPUTS
    return dict(read_json(path)) if path.exists() else None


def recorded_recipe(folder: Path) -> dict[str, Any]:
    """The recipe that the run in this folder was last started with; empty where there is none. UsageError: it is damaged."""
    path = RunFolder(folder).recipe
    try:
        return dict(yaml.load(path.read_text(encoding="utf-8"), LOADER) or {}) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def finished_steps(run: RunFolder) -> int:
    """Steps of the finished run in this folder, −1 for none. One that stopped early by its own rule counts as all its steps."""
    if not run.manifest.exists():
        return -1
    manifest = read_manifest(run.path)
    return int(manifest["steps"]) if manifest["status"] == "finished" else 2**62
