"""One row's text under a chat template: the prompt, its supervised stretches, and what follows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.data.records import Answer, BadRow, Message, Record, as_turn, as_turns, shared_length
from rlhf_cli.data.sandbox import TookTooLong, render
from rlhf_cli.data.templates import THINK_MARK, ChatFormat, prompt_text
from rlhf_cli.errors import UsageError

EMPTY_THINK = re.compile(rf"\s*(?:{THINK_MARK.pattern})?\s*{THINK_MARK.pattern}\s*", re.IGNORECASE)
"""A think block with nothing in it, or the rest of one that the prompt has begun."""

PICTURE = "<image>"
SPACED = "the chat template writes white space otherwise than {count:,} rows do"
STRIPPED = "the chat template leaves out the reasoning, or another part, of earlier assistant turns: {count:,} rows"
GREETED = "an assistant turn before the first user turn is not learned, it answers nothing: {count:,} rows"
THOUGHTLESS = (
    "the empty think block that the chat template writes is a part of the prompt, and not learned: {count:,} rows. Where the "
    "model samples, its own reasoning may stand there; with most templates, model.template_options: {{enable_thinking: false}} "
    "prevents that"
)
"""What a run says of rows that are not written as they stand."""


class Rendered(NamedTuple):
    """A row as text. Characters prompt[start:end] of each turn are an earlier assistant turn with its end-of-turn."""

    prompt: str
    turns: tuple[tuple[int, int], ...]
    responses: tuple[str, ...]  # without the end-of-turn token
    end_ids: tuple[int, ...]  # which follows each of them
    said: tuple[str, ...] = ()  # what is to be said of it, of those above


def check_text(form: ChatFormat, record: Record) -> None:
    """Raises BadRow for text that would forge a control token."""
    turns = (*as_turns(record.prompt), *map(as_turn, record.responses))
    for text in (record.given, *(part for turn in turns for part in turn[1:3])):
        if form.control is not None and (found := form.control.search(text)):
            raise BadRow("a control token in the text", repr(found.group()))
        if PICTURE in text:
            raise BadRow(f"the place of a picture ({PICTURE}) in the text, and only text is read")


def render_row(form: ChatFormat, record: Record, *, find_turns: bool, learn_empty_think: bool = False) -> Rendered:
    """Renders the prompt, each response, and (find_turns) where earlier assistant turns lie.

    Raises BadRow if the template cannot write the row, or leaves out what is not the assistant's; UsageError if it rewrites or
    loses a part of an answer.
    """
    failures: list[BadRow] = []
    for fitted in _fitted(form, record):
        try:
            return _render(form, fitted, find_turns, learn_empty_think)
        except TookTooLong:
            raise
        except BadRow as bad:
            failures.append(bad)
    # A template that wants the other kind of arguments fails in Python's words.
    raise next((bad for bad in failures if bad.__cause__ is None), failures[0])


def _fitted(form: ChatFormat, record: Record) -> Iterator[Record]:
    """The row as the template may want it: developer turns as the system's, arguments of calls as objects or as JSON text."""
    text, turns = form.template.text or "", as_turns(record.prompt)
    if "developer" not in text and any(turn.role == "developer" for turn in turns):
        turns = tuple(turn._replace(role="system") if turn.role == "developer" else turn for turn in turns)
        record = record._replace(prompt=turns)
    yield record
    answers = [as_turn(answer) for answer in record.responses]
    if any("tool_calls" in turn.extra for turn in (*turns, *answers)):
        yield record._replace(prompt=tuple(map(_written_out, turns)), responses=tuple(map(_written_out, answers)))


def _written_out(turn: Message) -> Message:
    extra = json.loads(turn.extra) if turn.extra else {}
    for call in extra.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return turn._replace(extra=json.dumps(extra, ensure_ascii=False)) if extra else turn


