"""What a row of any format becomes before it is tokenised."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | user | assistant
    content: str


Prompt = str | tuple[Message, ...]
"""A text stands for itself under `chat_template: none`, else for one user turn."""

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
