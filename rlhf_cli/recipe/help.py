"""The recipe's keys as text, for `--help`."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.recipe.keys import Key, arms, as_yaml, keys_of, section_in
from rlhf_cli.recipe.schema import LEARNING_RATE, STAGES

WIDTH = 77  # typer indents by two more
COLUMN = 30


def key_table(stage: str) -> str:
    """One entry for each key of a stage's recipe: name, default or *, choices and meaning, at most WIDTH columns wide."""
    lines = ["Recipe keys, with their defaults (* required):"]
    _section(STAGES[stage], 0, stage, set(), lines)
    return "\n".join(lines)


def _section(section: type, depth: int, stage: str, told: set[Any], lines: list[str]) -> None:
    for key in keys_of(section).values():
        inner = section_in(key.kind)
        lines += _entry(key, depth, _meaning(key, stage))
        if inner is not None and inner not in told:
            told.add(inner)
            _section(inner, depth + 1, stage, told, lines)


def _entry(key: Key, depth: int, meaning: str) -> list[str]:
    head = f"{'  ' * depth}{key.name}{_default(key)}"
    column = " " * COLUMN
    told = textwrap.wrap(meaning, WIDTH, initial_indent=column, subsequent_indent=column, break_on_hyphens=False)
    if len(head) >= COLUMN or not told:
        return [head, *told]
    return [f"{head:<{COLUMN}}{told[0].lstrip()}", *told[1:]]


def _default(key: Key) -> str:
    if dataclasses.is_dataclass(key.kind):
        return ":"
    return ": *" if key.default is dataclasses.MISSING else f": {as_yaml(key.default)}"


def _meaning(key: Key, stage: str) -> str:
    choices = [name for arm in arms(key.kind) if get_origin(arm) is Literal for name in get_args(arm)]
    rates = [f"{LEARNING_RATE[stage, how]:g} {how}" for how in ("lora", "full") if (stage, how) in LEARNING_RATE]
    words = [key.help] if key.help else []
    if key.name == "learning_rate" and rates:
        words.append(f"null: {', '.join(rates)}")
    if len(choices) > 1:
        words.append(" | ".join(choices))
    return ". ".join(words)
