"""What the schema's dataclasses say about each key: type, default, help and bounds, for the loader and the help."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rlhf_cli.sections import SHORT_FORM


class Key(NamedTuple):
    """One recipe key. `field` differs from `name` for Python's reserved words only: lambda_ holds `lambda`."""

    name: str
    field: str
    kind: Any  # the resolved annotation
    default: Any  # dataclasses.MISSING when the key is required
    help: str = ""
    low: float | None = None
    high: float | None = None
    path: bool = False
    last: bool = False


@cache
def keys_of(section: type) -> dict[str, Key]:
    """The keys of one section, in the schema's order, those marked `last` after the others."""
    hints = get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found.append(Key(field.name.removesuffix("_"), field.name, hints[field.name], default, **field.metadata))
    return {key.name: key for key in sorted(found, key=lambda key: key.last)}


def arms(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def shape(kind: Any) -> Any:
    """What a type looks like in YAML: NoneType, bool, int, float, str, Literal, list, tuple or dict (sections too)."""
    return dict if dataclasses.is_dataclass(kind) else get_origin(kind) or kind


def sections_in(kind: Any) -> tuple[type, ...]:
    """The sections that may stand in this type: itself, in a union, a list or the values of a dict."""
    inner = (get_args(arm)[-1] if get_origin(arm) in (list, dict) else arm for arm in arms(kind))
    return tuple(section for section in inner if dataclasses.is_dataclass(section) and isinstance(section, type))


def kind_of(section: type) -> str:
    """The `kind` that chooses this section among others."""
    name: str = get_args(keys_of(section)["kind"].kind)[0]
    return name


def source_list(kind: Any) -> tuple[type, str] | None:
    """(item, key of its short form) where the type is a list whose items have a short form."""
    items = (get_args(arm)[0] for arm in arms(kind) if get_origin(arm) is list)
    return next(((item, SHORT_FORM[item]) for item in items if item in SHORT_FORM), None)


def describe(kind: Any) -> str:
    """The type in words, as error messages and the help say it."""
    simple = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = []
    for arm in arms(kind):
        if get_origin(arm) is Literal:
            words.append(" | ".join(get_args(arm)))
        elif source_list(arm):
            words.append("a path or a list of sources")
        elif get_origin(arm) is list:
            words.append("a list")
        elif get_origin(arm) is tuple:
            words.append(f"a list of {len(get_args(arm))} numbers")
        elif dataclasses.is_dataclass(arm) and len(sections_in(kind)) > 1:
            words.append("keys (kind, …)")
        elif dataclasses.is_dataclass(arm) and isinstance(arm, type):
            names = list(keys_of(arm))
            short = "a path or " if arm in SHORT_FORM else ""
            words.append(f"{short}keys ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        else:
            words.append(simple.get(arm, "keys with values"))
    return " or ".join(dict.fromkeys(words))


def as_yaml(value: Any) -> str:
    """A default as a person would write it in a recipe."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    return f"[{', '.join(map(as_yaml, value))}]" if isinstance(value, (tuple, list)) else str(value)


def walk(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every (dotted key, key) below a section, list positions and free names left out: data.train.path.

    Where several sections may stand in one place, the keys of each: a dotted key may come more than once.
    """
    for key in keys_of(section).values():
        dotted = f"{prefix}{key.name}"
        yield dotted, key
        for inner in sections_in(key.kind):
            yield from walk(inner, f"{dotted}.")


def unlisted(key: str) -> str:
    """A dotted key without the positions in lists: data.train.0.path is data.train.path."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


@cache
def known_keys(section: type) -> tuple[str, ...]:
    """All dotted keys of a recipe, the shallow ones first."""
    return tuple(sorted(dict.fromkeys(dotted for dotted, _ in walk(section)), key=lambda dotted: dotted.count(".")))


def required_keys(section: type) -> Iterator[str]:
    """Dotted keys that every recipe has, in the schema's order."""
    for key in keys_of(section).values():
        if key.default is dataclasses.MISSING:
            inner = sections_in(key.kind) if dataclasses.is_dataclass(key.kind) else ()
            yield from (f"{key.name}.{name}" for name in required_keys(inner[0])) if inner else (key.name,)
