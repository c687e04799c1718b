"""Nodes → the schema's dataclasses. Every problem is collected; nothing is raised."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.recipe.keys import Key, arms, as_yaml, describe, keys_of, kind_of, known_keys, sections_in, shape, source_list
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES
from rlhf_cli.recipe.suggest import OTHER_VALUES, REASONS, REMARKS, closest_key
from rlhf_cli.recipe.yaml_reader import BAD, Node, Problem
from rlhf_cli.sections import Expanded
from rlhf_cli.suggest import closest, did_you_mean

VARIABLE = re.compile(r"\$\{(\w+)\}")
SHOWN = 100
"""Problems are listed, and suggestions sought, up to here: a file with more of them is no recipe."""


def spell_out(node: Node, section: type) -> Node:
    """The tree with each short form in full: `train: a.jsonl` becomes `train: [{path: a.jsonl}]`, marked bare."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    for name, key in keys_of(section).items():
        child = children.get(name)
        if child is None:
            continue
        listed = source_list(key.kind)
        if listed is not None:
            children[name] = _spell_out_list(child, listed[1])
            continue
        for inner in sections_in(key.kind):
            children[name] = spell_out(children[name], inner)
    return dataclasses.replace(node, value=children)


def _spell_out_list(node: Node, short: str) -> Node:
    alone = not isinstance(node.value, list)
    given = [node] if alone else node.value
    items = [Node({short: item}, item.line) if isinstance(item.value, str) else item for item in given]
    if alone and not isinstance(items[0].value, dict):
        return node
    return dataclasses.replace(node, value=items, bare=alone or node.bare)


def lines_of(node: Node, key: str = "") -> dict[str, int]:
    """Dotted key → line, for every key of the tree. A list written without brackets has no position in its keys."""
    found = {key: node.line} if key and node.line >= 0 else {}
    dot = f"{key}." if key else ""
    if isinstance(node.value, dict):
        for name, child in node.value.items():
            found |= lines_of(child, f"{dot}{name}")
    elif isinstance(node.value, list) and node.bare:
        found |= {**lines_of(node.value[0], key), key: node.line}
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            found |= lines_of(child, f"{dot}{index}")
    return found


