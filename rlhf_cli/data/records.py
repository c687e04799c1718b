"""What a row of any format becomes before it is tokenised, and the values in a row, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from rlhf_cli.data.meaning import check_turn

ROLES = ("system", "user", "assistant")
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
TURN_MARK = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | user | assistant
    content: str


Prompt = str | tuple[Message, ...]  # a text stands for itself under `chat_template: none`, else for one user turn

PlainPrompt = str | list[dict[str, str]]
"""A prompt as files and Python functions have it: a text, or a conversation as a list of {"role", "content"}."""


def plain_prompt(prompt: Prompt) -> PlainPrompt:
    """A prompt without our types; a single user turn is a text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [message._asdict() for message in prompt]


def prompt_lines(prompt: PlainPrompt) -> str:
    """All of a prompt as a reader needs it: a conversation as lines of "role: content"."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


class Facts(NamedTuple):
    """What the data say about a prompt and its responses beside their text; None where they say nothing."""

    ranks: tuple[float, ...] | None = None  # one per response, the best is lowest, equal ones are a tie; None: best first
    scores: tuple[float, ...] | None = None  # one per response, in the order of responses
    label: bool | None = None  # is the (only) response desirable?
    margin: float | None = None  # by how much the first of two responses is better
    probability: float | None = None  # that the first of two responses is the better one
    subset: str | None = None  # free-text group, for per-subset figures


class Record(NamedTuple):
    """A prompt and the responses that belong to it, best first when they are ranked.

    A row of the text format has an empty prompt. Earlier assistant turns of a conversation stay in the prompt; responses hold
    last turns only.

    >>> Record("2+2?", ("4", "5"), "pairs.jsonl:7").responses[0]
    '4'
    """

    prompt: Prompt
    responses: tuple[str, ...]  # empty for prompt-only rows
    where: str  # file:line, or hub-id[split]:row, both counted from 1
    facts: Facts = Facts()

    @property
    def question(self) -> str:
        """What a person reads as the prompt: its last turn, or the text itself."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1].content


class BadRow(Exception):
    """A row that cannot be used. Rows are counted by `reason`; `detail` is shown beside it and varies from row to row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


REMEDIES = {
    "longer than data.max_length": "raise data.max_length or let data.overlong cut them",
    "a control token in the text": "set data.control_tokens: keep where such tokens belong into the text",
}


def remedies(lost: Iterable[str]) -> str:
    """What a recipe can do about the reasons for which rows are lost, each followed by a comma."""
    words = list(lost)
    return "".join(f"{remedy}, " for reason, remedy in REMEDIES.items() if any(reason in text for text in words))


def kind_of(value: Any) -> str:
    """The type of a JSON value in words."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def a_text(value: Any, name: str, detail: str = "") -> str:
    """The value, if it is text that is not blank and can be tokenised; BadRow that begins with `name` otherwise."""
    if type(value) is not str:
        raise BadRow(f"{name} is {kind_of(value)}, expected text", detail)
    if not value.strip():
        raise BadRow(f"{name} is {'blank' if value else 'empty'}", detail)
    if "\0" in value:
        raise BadRow(f"{name} has a NUL character", detail)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} is not valid Unicode", detail or f"character {error.start + 1}") from None
    return value


def a_list(value: Any, name: str) -> list[Any]:
    """The value, if it is a list that is not empty; BadRow otherwise."""
    if type(value) is not list:
        raise BadRow(f"{name} is {kind_of(value)}, expected a list")
    if not value:
        raise BadRow(f"{name} is empty")
    return value


def messages(value: Any, name: str) -> tuple[Message, ...]:
    """The turns of a list of {role, content}, in any order. BadRow otherwise; LostMeaning where a turn says more than is read."""
    turns = []
    for i, turn in enumerate(a_list(value, name), start=1):
        at = f"turn {i}"
        if type(turn) is not dict:
            raise BadRow(f"a turn of {name} is {kind_of(turn)}, expected an object with role and content", at)
        if missing := [part for part in ("role", "content") if part not in turn]:
            raise BadRow(f"a turn of {name} has no '{missing[0]}'", at)
        role = turn["role"]
        if role not in ROLES:
            raise BadRow(f"a role of {name} is not system, user or assistant", f"{at}: {shortened(role)}")
        check_turn(turn, name, i)
        turns.append(Message(role, a_text(turn["content"], f"a turn of {name}", at)))
    return tuple(turns)


def shortened(value: Any) -> str:
    """A value from a row, safe and short enough to be shown."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_order(turns: tuple[Message, ...], name: str) -> None:
    """An optional system turn, then user and assistant by turns."""
    first = 1 if turns[0].role == "system" else 0
    for i, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise BadRow(f"wrong role order in {name}", f"turn {first + i + 1} is {turn.role}, expected {expected}")


def conversation(turns: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """The prompt and the last assistant turn of a whole conversation."""
    check_order(turns, name)
    if turns[-1].role != "assistant":
        some = any(turn.role == "assistant" for turn in turns)
        raise BadRow(f"{name} does not end in an assistant turn" if some else f"{name} has no assistant turn")
    return turns[:-1], turns[-1].content


def as_turns(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: a string is one user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def shared_length(one: str, other: str) -> int:
    """Characters at the beginning that two texts have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def as_spoken(prompt: Prompt) -> Prompt:
    r"""The turns of a text that is "Human: … \n\nAssistant:"; any other prompt as it is.

    >>> as_spoken("\n\nHuman: 2+2?\n\nAssistant:")
    (Message(role='user', content='2+2?'),)
    """
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
        return prompt
    text = prompt.strip()
    turns, _ = transcript(text + " …" if text.endswith("\n\nAssistant:") else text + "\n\nAssistant: …", "'prompt'")
    return turns


def transcript(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    r"""The prompt and the last assistant turn of "\n\nHuman: … \n\nAssistant: …", stripped."""
    before, *parts = TURN_MARK.split("\n\n" + a_text(value, name).strip())
    if before.strip() or not parts:
        raise BadRow(f"{name} is not a transcript that begins with 'Human:'")
    turns = []
    for i, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not content.strip():
            raise BadRow(f"{name} has an empty turn", f"turn {i}")
        turns.append(Message(SPEAKERS[speaker], content.strip()))
    return conversation(tuple(turns), name)
