"""What a row of any format becomes before it is tokenised."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system | user | assistant
    content: str


class Record(NamedTuple):
    """A prompt and the responses that belong to it, best first when they are ranked.

    A str stands for itself under `chat_template: none`, else for one user turn. A row of the text format has an
    empty prompt. Earlier assistant turns of a conversation stay in the prompt; responses hold last turns only.

    >>> Record("2+2?", ("4", "5"), "pairs.jsonl:7", scores=(1.0, 0.0))
    Record(prompt='2+2?', responses=('4', '5'), where='pairs.jsonl:7', scores=(1.0, 0.0), label=None, subset=None)
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]  # empty for prompt-only rows
    where: str  # file:line, or hub-id[split]:row, both counted from 1
    scores: tuple[float, ...] | None = None  # one per response, in the order of responses
    label: bool | None = None  # unpaired rows: is the response desirable?
    subset: str | None = None  # free-text group of the row, for per-subset figures
