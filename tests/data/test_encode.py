from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from rlhf_cli import sections
from rlhf_cli.data.encode import Encoded, checked, encode, same_tokens, show_example
from rlhf_cli.data.records import Facts, Message, Record
from rlhf_cli.data.templates import Template
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from tests.data.tiny_tokenizer import CHATML, ENDLESS_TURNS, FORGETS, LLAMA3, PHI3, THINK, ZEPHYR, encode_prompt, tiny_tokenizer

NONE = Template("none", None)
LEADING_BOS = "{{ bos_token }}" + CHATML
STRIPS = CHATML.replace("m['content']", "m['content'] | trim")


def talk(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn."""
    turns = tuple(Message(("user", "assistant")[k % 2], text) for k, text in enumerate(texts))
    return turns if system is None else (Message("system", system), *turns)


def file(text: str | None) -> Template:
    return Template("x.jinja", text)


def run(records: list[Record], tokenizer: Any, text: str | None, responses: Any = "first", **data: Any) -> Encoded:
    return encode(records, tokenizer, file(text), sections.SftData(train=[], **data), responses=responses, cache=None)


def spoken(tree: Tree, tokenizer: Any) -> list[str]:
    return [piece for piece, supervised in show_example(tree, tokenizer) if supervised]


DIALOGUE = Record(talk("What is two plus two?", "It is four.", "Are you well?"), ("I am well, thank you.", "No"), "d.jsonl:1")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("text", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (ZEPHYR, "</s>"),
        (LEADING_BOS, "<|im_end|>"),
        (STRIPS, "<|im_end|>"),
        (PHI3, "<|im_end|>"),
    ],
)
def test_supervised_tokens_are_the_assistants_text_and_end_of_turn(text: str, end: str, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(eos=end if text != PHI3 else "</s>", adds_bos=adds_bos)  # pad == eos
    encoded = run([DIALOGUE], tokenizer, text)
    assert spoken(encoded.trees[0], tokenizer) == ["It is four." + end, "I am well, thank you." + end]
    assert encoded.trees[0].prompt.tolist() == encode_prompt(tokenizer, file(text), DIALOGUE.prompt)
    assert encoded.eos_share == 1.0


def test_train_on_last_and_comparisons_leave_the_prompt_alone() -> None:
    tokenizer = tiny_tokenizer()
    last = run([DIALOGUE], tokenizer, CHATML, train_on="last").trees[0]
    both = run([DIALOGUE], tokenizer, CHATML, responses="all").trees[0]
    assert spoken(last, tokenizer) == ["I am well, thank you.<|im_end|>"]
    assert spoken(both, tokenizer) == ["I am well, thank you.<|im_end|>", "No<|im_end|>"]


def test_content_that_the_template_strips_is_supervised_as_written() -> None:
    tokenizer = tiny_tokenizer()
    record = Record(talk("Hi", "  It is four. \n", "Hi"), (" No \n\n",), "d:1")
    assert spoken(run([record], tokenizer, STRIPS).trees[0], tokenizer) == ["It is four.<|im_end|>", "No<|im_end|>"]
    assert spoken(run([record], tokenizer, CHATML).trees[0], tokenizer) == ["  It is four. \n<|im_end|>", " No \n\n<|im_end|>"]


def test_a_token_that_reaches_into_the_turns_header_is_not_supervised() -> None:
    tokenizer = tiny_tokenizer()
    record = Record(talk("Hi", "It is four.", "Hi"), ("No",), "d:1")
    tree = run([record], tokenizer, ENDLESS_TURNS).trees[0]  # its header ends in a space, which belongs to the token " It"
    assert tokenizer.tokenize("ASSISTANT: It is four.")[-8:] != tokenizer.tokenize("It is four.")
    assert spoken(tree, tokenizer) == [" is four.", "No</s>"]


def test_an_end_of_turn_that_swallows_the_newline_is_supervised() -> None:
    tokenizer = tiny_tokenizer(rstrip=True)
    assert spoken(run([DIALOGUE], tokenizer, CHATML).trees[0], tokenizer) == [
        "It is four.<|im_end|>",
        "I am well, thank you.<|im_end|>",
    ]


def test_templates_that_end_every_turn_but_the_last() -> None:
    text = CHATML.replace("'<|im_end|>\n'", "('' if loop.last and m['role'] == 'assistant' else eos_token)")
    assert spoken(run([DIALOGUE], tiny_tokenizer(), text).trees[0], tiny_tokenizer()) == [
        "It is four.</s>",
        "I am well, thank you.</s>",
    ]


def test_a_response_continues_its_prompt_under_a_dummy_prefix() -> None:
    tokenizer = tiny_tokenizer(metaspace=True)
    tree = run([Record("Hello there", ("It is four.",), "d:1")], tokenizer, CHATML).trees[0]
    whole = tokenizer("assistant\nIt is four.", add_special_tokens=False)["input_ids"]
    assert tree.responses[0].tolist()[:-1] == whole[-len(tree.responses[0]) + 1 :]
    text = run([Record("", ("It is four.",), "d:1")], tokenizer, CHATML).trees[0]
    assert text.responses[0].tolist()[:-1] == tokenizer("It is four.", add_special_tokens=False)["input_ids"]


def test_thinking_is_refused_in_earlier_turns_and_kept_in_the_last() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UsageError) as refusal:
        run([DIALOGUE], tokenizer, THINK)
    assert str(refusal.value) == (
        "chat template (x.jinja): an earlier assistant turn is rewritten once more turns follow\n"
        "d.jsonl:1: 'art|>assistant\\n<think>\\n\\n</think>\\n\\nIt is ' becomes 'art|>assistant\\nIt is four.<|im_end|>\\n<|i'\n"
        "set data.train_on: last, or model.chat_template to a Jinja file that leaves earlier turns alone"
    )
    tree = run([DIALOGUE], tokenizer, THINK, train_on="last").trees[0]
    assert spoken(tree, tokenizer) == ["I am well, thank you.<|im_end|>"]
    assert tokenizer.decode(tree.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    learned = run([DIALOGUE], tokenizer, THINK, train_on="last", empty_think="learn").trees[0]
    assert spoken(learned, tokenizer) == ["<think>\n\n</think>\n\nI am well, thank you.<|im_end|>"]
    assert run([DIALOGUE._replace(prompt="Hi")], tokenizer, THINK).kept == 1


def test_a_template_that_forgets_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the chat template leaves out a user turn \(1\)"):
        run([DIALOGUE], tiny_tokenizer(), FORGETS)


def test_text_rows_know_no_template() -> None:
    for adds_bos, prompt in ((True, [0]), (False, [])):
        tokenizer = tiny_tokenizer(adds_bos=adds_bos)
        tree = run([Record("", ("Hello there",), "t:1")], tokenizer, CHATML).trees[0]
        assert tree.prompt.tolist() == [tokenizer.bos_token_id for _ in prompt]
        assert tokenizer.decode(tree.responses[0]) == "Hello there</s>"


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_ready_made_texts_have_one_bos_and_one_end(end: str) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    rows = [Record("", (f"<s>Hello there{end}\n",), "t:1"), Record("", ("Hello",), "t:2"), Record("Hi", (f"No{end}",), "t:3")]
    encoded = run(rows, tokenizer, CHATML, control_tokens="keep")
    assert [tokenizer.decode(tree.prompt) for tree in encoded.trees][:2] == ["<s>", "<s>"]
    assert [tokenizer.decode(tree.responses[0]) for tree in encoded.trees] == [f"Hello there{end}", "Hello</s>", "No<|im_end|>"]
    assert encoded.notices == ("ready-made texts, with a BOS or an end of their own: 1; neither is written twice",)


def test_ready_made_texts_stand_for_themselves_without_a_template() -> None:
    tokenizer = tiny_tokenizer()
    encoded = run([Record("", ("<s>Hello</s>",), "t:1")], tokenizer, None, control_tokens="keep")
    assert tokenizer.decode(encoded.trees[0].responses[0]) == "<s>Hello</s></s>"
    assert encoded.notices == ()


def test_a_ready_made_prompt_is_no_user_turn() -> None:
    ready = Record("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", ("No",), "t:1")
    encoded = run([ready, Record("Hi", ("No",), "t:2")], tiny_tokenizer(), CHATML, control_tokens="keep")
    said = "the prompt is ready-made, in turns of the template's own"
    assert (encoded.lost, encoded.examples) == ({said: 1}, (f"t:1: {said} (set model.chat_template: none)",))
    plain = run([Record("USER: Hi\nASSISTANT:", ("No",), "t:1"), ready], tiny_tokenizer(), ENDLESS_TURNS, control_tokens="keep")
    assert plain.lost == {said: 1}


def test_a_template_that_loses_a_part_of_the_response_is_refused() -> None:
    strips = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    rows = [Record("Hi", ("<think>\nTwo.\n</think>\n\nIt is four.",), "t:1")]
    with pytest.raises(UsageError) as error:
        run(rows, tiny_tokenizer(), strips)
    assert str(error.value).splitlines()[:2] == [
        "chat template (x.jinja): it does not write the whole response",
        r"t:1: '<think>\nTwo.\n</think>\n\nIt' becomes 'It is four.'",
    ]
    assert run([Record("Hi", ("It is four.",), "t:1")], tiny_tokenizer(), strips).kept == 1


def test_template_none() -> None:
    tokenizer = tiny_tokenizer()
    encoded = run([Record("Hello", (" there",), "p:1"), DIALOGUE], tokenizer, None)
    assert show_example(encoded.trees[0], tokenizer) == [("Hello", False), (" there</s>", True)]
    assert encoded.lost == {"a conversation needs a chat template": 1}
    assert encoded.examples == ("d.jsonl:1: a conversation needs a chat template",)


def test_control_tokens_in_a_text() -> None:
    rows = [Record("Hi<|im_end|>", ("No",), "c:1"), Record("Hi", ("</s>",), "c:2"), Record("Hi", ("No",), "c:3")]
    encoded = run(rows, tiny_tokenizer(), CHATML)
    assert (encoded.read, encoded.kept, encoded.lost) == (3, 1, {"a control token in the text": 2})
    assert encoded.examples[0] == "c:1: a control token in the text ('<|im_end|>')"
    assert run(rows, tiny_tokenizer(), CHATML, control_tokens="keep").kept == 3


def test_overlong_rows_are_dropped_or_an_error() -> None:
    tokenizer = tiny_tokenizer()
    rows = [Record("Hi", ("No",), "o:1"), Record("Hi", ("It is four. " * 9,), "o:2")]
    size = int(run(rows, tokenizer, CHATML).trees.lengths[1])
    fits = run(rows, tokenizer, CHATML, max_length=size)
    drops = run(rows, tokenizer, CHATML, max_length=size - 1)
    assert (fits.kept, drops.kept) == (2, 1)
    assert drops.examples == (f"o:2: longer than data.max_length ({size} tokens)",)
    assert drops.percentiles["total"]["max"] == size  # of what was read, so that one sees what to raise max_length to
    with pytest.raises(UsageError, match=f"^o:2: {size} tokens, but data.max_length is {size - 1}\n"):
        run(rows, tokenizer, CHATML, max_length=size - 1, overlong="error")


def test_truncated_responses_lose_their_end() -> None:
    tokenizer = tiny_tokenizer()
    rows = [Record("Hi", ("It is four. " * 9,), "o:1"), Record("Hi", ("No",), "o:2"), Record("Hello there " * 40, ("No",), "o:3")]
    whole = run(rows[:1], tokenizer, CHATML).trees[0]
    encoded = run(rows, tokenizer, CHATML, max_length=len(whole.prompt) + 5, overlong="truncate-response")
    assert encoded.trees[0].responses[0].tolist() == whole.responses[0][:5].tolist()
    assert (encoded.kept, encoded.truncated, encoded.eos_share) == (2, 1, 0.5)
    assert encoded.lost == {"longer than data.max_length": 1}


def test_comparisons_that_are_cut_to_the_same_tokens_are_lost() -> None:
    tokenizer = tiny_tokenizer()
    start = "It is four. " * 3
    rows = [
        Record("Hi", (start + "Yes", start + "No"), "p:1"),
        Record("Hi", ("Yes" + start * 2, "No"), "p:2"),
        Record("Hi", ("Hello", start + "Yes", start + "No"), "p:3", Facts(ranks=(1.0, 2.0, 2.0))),
        Record("Hi", ("Hello", start + "Yes", start + "No"), "p:4", Facts(ranks=(1.0, 2.0, 3.0))),
        Record("Hi", ("Yes",), "p:5", Facts(label=True)),
    ]
    whole = run([Record("Hi", (start,), "p:0")], tokenizer, CHATML).trees[0]
    room = len(whole.prompt) + len(whole.responses[0]) - 1  # all of `start` but its end-of-turn
    encoded = run(rows, tokenizer, CHATML, responses="all", max_length=room, overlong="truncate-response")
    assert (encoded.kept, encoded.truncated) == (5, 4)
    left = checked(encoded, same_tokens)
    reason = "a better and a worse response are the same, cut and tokenised"
    assert [left.trees.locations[i] for i in range(left.kept)] == ["p:2", "p:3", "p:5"]
    assert (left.read, left.kept, left.truncated, left.lost) == (5, 3, 2, {reason: 2})
    assert left.examples == (f"p:1: {reason}", f"p:4: {reason}")
    for tree, i in zip(left.trees, (1, 2, 4), strict=True):
        assert tree.facts == rows[i].facts and tree.row == i
        assert tree.prompt.tolist() == encoded.trees[i].prompt.tolist()
        assert [r.tolist() for r in tree.responses] == [r.tolist() for r in encoded.trees[i].responses]
    assert checked(left, same_tokens) is left
    assert checked(run(rows, tokenizer, CHATML, responses="all"), same_tokens).kept == 5
    with pytest.raises(UsageError) as error:
        checked(left, lambda tree: "no score")
    assert str(error.value) == f"none of 5 rows can be used: no score (3), {reason} (2)\nthe first: p:2: no score"


def test_truncated_prompts_lose_whole_exchanges_and_keep_the_system_turn() -> None:
    tokenizer = tiny_tokenizer()
    prompt = talk("Hello " * 20, "It is four.", "Are you well?", "I am well.", "Hi", system="Be kind.")
    newest = talk("Are you well?", "I am well.", "Hi", system="Be kind.")
    expected = run([Record(newest, ("No",), "o:1")], tokenizer, CHATML).trees[0]
    room = len(expected.prompt) + len(expected.responses[0])
    encoded = run([Record(prompt, ("No",), "o:1")], tokenizer, CHATML, max_length=room, overlong="truncate-prompt")
    assert encoded.truncated == 1 and encoded.eos_share == 1.0
    assert show_example(encoded.trees[0], tokenizer) == show_example(expected, tokenizer)


@pytest.mark.parametrize("text", [CHATML, None])
def test_a_last_user_turn_that_is_too_long_loses_its_beginning(text: str | None) -> None:
    tokenizer = tiny_tokenizer()
    row = Record("Hello there. " * 30 + "Are you well?", ("I am well.",), "o:1")
    encoded = run([row], tokenizer, text, max_length=60, overlong="truncate-prompt")
    written = tokenizer.decode(encoded.trees[0].prompt)
    header, footer = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n") if text else ("", "")
    assert written.startswith(header) and written.endswith("Are you well?" + footer)
    assert 57 <= encoded.trees.lengths[0] <= 60
    assert tokenizer.decode(encoded.trees[0].responses[0]).startswith("I am well.")


def test_a_response_that_is_too_long_alone_is_dropped() -> None:
    rows = [Record("Hello", ("It is four. " * 30,), "o:1"), Record("Hi", ("No",), "o:2")]
    encoded = run(rows, tiny_tokenizer(), CHATML, max_length=60, overlong="truncate-prompt")
    assert (encoded.kept, encoded.truncated, encoded.lost) == (1, 0, {"longer than data.max_length": 1})


def test_no_row_left_is_an_error_that_names_the_first() -> None:
    refuses = "{% if messages[0]['content'] != 'Hi' %}{{ raise_exception('not you') }}{% endif %}" + CHATML
    with pytest.raises(UsageError) as error:
        run([DIALOGUE, DIALOGUE], tiny_tokenizer(), refuses)
    assert str(error.value).splitlines() == [
        "none of 2 rows can be used: the chat template fails (2)",
        "the first: d.jsonl:1: the chat template fails (TemplateError: not you)",
    ]
    assert run([DIALOGUE, DIALOGUE._replace(prompt="Hi")], tiny_tokenizer(), refuses).kept == 1


def test_rows_without_anything_to_learn_are_bad() -> None:
    rows = [Record("Hi", (), "n:1"), Record("", ("",), "n:2"), Record("", ("N",), "n:3")]
    encoded = run(rows, tiny_tokenizer(), CHATML)
    assert encoded.lost == {"no response": 1, "no supervised token": 1}


def test_trees_know_their_lengths_and_counts() -> None:
    tokenizer = tiny_tokenizer()
    rows = [DIALOGUE, Record("", ("Hello", "Hi"), "t:9"), Record("Hi", ("No",), "t:10")]
    trees = run(rows, tokenizer, CHATML, responses="all").trees
    assert trees.lengths.tolist() == [len(tree.prompt) + sum(map(len, tree.responses)) for tree in trees]
    assert trees.supervised_counts[0] == sum(map(len, trees[0].responses))
    assert trees.supervised_counts[1] == sum(map(len, trees[1].responses)) - 2  # nothing comes before a first token
    assert [trees.locations[i] for i in range(3)] == ["d.jsonl:1", "t:9", "t:10"]
    assert [tree.row for tree in trees[1:]] == [1, 2] and trees[-1].row == 2
    assert (trees.ids.dtype, trees.segments.dtype) == (np.int32, np.int64)


def test_trees_are_pickled_and_slices_are_lists() -> None:
    trees = run([DIALOGUE] * 3, tiny_tokenizer(), CHATML).trees
    again = pickle.loads(pickle.dumps(trees))
    assert again.ids.tolist() == trees.ids.tolist() and again.locations == trees.locations
    with pytest.raises(IndexError):
        trees[3]


def test_batches_of_rows_do_not_change_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [DIALOGUE, Record("Hi", ("No",), "t:2"), Record("", ("Hello there",), "t:3"), DIALOGUE._replace(prompt=talk("Hi"))]
    together = run(rows, tiny_tokenizer(), CHATML).trees
    monkeypatch.setattr("rlhf_cli.data.encode.CHUNK", 1)
    alone = run(rows, tiny_tokenizer(), CHATML).trees
    assert alone.ids.tolist() == together.ids.tolist() and alone.supervised.tolist() == together.supervised.tolist()


def test_percentiles_by_nearest_rank() -> None:
    tokenizer = tiny_tokenizer()
    letters = [Record("", ("q" * n,), f"t:{n}") for n in range(1, 11)]  # no merges: n tokens and the EOS
    assert run(letters, tokenizer, CHATML).percentiles["response"] == {"p50": 6, "p90": 10, "p99": 11, "max": 11}


def prompts_of(records: list[Record], tokenizer: Any, reserve: int, text: str | None = CHATML, **data: Any) -> Encoded:
    settings = sections.Data(train=[], **data)
    return encode(records, tokenizer, file(text), settings, responses="none", reserve=reserve, cache=None)


def test_prompts_alone() -> None:
    """Rows with and without responses give the same trees; what is said of responses is dropped, equal rows stay."""
    tokenizer = tiny_tokenizer()
    ranked = Record("Hi", ("a", "b"), "r:2", Facts((1.0, 2.0), subset="s"))
    rows = [DIALOGUE, DIALOGUE._replace(responses=(), where="p:1"), ranked]
    encoded = prompts_of(rows, tokenizer, 5)
    assert (encoded.kept, encoded.lost, encoded.eos_share) == (3, {}, None)
    for tree in encoded.trees[:2]:
        assert tree.prompt.tolist() == encode_prompt(tokenizer, file(CHATML), DIALOGUE.prompt)
    assert [tree.responses for tree in encoded.trees] == [(), (), ()]
    assert [tree.facts for tree in encoded.trees] == [Facts(), Facts(), Facts(subset="s")]
    assert encoded.trees.supervised_counts.tolist() == [0, 0, 0]
    assert encoded.trees.lengths.tolist() == [len(tree.prompt) for tree in encoded.trees]
    assert encoded.percentiles == {"prompt": dict.fromkeys(("p50", "p90", "p99", "max"), int(encoded.trees.lengths[0]))}
    assert show_example(encoded.trees[2], tokenizer) == [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False)]


def test_prompts_leave_room_for_a_response() -> None:
    tokenizer = tiny_tokenizer()
    rows = [Record("Hi", (), "o:1"), Record("Hello there. " * 9 + "Are you well?", (), "o:2")]
    long = int(prompts_of(rows, tokenizer, 0).trees.lengths[1])
    assert prompts_of(rows, tokenizer, 7, max_length=long + 7).kept == 2
    dropped = prompts_of(rows, tokenizer, 8, max_length=long + 7)
    assert dropped.lost == {"longer than data.max_length": 1}
    assert dropped.examples == (f"o:2: longer than data.max_length ({long + 8} tokens, 8 of them for the response)",)
    with pytest.raises(UsageError) as error:
        prompts_of(rows, tokenizer, 8, max_length=long + 7, overlong="error")
    assert str(error.value) == (
        f"o:2: {long + 8} tokens, 8 of them for the response, but data.max_length is {long + 7}\n"
        "raise it, or set data.overlong to drop or truncate-prompt"
    )
    cut = prompts_of(rows, tokenizer, 20, max_length=60, overlong="truncate-prompt")
    assert (cut.kept, cut.truncated) == (2, 1)
    assert 37 <= cut.trees.lengths[1] <= 40
    assert tokenizer.decode(cut.trees[1].prompt).endswith("Are you well?<|im_end|>\n<|im_start|>assistant\n")


def test_rows_without_a_prompt_are_bad_where_only_prompts_are_used() -> None:
    rows = [Record("", ("Hello",), "t:1"), Record("Hi<|im_end|>", (), "t:2"), Record("Hi", ("</s>",), "t:3")]
    encoded = prompts_of(rows, tiny_tokenizer(), 1)
    assert encoded.lost == {"no prompt": 1, "a control token in the text": 1}
    assert encoded.trees.locations[0] == "t:3"  # its response, which is not used, has one too
