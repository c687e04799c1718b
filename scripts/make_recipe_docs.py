"""Write docs/recipes.md, the reference of every recipe key, from the schema.

    python scripts/make_recipe_docs.py [--check]

--check writes nothing and exits 1 if the file is not what the schema says.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.recipe.dump import MAY_CHANGE, ONLY_GROW
from rlhf_cli.recipe.keys import Key, arms, as_yaml, describe, keys_of, section_in, source_list
from rlhf_cli.recipe.schema import LEARNING_RATE, SANE_LEARNING_RATE, STAGES

DEST = Path(__file__).parents[1] / "docs" / "recipes.md"
HEAD = """\
<!-- Made by scripts/make_recipe_docs.py from rlhf_cli/recipe/schema.py; change it there. -->
# Recipe keys

`*` marks a key without a default. `rlhf COMMAND --help` shows the same keys. A recipe is YAML 1.2: `1e-5` is a number, `yes` is a
text. A key that is unknown, written twice, or without effect in this stage is an error, and all errors are told at once.
"""
RESUMING = """\
## What may change on `--resume`

Everything else must be as it was when the run began; a difference is told in a table, and nothing is changed.

"""
SETTING = """\
## On the command line

`--set KEY=VALUE` takes any key below by its dotted path and wins over the file; VALUE is YAML. A list is addressed by position:
`--set data.train.0.limit=1000`. `${NAME}` is replaced by an environment variable in the keys marked *path*; relative paths start
at the working directory.

"""


def reference() -> str:
    """The whole file."""
    parts = [HEAD, SETTING.rstrip() + "\n"]
    told: set[type] = set()
    for stage, section in STAGES.items():
        parts += _section(section, f"`rlhf {stage}`", "", stage, told)
    return "\n".join([*parts, RESUMING + "\n".join(_may_change()), ""])


def _section(section: type, title: str, prefix: str, stage: str, told: set[type]) -> Iterator[str]:
    """A table of the section's keys, then one for each section in it that no earlier table has shown."""
    told.add(section)
    rows = [_row(key, prefix, stage) for key in keys_of(section).values()]
    yield "\n".join([f"## {title}", "", "| key | default | value | meaning |", "|---|---|---|---|", *rows, ""])
    for key in keys_of(section).values():
        inner = section_in(key.kind)
        if inner is not None and inner not in told:
            dotted = prefix + key.name
            path = f"{dotted}.{_step(key.kind)}"
            yield from _section(inner, f"`{dotted}`", path, stage, told)


def _step(kind: Any) -> str:
    """What stands between a key and the keys of its section: a position, a free name, or nothing."""
    steps = {list: "0.", dict: "NAME."}
    return next((steps[get_origin(arm)] for arm in arms(kind) if get_origin(arm) in steps), "")


def _row(key: Key, prefix: str, stage: str) -> str:
    cells = (f"`{prefix}{key.name}`", _default(key), _value(key), _meaning(key, stage))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    if dataclasses.is_dataclass(key.kind):
        return ""
    return "*" if key.default is dataclasses.MISSING else f"`{as_yaml(key.default)}`"


def _value(key: Key) -> str:
    """Type or choices, with their bounds."""
    words = [_arm(arm) for arm in arms(key.kind)]
    bounds = {"≥": key.low, "≤": key.high}
    limits = ", ".join(f"{sign} {limit:g}" for sign, limit in bounds.items() if limit is not None)
    return " or ".join(words) + (f", {limits}" if limits else "") + (", *path*" if key.path else "")


def _arm(arm: Any) -> str:
    if dataclasses.is_dataclass(arm):
        return "a section"
    if get_origin(arm) is Literal:
        return " ".join(f"`{name}`" for name in get_args(arm))
    if source_list(arm) is not None:
        return describe(arm)
    return "`null`" if arm is type(None) else describe(arm)


def _meaning(key: Key, stage: str) -> str:
    if key.name != "learning_rate":
        return key.help
    rates = [f"{LEARNING_RATE[stage, how]:g} for {_weights(how)}" for how in SANE_LEARNING_RATE]
    sane = [f"{low:g} … {high:g} for {_weights(how)}" for how, (low, high) in SANE_LEARNING_RATE.items()]
    return f"`null`: {', '.join(rates)}. A run warns outside {', '.join(sane)}"


def _weights(how: str) -> str:
    return {"lora": "LoRA", "full": "all weights"}[how]


def _may_change() -> Iterator[str]:
    for name in MAY_CHANGE:
        yield f"- `{name}`" + (" (may only grow)" if name in ONLY_GROW else "")


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/recipes.md from the schema.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if not parser.parse_args().check:
        DEST.write_text(reference(), encoding="utf-8")
        return 0
    if DEST.read_text(encoding="utf-8") == reference():
        return 0
    print(f"{DEST} is out of date: python scripts/make_recipe_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
