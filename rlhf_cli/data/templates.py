"""Chat templates: which one is in force, what it says about turns, and the one way a prompt becomes tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from rlhf_cli.data.meaning import OWN_VARIABLES
from rlhf_cli.data.records import BadRow, Message, Prompt, as_turns, shared_length
from rlhf_cli.data.sandbox import TookTooLong, ends_in_time, memory_limit, render, time_limit
from rlhf_cli.errors import UsageError
from rlhf_cli.suggest import did_you_mean

BUILT_IN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a template. The name and text meet at a newline, where every tokenizer splits."""

THINK_MARK = re.compile(r"[<\[◁]\W*(?:(?:START|END)_)?(?:think|thought|reason)\w*\W*[>\]▷]", re.IGNORECASE)
"""Where reasoning begins or ends: a part of what the assistant writes, and not of how turns are told apart."""

MARK = "markedanswer"
QUESTION, ANSWER = Message("user", "Hi"), Message("assistant", MARK)
PROBES = ((QUESTION,), (Message("system", "Be brief."), QUESTION))
"""Conversations that any chat template can write; a few insist on a system turn."""


@dataclass(frozen=True)
class Template:
    """A chat template, and where it comes from; `text` is None for `none`."""

    source: str  # as a person is told
    text: str | None  # Jinja

    @property
    def hash(self) -> str:
        """The same for the same text, wherever it comes from."""
        return "none" if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()


def choose_template(tokenizer: Any, setting: str | None, options: Mapping[str, Any] | None = None) -> Template:
    """The template that `model.chat_template` asks for, with `model.template_options` as defaults of its variables.

    Raises UsageError if it is missing or no Jinja.
    """
    if setting == "none":
        return Template("none: prompt and response as they stand", None)
    if setting is not None:
        try:
            template = Template(setting, Path(setting).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            advice = "give a Jinja file, none, or null for the tokenizer's own"
            raise UsageError(f"model.chat_template: {Path(setting)}: {reason}; {advice}") from None
    elif not tokenizer.chat_template:
        template = Template("a plain built-in one (the tokenizer has none)", BUILT_IN)
    else:
        try:
            template = Template("the tokenizer's own", tokenizer.get_chat_template())
        except ValueError:
            what = "the tokenizer has several chat templates and none of them is its default"
            raise UsageError(f"{what}: set model.chat_template to a Jinja file") from None
    template = _with_defaults(template, options or {})
    try:
        _render_probe(tokenizer, template, (QUESTION,), generation=True)
    except TemplateSyntaxError as error:
        raise UsageError(f"chat template ({template.source}): line {error.lineno}: {error.message}: not valid Jinja") from None
    except TookTooLong as error:
        raise UsageError(f"chat template ({template.source}): {error}") from None
    except BadRow:
        pass  # it may want more turns than one; `read_chat_format` tries those
    return template


def _with_defaults(template: Template, options: Mapping[str, Any]) -> Template:
    """The template with its variables set where nobody sets them.

    They are written into its text: so they have their part in its hash, and go wherever it goes, to the next stage and to those
    who serve the model.
    """
    from transformers.utils.chat_template_utils import _get_template_variables

    text = template.text or ""
    known = _get_template_variables(text) - {*OWN_VARIABLES} if options else frozenset()
    for name in options:
        if name not in known:
            there = did_you_mean(name, known, f"it reads {', '.join(sorted(known)) or 'none that can be set'}")
            raise UsageError(f"model.template_options: the chat template ({template.source}) reads no variable '{name}'. {there}")
        text = re.sub(rf"\{{% if {name} is not defined %\}}\{{% set {name} = .*? %\}}\{{% endif %\}}", "", text, count=1)
    lines = [f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}" for name, value in options.items()]
    said = "".join(f", {name}: {value}" for name, value in options.items())
    return Template(template.source + said, "".join(lines) + text)


_ENDING: set[str] = set()
"""Templates that are known to be compiled, and to write a small conversation, in time: a child process costs some 50 ms."""


def _render_probe(tokenizer: Any, template: Template, messages: Sequence[Message], *, generation: bool) -> str:
    assert template.text is not None
    text = template.text

    def attempt() -> str:
        with memory_limit(), time_limit():
            return render(tokenizer, text, messages, {}, generation=generation)

    if text not in _ENDING and not ends_in_time(attempt):
        raise TookTooLong
    _ENDING.add(text)
    return attempt()


class ChatFormat(NamedTuple):
    """What is the same in every row under one tokenizer and template, found by rendering a small conversation.

    ChatML under SmolLM2's tokenizer: tail "<|im_end|>\\n", close "", end "<|im_end|>", end_ids (2,), prefix ().
    """

    tokenizer: Any
    template: Template
    prefix: tuple[int, ...]  # special tokens that the tokenizer puts before any text of its own accord: one BOS, or nothing
    anchor: str  # put before a response while it is tokenised, so that it continues a text and does not start one
    tail: str  # what the template writes after the last assistant turn's text
    close: str  # the beginning of tail that is ordinary text
    end: str  # the end-of-turn token (a few templates write two), "" if the template writes none
    end_ids: tuple[int, ...]  # its ids; the EOS if the template writes none
    eos_id: int
    control: re.Pattern[str] | None  # strings that would become control tokens


def read_chat_format(tokenizer: Any, template: Template) -> ChatFormat:
    """Renders the probe and reads the turn's end off it. Raises UsageError if the template cannot write it."""
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no EOS token, so a model could never learn to stop: use one that has")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    tail, dialogue = ("", "") if template.text is None else _read_turn(tokenizer, template)
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    close, end = _split_tail(tail, dialogue.partition(MARK)[2], [token.content for token in added])
    marks = [token.content for token in added if token.special or token.content in dialogue]
    control = [mark for mark in marks if not THINK_MARK.fullmatch(mark)]
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        prefix=tuple(full[: next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)]),
        anchor=_anchor(tokenizer),
        tail=tail,
        close=close,
        end=end,
        end_ids=tuple(tokenise(tokenizer, [end])[0]) if end else (tokenizer.eos_token_id,),
        eos_id=tokenizer.eos_token_id,
        # An added token that is not marked special opens or closes a turn too, if the template uses it for that.
        control=re.compile(_any_of(control)) if control else None,
    )


