"""What the runs that a model comes from were trained on, and what they held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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
    split: Split


def ancestors(path: str) -> Iterator[Ancestor]:
    """The run that a model, an adapter or a checkpoint lies in, and all that it was made from, where their folders are there."""
    waiting, seen = [path], set[Path]()
    while waiting:
        place = Path(waiting.pop())
        run = next((each for each in (place, place.parent, place.parent.parent) if (each / INPUTS).exists()), None)
        if run is None or run.resolve() in seen:
            continue
        seen.add(run.resolve())
        recipe, folder, inputs = recorded_recipe(run), RunFolder(run), _json(run / INPUTS)
        if (data := recipe.get("data")) is None:
            continue  # of an evaluation
        sources = [source["path"] for source in (*data["train"], *((recipe.get("ptx") or {}).get("data") or ()))]
        trained_on = frozenset(str(inputs[source]) for source in sources if source in inputs)
        yield Ancestor(str(run), trained_on, Split(data.get("holdout") or 0.0, data.get("holdout_seed")))
        parents = [parent["path"] for parent in _json(folder.manifest).get("parents", ())]
        waiting += [*parents, recipe["model"]["path"]]


def _json(path: Path) -> dict[str, Any]:
    """What a file of a run that may have been moved or changed says; empty where it says nothing."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_bytes()))
    return {}