class Builder:
    """Checks nodes against types. Where a value is wrong its key is in `bad` and its default, or None, stands in."""

    def __init__(self, recipe: type, stage: str) -> None:
        self.known = known_keys(recipe)
        recipes: Iterable[type] = (other.recipe for other in STAGES.values())
        self.elsewhere = {key for other in recipes for key in known_keys(other)}.difference(self.known)
        self.stage = stage
        self.problems: list[Problem] = []
        self.bad: set[str] = set()

    def report(self, line: int, key: str, what: str) -> Any:
        """Notes a problem and returns None, the value that stands in."""
        self.problems.append(Problem(line, key, what))
        self.bad.add(key)
        return None

    def section(self, kind: type, node: Node, prefix: str, rivals: Sequence[type] = ()) -> Any:
        """The dataclass `kind` from a mapping node; `rivals` could stand in its place under another `kind:`."""
        self.carried_over(kind, node, prefix, rivals)
        meant = self.unknown(kind, node, prefix, rivals)
        values = {}
        for name, key in keys_of(kind).items():
            dotted = f"{prefix}{name}"
            if name in node.value:
                value = self.value(key.kind, node.value[name], dotted, key)
                if value is not None or dotted not in self.bad or key.default is dataclasses.MISSING:
                    values[key.field] = value
            elif key.default is dataclasses.MISSING:
                values[key.field] = None if dotted in meant else self.missing(key, node, dotted)
        return kind(**values)

    def carried_over(self, kind: type, node: Node, prefix: str, rivals: Sequence[type]) -> None:
        """Reports keys of the file that the command line's `kind` gives another default: they were meant for another kind."""
        chosen = node.value.get("kind")
        if chosen is None or chosen.line != 0:
            return
        for name, key in keys_of(kind).items():
            usual = next((keys_of(rival)[name].default for rival in rivals if name in keys_of(rival)), key.default)
            if name != "kind" and name in node.value and node.value[name].line > 0 and key.default != usual:
                what = f"is the file's, and kind {kind_of(kind)} has a default of its own, {as_yaml(key.default)}. "
                what += f"give it with --set too, or replace the whole section: --set '{prefix[:-1]}={{kind: {kind_of(kind)}}}'"
                self.report(node.value[name].line, f"{prefix}{name}", what)

    def missing(self, key: Key, node: Node, dotted: str) -> Any:
        if dataclasses.is_dataclass(key.kind) and isinstance(key.kind, type):
            return self.section(key.kind, Node({}, node.line), f"{dotted}.")
        return self.report(max(node.line, 1), dotted, f"missing. add it: {key.help or describe(key.kind)}")

    def unknown(self, kind: type, node: Node, prefix: str, rivals: Sequence[type]) -> set[str]:
        """Reports keys that `kind` lacks; returns what they were meant to be."""
        keys = keys_of(kind)
        unused = [name for name in keys if name not in node.value]
        meant = set()
        for name, child in node.value.items():
            if name in keys or (name == "<<" and child.value is BAD):
                continue
            dotted = f"{prefix}{name}"
            owners = [kind_of(rival) for rival in rivals if name in keys_of(rival)]
            defaults = [keys_of(rival)[name].default for rival in rivals if name in keys_of(rival)]
            if child.value is None and (owners or dotted in self.elsewhere):
                continue
            if any(_is(child.value, default) and not isinstance(default, str) for default in defaults):
                continue  # it asks for nothing, where a word would ask for a way of doing it
            if owners:
                what = f"has no effect with kind: {kind_of(kind)} (it belongs to {', '.join(owners)}). remove it"
                if child.line > 0 and "kind" in node.value and node.value["kind"].line == 0:
                    what += f", or replace the whole section: --set '{prefix[:-1]}={{kind: {kind_of(kind)}}}'"
                self.report(child.line, dotted, what)
                continue
            if dotted in self.elsewhere and not any(key.endswith(f".{name}") for key in self.beyond(prefix)):
                self.report(child.line, dotted, REASONS.get(dotted, f"has no effect in {self.stage}. remove it"))
                continue
            # a key that is there already is the less likely meaning, so unused ones come first
            names = [*unused, *(other for other in keys if other in node.value)]
            near = closest_key(name, names, prefix.rstrip("."), self.beyond(prefix)) if len(self.problems) < SHOWN else None
            if name == "log_level":
                hint = REMARKS[name]
            elif near is not None:
                meant.add(near)
                self.bad.add(near)
                hint = f"did you mean {near}?" + (f" {REMARKS[name]}" if name in REMARKS else "")
            elif prefix == "objective.":
                hint = f"{kind_of(kind)} takes {', '.join(keys)}"
            else:
                hint = f"keys here: {', '.join(keys)}"
            self.report(child.line, dotted, f"unknown key. {hint}")
        return meant

    def beyond(self, prefix: str) -> tuple[str, ...]:
        """The keys that one of another section may stand for. An objective's names mean nothing outside objectives."""
        return tuple(key for key in self.known if key.startswith(prefix)) if prefix == "objective." else self.known

    def value(self, kind: Any, node: Node, dotted: str, key: Key) -> Any:
        """The node as `kind`, or None with a problem reported."""
        if node.value is BAD:
            self.bad.add(dotted)
            return None
        if node.value is None and dataclasses.is_dataclass(kind):
            node = dataclasses.replace(node, value={})  # `train:` with all its keys commented out
        fitting = [arm for arm in arms(kind) if _fits(arm, node.value)]
        if not fitting:
            return self.report(node.line, dotted, _mismatch(kind, node, key))
        sections = [arm for arm in fitting if dataclasses.is_dataclass(arm) and isinstance(arm, type)]
        arm = self.by_kind(sections, node, dotted) if len(sections) > 1 else fitting[0]
        if arm is None:
            return None
        if dataclasses.is_dataclass(arm) and isinstance(arm, type):
            return self.section(arm, node, f"{dotted}.", sections)
        form = shape(arm)
        if form is list:
            return self.items(get_args(arm)[0], node, dotted, key)
        if form is tuple:
            return self.fixed(get_args(arm), node, dotted, key)
        if form is dict:
            inner = get_args(arm)[1]
            return {name: self.value(inner, child, f"{dotted}.{name}", key) for name, child in node.value.items()}
        if form in (int, float):
            return self.number(form, node, dotted, key)
        if form is not str:
            return node.value
        return self.path(node, dotted) if key.path else self.expanded(node, dotted)

    def by_kind(self, sections: Sequence[type], node: Node, dotted: str) -> Any:
        """Among several sections, the one whose `kind` the mapping names; the first when it names none."""
        child = node.value.get("kind")
        if child is None:
            return sections[0]
        if child.value is BAD:
            self.bad.add(f"{dotted}.kind")
            return None
        named = next((section for section in sections if kind_of(section) == child.value), None)
        return named or self.report(child.line, f"{dotted}.kind", _not_among(list(map(kind_of, sections)), child))

    def items(self, inner: Any, node: Node, dotted: str, key: Key) -> Any:
        if not node.value and source_list(list[inner]):
            return self.report(node.line, dotted, "the list is empty. name a path")
        names = [dotted if node.bare else f"{dotted}.{index}" for index in range(len(node.value))]
        return [self.value(inner, child, name, key) for name, child in zip(names, node.value, strict=True)]

    def fixed(self, inner: tuple[Any, ...], node: Node, dotted: str, key: Key) -> Any:
        if len(node.value) != len(inner):
            return self.report(node.line, dotted, f"expected a list of {len(inner)} numbers, found {len(node.value)}")
        pairs = enumerate(zip(inner, node.value, strict=True))
        return tuple(self.value(kind, child, f"{dotted}.{index}", key) for index, (kind, child) in pairs)

    def number(self, form: Any, node: Node, dotted: str, key: Key) -> Any:
        if not math.isfinite(node.value):
            return self.report(node.line, dotted, f"{node.text[:40]} is not a finite number. give a finite one")
        if key.low is not None and node.value < key.low:
            return self.report(node.line, dotted, f"expected at least {key.low:g}, found {node.text[:40]}")
        if key.high is not None and node.value > key.high:
            return self.report(node.line, dotted, f"expected at most {key.high:g}, found {node.text[:40]}")
        return form(node.value)

    def path(self, node: Node, dotted: str) -> Any:
        """The text with ${NAME} replaced by the environment's value."""
        if not node.value.strip() or "\0" in node.value:
            return self.report(node.line, dotted, "expected a path, found empty text. name one")
        if node.value.startswith("~"):
            return self.report(node.line, dotted, "~ is not expanded. write ${HOME}" + node.value[1:])
        found = self.expanded(node, dotted)
        return None if found is None else str(found)

    def expanded(self, node: Node, dotted: str) -> Any:
        """The text with ${NAME} replaced by the environment's value."""
        names = VARIABLE.findall(node.value)
        for name in names:
            if not os.environ.get(name):
                return self.report(node.line, dotted, f"the environment variable {name} is not set. set it, or write it out")
        if not names:
            return node.value
        found = Expanded(VARIABLE.sub(lambda match: os.environ[match[1]], node.value))
        found.written = node.value
        return found


