"""Figures as JSON has them, and back: a dataclass is an object with its fields as keys, and so is an interval."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from rlhf_cli.figures import Interval


def to_json(value: Any) -> Any:
    """A figure, or any number of them in lists and dictionaries, as JSON has it."""
    if isinstance(value, Interval):
        return value._asdict()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: to_json(own) for key, own in value.items()}
    return [to_json(own) for own in value] if isinstance(value, list | tuple) else value


def from_json(kind: Any, entry: Any) -> Any:
    """What `to_json` made of such a value; other keys are left out. KeyError, TypeError, AttributeError: it has another shape."""
    has_fields = is_dataclass(kind) or kind is Interval
    if has_fields:
        types = get_type_hints(kind)
        return kind(**{key: from_json(types[key], own) for key, own in entry.items() if key in types})
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict:
        return {key: from_json(inner[1], own) for key, own in entry.items()}
    if origin in (list, tuple):
        return origin(from_json(inner[0], own) for own in entry)
    # Of a union: an object is the dataclass among its types, which are one at most.
    classes = [each for each in inner if is_dataclass(each)]
    return from_json(classes[0], entry) if classes and isinstance(entry, dict) else entry
