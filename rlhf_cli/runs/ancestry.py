"""What the runs that a model comes from were trained on, and what they held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.errors import UsageError
from rlhf_cli.files import read_json
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.resume import INPUTS, recorded_recipe


class Split(NamedTuple):
    """Which prompts are held out."""

    holdout: float  # share; 0: none
    seed: int | None  # None: of a release before holdout_seed, which held out other prompts

    def __str__(self) -> str:
        by = "by an earlier release's rule" if self.seed is None else f"by holdout_seed {self.seed}"
        return f"{self.holdout:.3g} of the prompts {by}" if self.holdout else "nothing"


class Ancestor(NamedTuple):
    """A run that a model comes from, itself included."""

    path: str
    trained_on: frozenset[str]  # fingerprints of its sources
    split: Split | None  # None: a file that would tell is missing or damaged


def ancestors(path: str) -> Iterator[Ancestor]:
    """The run that a model, an adapter or a checkpoint lies in, and all that it was made from, where their folders are there."""
    waiting, seen = [path], set[Path]()
    while waiting:
        run = run_of(waiting.pop())
        if run is None or run.resolve() in seen:
            continue
        seen.add(run.resolve())
        recipe, manifest, inputs = recorded_recipe(run), json_if_any(RunFolder(run).manifest), json_if_any(run / INPUTS)
        if "models" in recipe:
            continue  # an evaluation
        try:
            data, start = recipe["data"], recipe["model"]["path"]
            sources = [source["path"] for source in (*data["train"], *((recipe.get("ptx") or {}).get("data") or ()))]
            trained_on = frozenset(str(inputs[source]) for source in sources)
            split = Split(data.get("holdout") or 0.0, data.get("holdout_seed"))
        except (KeyError, TypeError, AttributeError):
            yield Ancestor(str(run), frozenset(), None)
        else:
            yield Ancestor(str(run), trained_on, split)
            waiting.append(start)
        parents = manifest.get("parents", ())
        waiting += [str(parent["path"]) for parent in parents if isinstance(parent, dict) and "path" in parent]


def unknown(runs: Iterable[Ancestor]) -> list[str]:
    """What to say of runs that do not tell what they were trained on."""
    said = "what it was trained on and what it held out is not known: its recipe.yaml or inputs.json is missing or damaged"
    return [f"{run.path}: {said}" for run in runs if run.split is None]


def is_run(folder: RunFolder) -> bool:
    """Does a run lie there? A recipe that lies about is none."""
    own = (folder.manifest, folder.metrics, folder.recipe)
    return (folder.path / INPUTS).exists() or sum(path.exists() for path in own) > 1


def run_of(path: str) -> Path | None:
    """The folder of the run that this path is, or that it lies in as its model, a checkpoint or a file."""
    place = Path(path)
    return next((each for each in (place, place.parent, place.parent.parent) if is_run(RunFolder(each))), None)


def json_if_any(path: Path) -> dict[str, Any]:
    """What a file of a run that may have been moved or changed says; empty where it says nothing."""
    with suppress(OSError, UsageError):
        return read_json(path)
    return {}
