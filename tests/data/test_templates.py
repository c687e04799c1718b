from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.records import BadRow, Message
from rlhf_cli.data.templates import BUILT_IN, Template, choose_template, read_chat_format, tokenise
from rlhf_cli.errors import UsageError
from tests.data.tiny_tokenizer import CHATML, ENDLESS_TURNS, LLAMA3, PHI3, ZEPHYR, encode_prompt, render_prompt, tiny_tokenizer

NONE = Template("none", None)


def file(text: str) -> Template:
    return Template("x.jinja", text)


def test_the_tokenizers_own_template_wins_over_the_built_in_one() -> None:
    own = choose_template(tiny_tokenizer(template=CHATML), None)
    plain = choose_template(tiny_tokenizer(), None)
    assert (own.source, own.text) == ("the tokenizer's own", CHATML)
    assert (plain.source, plain.text) == ("a plain built-in one (the tokenizer has none)", BUILT_IN)
    assert choose_template(tiny_tokenizer(template=CHATML), "none").hash == "none"


def test_hash_is_of_the_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    tokenizer = tiny_tokenizer(template=CHATML)
    assert choose_template(tokenizer, str(path)).hash == choose_template(tokenizer, None).hash
    assert file("a").hash == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # sha256sum of "a"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.jinja: No such file or directory"):
        choose_template(tiny_tokenizer(), str(tmp_path / "no.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UsageError, match=r"bad\.jinja\): line 2: unexpected '}': not valid Jinja"):
        choose_template(tiny_tokenizer(), str(tmp_path / "bad.jinja"))
    with pytest.raises(UsageError, match="none of them is its default"):
        choose_template(tiny_tokenizer(template={"rag": CHATML, "tool_use": CHATML}), None)


def end_of_turn(tokenizer: Any, template: Template) -> list[int]:
    form = read_chat_format(tokenizer, template)
    return [*tokenise(tokenizer, [form.close])[0], *form.end_ids]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (ZEPHYR, "</s>"),
        (PHI3, "<|im_end|>"),
        (ENDLESS_TURNS, "</s>"),
        (None, "</s>"),
    ],
)
def test_end_of_turn(text: str | None, end: str) -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_turn(tokenizer, Template("x", text)) == [tokenizer.convert_tokens_to_ids(end)]


def test_an_end_of_turn_of_two_tokens_and_an_eos_after_everything() -> None:
    tokenizer = tiny_tokenizer()
    double = CHATML.replace("<|im_end|>", "<|eot_id|><|im_end|>")
    adjoining = PHI3.replace("<|im_end|>\n", "<|im_end|>")  # the last turn ends in <|im_end|></s>, others in <|im_end|>
    assert tokenizer.decode(end_of_turn(tokenizer, file(double))) == "<|eot_id|><|im_end|>"
    assert tokenizer.decode(end_of_turn(tokenizer, file(adjoining))) == "<|im_end|>"


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no EOS token"):
        end_of_turn(tokenizer, NONE)


@pytest.mark.parametrize(
    ("text", "adds_bos", "count"), [(LLAMA3, True, 1), (LLAMA3, False, 1), (CHATML, True, 1), (CHATML, False, 0), (None, True, 1)]
)
def test_at_most_one_bos(text: str | None, adds_bos: bool, count: int) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    ids = encode_prompt(tokenizer, Template("x", text), "Hello")
    assert ids.count(tokenizer.bos_token_id) == count
    assert ids[:1] == [tokenizer.bos_token_id] or not count


def test_text_rows_and_template_none_stand_for_themselves() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    assert encode_prompt(tokenizer, file(CHATML), "") == [tokenizer.bos_token_id]
    assert encode_prompt(tiny_tokenizer(), file(CHATML), "") == []
    assert tokenizer.decode(encode_prompt(tokenizer, NONE, "Hello there")) == "<s>Hello there"
    with pytest.raises(BadRow, match="a conversation needs a chat template"):
        encode_prompt(tokenizer, NONE, (Message("user", "Hello"),))


def test_a_prompt_is_rendered_as_transformers_renders_it() -> None:
    tokenizer = tiny_tokenizer(template=LLAMA3)
    turns = (Message("user", "Hello"), Message("assistant", "Hi "), Message("user", "two plus two?"))
    expected = tokenizer.apply_chat_template([turn._asdict() for turn in turns], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, choose_template(tokenizer, None), turns) == expected


def test_built_in_template() -> None:
    turns = (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))
    text = render_prompt(tiny_tokenizer(), Template("", BUILT_IN), turns)
    assert text == "System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\nHello</s>\n\nUser:\nBye\n\nAssistant:\n"


def test_dates_are_fixed() -> None:
    assert render_prompt(tiny_tokenizer(), file("{{ strftime_now('%Y') }}: {{ messages[0].content }}"), "Hi") == "26 Jul 2024: Hi"


def test_control_strings_include_what_the_template_writes_though_it_is_not_special() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<think>"])
    control = read_chat_format(tokenizer, file("{% for m in messages %}<turn>{{ m.content }}{% endfor %}")).control
    assert control is not None
    assert [bool(control.search(text)) for text in ("a <turn> b", "<think>", "<s>", "plain <|im_en")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('no such role') }}", r"the chat template fails \(TemplateError: no such role"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"the chat template fails \(SecurityError"),
        ("{{ 'x' * 2000000 }}", r"the chat template writes too much \(2,000,000 characters, at most 1,000,016"),
        ("{{ ('x' * 8000000000) | length }}", r"the chat template takes too much memory"),
    ],
)
def test_a_hostile_template_is_a_bad_row(text: str, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        render_prompt(tiny_tokenizer(), file(text), "Hi")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 ** 99999999 }}",  # folded while the template is compiled, in one step that hears no signal
        "{% set x = 9 ** (messages | length * 99999999) %}{{ x }}",  # and one in the same step while it renders
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.data.sandbox.SECONDS", 0.5)
    (tmp_path / "x.jinja").write_text(text)
    said = r"x.jinja\): the chat template takes too long \(more than 0.5 s of CPU time\)$"
    with pytest.raises(UsageError, match=said):
        choose_template(tiny_tokenizer(), str(tmp_path / "x.jinja"))


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.data.sandbox.SECONDS", 0.1)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BadRow, match=r"the chat template takes too long \(more than 0.1 s of CPU time\)"):
        render_prompt(tiny_tokenizer(), file(loops), "Hi")
    with pytest.raises(UsageError, match=r"chat template \(x.jinja\): the chat template takes too long"):
        end_of_turn(tiny_tokenizer(), file(loops))
