"""`rlhf runs`: a table of the runs below a folder, read from their small files alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import textwrap
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
NAMED, SHORTEST, STATUS = 2, 16, 24
"""Of what a run comes from so many are named; of its name so many characters are shown at least, and of its status at most."""


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

    def cells(self, branch: str) -> dict[str, str]:
        """Its row of the table, the name behind its branch of the tree."""
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
        cells = {name: " ".join(cell.split()) for name, cell in cells.items()}
        return cells | {"run": branch + cells["run"]}


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
    rows = [run.cells(branch) for branch, run in (drawn(runs) if tree else (("", run) for run in runs))]
    width = shutil.get_terminal_size().columns if console.live else None
    for line in table(rows, width) if rows else [f"no runs below {folder}"]:
        console.say(line)
    for run in runs:
        if run.fault is not None:
            console.warn(f"{run.path}: {run.fault}")


def find_runs(folder: Path) -> list[Run]:
    """Every run below a folder, itself included, in the order of their last words."""
    places, seen, by_hash = dict[Path, str](), set[Path](), dict[str, str]()  # where a run lies → how it is reached
    for name, inner, _ in os.walk(folder, followlinks=True):
        real = Path(name).resolve()
        inner.sort()
        if real in seen:
            inner.clear()
        elif is_run(RunFolder(Path(name))):
            places[real] = str(Path(name))
            inner[:] = [each for each in inner if each not in ("model", "checkpoints", "plots", "base", "failed")]
            with suppress(OSError):
                by_hash[sha256_file(real / "manifest.json")] = places[real]
        seen.add(real)
    runs = []
    for name in places.values():
        try:
            runs.append(_read(RunFolder(Path(name)), places, by_hash))
        except (OSError, UsageError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
            plain = isinstance(error, OSError | UsageError)
            fault = str(error).splitlines()[0] if plain else f"what its files say is not what a run writes ({error!r})"
            runs.append(Run(name, datetime.fromtimestamp(Path(name).stat().st_mtime).astimezone(), fault=fault))
    return sorted(runs, key=lambda run: (run.when, run.path))


def _read(run: RunFolder, places: Mapping[Path, str], by_hash: Mapping[str, str]) -> Run:
    """What the files of a run tell. An error of any kind: they are damaged."""
    recipe, complete = recorded_recipe(run.path), run.manifest.exists()
    manifest = read_json(run.manifest) if complete else {}
    trained, held_out = _last_lines(run.metrics)
    held_out = held_out or manifest.get("final_metrics", {}).get("eval", {})
    figures: Iterator[tuple[str, Any]] = ((name, held_out[name]) for name in HEADLINES if name in held_out)
    if complete and run.result.exists():
        figures = _of_models(read_json(run.result))
    metric, value = next(((name, float(own)) for name, own in figures), (None, None))
    last = next(path for path in (run.metrics, run.manifest, run.path / INPUTS, run.recipe) if path.exists())
    seconds = max((line["time"] for line in (trained, held_out) if "time" in line), default=last.stat().st_mtime)
    when = datetime.fromtimestamp(seconds).astimezone()
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


def _last_lines(log: Path) -> list[dict[str, Any]]:
    """The last whole line of each split, train and eval; empty without one. Of a long log no other is parsed."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    marks = (b'"split": "train"', b'"split": "eval"')
    return [json.loads(next((line for line in reversed(lines) if mark in line), b"{}")) for mark in marks]


def _of_models(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, figure) of an evaluation: win rates, what was measured of its models, their agreement with preferences."""
    yield from ((f"winrate/{model}", own["mean"]) for model, own in result["winrate"].items())
    for name in HEADLINES:
        yield from ((f"{name}/{model}", own[name]["mean"]) for model, own in result["models"].items() if name in own)
    agreement = {name: own.get("accuracy") for name, own in result["preferences"].items()}
    yield from ((f"accuracy/{name}", own) for name, own in agreement.items() if own is not None)


def _unfinished(run: RunFolder, step: int) -> str:
    """How a run without a manifest stands: one that ends in order takes its lock away, one that is killed cannot."""
    if holder(run.path):
        return "running"
    if (lock := run.path / LOCK).exists():
        said = lock.read_text(encoding="utf-8", errors="replace")
        return "killed" if not said or said.endswith(f" on {socket.gethostname()}\n") else "unknown"
    refused = [int(path.stem.removeprefix("step-")) for path in run.failed.glob("step-*.json")]
    return "failed" if max(refused, default=0) > step else "stopped"


def _origins(
    own: Path, recipe: dict[str, Any], manifest: dict[str, Any], places: Mapping[Path, str], by_hash: Mapping[str, str]
) -> tuple[str | None, list[str]]:
    """What a run started from, and the runs that it was made from: all in which something lies that its recipe names.

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
    if isinstance(value, dict):
        value = [own for key, own in value.items() if key not in ("output", "dump_pairs")]
    if isinstance(value, list):
        for own in value:
            yield from _texts(own)
    elif isinstance(value, str):
        yield value


def drawn(runs: Sequence[Run]) -> Iterator[tuple[str, Run]]:
    """Runs as a tree, each behind the branch that leads to it from what it started from: an older run."""
    trunks = dict[str, str | None]()
    for run in runs:  # the oldest first: of two folders that seem to come from each other, one has been written anew since
        origins = [run.start] if run.start else run.parents
        trunks[run.path] = next((path for path in origins if path in trunks), None)

    def below(trunk: str | None, before: str) -> Iterator[tuple[str, Run]]:
        own = [run for run in runs if trunks[run.path] == trunk]
        for run in own:
            branch, rest = ("", "") if trunk is None else ("└─ ", "   ") if run is own[-1] else ("├─ ", "│  ")
            yield before + branch, run
            yield from below(run.path, before + rest)

    return below(None, "")


def table(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """A line a row, below a head: in columns for a terminal of this width, of which some give way; else with tabs between."""
    if width is None:
        return ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    rows = [{**row, "status": textwrap.shorten(row["status"], STATUS, placeholder=" …")} for row in rows]
    widths = {name: max(len(row[name]) for row in ({name: name}, *rows)) for name in rows[0] if any(row[name] for row in rows)}
    for name in GIVE_WAY:
        spare = max(0, widths["run"] - SHORTEST) if name == GIVE_WAY[-1] else 0
        if sum(widths.values()) + 2 * len(widths) - 2 - spare > width:
            widths.pop(name, None)
    too_many = sum(widths.values()) + 2 * len(widths) - 2 - width
    widths["run"] = max(min(widths["run"], SHORTEST), widths["run"] - max(0, too_many))
    return ["  ".join(_end(row[name], own) for name, own in widths.items()).rstrip() for row in ({n: n for n in widths}, *rows)]


def _end(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"…{text[len(text) - width + 1 :]}"
