"""`rlhf runs`: a table of the runs below a folder, read from their small files alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_cli.console import Console
from rlhf_cli.errors import UsageError
from rlhf_cli.figures import duration, short
from rlhf_cli.files import non_finite, read_json, sha256_file, to_json
from rlhf_cli.recipe.dump import dumped_stage
from rlhf_cli.runs.ancestry import is_run, run_of
from rlhf_cli.runs.folder import LOCK, RunFolder, holder
from rlhf_cli.runs.resume import INPUTS, recorded_recipe
from rlhf_cli.suggest import closest_path

JSON = ("path", "stage", "status", "objective", "metric", "value", "finished", "seconds", "parents")
HEADLINES = ("objective/scores", "rewards/accuracies", "accuracy", "perplexity", "loss")
"""The held-out figure that stands for a run, and for a model of an evaluation: the first of these that it has."""
GIVE_WAY = ("from", "took", "objective", "when", "stage", "held out")
"""The columns that a narrow terminal does without, the first one first."""
NAMED, SHORTEST = 2, 16
"""Of what a run comes from so many are named; and of its own name so many characters are shown at least."""


@dataclass(frozen=True)
class Run:
    """What the files of a run tell. None: they do not, or it has none."""

    path: str
    when: datetime  # of its last word
    stage: str | None = None
    status: str = "damaged"  # its manifest's, or running, stopped, killed, failed, unknown
    objective: str | None = None
    metric: str | None = None
    value: float | None = None  # the metric's, on held-out rows
    finished: str | None = None  # ISO 8601
    seconds: float | None = None
    parents: list[str] = field(default_factory=list)  # runs that it was made from, the one that it started from first
    start: str | None = None  # the model that it started from
    step: int | None = None  # the last one that an unfinished run has logged
    fault: str | None = None

    @property
    def cells(self) -> dict[str, str]:
        """Its row of the table."""
        made_from = list(dict.fromkeys([*([self.start] if self.start else []), *self.parents]))
        more = f" and {len(made_from) - NAMED} more" if len(made_from) > NAMED else ""
        cells = {
            "run": self.path,
            "stage": self.stage or "",
            "status": self.status if self.step is None else f"{self.status}, step {self.step}",
            "objective": self.objective or "",
            "held out": "" if self.value is None else f"{self.metric} {short(self.value)}",
            "when": f"{self.when:%Y-%m-%d %H:%M}",
            "took": "" if self.seconds is None else duration(self.seconds),
            "from": ", ".join(made_from[:NAMED]) + more,
        }
        return {name: " ".join(cell.split()) for name, cell in cells.items()}


def list_runs(folder: Path, *, as_json: bool, tree: bool) -> None:
    """Print the runs below `folder`, the oldest first. UsageError: there is no such folder."""
    if as_json and tree:
        raise UsageError("--json has the parents of every run, --tree draws them: give one of the two")
    if not folder.is_dir():
        near = closest_path(str(folder))
        raise UsageError(f"there is no folder {folder}. " + (f"did you mean {near}?" if near else "name the one with your runs"))
    console, runs = Console(), find_runs(folder)
    if as_json:
        console.say(to_json([{name: vars(run)[name] for name in JSON} for run in runs], indent=2).decode())
        return
    rows = [
        run.cells | {"run": f"{branch}{run.cells['run']}"} for branch, run in (drawn(runs) if tree else (("", r) for r in runs))
    ]
    width = shutil.get_terminal_size().columns if console.live else None
    for line in table(rows, width) if rows else [f"no runs below {folder}"]:
        console.say(line)
    for run in runs:
        if run.fault is not None:
            console.warn(f"{run.path}: {run.fault}")


def find_runs(folder: Path) -> list[Run]:
    """Every run below a folder, itself included, in the order of their last words."""
    places = dict[Path, str]()  # where a run lies → how it is reached
    seen = set()
    for name, inner, _ in os.walk(folder, followlinks=True):
        real = Path(name).resolve()
        inner.sort()
        if real in seen:
            inner.clear()
        elif is_run(RunFolder(Path(name))):
            places[real] = str(Path(name))
            inner[:] = [each for each in inner if each not in ("model", "checkpoints", "plots", "base", "failed")]
        seen.add(real)
    by_hash = dict[str, str]()
    for name in places.values():
        with suppress(OSError):
            by_hash[sha256_file(Path(name) / "manifest.json")] = name
    runs = []
    for name in places.values():
        try:
            runs.append(_read(RunFolder(Path(name)), places, by_hash))
        except (OSError, UsageError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
            plain = isinstance(error, OSError | UsageError)
            fault = str(error).splitlines()[0] if plain else f"what its files say is not what a run writes ({error!r})"
            runs.append(Run(name, _moment(Path(name).stat().st_mtime), fault=fault))
    return sorted(runs, key=lambda run: (run.when, run.path))


def _read(run: RunFolder, places: Mapping[Path, str], by_hash: Mapping[str, str]) -> Run:
    """What the files of a run tell. An error of any kind: they are damaged."""
    recipe, complete = recorded_recipe(run.path), run.manifest.exists()
    manifest = read_json(run.manifest) if complete else {}
    result = read_json(run.result) if complete and run.result.exists() else {}
    trained, held_out = _last_lines(run.metrics)
    held_out = held_out or manifest.get("final_metrics", {}).get("eval", {})
    figures = _of_models(result) if result else ((name, held_out[name]) for name in HEADLINES if name in held_out)
    metric, value = next(((name, float(own)) for name, own in figures), (None, None))
    last = next(path for path in (run.metrics, run.manifest, run.path / INPUTS, run.recipe) if path.exists())
    when = _moment(max((line["time"] for line in (trained, held_out) if "time" in line), default=last.stat().st_mtime))
    start, parents = _origins(run.path, recipe, manifest, places, by_hash)
    found = Run(
        path=str(run.path),
        when=when,
        stage=str(manifest["stage"]) if complete else dumped_stage(run.recipe),
        status=str(manifest["status"]) if complete else _unfinished(run, trained.get("step", 0)),
        objective=manifest.get("objective", {}).get("kind") or recipe.get("objective", {}).get("kind"),
        metric=metric,
        value=value,
        finished=when.isoformat(timespec="seconds") if complete else None,
        seconds=float(manifest["seconds"]) if "seconds" in manifest else None,
        parents=parents,
        start=start,
        step=None if complete else trained.get("step"),
    )
    if bad := non_finite(vars(found)):
        raise ValueError(f"{bad[0]} is {bad[1]}")
    return found


def _moment(seconds: float) -> datetime:
    """In the time zone of this machine."""
    return datetime.fromtimestamp(seconds).astimezone()


def _last_lines(log: Path) -> list[dict[str, Any]]:
    """The last whole line of each split, train and eval; empty without one. Of a long log no other is parsed."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    marks = (b'"split": "train"', b'"split": "eval"')
    return [json.loads(next((line for line in reversed(lines) if mark in line), b"{}")) for mark in marks]


