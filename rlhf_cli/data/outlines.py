"""Chat templates that only copy what turns say: they are rendered once for each order of roles, and then filled in.

Rendering a template takes longer than all else that is done to a short row but for its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

from jinja2 import nodes

from rlhf_cli.data.records import Message

Way = Literal["whole", "trimmed", "otherwise", "unread"]
"""What becomes of a turn's content where an expression names the turn: it is written, or used in a way that is not understood."""

KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys of turns whose use is understood: that of a turn of plain text has the first two."""


LOOP = ("first", "last", "index", "index0", "revindex", "revindex0", "length")


class Outline(NamedTuple):
    """What stands around the texts of the turns."""

    pieces: tuple[str, ...]  # one more than there are turns
    trimmed: bool

    def fill(self, messages: Sequence[Message]) -> str:
        texts = [message.content.strip() if self.trimmed else message.content for message in messages]
        return self.pieces[0] + "".join(text + piece for text, piece in zip(texts, self.pieces[1:], strict=True))


_KNOWN: WeakKeyDictionary[object, dict[tuple[str, tuple[str, ...], bool], Outline | None]] = WeakKeyDictionary()


def outline(
    tokenizer: object, text: str, messages: Sequence[Message], generation: bool, render: Callable[[Sequence[Message]], str]
) -> Outline | None:
    """The outline of turns in this order of roles; None if the template does more with their texts than to copy them."""
    if any(message.extra for message in messages):
        return None
    known = _KNOWN.setdefault(tokenizer, {})
    key = text, tuple(message.role for message in messages), generation
    if key not in known:
        copied, marks = how_copied(text), [f"\ue000{i}\ue001" for i in range(len(messages))]
        written = "" if copied is None else render([Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)])
        pieces: list[str] = []
        for mark in marks:
            piece, _, written = written.partition(mark)
            pieces.append(piece)
        complete = copied is not None and not any("\ue000" in piece for piece in (*pieces, written)) and bool(written)
        known[key] = Outline((*pieces, written), copied == "trimmed") if complete else None
    return known[key]


@lru_cache(64)
def how_copied(text: str) -> Way | None:
    """How a template writes what turns say; None if it may do anything else with it.

    Its syntax tree shows it: a turn is the variable of a loop over `messages`, or one of them by its number; of a turn single
    keys are read and nothing else; and its content is joined with other texts and written, at most trimmed before.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(text).environment.parse(text)
    parents = {id(child): node for node in (tree, *tree.find_all(nodes.Node)) for child in node.iter_child_nodes()}
    loops = tree.find_all(nodes.For)
    turns = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    ways: set[Way] = set()
    for name in tree.find_all(nodes.Name):
        parent = parents[id(name)]
        if isinstance(parent, nodes.For) and name in (parent.target, parent.iter):
            continue
        if name.ctx != "load" and name.name in (*turns, "messages", "loop"):
            return None
        if name.name == "messages":
            ways.add(_of_messages(name, parents))
        elif name.name == "loop":
            ways.add("unread" if isinstance(parent, nodes.Getattr) and parent.attr in LOOP else "otherwise")
        elif name.name in turns:
            ways.add(_of_turn(name, parents))
    ways.discard("unread")
    return ways.pop() if ways in ({"whole"}, {"trimmed"}) else None


def _of_messages(name: nodes.Node, parents: dict[int, nodes.Node]) -> Way:
    parent = parents[id(name)]
    if isinstance(parent, nodes.Filter) and parent.name in ("length", "count"):
        return "unread"
    if isinstance(parent, nodes.Getitem) and isinstance(parent.arg, nodes.Slice):
        above = parents[id(parent)]
        return "unread" if isinstance(above, nodes.For) and above.iter is parent else "otherwise"
    if isinstance(parent, nodes.Getitem) and isinstance(parent.arg, nodes.Const | nodes.Neg) and parent.node is name:
        return _of_turn(parent, parents)
    return "otherwise"


def _of_turn(turn: nodes.Node, parents: dict[int, nodes.Node]) -> Way:
    read = parents[id(turn)]
    if isinstance(read, nodes.Getattr):
        key = read.attr
    elif isinstance(read, nodes.Getitem) and isinstance(read.arg, nodes.Const) and read.node is turn:
        key = read.arg.value
    else:
        return "otherwise"
    if key != "content":
        return "unread" if key in KEYS else "otherwise"
    node: nodes.Node = read
    trimmed = False
    while not isinstance(parents[id(node)], nodes.Output):
        parent = parents[id(node)]
        if isinstance(parent, nodes.Filter) and parent.name == "trim" and not parent.args and node is read:
            trimmed = True
        elif not isinstance(parent, nodes.Add | nodes.Concat):
            return "otherwise"
        node = parent
    node = parents[id(node)]
    while not isinstance(node, nodes.Template):
        node = parents[id(node)]
        if not isinstance(node, nodes.For | nodes.If | nodes.Template):
            return "otherwise"
    return "trimmed" if trimmed else "whole"
