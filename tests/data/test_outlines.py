"""Which chat templates only copy what turns say, and that filling their outlines is rendering them."""

from __future__ import annotations

import pytest

from rlhf_cli.data import outlines
from rlhf_cli.data.outlines import how_copied
from rlhf_cli.data.records import Message
from rlhf_cli.data.sandbox import render
from tests.data.test_template_zoo import ZOO
from tests.data.tiny_tokenizer import CHATML, ENDLESS_TURNS, FORGETS, LLAMA3, PHI3, ZEPHYR, tiny_tokenizer

LOOP = "{{% for m in messages %}}{}{{% endfor %}}"
OTHERWISE = {
    "a test of the text": LOOP.format("{% if m['content'] %}{{ m['content'] }}{% endif %}"),
    "a test inside an expression": LOOP.format("{{ m['content'] if 'x' in m['content'] else m['content'] }}"),
    "another filter": LOOP.format("{{ m['content'] | upper }}"),
    "trimmed together": LOOP.format("{{ (m['role'] + m['content']) | trim }}"),
    "trimmed and not": LOOP.format("{{ m['content'] | trim }}{{ m['content'] }}"),
    "of some letters": LOOP.format("{{ m['content'] | trim('x') }}"),
    "a method": LOOP.format("{{ m['content'].strip() }}"),
    "a slice": LOOP.format("{{ m['content'][:3] }}"),
    "a variable": LOOP.format("{% set c = m['content'] %}{{ c }}"),
    "a block that is set": LOOP.format("{% set c %}{{ m['content'] }}{% endset %}{{ c | length }}"),
    "a block that is filtered": LOOP.format("{% filter upper %}{{ m['content'] }}{% endfilter %}"),
    "a macro": "{% macro f(m) %}{{ m['content'] }}{% endmacro %}" + LOOP.format("{{ f(m) }}"),
    "a namespace": "{% set n = namespace(x='') %}" + LOOP.format("{% set n.x = m['content'] %}") + "{{ n.x }}",
    "a turn as a whole": LOOP.format("{{ m }}"),
    "all its keys": LOOP.format("{% for k, v in m.items() %}{{ v }}{% endfor %}"),
    "get": LOOP.format("{{ m.get('content') }}"),
    "a key that is computed": LOOP.format("{{ m['con' + 'tent'] }}"),
    "all turns": "{{ messages | tojson }}",
    "other turns": "{% set messages = messages[1:] %}" + LOOP.format("{{ m['content'] }}"),
    "the turn before": LOOP.format("{{ loop.previtem['content'] if loop.previtem }}{{ m['content'] }}"),
    "a turn of the loop's": LOOP.format("{{ loop.changed(m['content']) }}{{ m['content'] }}"),
    "a call": LOOP.format("{{ raise_exception(m['content']) }}"),
    "in a list": LOOP.format("{{ [m['content']] | join('') }}"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_template_that_does_more_than_copy_is_rendered_for_every_row(name: str) -> None:
    assert how_copied(OTHERWISE[name]) is None


def test_templates_that_copy() -> None:
    assert [how_copied(text) for text in (CHATML, ZEPHYR, PHI3, ENDLESS_TURNS)] == ["whole"] * 4
    assert [how_copied(text) for text in (LLAMA3, FORGETS)] == ["trimmed", None]
    assert (
        how_copied("{{ messages[0]['content'] }}" + LOOP.format("{% if not loop.first %}{{ m.content ~ '\n' }}{% endif %}"))
        == "whole"
    )


TEXTS = ("Hi", " spaced\n", "{{ m }}", "\ue000 0", "<think>x</think> y")


@pytest.mark.parametrize("text", [CHATML, ZEPHYR, PHI3, LLAMA3, ENDLESS_TURNS, *ZOO.values()])
def test_filling_is_rendering(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, filled = tiny_tokenizer(), []
    for roles in (("user",), ("user", "assistant"), ("system", "user"), ("user", "assistant", "user"), ("user", "user")):
        for said in TEXTS:
            turns = [Message(role, said) for role in roles]
            filled += [render(tokenizer, text, turns, {}, generation=on) for on in (True, False) if _writable(text, turns)]
    monkeypatch.setattr(outlines, "how_copied", lambda text: None)
    plain, i = tiny_tokenizer(), 0
    for roles in (("user",), ("user", "assistant"), ("system", "user"), ("user", "assistant", "user"), ("user", "user")):
        for said in TEXTS:
            turns = [Message(role, said) for role in roles]
            for on in (True, False) if _writable(text, turns) else ():
                assert filled[i] == render(plain, text, turns, {}, generation=on)
                i += 1
    assert i == len(filled) > 0


def _writable(text: str, turns: list[Message]) -> bool:
    return "only user and assistant" not in text or all(turn.role != "system" for turn in turns)