def _render(form: ChatFormat, record: Record, find_turns: bool, learn_empty_think: bool) -> Rendered:
    given = record.options
    prompt = prompt_text(form.tokenizer, form.template, record.prompt, given)
    if form.template.text is None:
        if given or not all(isinstance(answer, str) for answer in record.responses):
            raise BadRow("tools, reasoning or calls need a chat template")
        return Rendered(prompt, (), tuple(map(str, record.responses)), (form.eos_id,))
    answers = tuple(_bare(form, answer) if isinstance(answer, str) else answer for answer in record.responses)
    if record.prompt == "":
        texts = tuple(map(str, answers))
        ends_turn = bool(form.end) and any(str(text).rstrip().endswith(form.end) for text in record.responses)
        return Rendered(prompt, (), texts, form.end_ids if ends_turn else (form.eos_id,))
    if isinstance(record.prompt, str):
        opening = prompt.rpartition(record.prompt.strip())[2].strip()
        if opening and record.prompt.rstrip().endswith(opening):
            raise BadRow("the prompt is ready-made, in turns of the template's own", "set model.chat_template: none")
    messages = as_turns(record.prompt)
    if given.get("tools") and prompt_text(form.tokenizer, form.template, record.prompt, {**given, "tools": None}) == prompt:
        raise BadRow("the chat template has no place for tools")
    said = _check_prompt(prompt, messages)
    asked, where = [as_turn(answer) for answer in answers], record.where
    responses = tuple(added_turn(form, prompt, (*messages, turn), given, where) + form.close for turn in asked)
    for turn, written in zip(asked, responses, strict=True):
        said |= _check_answer(form, prompt, turn, written, where)
    empty = {_empty_think(written, turn.content) for turn, written in zip(asked, responses, strict=True)}
    earlier = [k for k, message in enumerate(messages) if message.role == "assistant" and message.learned] if find_turns else []
    answering = [k for k in earlier if any(message.role == "user" for message in messages[:k])]
    turns = [_find_turn(form, prompt, messages, k, given, record.where) for k in answering]
    if not learn_empty_think:
        turns = [_without_empty(prompt, turn, messages[k]) for turn, k in zip(turns, answering, strict=True)]
    if len(answering) < len(earlier):
        said.add(GREETED)
    lead = empty.pop() if len(empty) == 1 and not learn_empty_think else ""
    if lead and not any(map(_thinks, answers)):
        said.add(THOUGHTLESS)
        prompt, responses = prompt + lead, tuple(written[len(lead) :] for written in responses)
    return Rendered(prompt, tuple(turns), responses, form.end_ids, tuple(said))


def _empty_think(written: str, text: str) -> str:
    """The empty think block that a response begins with, less white space of its own text."""
    found = EMPTY_THINK.match(written)
    at = written.find(text)
    return written[: found.end() if at < 0 else min(at, found.end())] if found else ""


def _thinks(answer: Answer) -> bool:
    """Does the row itself say what the assistant thinks, be it nothing?"""
    turn = as_turn(answer)
    return "reasoning_content" in turn.extra or THINK_MARK.search(turn.content) is not None


def _without_empty(prompt: str, turn: tuple[int, int], message: Message) -> tuple[int, int]:
    """The turn from behind a think block that is empty and not the row's."""
    found = None if _thinks(message if message.extra else message.content) else EMPTY_THINK.match(prompt, turn[0], turn[1])
    return (found.end(), turn[1]) if found else turn


def _check_prompt(prompt: str, messages: tuple[Message, ...]) -> set[str]:
    """BadRow for what the template leaves out of a prompt, but for the assistant's own: that is what sampling sees too."""
    said = set()
    for message in messages:
        if message.role == "assistant":
            extra = json.loads(message.extra) if message.extra else {}
            _check_calls(extra, prompt)
            if not _holds(prompt, extra.get("reasoning_content", "")):
                said.add(STRIPPED)
        elif not _holds(prompt, message.content):
            raise BadRow(f"the chat template leaves out a {message.role} turn")
        if message.content not in prompt:
            said.add(SPACED if _holds(prompt, message.content) else STRIPPED)
    return said


