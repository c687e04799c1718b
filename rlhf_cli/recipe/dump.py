"""A typed recipe → YAML that reads back as the same recipe, and what differs between two."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.keys import keys_of, unlisted, walk
from rlhf_cli.recipe.recipes import Recipe
from rlhf_cli.recipe.yaml_reader import SCALARS, Unreadable, plain, read
from rlhf_cli.sections import Cadence, Expanded

ONLY_GROW = ("train.steps", "train.epochs")

MAY_CHANGE = (
    *(f"train.{name}" for name in keys_of(Cadence)),
    *("train.tokens_per_device", *ONLY_GROW, "reference.cache", "trackers", "env", "output"),
    *("models", "preferences", "text", "winrate", "best_of_n", "compare_at_kl", "beta", "dump_pairs", "tokens_per_device"),
)
"""Keys, with all below them, that may differ when a run is resumed; those of ONLY_GROW may not shrink."""

HOW_ASKED = re.compile(
    r"(reward|gold)\.\d+\.((judge\.)?(timeout|parallel)|judge\.(retries|endpoint))|(judge|revise)\.(timeout|parallel|retries|endpoint)"
)
"""What is mended where a term's server did not answer; who is asked, and what, stays the same."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would misread: PyYAML's own rules leave the text 1e-5 bare and quote the text yes."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's class-level table; emptied, refilled below)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _name, _pattern in SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=_is_flat(items))
)
_Dumper.add_representer(
    dict, lambda dumper, items: dumper.represent_mapping("tag:yaml.org,2002:map", items, flow_style=not items)
)
# line separators survive as escapes only
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
)


def dump_recipe(recipe: Recipe, stage: str) -> str:
    """Every value in force, as a recipe."""
    return f"# every value in force; `rlhf {stage} THIS --output OTHER` repeats the run\n{as_yaml_text(_plain(recipe))}"


def as_yaml_text(values: dict[str, Any]) -> str:
    """Sections, as a recipe has them."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=math.inf, allow_unicode=True)
    return text


def dumped_stage(path: Path) -> str | None:
    """The stage that a dumped recipe is of, by its first line; None if that does not tell."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        found = re.search(r"`rlhf (\S+) THIS", lines.readline())
    return found and found[1]


def flatten(recipe: Recipe) -> dict[str, object]:
    """Dotted key → value. A list of plain values is one value; a list of sections has positions in its keys."""
    return dict(_flat(_plain(recipe), ""))


def flatten_section(section: object) -> dict[str, object]:
    """Key → value of one section without sections in it."""
    return dict(_plain(section))


def differences(old_text: str, new: Recipe) -> list[tuple[str, object, object]]:
    """(key, old, new) for each key whose value differs from a dumped recipe; None where one side lacks the key.

    Raises UsageError when the old text is not readable YAML.
    """
    try:
        old = dict(_flat(plain(read(old_text, [])), ""))
    except Unreadable as error:
        place = f"line {error.problem.line}: {error.problem.what}"
        raise UsageError(f"the earlier run's recipe.yaml cannot be read, {place}") from None
    now = flatten(new)
    # A key that the old file does not know had its default, unless it is of a list's item that the file does not have either.
    defaults, there = defaultdict[str, list[object]](list), {key.rpartition(".")[0] for key in old}
    for key, known in walk(type(new)):
        defaults[key].append(known.default)  # of each kind that may stand there
    unknown = [key for key in now if key not in old and (key in defaults or key.rpartition(".")[0] in there)]
    usual = {key for key in unknown if now[key] in defaults[unlisted(key)]}
    keys = [key for key in dict.fromkeys([*now, *old]) if key not in usual]
    return [(key, old.get(key), now.get(key)) for key in keys if old.get(key) != now.get(key)]


def refuse_changes(old_text: str, new: Recipe, old_path: str = "recipe.yaml") -> None:
    """Raises UsageError with a table old/new when a resumed run differs in a key that may not change.

    `steps` and `epochs` are compared with themselves only: that a run is not shorter than its checkpoint is for the
    caller to check once both are turned into steps.
    """
    refused = [row for row in differences(old_text, new) if not _may_change(*row)]
    if not refused:
        return
    rows = [("key", "old", "new"), *((key, one_line(old), one_line(now)) for key, old, now in refused)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    table = [f"  {key:<{widths[0]}}  {old:<{widths[1]}}  {now}" for key, old, now in rows]
    differ = f"{len(refused)} value{'s differ' if len(refused) > 1 else ' differs'} from {old_path}"
    head = f"--resume: {differ} and may not. put them back, or start another run with --output"
    raise UsageError("\n".join([head, *table]))


def one_line(value: object) -> str:
    """The value as YAML that reads back as it, as `--set` and tables have it."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def _may_change(key: str, old: object, new: object) -> bool:
    if key in ONLY_GROW and isinstance(old, (int, float)) and isinstance(new, (int, float)):
        return new >= old
    return bool(HOW_ASKED.fullmatch(key)) or any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _is_flat(items: list[Any]) -> bool:
    return not any(isinstance(item, (dict, list)) for item in items)


def _plain(value: Any) -> Any:
    """Sections as dicts under their recipe names, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key.name: _plain(vars(value)[key.field]) for key in keys_of(type(value)).values()}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.written if isinstance(value, Expanded) else value


def _flat(value: Any, key: str) -> Iterator[tuple[str, object]]:
    dot = f"{key}." if key else ""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{dot}{name}")
    elif isinstance(value, list) and not _is_flat(value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{dot}{index}")
    else:
        yield key, value
