"""The JSON schema of a recipe, for editors: types, names, bounds and the meaning of every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.recipe.keys import Key, arms, keys_of, kind_of, sections_in, shape
from rlhf_cli.recipe.load import OF_FILES
from rlhf_cli.recipe.stages import STAGES
from rlhf_cli.sections import SHORT_FORM

SIMPLE = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def recipe_schema(stage: str) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the recipe of a command. What keys must agree on among themselves is not in it."""
    whole = _section(STAGES[stage].recipe)
    whole["properties"] |= {name: {"type": "string", "description": told} for name, told in OF_FILES.items()}
    whole.pop("required", None)  # a recipe with a base leaves out what the base has
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"A recipe of rlhf {stage}", **whole}


def _section(section: type) -> dict[str, Any]:
    keys = keys_of(section).values()
    found: dict[str, Any] = {"type": "object", "properties": {key.name: _key(key) for key in keys}, "additionalProperties": False}
    needed = [key.name for key in keys if key.default is dataclasses.MISSING and not dataclasses.is_dataclass(key.kind)]
    return found | ({"required": needed} if needed else {})


def _key(key: Key) -> dict[str, Any]:
    found = _any_of(_arm(arm, key) for arm in arms(key.kind))
    kinds = sections_in(key.kind)
    if len(kinds) > 1 and all(dataclasses.is_dataclass(arm) for arm in arms(key.kind)):
        found = _by_kind(kinds)
    elif dataclasses.is_dataclass(key.kind):
        found = _any_of([found, {"type": "null"}])  # `train:` with all its keys commented out
    if key.help:
        found["description"] = key.help
    if isinstance(key.default, (bool, int, float, str)):
        found["default"] = key.default
    return found


def _by_kind(sections: tuple[type, ...]) -> dict[str, Any]:
    """A section whose `kind` says which keys it has; the first where it says none."""
    own = [_section(section) for section in sections]
    for section, each in zip(sections, own, strict=True):
        each["properties"]["kind"] = {"const": kind_of(section)}
        if section is not sections[0]:
            each["required"] = [*each.get("required", []), "kind"]
    return _any_of([*own, {"type": "null"}])


def _any_of(options: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found = list(options)
    return found[0] if len(found) == 1 else {"anyOf": found}


def _arm(arm: Any, key: Key) -> dict[str, Any]:
    if get_origin(arm) is Literal:
        return {"enum": list(get_args(arm))}
    if dataclasses.is_dataclass(arm) and isinstance(arm, type):
        return _section(arm)
    form = shape(arm)
    if form is list:
        item = get_args(arm)[0]
        items = _any_of(_arm(inner, key) for inner in arms(item))
        if item in SHORT_FORM:  # a path stands for a source, and one source for a list of it
            items = {"anyOf": [items, {"type": "string"}]}
            return {"anyOf": [{"type": "array", "items": items, "minItems": 1}, items]}
        return {"type": "array", "items": items}
    if form is tuple:
        inner = get_args(arm)
        return {
            "type": "array",
            "prefixItems": [_arm(each, key) for each in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if form is dict:
        return {"type": "object", "additionalProperties": _any_of(_arm(inner, key) for inner in arms(get_args(arm)[1]))}
    found: dict[str, Any] = {"type": SIMPLE[form]}
    if form in (int, float):
        found |= {name: bound for name, bound in (("minimum", key.low), ("maximum", key.high)) if bound is not None}
    return found
