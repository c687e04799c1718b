"""What a row says beside the columns that are read: names that change what is learned are never left out without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.suggest import did_you_mean

OF_PROMPTS = {
    **dict.fromkeys(("system", "system_prompt"), "a system turn"),
    **dict.fromkeys(("input", "context", "documents"), "a part of the prompt"),
    "history": "earlier turns",
    **dict.fromkeys(("tools", "functions"), "functions that the model may call"),
    **dict.fromkeys(("images", "image", "audios", "audio", "videos", "video"), "no text, and only text is read"),
    "parent_id": "a place in a tree of messages",
    "chat_template_kwargs": "options of the chat template",
}
"""Columns that bear on the prompt → what they are."""

OF_RESPONSES = {
    **dict.fromkeys(
        ("label", "kto_tag"), "whether the response is desirable; as true or false beside prompt and completion it is read"
    ),
    **dict.fromkeys(("weight", "loss_weight", "train"), "how much of it is learned"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "a part of the response"),
    **dict.fromkeys(("better_response_id", "safer_response_id", "winner", "choice"), "which response is better"),
    **dict.fromkeys(("tool_calls", "function_call"), "a call of a function"),
}
"""Columns that bear on the responses."""

MEANINGFUL = OF_PROMPTS.keys() | OF_RESPONSES.keys()

READ_OF_TURNS = ("weight", "loss_weight", "train", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")

OF_TURNS = {
    **{name: what for name, what in OF_RESPONSES.items() if name not in ("label", "winner", "choice", *READ_OF_TURNS)},
    **{name: what for name, what in OF_PROMPTS.items() if what.startswith("no text")},
}
"""The same of the keys of a turn, beside its role and its content."""

NEUTRAL = {"weight": 1, "loss_weight": 1, "train": True}
"""Values that say what is done anyway."""


OWN_VARIABLES = (
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length", "bos_token", "eos_token"),
)
"""What is given to a chat template, or to the function that renders it, and no option of a row or a recipe may stand for."""


class LostMeaning(Exception):
    """A row says something that changes what is learned, and that nothing reads: not the row is wrong, but the recipe."""

    def __init__(self, name: str, what: str, where: str = "") -> None:
        super().__init__(f"'{name}'{where} is not read, and changes what the row means: {what}")
        self.name = name


def check_columns(row: Mapping[str, Any], used: Set[str | None], prompts_alone: bool) -> None:
    """Raises LostMeaning for a column not among `used` that bears on the prompt or, unless `prompts_alone`, on responses."""
    for name in sorted(row.keys() - used):
        what = OF_PROMPTS.get(name) or (None if prompts_alone else OF_RESPONSES.get(name))
        if what is not None and says_something(name, row[name]):
            raise LostMeaning(name, what)


def check_turn(turn: Mapping[str, Any], name: str, number: int) -> None:
    """Raises LostMeaning for a key of a conversation's turn."""
    for key in sorted(turn.keys() & OF_TURNS.keys()):
        if says_something(key, turn[key]):
            raise LostMeaning(key, OF_TURNS[key], f" in turn {number} of {name}")


def says_something(name: str, value: Any) -> bool:
    """Is it more than an empty value, or one that says what is done anyway?"""
    if value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
        return False
    return name not in NEUTRAL or bool(value != NEUTRAL[name])


def without(row: Mapping[str, Any], ignored: Sequence[str]) -> Mapping[str, Any]:
    """The row without these columns, and without these keys in the turns of its conversations."""
    return {name: _of_turns(value, ignored) for name, value in row.items() if name not in ignored} if ignored else row


def _of_turns(value: Any, ignored: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_of_turns(item, ignored) for item in value]
    return (
        {key: _of_turns(own, ignored) for key, own in value.items() if key not in ignored} if isinstance(value, dict) else value
    )


def check_ignored(ignored: Sequence[str], rows: Sequence[Mapping[str, Any]], place: str) -> None:
    """UsageError for a name that none of the rows has, as a column or in a turn."""
    known = list(dict.fromkeys(_names(rows)))
    for name in ignored:
        if name not in known:
            raise UsageError(f"{place}: the data has no column '{name}'. {did_you_mean(name, known, 'remove it')}")


def _names(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield from row
        for value in row.values():
            inner = value if isinstance(value, list) else [value]
            yield from _names([item for item in inner if isinstance(item, dict)])
