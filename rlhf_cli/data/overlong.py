"""What happens to rows that are longer than `data.max_length`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.data.records import BadRow, Message, Prompt, Record
from rlhf_cli.data.trees import Tree

TRIES = 8  # cutting n tokens' worth of text may save a few less: the cut is repeated until the row fits


def span(tree: Tree, reserve: int = 0) -> int:
    """Tokens of the prompt, of the longest response, and `reserve` for one that is yet to be drawn: what max_length counts."""
    return len(tree.prompt) + max(map(len, tree.responses), default=0) + reserve


def too_long(tokens: int, detail: str = "") -> BadRow:
    """The one reason under which these rows are counted."""
    return BadRow("longer than data.max_length", f"{tokens} tokens{detail}")


def cut_responses(tree: Tree, max_length: int) -> Tree:
    """Responses end where max_length is reached, without an end-of-turn. Raises BadRow if the prompt leaves no room."""
    room = max_length - len(tree.prompt)
    if room < 1:
        raise too_long(span(tree), f", {len(tree.prompt)} of them in the prompt")
    return tree._replace(responses=tuple(response[:room] for response in tree.responses))


def cut_prompt(record: Record, encode_one: Callable[[Record], Tree], tokenizer: Any, max_length: int, reserve: int = 0) -> Tree:
    """Drops the oldest exchanges, system turns excepted, then the beginning of the last user turn.

    The text is cut and rendered again, so the template stays whole. Raises BadRow if no text of the prompt would be left.
    """
    shorter = record
    for prompt in without_oldest(record.prompt):
        shorter = record._replace(prompt=prompt)
        tree = encode_one(shorter)
        if span(tree, reserve) <= max_length:
            return tree
    for _ in range(TRIES):
        tree = encode_one(shorter)
        excess = span(tree, reserve) - max_length
        if excess <= 0:
            return tree
        shorter = shorter._replace(prompt=_without_beginning(shorter.prompt, excess, tokenizer, span(tree, reserve)))
    raise too_long(span(tree, reserve))


def without_oldest(prompt: Prompt) -> Iterator[tuple[Message, ...]]:
    """Ever shorter prompts that begin at a later user turn, after the system turns that stood first."""
    if isinstance(prompt, str):
        return
    systems = next((k for k, message in enumerate(prompt) if message.role != "system"), len(prompt))
    for k in range(systems + 1, len(prompt)):
        if prompt[k].role == "user":
            yield prompt[:systems] + prompt[k:]


def _without_beginning(prompt: Prompt, tokens: int, tokenizer: Any, total: int) -> Prompt:
    """The last user turn loses that many tokens at its beginning."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt and prompt[-1].role == "user" else ""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    rest = text[max(1, offsets[tokens][0]) :] if tokens < len(offsets) else ""
    if not rest.strip():
        raise too_long(total, ", too many even without the prompt's text")
    return rest if isinstance(prompt, str) else (*prompt[:-1], prompt[-1]._replace(content=rest))
