"""YAML text → nodes that know their line. YAML 1.2 scalars; nothing is executed, expanded or guessed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 5_000

SCALARS = (
    ("null", re.compile(r"(null|Null|NULL|~|)$")),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")),
    ("float", re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")),
)
"""YAML 1.2 core schema: 1e-5 is a float, 010 is ten, yes and 1_000 are text. (PyYAML itself follows 1.1.)"""

BAD: Final = object()
"""The value of a node whose problem is already reported."""


class Problem(NamedTuple):
    """One thing wrong with a recipe. Line 0 is the command line."""

    line: int
    key: str
    what: str  # ends in what to do


class Unreadable(Exception):
    """The text is no YAML at all: reading stops at this one problem."""

    def __init__(self, line: int, key: str, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(line, key, what)


@dataclass(frozen=True)
class Node:
    """A value and where it stands: a scalar, a list of nodes, or a dict of nodes."""

    value: Any
    line: int  # of its key or list item, from 1; 0: from the command line; -1: a section that --set made on its way
    text: str = ""  # a scalar as it was written
    bare: bool = False  # a list of one that was written without the list


def scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar."""
    kind = next((name for name, pattern in SCALARS if pattern.match(text)), "str")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base) if len(text) < 300 else math.inf
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def plain(node: Node) -> Any:
    """The node as nested dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def decode(data: bytes) -> str:
    """UTF-8 text, a byte order mark removed. Raises Unreadable."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(line, "", f"byte 0x{data[error.start]:02x} is not UTF-8. save the file as UTF-8") from None


def read(text: str, problems: list[Problem], line: int | None = None, key: str = "") -> Node:
    """The one document in `text`; an empty one is a node with the value None. Raises Unreadable.

    `line` overrides every node's line and `key` names the place: for values of the command line.
    """
    try:
        return _Reader(text, problems, line, key).document()
    except yaml.reader.ReaderError as error:
        at = line if line is not None else text.count("\n", 0, error.position) + 1
        char = f"the character U+{int(error.character):04X} is not allowed"
        raise Unreadable(at, key, f"{char}. remove it") from None
    except yaml.MarkedYAMLError as error:
        began = any(words in str(error.problem) for words in ("stream end", "end of stream", "could not find expected ':'"))
        mark = error.context_mark if began and error.context_mark else error.problem_mark
        at = line if line is not None else (mark.line if mark else 0) + 1
        raise Unreadable(at, key, _syntax(str(error.problem or error.context))) from None
    except (ValueError, OverflowError):  # PyYAML's own, on escapes such as "\UFFFFFFFF"
        raise Unreadable(line or 1, key, "a quoted text has an escape that is no character. remove it") from None


def _syntax(problem: str) -> str:
    if "'\\t'" in problem:
        return "a tab where YAML wants spaces. indent with spaces"
    if problem == "mapping values are not allowed here":
        return "a colon where none can be. check the indentation, or quote text that contains ': '"
    if "undefined tag handle" in problem or "while parsing a tag" in problem:
        return "tags (!…) are not read. remove it"
    if problem.startswith("could not find expected ':'"):
        return "no colon after this key. write `key: value`"
    if "cannot start any token" in problem or "expected alphabetic or numeric" in problem:
        return f"not valid YAML: {problem}. quote text that starts with * & @ % or `"
    return f"not valid YAML: {problem}. check brackets, quotes and indentation"


def _no_tags(tag: str) -> str:
    return f"tags such as {tag.replace('tag:yaml.org,2002:', '!!')[:40]} are not read. remove it"


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


class _Reader:
    """Builds nodes from PyYAML's events, which are produced without recursion and without constructing anything."""

    def __init__(self, text: str, problems: list[Problem], line: int | None, key: str) -> None:
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.problems = problems
        self.line = line
        self.key = key
        self.count = 0

    def document(self) -> Node:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return Node(None, 1 if self.line is None else self.line)
        root = self.node(next(self.events), self.key, 0)
        next(self.events)  # document end
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise Unreadable(self.at(after), self.key, "a second document starts here. keep one document in a file")
        return root

    def at(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if self.line is None else self.line  # type: ignore[union-attr]

    def node(self, event: yaml.Event, key: str, depth: int) -> Node:
        line = self.at(event)
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            raise Unreadable(line, key, "too deep or too large for a recipe. put data in data files")
        if isinstance(event, yaml.AliasEvent):
            what = f"aliases are not read. write out what *{event.anchor} stands for, or quote the text"
            self.problems.append(Problem(line, key, what))
            return Node(BAD, line)
        tagged = event.tag is not None  # type: ignore[attr-defined]
        if tagged:
            self.problems.append(Problem(line, key, _no_tags(event.tag)))  # type: ignore[attr-defined]
        if isinstance(event, yaml.MappingStartEvent):
            found = self.mapping(line, key, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item, f"{key}.{len(items)}", depth + 1))
            found = Node(items, line)
        else:
            text = str(event.value)  # type: ignore[attr-defined]
            if not _is_unicode(text):
                raise Unreadable(line, key, "a quoted text has an escape that is no character. remove it")
            quoted = event.style is not None  # type: ignore[attr-defined]
            found = Node(text if quoted else scalar(text), line, text)
        return Node(BAD, line) if tagged else found

    def mapping(self, line: int, key: str, depth: int) -> Node:
        children: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = self.at(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise Unreadable(at, key, "a key must be a plain word. quote values that start with [, { or *")
            name = str(event.value)
            if not _is_unicode(name):
                raise Unreadable(at, key, "a key has an escape that is no character. remove it")
            dotted = f"{key}.{name}" if key else name
            if event.tag is not None:
                self.problems.append(Problem(at, dotted, _no_tags(event.tag)))
            child = self.node(next(self.events), dotted, depth + 1)
            if name in children:
                first = f", first in line {children[name].line}" if at else ""
                self.problems.append(Problem(at, dotted, f"written twice{first}. keep one"))
            else:
                children[name] = dataclasses.replace(child, line=at)
        return Node(children, line)
