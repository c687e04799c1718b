"""Chat templates of every kind that is about, and rows of every kind: what is tokenised is what the template itself writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_cli.data.encode import Encoded, encode
from rlhf_cli.data.records import Message, Record, as_turn, as_turns
from rlhf_cli.data.templates import choose_template
from rlhf_cli.data.turns import GREETED, SPACED, STRIPPED, THOUGHTLESS
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import SftData
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

ZOO = {
    "plain": CHATML,
    "thinking in the prompt": HEAD
    + "{% if m['role'] == 'assistant' %}{% if '</think>' in m['content'] %}{{ '<think>\n' + "
    "m['content'].split('</think>')[0].replace('<think>', '').strip() + '\n</think>\n\n' + "
    "m['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + m['content'] }}{% endif %}{% else %}{{ m['content'] }}{% endif %}"
    + TAIL
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "thinking unless told": HEAD
    + "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}"
    + TAIL
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<think></think>' if enable_thinking is defined and not "
    "enable_thinking else '<think>\n') }}{% endif %}",
    "stripped": HEAD
    + "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] }}"
    + TAIL
    + GENERATION,
    "system merged into user": "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] }}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + GENERATION,
    "tools": "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    + HEAD
    + "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}{{ '<call>' + (c['function'] | tojson) + '</call>' }}{% endfor %}" + TAIL + GENERATION,
    "arguments as text": HEAD
    + "{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function']['name'] + ':' + c['function']['arguments'] }}{% endfor %}"
    + TAIL
    + GENERATION,
    "BOS written": "{{ bos_token }}" + CHATML,
    "no generation prompt": "{% for m in messages %}{{ (m['role'] | upper) + ': ' + m['content'] }}" + TAIL,
    "trimmed": HEAD + "{{ m['content'] | trim }}" + TAIL + GENERATION,
    "EOS between turns": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "roles must alternate": "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + GENERATION,
}  # fmt: skip

WEIGH = {"type": "function", "function": {"name": "weigh", "arguments": {"fruit": "plum"}}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "weigh"}}]}
U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
CALL = Message(
    "assistant", "", '{"tool_calls": [{"type": "function", "function": {"name": "weigh", "arguments": {"fruit": "plum"}}}]}'
)
THOUGHT = "<think>\nIt is well.\n</think>\n\nFour."
ROWS = {
    "a text": Record("What is two?", ("It is four.",), "d:1"),
    "a dialogue": Record((U("Hi"), A("Hello there"), U("Well?")), ("Four.",), "d:1"),
    "a system turn": Record((Message("system", "Be well."), U("Hi")), ("Four.",), "d:1"),
    "white space": Record((U(" Hi "),), (" Four. ",), "d:1"),
    "thinking": Record((U("Hi"),), (THOUGHT,), "d:1"),
    "thinking before": Record((U("Hi"), A(THOUGHT), U("Well?")), ("Four.",), "d:1"),
    "reasoning apart": Record((U("Hi"),), (Message("assistant", "Four.", '{"reasoning_content": "It is well."}'),), "d:1"),
    "a call": Record((U("Hi"), CALL, Message("tool", "12")), ("Four.",), "d:1", given=json.dumps(TOOLS)),
    "a call as answer": Record((U("Hi"),), (CALL,), "d:1"),
    "an empty system turn": Record((Message("system", ""), U("Hi")), ("Four.",), "d:1"),
    "the assistant first": Record((A("Hello."), U("Hi")), ("Four.",), "d:1"),
}  # fmt: skip

NO_TOOLS = "the chat template has no place for tools"
NO_CALLS = "the chat template has no place for calls of functions"
NO_REASONING = "the chat template has no place for reasoning"
ALTERNATE = "only user and assistant"
SILENT = r"set model\.template_options: \{enable_thinking: false\}"
LOST = "it does not write the whole response"
REFUSED: dict[str, dict[str, str]] = {
    **{name: {"a call": NO_TOOLS, "a call as answer": NO_CALLS, "reasoning apart": NO_REASONING} for name in ZOO},
    "tools": {},
}
for name, more in {
    "thinking unless told": dict.fromkeys(ROWS, SILENT) | {"a call": NO_TOOLS, "thinking": ""},
    "arguments as text": {"a call as answer": ""},
    "roles must alternate": {"a system turn": ALTERNATE, "an empty system turn": ALTERNATE, "a call": ALTERNATE},
}.items():
    REFUSED[name] = {row: reason for row, reason in (REFUSED[name] | more).items() if reason}


def encoded(record: Record, text: str, options: dict[str, Any] | None = None) -> Encoded:
    tokenizer = tiny_tokenizer(adds_bos="bos_token" in text)
    template = choose_template(tiny_tokenizer(template=text), None, options)
    return encode([record], tokenizer, template, SftData([], train_on="last"), responses="all", cache=None)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ZOO)
def test_a_row_is_written_as_the_template_writes_it_or_refused(kind: str, row: str) -> None:
    record, text = ROWS[row], ZOO[kind]
    if reason := REFUSED[kind].get(row):
        with pytest.raises(UsageError, match=reason):
            encoded(record, text)
        return
    tokenizer = tiny_tokenizer(adds_bos="bos_token" in text, template=text)
    (tree,) = encoded(record, text).trees
    written = tokenizer.decode([*tree.prompt, *tree.responses[0]])
    turns = [turn.plain() for turn in (*as_turns(record.prompt), as_turn(record.responses[0]))]
    if kind == "arguments as text" and row == "a call as answer":
        turns[-1:] = [turns[-1] | {"tool_calls": [{"function": {"name": "weigh", "arguments": '{"fruit": "plum"}'}}]}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, **record.options)
    end = "<|im_end|>" if "<|im_end|>" in text else "</s>"
    assert written == (whole[: whole.rindex(end) + len(end)] if end in whole else whole.rstrip() + end)
    assert written.count("<s>") == text.count("bos_token")
    # Sampling begins with what the template writes for it, or with that and an empty think block.
    asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True, **record.options)
    beyond = tokenizer.decode(tree.prompt).removeprefix(asked)
    assert beyond in (("\n</think>\n\n", "") if kind == "thinking in the prompt" else ("",))


def test_an_option_makes_a_template_silent() -> None:
    record, text = ROWS["a dialogue"], ZOO["thinking unless told"]
    (tree,) = encoded(record, text, {"enable_thinking": False}).trees
    assert tiny_tokenizer().decode(tree.prompt).endswith("<|im_start|>assistant\n<think></think>")
    assert tiny_tokenizer().decode(tree.responses[0]) == "Four.<|im_end|>"
    own = encoded(record._replace(given='{"enable_thinking": false}'), text).trees[0]  # a row's own option
    assert own.prompt.tolist() == tree.prompt.tolist()


def test_options_go_with_the_template_and_are_written_once() -> None:
    text = "{{ enable_thinking }} {{ date }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    own, options = tiny_tokenizer(template=text), {"enable_thinking": False, "date": "it's 1 May"}
    once = choose_template(own, None, options)
    again = choose_template(tiny_tokenizer(template=once.text), None, options)
    assert again.hash == once.hash != choose_template(own, None).hash
    other = choose_template(tiny_tokenizer(template=once.text), None, {"enable_thinking": True})
    assert choose_template(tiny_tokenizer(template=other.text), None, {"enable_thinking": False}).text.count("{% set") == 2
    shows = tiny_tokenizer(template=once.text)
    hi = [{"role": "user", "content": "!"}]
    assert shows.apply_chat_template(hi, tokenize=False) == "False it's 1 May!"
    assert shows.apply_chat_template(hi, tokenize=False, enable_thinking=True) == "True it's 1 May!"
    for name, advice in (("messages", "it reads date, enable_thinking"), ("enable_thinkin", r"did you mean enable_thinking\?")):
        with pytest.raises(UsageError, match=rf"reads no variable '{name}'\. {advice}"):
            choose_template(own, None, {name: 1})


SAID = [
    ("trimmed", "white space", SPACED),
    ("stripped", "thinking before", STRIPPED),
    ("thinking in the prompt", "a text", THOUGHTLESS),
]


@pytest.mark.parametrize(("kind", "row", "said"), SAID)
def test_what_a_template_changes_is_said(kind: str, row: str, said: str) -> None:
    assert encoded(ROWS[row], ZOO[kind]).notices == (said.format(count=1),)
    assert encoded(ROWS["a text"], ZOO["plain"]).notices == ()


def test_an_assistant_that_speaks_first_is_not_learned() -> None:
    template = choose_template(tiny_tokenizer(template=CHATML), None)
    read = encode([ROWS["the assistant first"]], tiny_tokenizer(), template, SftData([]), responses="first", cache=None)
    assert not read.trees.supervised[: len(read.trees[0].prompt)].any()
    assert read.notices == (GREETED.format(count=1),)