def _fits(arm: Any, value: Any) -> bool:
    form = shape(arm)
    if form is Literal:
        return isinstance(value, str) and value in get_args(arm)
    if form in (int, float):
        wide = isinstance(value, (int, float) if form is float else int) or (isinstance(value, float) and math.isinf(value))
        return wide and not isinstance(value, bool)
    return isinstance(value, list if form is tuple else form)


def _found(node: Node) -> str:
    if isinstance(node.value, dict):
        return "keys with values"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "nothing" if not node.text else "null"
    if isinstance(node.value, str):
        return f"the text '{node.value[:40]}'"
    return node.text[:40]


def _is(value: Any, default: Any) -> bool:
    """The same value: 1 is 1.0, and true is neither."""
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _not_among(names: list[str], node: Node) -> str:
    """What is wrong with a kind that is none of these, and the stage whose kind it is or the one that is meant."""
    advice, value = "write one of these", node.value
    if isinstance(value, str):
        ours = OTHER_VALUES["kind"].get(value, "")
        owner = next((name for name, stage in TRAINING_STAGES.items() if value in map(kind_of, stage.objectives)), None)
        advice = f"{value} is a kind of rlhf {owner}" if owner else did_you_mean(value, names, advice)
        advice = f"write {ours}" if ours.partition(",")[0] in names else advice
    return f"expected {' | '.join(names)}, found {_found(node)}. {advice}"


