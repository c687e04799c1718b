"""One row's text under a chat template: the prompt, its supervised stretches, and what follows it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.records import BadRow, Message, Record, as_turns, shared_length
from rlhf_cli.data.sandbox import render
from rlhf_cli.data.templates import ChatFormat, prompt_text
from rlhf_cli.errors import UsageError


class Rendered(NamedTuple):
    """A row as text. Characters prompt[start:end] of each turn are an earlier assistant turn with its end-of-turn."""

    prompt: str
    turns: tuple[tuple[int, int], ...]
    responses: tuple[str, ...]  # without the end-of-turn token
    end_ids: tuple[int, ...]  # which follows each of them


def check_text(form: ChatFormat, record: Record) -> None:
    """Raises BadRow for text that would forge a control token."""
    for text in (*(message.content for message in as_turns(record.prompt)), *record.responses):
        if form.control is not None and (found := form.control.search(text)):
            raise BadRow("a control token in the text", repr(found.group()))


def render_row(form: ChatFormat, record: Record, *, find_turns: bool) -> Rendered:
    """Renders the prompt, each response, and (find_turns) where earlier assistant turns lie.

    Raises BadRow if the template cannot write the row, UsageError if it rewrites or loses a part of a text.
    """
    prompt = prompt_text(form.tokenizer, form.template, record.prompt)
    if form.template.text is None:
        return Rendered(prompt, (), record.responses, (form.eos_id,))
    texts = tuple(_bare(form, text) for text in record.responses)
    if record.prompt == "":
        ends_turn = bool(form.end) and any(text.rstrip().endswith(form.end) for text in record.responses)
        return Rendered(prompt, (), texts, form.end_ids if ends_turn else (form.eos_id,))
    if isinstance(record.prompt, str):
        opening = prompt.rpartition(record.prompt.strip())[2].strip()
        if opening and record.prompt.rstrip().endswith(opening):
            raise BadRow("the prompt is ready-made, in turns of the template's own", "set model.chat_template: none")
    messages = as_turns(record.prompt)
    responses = tuple(
        added_turn(form, prompt, (*messages, Message("assistant", text)), record.where) + form.close for text in texts
    )
    for text, written in zip(texts, responses, strict=True):
        if text.strip() not in written:
            raise UsageError(
                f"chat template ({form.template.source}): it does not write the whole response\n"
                f"{record.where}: {_difference(text.strip(), written.strip())}\n"
                "set model.chat_template to a Jinja file that writes all of it, or leave that part out of the data"
            )
    earlier = [k for k, message in enumerate(messages) if message.role == "assistant"] if find_turns else []
    turns = tuple(_find_turn(form, prompt, messages, k, record.where) for k in earlier)
    return Rendered(prompt, turns, responses, form.end_ids)


def _bare(form: ChatFormat, text: str) -> str:
    """The text without a BOS and an end of its own, which are added to every text."""
    begin = form.tokenizer.bos_token if form.prefix else None
    bare = text.lstrip().removeprefix(begin) if begin and text.lstrip().startswith(begin) else text
    for end in (form.end, form.tokenizer.eos_token):
        if end and bare.rstrip().endswith(end):
            bare = bare.rstrip().removesuffix(end)
    return bare if bare.strip() else text


def added_turn(form: ChatFormat, before: str, messages: tuple[Message, ...], where: str) -> str:
    """What the last of `messages` adds to the rendered text `before`, without the turn's end."""
    assert form.template.text is not None
    after = render(form.tokenizer, form.template.text, messages, generation=False)
    if not after.startswith(before):
        raise UsageError(
            f"chat template ({form.template.source}): the prompt is written otherwise once its answer follows\n"
            f"{where}: {_difference(before, after)}\n"
            "sampling would not see what training saw: set model.chat_template to a Jinja file that writes both alike"
        )
    added = after[len(before) :]
    if not added.endswith(form.tail):
        raise BadRow("the chat template ends this turn otherwise", f"{added[-20:]!r}, not {form.tail!r}")
    return added[: len(added) - len(form.tail)]


def _find_turn(form: ChatFormat, prompt: str, messages: tuple[Message, ...], k: int, where: str) -> tuple[int, int]:
    """Where assistant turn k lies in the rendered prompt: from the end of its header to the end of its end-of-turn token."""
    header = prompt_text(form.tokenizer, form.template, messages[:k])
    written = header + added_turn(form, header, messages[: k + 1], where) + form.close + form.end
    if not prompt.startswith(written):
        raise UsageError(
            f"chat template ({form.template.source}): an earlier assistant turn is rewritten once more turns follow\n"
            f"{where}: {_difference(written, prompt)}\n"
            "set data.train_on: last, or model.chat_template to a Jinja file that leaves earlier turns alone"
        )
    end = len(written)
    eos = form.tokenizer.eos_token
    # Some templates end every assistant turn but the last.
    return len(header), end + len(eos) if not form.end and prompt.startswith(eos, end) else end


def _difference(one: str, other: str) -> str:
    """Both texts around the first character that differs."""
    at = shared_length(one, other)
    start = max(0, at - 15)
    return f"{one[start : at + 25]!r} becomes {other[start : at + 25]!r}"


class Letters(NamedTuple):
    """Two facts about every token id, for `supervised`."""

    is_added: np.ndarray  # (V,) bool
    starts_with_space: np.ndarray  # (V,) bool; byte-level tokenizers leave that space out of the token's offsets


def read_letters(tokenizer: Any) -> Letters:
    """Reads the vocabulary once."""
    tokens = tokenizer.get_vocab()
    is_added = np.zeros(max(tokens.values()) + 1, bool)
    is_added[list(tokenizer.added_tokens_decoder)] = True
    spaced = np.zeros_like(is_added)
    spaced[[i for token, i in tokens.items() if token.startswith("Ġ")]] = True
    return Letters(is_added, spaced & ~is_added)


def supervised(letters: Letters, ids: np.ndarray, offsets: np.ndarray, turns: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(T,) bool: does a token lie wholly in one of the turns?

    `offsets` is (T, 2). An added token counts by its beginning: some swallow the whitespace that follows them.
    """
    previous_end = np.concatenate([[0], offsets[:-1, 1]])
    starts = np.where(letters.starts_with_space[ids], np.minimum(previous_end, offsets[:, 0]), offsets[:, 0])
    ends = np.where(letters.is_added[ids], np.minimum(starts + 1, offsets[:, 1]), offsets[:, 1])
    inside = np.zeros(len(ids), bool)
    for first, last in turns:
        inside |= (first <= starts) & (starts < last) & (ends <= last)
    return inside