def _of_models(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, figure) of an evaluation: win rates, then what was measured of its models, then their agreement with preferences."""
    yield from ((f"winrate/{model}", own["mean"]) for model, own in result["winrate"].items())
    for name in HEADLINES:
        yield from ((f"{name}/{model}", own[name]["mean"]) for model, own in result["models"].items() if name in own)
    yield from (
        (f"accuracy/{name}", own["accuracy"]) for name, own in result["preferences"].items() if own.get("accuracy") is not None
    )


def _unfinished(run: RunFolder, step: int) -> str:
    """How a run without a manifest stands: one that ends in order takes its lock away, one that is killed cannot."""
    if holder(run.path):
        return "running"
    if (run.path / LOCK).exists():
        said = (run.path / LOCK).read_text(encoding="utf-8", errors="replace")
        return "killed" if not said or said.endswith(f" on {socket.gethostname()}\n") else "unknown"
    refused = [int(path.stem.removeprefix("step-")) for path in run.failed.glob("step-*.json")]
    return "failed" if max(refused, default=0) > step else "stopped"


def _origins(
    own: Path, recipe: dict[str, Any], manifest: dict[str, Any], places: Mapping[Path, str], by_hash: Mapping[str, str]
) -> tuple[str | None, list[str]]:
    """What a run started from, and the runs that it was made from: all that lie where its recipe names something.

    A parent in the manifest is the run with its hash, if that is here: folders are moved, and written anew with --force.
    """
    recorded = {str(each["path"]): by_hash.get(each["manifest_hash"], each["path"]) for each in manifest.get("parents", [])}
    found = {}
    for text in (*_texts(recipe), *recorded):
        there = os.path.exists(text.partition("*")[0])  # noqa: PTH110  (a text may be too long for Path's)
        run = recorded.get(text) or (run_of(text) if there else None)
        if run is not None and (real := Path(run).resolve()) != own.resolve():
            found[text] = places.get(real, str(run))
    start = str(recipe["model"]["path"]) if "model" in recipe else None
    return start and found.get(start, start), list(dict.fromkeys(found.values()))


def _texts(value: Any) -> Iterator[str]:
    """All texts of a recipe, but for where it writes to."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner = value if isinstance(value, list) else [own for key, own in value.items() if key not in ("output", "dump_pairs")]
        for own in inner:
            yield from _texts(own)


def drawn(runs: Sequence[Run]) -> Iterator[tuple[str, Run]]:
    """Runs as a tree, each below what it started from, with the branches that are drawn before it."""
    known, left = {run.path for run in runs}, {run.path: run for run in runs}

    def below(parent: Run, before: str) -> Iterator[tuple[str, Run]]:
        children = [run for run in runs if run.path in left and _trunk(run, known) == parent.path]
        for child in children:
            left.pop(child.path)
        for child in children:
            last = child is children[-1]
            yield before + ("└─ " if last else "├─ "), child
            yield from below(child, before + ("   " if last else "│  "))

    roots = [run for run in runs if _trunk(run, known) is None]
    for run in (*roots, *runs):  # those that come from each other in a circle have no root
        if left.pop(run.path, None):
            yield "", run
            yield from below(run, "")


def _trunk(run: Run, known: set[str]) -> str | None:
    """The run below which it is drawn."""
    return next((path for path in ([run.start] if run.start else run.parents) if path in known), None)


def table(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """A line a row, below a head: in columns for a terminal of this width, of which some give way; else with tabs between."""
    if width is None:
        return ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    widths = {name: own for name, own in widths.items() if any(row[name] for row in rows)}
    for name in GIVE_WAY:
        run = min(widths["run"], SHORTEST) if name == GIVE_WAY[-1] else widths["run"]
        if run + sum(own + 2 for column, own in widths.items() if column != "run") > width:
            widths.pop(name, None)
    room = width - sum(own + 2 for name, own in widths.items() if name != "run")
    widths["run"] = min(widths["run"], max(SHORTEST, room))
    cells = [{name: name for name in widths}, *rows]
    return ["  ".join(_ending(row[name], own).ljust(own) for name, own in widths.items()).rstrip() for row in cells]


def _ending(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"
