"""The recipe's keys as text, for `--help`."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.objectives.base import Objective
from rlhf_cli.recipe.keys import Key, arms, as_yaml, keys_of, kind_of, sections_in
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES
from rlhf_cli.sections import Train

WIDTH = 77  # typer indents by two more
COLUMN = 30


def key_table(stage: str) -> str:
    """One entry for each key of a stage's recipe: name, default or *, choices and meaning, at most WIDTH columns wide."""
    lines = ["Recipe keys, with their defaults (* required):"]
    _section(STAGES[stage].recipe, 0, stage, set(), lines)
    return "\n".join(lines)


def _section(section: type, depth: int, stage: str, told: set[Any], lines: list[str]) -> None:
    for key in keys_of(section).values():
        inner = sections_in(key.kind)
        lines += _entry(f"{key.name}{_default(key)}", depth, _meaning(key, stage if section is Train else ""))
        if len(inner) > 1:
            _kinds(inner, depth + 1, lines)
        elif inner and inner[0] not in told:
            told.add(inner[0])
            _section(inner[0], depth + 1, stage, told, lines)


def _kinds(sections: tuple[type, ...], depth: int, lines: list[str]) -> None:
    """Every kind with its own keys, the default first. A key that means the same as in an earlier kind is only named."""
    told: set[str] = set()
    for section in sections:
        entries = {
            f"{key.name}{_default(key)}": _entry(f"{key.name}{_default(key)}", depth + 1, _meaning(key, ""))
            for key in keys_of(section).values()
            if key.name != "kind"
        }
        shared = [head for head, entry in entries.items() if "\n".join(entry) in told]
        lines += _entry(f"kind: {kind_of(section)}", depth, f"with {', '.join(shared)}" if shared else "")
        lines += [line for head, entry in entries.items() if head not in shared for line in entry]
        told |= {"\n".join(entry) for entry in entries.values()}
        if issubclass(section, Objective) and section.known_as:
            lines += _entry("methods by other names", depth + 1, "")
            lines += [line for name, keys in section.known_as.items() for line in _entry(name, depth + 2, keys)]


def _entry(head: str, depth: int, meaning: str) -> list[str]:
    head, column = f"{'  ' * depth}{head}", " " * COLUMN
    told = textwrap.wrap(meaning, WIDTH, initial_indent=column, subsequent_indent=column, break_on_hyphens=False)
    if len(head) >= COLUMN or not told:
        return [head, *told]
    return [f"{head:<{COLUMN}}{told[0].lstrip()}", *told[1:]]


def _default(key: Key) -> str:
    if all(dataclasses.is_dataclass(arm) for arm in arms(key.kind)):
        return ":"
    return ": *" if key.default is dataclasses.MISSING else f": {as_yaml(key.default)}"


def _meaning(key: Key, stage: str) -> str:
    choices = [name for arm in arms(key.kind) if get_origin(arm) is Literal for name in get_args(arm)]
    words = [key.help] if key.help else []
    if key.name == "learning_rate" and stage:
        words.append(f"null: {'; '.join(_rates(stage))}")
    if len(choices) > 1:
        words.append(" | ".join(choices))
    return ". ".join(words)


def _rates(stage: str) -> Iterator[str]:
    """The stage's default rates, and those of kinds that have others."""
    row = TRAINING_STAGES[stage]
    yield f"{row.learning_rate['lora']:g} lora, {row.learning_rate['full']:g} full"
    for objective in row.objectives:
        if own := objective.learning_rate:
            yield f"{kind_of(objective)} {own['lora']:g} lora, {own['full']:g} full"
