"""A configuration of another trainer on its way to a recipe: what nobody has read yet, what became of the rest, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_cli.data.files import find_files, read_file
from rlhf_cli.errors import RunError
from rlhf_cli.recipe.keys import keys_of, kind_of, walk
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.recipe.suggest import OTHER_NAMES, OTHER_VALUES
from rlhf_cli.recipe.yaml_reader import scalar

Tool = Literal["TRL", "LLaMA-Factory", "axolotl"]
Heading = Literal["To fill in", "Computed", "Done otherwise"]
UNKNOWN = "Not understood, and left out"
TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
OURS = {theirs: ours for ours, names in OTHER_NAMES.items() for theirs in names}
LEFT_OUT, REFUSED = ({n: why for why, names in TABLES[part].items() for n in names.split()} for part in ("left out", "refused"))
"""Their key → ours; their key → why it has no place in a recipe, or cannot be expressed."""
SECRET = re.compile("api_key|secret|password|access_key|webhook")


def asks(value: object) -> bool:
    """Does it ask for something? Other trainers read YAML 1.1, where `no` and `off` are no texts."""
    return bool(value) and str(value).lower() not in ("no", "off", "false", "none", "null", "n")


class Job:
    """What is left of a file, and what was made of it."""

    def __init__(self, path: Path, tool: Tool, given: dict[str, Any], stage: str, kind: str, gpus: int) -> None:
        self.path, self.tool, self.given, self.stage, self.kind, self.gpus = path, tool, given, stage, kind, gpus
        self.rest = {name: value for name, value in given.items() if value is not None}
        self.values: dict[str, Any] = {}  # dotted key of ours → value
        self.assumed: dict[str, object] = {}  # of ours, where the value is a default of theirs → our default
        self.told: dict[str, list[str]] = defaultdict(list)  # heading → lines
        self.left_out: dict[str, list[str]] = defaultdict(list)  # why → their keys
        self.refused: list[str] = []

    def take(self, *names: str, form: Any = object) -> Any:
        """The value of the first of these keys that the file has; none of them is left. One of another form is refused."""
        found = [(name, self.rest.pop(name)) for name in names if name in self.rest]
        if found and (not isinstance(found[0][1], form) or (form in (int, float) and isinstance(found[0][1], bool))):
            words = {dict: "keys with values", list: "a list", str: "a text", int: "a whole number"}.get(form, "a number")
            self.refuse(found[0][0], f"expected {words}, found {str(found[0][1])[:40]}")
        elif found:
            return found[0][1]
        return None

    def put(self, ours: str, value: Any) -> None:
        """A key of the recipe, with the value that is ours for theirs; numbers may be texts there."""
        if isinstance(value, str) and ours.startswith(("train.", "objective.", "data.max", "lora.")):
            value = scalar(value)
        known = OTHER_VALUES.get(ours.rpartition(".")[2], {})
        if isinstance(value, (str, int)) and str(value) in known:
            value = known[str(value)].partition(",")[0]
        self.values[ours] = value

    def name(self, ours: str) -> str:
        """Their key for one of ours, as the file has it."""
        return next((name for name in OTHER_NAMES.get(ours, ()) if name in self.given), ours)

    def assume(self, defaults: dict[str, Any]) -> None:
        """Their defaults, where the file is silent and ours are others."""
        for ours, value in defaults.items():
            if ours not in self.values and ours in self.usual and self.usual[ours] != value:
                self.values[ours], self.assumed[ours] = value, self.usual[ours]

    @cached_property
    def usual(self) -> dict[str, Any]:
        """Every key of the stage and the kind, with our default. Not to be asked for before both are known."""
        stage = TRAINING_STAGES[self.stage]
        chosen: Any = next((section for section in stage.objectives if kind_of(section) == self.kind), stage.objectives[0])
        found = {key: known.default for key, known in walk(stage.recipe) if not key.startswith("objective.")}
        return found | {f"objective.{name}": key.default for name, key in keys_of(chosen).items()}

    def tell(self, heading: Heading, line: str) -> None:
        if line not in self.told[heading]:
            self.told[heading].append(line)

    def refuse(self, theirs: str, why: str) -> None:
        self.refused.append(f"{self.path}: {theirs}: {why}")

    def leave_out(self, why: str, *names: str) -> None:
        """Keys without effect; none of them is left."""
        self.take(*names)
        self.left_out[why] += names

    def count(self) -> int | None:
        """Rows of all sources to train on; None where that takes the hub."""
        with suppress(RunError, ValueError):
            files = [(find_files(own["path"], str(self.path)), own.get("limit")) for own in self.values["data.train"]]
            return sum(1 for own, limit in files for _ in islice(chain.from_iterable(map(read_file, own)), limit))
        return None
