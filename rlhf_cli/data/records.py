"""What a row of any format becomes before it is tokenised, and the values in a row, checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | developer | user | assistant | tool
    content: str
    extra: str = ""  # JSON object of what else a chat template is given of it: tool_calls, reasoning_content, name, …
    learned: bool = True  # false: not supervised, though it is the assistant's

    def plain(self) -> dict[str, Any]:
        """The turn as chat templates, files and Python functions take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}


Prompt = str | tuple[Message, ...]  # a text stands for itself under `chat_template: none`, else for one user turn

Answer = str | Message
"""A response: its text or, where it has reasoning or calls of functions beside it, the assistant's turn."""

PlainPrompt = str | list[dict[str, Any]]
"""A prompt as files and Python functions have it: a text, or a conversation as a list of {"role", "content", …}."""


def plain_prompt(prompt: Prompt) -> PlainPrompt:
    """A prompt without our types; a single user turn is a text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [message.plain() for message in prompt]


def prompt_lines(prompt: PlainPrompt) -> str:
    """All of a prompt as a reader needs it: a conversation as lines of "role: content"."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {' '.join((turn['content'], *_calls(turn))).strip()}" for turn in prompt)


def _calls(turn: Mapping[str, Any]) -> list[str]:
    """The calls of a turn, each as JSON of its name and arguments."""
    return [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]


class Facts(NamedTuple):
    """What the data say about a prompt and its responses beside their text; None where they say nothing."""

    ranks: tuple[float, ...] | None = None  # one per response, the best is lowest, equal ones are a tie; None: best first
    scores: tuple[float, ...] | None = None  # one per response, in the order of responses
    label: bool | None = None  # is the (only) response desirable?
    margin: float | None = None  # by how much the first of two responses is better
    probability: float | None = None  # that the first of two responses is the better one
    subset: str | None = None  # free-text group, for per-subset figures
    steps: tuple[float, ...] | None = None  # of each step of the (only) response: the probability that it is right
    ends: tuple[tuple[int, ...], ...] | None = None  # of each response of a tree: how many tokens follow each step's last one

    @property
    def soft_label(self) -> float:
        """The probability that the first of two responses is the better one: 1 where the data name none."""
        return 1.0 if self.probability is None else self.probability

    @property
    def better(self) -> int:
        """Which of two responses is more likely the better one: 1 the first, −1 the second, 0 for a tie."""
        return (self.soft_label > 0.5) - (self.soft_label < 0.5)


class Record(NamedTuple):
    """A prompt and the responses that belong to it, best first when they are ranked.

    A row of the text format has an empty prompt. Earlier assistant turns of a conversation stay in the prompt; responses hold
    last turns only.

    >>> Record("2+2?", ("4", "5"), "pairs.jsonl:7").responses[0]
    '4'
    """

    prompt: Prompt
    responses: tuple[Answer, ...]  # empty for prompt-only rows
    where: str  # file:line, or hub-id[split]:row, both counted from 1
    facts: Facts = Facts()
    given: str = ""  # JSON object of what else the chat template is given: the row's tools, and options of its own
    columns: str = ""  # JSON object of the row's columns that terms of a reward read

    @property
    def options(self) -> dict[str, Any]:
        """What the chat template is given beside the turns."""
        return json.loads(self.given) if self.given else {}

    @property
    def serialised(self) -> str:
        """All that it says, as JSON; where it stands is left out."""
        prompt = self.prompt if isinstance(self.prompt, str) else [_brief(turn) for turn in self.prompt]
        responses = [text if isinstance(text, str) else _brief(text) for text in self.responses]
        rest = [self.given, self.columns] if self.columns else [self.given] if self.given else []
        facts = self.facts[:6] if self.facts.steps is None else self.facts[:7]  # which earlier releases wrote, and hashed
        return json.dumps((prompt, responses, facts, *rest))

    @classmethod
    def read(cls, text: str, where: str) -> Record:
        """What `serialised` wrote."""
        prompt, responses, facts, *rest = json.loads(text)
        turns = prompt if isinstance(prompt, str) else tuple(Message(*turn) for turn in prompt)
        answers = tuple(answer if isinstance(answer, str) else Message(*answer) for answer in responses)
        return cls(turns, answers, where, cls.read_facts(facts), *rest)

    @staticmethod
    def read_facts(values: list[Any]) -> Facts:
        """Facts from JSON."""
        return Facts._make(tuple(v) if isinstance(v, list) else v for v in (*values, *Facts()[len(values) :]))

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
    "the chat template has no place for": (
        "name a Jinja file that has one in model.chat_template, or leave them out: data.train.0.ignore: [tools, tool_calls]"
    ),
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


def shortened(value: Any) -> str:
    """A value from a row, safe and short enough to be shown."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def as_turns(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: a string is one user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def shared_length(one: str, other: str) -> int:
    """Characters at the beginning that two texts have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Where steps begin and end: what stands between separators, white space aside, unless blank; with "" the whole text."""
    found, at = [], 0
    for piece in text.split(separator) if separator else [text]:
        if bare := piece.strip():
            start = at + piece.index(bare)
            found.append((start, start + len(bare)))
        at += len(piece) + len(separator)
    return found


def as_turn(answer: Answer) -> Message:
    """A response as the assistant's turn."""
    return Message("assistant", answer) if isinstance(answer, str) else answer


def spoken(answer: Answer) -> str:
    """A response as a reader needs it: its reasoning, its text and its calls."""
    if isinstance(answer, str):
        return answer
    extra = json.loads(answer.extra) if answer.extra else {}
    return "\n".join(part for part in (extra.get("reasoning_content"), answer.content, *_calls(extra)) if part)


def _brief(turn: Message) -> tuple[Any, ...]:
    """A turn without what it leaves at the default."""
    return turn[:2] if turn[2:] == ("", True) else turn