def _mismatch(kind: Any, node: Node, key: Key) -> str:
    forms = [shape(arm) for arm in arms(kind)]
    names = [name for arm in arms(kind) if get_origin(arm) is Literal for name in get_args(arm)]
    if names and key.name == "kind":
        return _not_among(names, node)
    ours = OTHER_VALUES.get(key.name, {}).get(node.text)
    if ours is not None:
        return f"expected {describe(kind)}, found {_found(node)}. write {ours}"
    near = closest(node.value, names) if isinstance(node.value, str) else None
    return f"expected {describe(kind)}, found {_found(node)}. {_advice(node, forms, near, key)}"


def _written(node: Node, forms: list[Any], key: Key) -> str | None:
    """The text or number in the list, in the section or under the name that it was written without, if it fits there."""
    value, text, sections = node.value, node.text[:40], sections_in(key.kind)
    if str in forms or len(sections) > 1 or isinstance(value, bool):
        return None
    if isinstance(value, str) and any(get_origin(arm) is list and str in get_args(arm) for arm in arms(key.kind)):
        return f"[{text}]"
    if not sections and isinstance(value, (str, int, float)):
        return f"[{text}]" if list in forms else f"{{NAME: {text}}}" if dict in forms and key.path else None
    if not sections or not isinstance(value, str):
        return None
    keys = keys_of(sections[0])
    name = "function" if "function" in keys and ".py:" in text else next(iter(keys))
    if list in forms:
        return f"[{{{name}: {text}}}]"
    return f"{{{name}: {text}}}" if keys[name].default is dataclasses.MISSING else None


def _advice(node: Node, forms: list[Any], near: str | None, key: Key) -> str:
    value = node.value
    if near is not None:
        return f"did you mean {near}?"
    numeric = int in forms or float in forms
    if bool in forms and isinstance(value, str) and value.lower() in ("yes", "on", "y", "no", "off", "n", "true", "false"):
        return f"write {'true' if value.lower() in ('yes', 'on', 'y', 'true') else 'false'}"
    if numeric and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_,]*", value) and re.search("[_,]", value):
        thousands = re.fullmatch(r"[-+]?[1-9]\d{0,2}([,_]\d{3})+", value) or "," not in value
        return f"write {re.sub('[_,]', '', value) if thousands else value.replace('_', '').replace(',', '.')}"
    if numeric and isinstance(value, str) and re.fullmatch(r"[-+0-9.eE]+", value):
        return "remove the quotes"
    if int in forms and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if value is False and type(None) in forms:
        return "write null"
    if (str in forms or source_list(key.kind)) and isinstance(value, (bool, int, float)):
        return f"put it in quotes: '{node.text[:40]}'"
    if list in forms and isinstance(value, dict) and sections_in(key.kind):
        return "it is a list: begin each of its terms with `- `"
    if dict in forms and key.path and isinstance(value, list):
        return "give each a name: {NAME: PATH, …}"
    written = _written(node, forms, key)
    if written is not None:
        return f"write {written}"
    if value is None and key.default == {}:
        return "fill it in, or remove it"
    if value is None and key.default is not dataclasses.MISSING:
        told = "" if dataclasses.is_dataclass(key.default) else f", {as_yaml(key.default)}"
        return f"remove the key for its default{told}"
    if isinstance(key.default, (bool, int, float, str, tuple)):
        return f"the default is {as_yaml(key.default)}"
    return f"it is: {key.help}" if key.help else "write keys below it"
