"""What a checkpoint holds of a step that is half done: its batches, which later weights could not repeat, and its sums so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.data.batches import StepBatches
from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Recorded, Tree
from rlhf_cli.files import read_json, write_json
from rlhf_cli.training.step import Sums

ARRAYS, NUMBERS = "underway.npz", "underway.json"


@dataclass(frozen=True)
class PartialStep:
    """Batches that are still learned from, and how far their step has come: a step of several updates may be left between two."""

    batches: StepBatches
    updates: int = 0  # made of the step after State.step
    sums: Sums = field(default_factory=Sums)  # of those updates
    first: dict[str, float] = field(default_factory=dict)  # means of the first of them, where only it says something
    seconds: float = 0.0


def save_partial_step(folder: Path, partial: PartialStep) -> None:
    """Write it into a checkpoint; numbers come back bit for bit."""
    made = partial.batches
    arrays: list[np.ndarray] = []
    numbers = {
        "first": made.first,
        "batches": [[_to_json(tree, arrays) for tree in batch] for batch in made.batches],
        "wheres": made.locations,
        "memory": made.memory,
        "given": made.given,
        "metrics": made.metrics,
        "updates": partial.updates,
        "totals": [[*key, total] for key, total in partial.sums.totals.items()],
        "counts": partial.sums.counts,
        "first_means": partial.first,
        "seconds": partial.seconds,
    }
    np.savez(folder / ARRAYS, **{str(number): array for number, array in enumerate(arrays)})  # type: ignore[arg-type]
    write_json(folder / NUMBERS, numbers)


def load_partial_step(folder: Path) -> PartialStep | None:
    """The inverse of `save_partial_step`; None if nothing was under way."""
    if not (folder / NUMBERS).exists():
        return None
    numbers: dict[str, Any] = read_json(folder / NUMBERS)
    with np.load(folder / ARRAYS) as arrays:
        batches = tuple([_from_json(saved, arrays) for saved in batch] for batch in numbers["batches"])
    made = StepBatches(
        numbers["first"], batches, tuple(numbers["wheres"]), numbers["memory"], numbers["given"], numbers["metrics"]
    )
    sums = Sums({(name, unit): total for name, unit, total in numbers["totals"]}, numbers["counts"])
    return PartialStep(made, numbers["updates"], sums, numbers["first_means"], numbers["seconds"])


PARTS = ("responses", "reference", "recorded")
"""The fields of a tree that are one array for each response, where they are there."""


def _to_json(tree: Tree, arrays: list[np.ndarray]) -> dict[str, Any]:
    """The tree with a number for each of its arrays, which are added to `arrays`."""

    def number(array: np.ndarray) -> str:
        arrays.append(array)
        return str(len(arrays) - 1)

    fields = tree._asdict() | {"recorded": tree.recorded and [np.stack(known, 1) for known in tree.recorded]}
    parts = {name: fields[name] and [number(array) for array in fields[name]] for name in PARTS}
    prompt = {"prompt": number(tree.prompt), "supervised": number(tree.supervised)}
    return {**prompt, **parts, "row": tree.row, "member": tree.member, "facts": tree.facts._asdict()}


def _from_json(saved: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Tree:
    parts: dict[str, Any] = {name: saved[name] and tuple(arrays[number] for number in saved[name]) for name in PARTS}
    parts["recorded"] = parts["recorded"] and tuple(Recorded(*known.T.copy()) for known in parts["recorded"])
    facts: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["facts"].items()}
    own = {"row": saved["row"], "member": saved.get("member")}
    return Tree(arrays[saved["prompt"]], arrays[saved["supervised"]], facts=Facts(**facts), **own, **parts)