def _read_turn(tokenizer: Any, template: Template) -> tuple[str, str]:
    """What follows an assistant's text, and a whole small conversation. The first probe that renders counts."""
    failure = BadRow("")
    for probe in PROBES:
        try:
            turn = _render_probe(tokenizer, template, (*probe, ANSWER), generation=False)
            dialogue = _render_probe(tokenizer, template, (*probe, ANSWER, QUESTION), generation=True)
        except BadRow as error:
            failure = error
            continue
        if MARK not in turn:
            raise UsageError(f"chat template ({template.source}): the assistant's text does not appear in what it writes")
        return turn.rpartition(MARK)[2], dialogue
    raise UsageError(f"chat template ({template.source}): {failure}")


def _split_tail(tail: str, midway: str, added: list[str]) -> tuple[str, str]:
    """(plain text, end-of-turn tokens) at the beginning of a last turn's tail.

    Only what also ends a turn `midway` belongs to the turn: some templates write an EOS after the whole conversation.
    """
    run = re.compile(f"(?:{_any_of(added)})+") if added else None
    found = run and (run.search(tail[: shared_length(tail, midway)]) or run.search(tail))
    return (tail[: found.start()], found.group()) if found else (tail.rstrip(), "")


def _any_of(strings: Sequence[str]) -> str:
    return "|".join(map(re.escape, sorted(set(strings), key=len, reverse=True)))


def _anchor(tokenizer: Any) -> str:
    """A newline for tokenizers that put a space before every text, and so would make " Hello" of "Hello"; else nothing."""
    alone, newline, continued = tokenise(tokenizer, ["a", "\n", "\na"])
    return "\n" if continued[: len(newline)] == newline and continued[len(newline) :] != alone else ""


def tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added."""
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # left from other calls
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prompt_text(tokenizer: Any, template: Template, prompt: Prompt, given: Mapping[str, Any]) -> str:
    """The text a model continues: generation prompt on; an empty string and template `none` stand for themselves.

    The caller sets the limits of memory and time. Raises BadRow if the template cannot write this prompt.
    """
    if template.text is None or prompt == "":
        if not isinstance(prompt, str):
            raise BadRow("a conversation needs a chat template")
        return prompt
    if not prompt:
        raise BadRow("nothing comes before the response")
    return render(tokenizer, template.text, as_turns(prompt), given, generation=True)