def _check_answer(form: ChatFormat, prompt: str, turn: Message, written: str, where: str) -> set[str]:
    """BadRow for reasoning or calls that the template has no place for, UsageError for text that it does not write."""
    # What begins in the prompt, such as the mark of reasoning, is a part of what the row has.
    whole = prompt[max(0, len(prompt) - len(turn.content) - 1) :] + written
    if not _holds(whole, turn.content):
        raise UsageError(
            f"chat template ({form.template.source}): it does not write the whole response\n"
            f"{where}: {_difference(turn.content.strip(), written.strip())}\n"
            "set model.chat_template to a Jinja file that writes all of it, or leave that part out of the data"
        )
    extra = json.loads(turn.extra) if turn.extra else {}
    if not _holds(written, extra.get("reasoning_content", "")):
        raise BadRow("the chat template has no place for reasoning", "write it into the text, in <think> and </think>")
    _check_calls(extra, written)
    return set() if turn.content in whole else {SPACED}


def _check_calls(extra: Mapping[str, Any], written: str) -> None:
    """BadRow for a call that a template has no place for, or does not write as JSON."""
    for call in extra.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        as_python = isinstance(arguments, dict) and bool(arguments) and str(arguments) in written
        if name not in written or (as_python and str(arguments) != json.dumps(arguments)):
            raise BadRow("the chat template has no place for calls of functions", name)
        if not all(_holds(written, text) for text in _leaves(arguments)):
            raise BadRow("the chat template does not write the arguments of a call", name)


def _leaves(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, and the names of what has one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _holds(text: str, part: str) -> bool:
    """Does the text hold the part, as it is or as JSON, white space aside?"""
    if part in text:
        return True
    bare, found = "".join(part.split()), "".join(text.split())
    return bare in found or "".join(json.dumps(part, ensure_ascii=False)[1:-1].split()) in found


def _bare(form: ChatFormat, text: str) -> str:
    """The text without a BOS and an end of its own, which are added to every text."""
    begin, eos = form.tokenizer.bos_token if form.prefix else None, form.tokenizer.eos_token
    if not any(mark and mark in text for mark in (begin, form.end, eos)):
        return text
    bare = text.lstrip().removeprefix(begin) if begin and text.lstrip().startswith(begin) else text
    for end in (form.end, eos):
        if end and bare.rstrip().endswith(end):
            bare = bare.rstrip().removesuffix(end)
    return bare if bare.strip() else text


def added_turn(form: ChatFormat, before: str, messages: tuple[Message, ...], given: Mapping[str, Any], where: str) -> str:
    """What the last of `messages` adds to the rendered text `before`, without the turn's end."""
    assert form.template.text is not None
    after = render(form.tokenizer, form.template.text, messages, given, generation=False)
    if not after.startswith(before):
        silent = _fits_without_thinking(form, messages, given)
        raise UsageError(
            f"chat template ({form.template.source}): the prompt is written otherwise once its answer follows\n"
            f"{where}: {_difference(before, after)}\n"
            "sampling would not see what training saw: set "
            + ("model.template_options: {enable_thinking: false}, or " if silent else "")
            + "model.chat_template to a Jinja file that writes both alike"
        )
    added = after[len(before) :]
    if not added.endswith(form.tail):
        raise BadRow("the chat template ends this turn otherwise", f"{added[-20:]!r}, not {form.tail!r}")
    return added[: len(added) - len(form.tail)]


def _fits_without_thinking(form: ChatFormat, messages: tuple[Message, ...], given: Mapping[str, Any]) -> bool:
    """Would the template write an answer without reasoning as it writes the prompt, if it were told that there is none?"""
    silent = {**given, "enable_thinking": False}
    try:
        before = prompt_text(form.tokenizer, form.template, messages[:-1], silent)
        return render(form.tokenizer, form.template.text or "", messages, silent, generation=False).startswith(before)
    except BadRow:
        return False


def _find_turn(
    form: ChatFormat, prompt: str, messages: tuple[Message, ...], k: int, given: Mapping[str, Any], where: str
) -> tuple[int, int]:
    """Where assistant turn k lies in the rendered prompt: from the end of its header to the end of its end-of-turn token."""
    header = prompt_text(form.tokenizer, form.template, messages[:k], given)
    written = header + added_turn(form, header, messages[: k + 1], given, where) + form.close + form.end
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
