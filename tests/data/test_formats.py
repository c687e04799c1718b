"""Rows of every format, good and bad, and which format a row has."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from rlhf_cli.data.formats import ANSWERS, COMPARISONS, FORMATS, LABELS, PROMPTS, STEPS, convert, detect, readings, with_margin
from rlhf_cli.data.records import BadRow, Facts, Message, Record
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Source
from tests.data.uses import purpose_of

U, A, S = "user", "assistant", "system"


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def said(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


ASK = turns((U, "2+2?"))
LONG = turns((S, "Be brief."), (U, "2+2?"), (A, "4"), (U, "and 3+3?"))
LONG_SAID = said((S, "Be brief."), (U, "2+2?"), (A, "4"), (U, "and 3+3?"))

HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: hey"}

GOOD = [
    ("messages", {"messages": [*LONG, *turns((A, "6"))]}, LONG_SAID, ("6",), {}),
    ("prompt-completion", {"prompt": "2+2?", "completion": " 4"}, "2+2?", (" 4",), {}),
    ("prompt-completion", {"prompt": ASK, "completion": turns((A, "4"))}, said((U, "2+2?")), ("4",), {}),
    ("prompt-completion", {"prompt": "2+2?", "completion": turns((A, "4"))}, "2+2?", ("4",), {}),
    ("prompt-completion", {"prompt": LONG, "completion": "6"}, LONG_SAID, ("6",), {}),
    (
        "prompt-completion",
        {"prompt": "2+2?", "completion": turns((A, "4"), (U, "sure?"), (A, "yes"))},
        said((U, "2+2?"), (A, "4"), (U, "sure?")),
        ("yes",),
        {},
    ),
    ("text", {"text": "Once upon a time"}, "", ("Once upon a time",), {}),
    ("preference", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?", ("4", "5"), {}),
    ("preference", {"prompt": ASK, "chosen": turns((A, "4")), "rejected": "5"}, said((U, "2+2?")), ("4", "5"), {}),
    ("preference", {"prompt": "2+2?", "chosen": [*ASK, *turns((A, "4"))], "rejected": turns((A, "5"))}, "2+2?", ("4", "5"), {}),
    ("preference", {"chosen": [*ASK, *turns((A, "4"))], "rejected": [*ASK, *turns((A, "5"))]}, said((U, "2+2?")), ("4", "5"), {}),
    (
        "hh",
        {
            "chosen": "\n\nHuman: 2+2? \n\nAssistant:  4\n\nHuman: and\n\n3+3?\n\nAssistant: 6 ",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: and\n\n3+3?\n\nAssistant: 7",
        },
        said((U, "2+2?"), (A, "4"), (U, "and\n\n3+3?")),
        ("6", "7"),
        {},
    ),
    ("ranked", {"prompt": "2+2?", "responses": ["4", "5", "fish"]}, "2+2?", ("4", "5", "fish"), {}),
    (
        "preference",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "score_chosen": 3, "score_rejected": -0.5, "probability": 0.75},
        "2+2?",
        ("4", "5"),
        {"scores": (3.0, -0.5), "probability": 0.75},
    ),
    (
        "hh",
        {**HH, "score_chosen": 1, "score_rejected": 1, "probability": None},
        said((U, "hi")),
        ("hello", "hey"),
        {"scores": (1.0, 1.0)},
    ),
    (
        "ranked",
        {"prompt": "2+2?", "responses": ["fish", "4", "5"], "ranks": [3, 1, 2]},
        "2+2?",
        ("4", "5", "fish"),
        {"ranks": (1.0, 2.0, 3.0)},
    ),
    (
        "ranked",
        {"prompt": "2+2?", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 1]},
        "2+2?",
        ("b", "d", "a", "c"),
        {"ranks": (1.0, 1.0, 2.0, 2.0)},
    ),
    (
        "ranked",
        {"prompt": "2+2?", "responses": ["a", "b", "a "], "ranks": [1, 2, 1]},
        "2+2?",
        ("a", "a ", "b"),
        {"ranks": (1.0, 1.0, 2.0)},
    ),
    (
        "ranked",
        {"prompt": "2+2?", "responses": ["5", "4", "fish", "5!"], "scores": [0.5, 2, -1e3, 0.5]},
        "2+2?",
        ("4", "5", "5!", "fish"),
        {"scores": (2.0, 0.5, 0.5, -1000.0), "ranks": (-2.0, -0.5, -0.5, 1000.0)},
    ),
    (
        "ranked",
        {"prompt": ASK, "responses": [turns((A, "5")), turns((A, "4"))], "ranks": [2, 1], "scores": [1, 3]},
        said((U, "2+2?")),
        ("4", "5"),
        {"scores": (3.0, 1.0), "ranks": (1.0, 2.0)},
    ),
    ("unpaired", {"prompt": "2+2?", "completion": "5", "label": False}, "2+2?", ("5",), {"label": False}),
    ("prompt", {"prompt": LONG}, LONG_SAID, (), {}),
    ("prompt", {"prompt": "2+2?", "subset": "sums"}, "2+2?", (), {"subset": "sums"}),
]


@pytest.mark.parametrize(("format", "row", "prompt", "responses", "facts"), GOOD)
def test_good_rows(format, row, prompt, responses, facts):
    assert convert(row, "x.jsonl:7", FORMATS[format].convert) == Record(prompt, responses, "x.jsonl:7", Facts(**facts))
    assert readings(row) == (format,)


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
Q, GOOD_HH = "\n\nHuman: hi", "\n\nHuman: hi\n\nAssistant: hello"

BAD = [
    ("messages", {}, "'messages' is missing"),
    ("messages", {"messages": None}, "'messages' is null, expected a list"),
    ("messages", {"messages": "hi"}, "'messages' is text that is not JSON ('hi')"),
    ("messages", {"messages": []}, "'messages' is empty"),
    ("messages", {"messages": ["hi"]}, "a turn of 'messages' is text, expected an object with role and content (turn 1)"),
    ("messages", {"messages": [{"role": U}]}, "a turn of 'messages' has no 'content' (turn 1)"),
    ("messages", {"messages": [{"speaker": "human", "content": "a"}]}, "a turn of 'messages' has no 'role' (turn 1)"),
    ("messages", {"messages": turns((S, "Be brief."))}, "'messages' has no assistant turn"),
    (
        "messages",
        {"messages": turns(("narrator", "b"))},
        "a role of 'messages' is not system, user, assistant or tool (turn 1: 'narrator')",
    ),
    (
        "messages",
        {"messages": turns((U, "a"), (A, "b"), (A, "c"))},
        "wrong role order in 'messages' (turn 3 is assistant, expected user or tool)",
    ),
    ("messages", {"messages": turns((U, "a"), (U, "b"))}, "wrong role order in 'messages' (turn 2 is user, expected assistant)"),
    (
        "messages",
        {"messages": turns((U, "a"), (S, "b"))},
        "wrong role order in 'messages' (turn 2 is system, expected assistant)",
    ),
    (
        "messages",
        {"messages": turns((U, "a"), ("tool", "b"))},
        "wrong role order in 'messages' (turn 2 is tool, expected assistant)",
    ),
    ("messages", {"messages": [*ASK, {"role": A, "content": None}]}, "a turn of 'messages' is null, expected text (turn 2)"),
    (
        "messages",
        {"messages": [*ASK, {"role": A, "content": [{}]}]},
        "a turn of 'messages' has a part of type text without a text (turn 2)",
    ),
    ("messages", {"messages": turns((U, "a"), (A, " \n"))}, "a turn of 'messages' is blank (turn 2)"),
    ("messages", {"messages": turns((U, ""), (A, "b"))}, "a turn of 'messages' is empty (turn 1)"),
    ("prompt-completion", {"prompt": "a"}, "'completion' is missing"),
    ("prompt-completion", {"prompt": "a", "completion": 4}, "'completion' is a number, expected text"),
    ("prompt-completion", {"prompt": "a", "completion": True}, "'completion' is true or false, expected text"),
    ("prompt-completion", {"prompt": {}, "completion": "b"}, "'prompt' is an object, expected text"),
    ("prompt-completion", {"prompt": turns((U, "a"), (A, "b")), "completion": "c"}, "'prompt' does not end in a user turn"),
    ("prompt-completion", {"prompt": "a", "completion": "b\0"}, "'completion' has a NUL character"),
    ("prompt-completion", {"prompt": "a", "completion": "é\ud800"}, "'completion' is not valid Unicode (character 2)"),
    ("prompt-completion", {"prompt": "a", "completion": turns((U, "b"), (A, "c"))}, "'completion' does not begin with 'prompt'"),
    ("text", {"text": "\t"}, "'text' is blank"),
    ("preference", {"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
    ("preference", {"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b "}, "'chosen' and 'rejected' are the same"),
    (
        "preference",
        {"chosen": turns((U, "a"), (A, "c")), "rejected": turns((U, "b"), (A, "d"))},
        "the prompts of 'chosen' and 'rejected' differ",
    ),
    ("hh", hh("hi", "ho"), "'chosen' is not a transcript that begins with 'Human:'"),
    ("hh", hh(GOOD_HH, Q), "'rejected' has no assistant turn"),
    ("hh", hh(GOOD_HH, GOOD_HH), "'chosen' and 'rejected' are the same"),
    ("hh", hh(GOOD_HH, "\n\nHuman: ho\n\nAssistant: hey"), "the prompts of 'chosen' and 'rejected' differ"),
    ("hh", hh(Q + "\n\nAssistant:", GOOD_HH), "'chosen' has an empty turn (turn 2)"),
    (
        "hh",
        hh(GOOD_HH + "\n\nAssistant: a", GOOD_HH),
        "wrong role order in 'chosen' (turn 3 is assistant, expected user or tool)",
    ),
    ("hh", hh("\n\nAssistant: a" + GOOD_HH, GOOD_HH), "the prompts of 'chosen' and 'rejected' differ"),
    ("ranked", {"prompt": "a", "responses": ["b"]}, "'responses' has one response, a ranking needs two"),
    ("ranked", {"prompt": "a", "responses": "b"}, "'responses' is text, expected a list"),
    ("ranked", {"prompt": "a", "responses": ["b", ""]}, "a response is empty"),
    ("ranked", {"prompt": "a", "responses": ["b", "b"]}, "all 'responses' are the same"),
    ("ranked", {"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "'ranks' and 'responses' differ in number (1 and 2)"),
    ("ranked", {"prompt": "a", "responses": ["b", "c"], "scores": [1, "2"]}, "an entry of 'scores' is text, expected a number"),
    (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, True]},
        "an entry of 'scores' is true or false, expected a number",
    ),
    (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]},
        "an entry of 'scores' is not finite",
    ),
    ("ranked", {"prompt": "a", "responses": ["b", "c"], "scores": [1, 10**400]}, "an entry of 'scores' is not finite"),
    ("ranked", {"prompt": "a", "responses": ["b", "c", "b "]}, "two 'responses' are the same"),
    ("ranked", {"prompt": "a", "responses": ["b", "c", "b"], "ranks": [1, 1, 2]}, "the same response has two ranks"),
    ("preference", {**PAIR, "score_chosen": 1}, "one of 'score_chosen' and 'score_rejected' is missing"),
    ("preference", {**PAIR, "score_chosen": 1, "score_rejected": "0"}, "'score_rejected' is text, expected a number"),
    ("preference", {**PAIR, "score_chosen": 1, "score_rejected": 2}, "'score_chosen' is lower than 'score_rejected'"),
    ("preference", {**PAIR, "probability": 1.01}, "'probability' is not between 0 and 1 (write 70 % as 0.7)"),
    ("preference", {**PAIR, "probability": -0.01}, "'probability' is not between 0 and 1 (write 70 % as 0.7)"),
    ("preference", {**PAIR, "probability": True}, "'probability' is true or false, expected a number"),
    ("hh", {**HH, "probability": float("nan")}, "'probability' is not finite"),
    (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [1, 2]},
        "'ranks' and 'scores' contradict each other",
    ),
    ("unpaired", {"prompt": "a", "completion": "b"}, "'label' is missing"),
    (
        "unpaired",
        {"prompt": "a", "completion": "b", "label": "up"},
        "'label' is neither true nor false, 1 nor 0 (write true for 'up')",
    ),
    ("prompt", {"prompt": "a", "subset": 3}, "'subset' is a number, expected text"),
]


@pytest.mark.parametrize(("format", "row", "message"), BAD)
def test_bad_rows(format, row, message):
    with pytest.raises(BadRow) as error:
        convert(row, "x.jsonl:7", FORMATS[format].convert)
    assert str(error.value) == message
    assert message.startswith(error.value.reason)


def test_pairs_without_any_prompt_are_whole_conversations():
    rows = [{"chosen": "Q: 2+2?\nA: it is four", "rejected": "Q: 2+2?\nA: it is five"}]
    read = FORMATS["preference"].converter(rows, False, "x")
    assert read(rows[0], "x:1") == Record("Q: 2+2?\nA: it is", (" four", " five"), "x:1")
    # A shared word is never cut: "foul" and "four" share three letters, and one answer may begin the other.
    assert read(hh("Q: A: foul", "Q: A: four"), "x:1").responses == (" foul", " four")
    assert read(hh("Q: A: yes", "Q: A: yes, sir"), "x:1") == Record("Q: A:", (" yes", " yes, sir"), "x:1")
    with pytest.raises(BadRow, match="the prompts of 'chosen' and 'rejected' differ"):
        read(hh("four", "foul"), "x:1")
    with pytest.raises(BadRow, match="'rejected' is a number, expected text"):
        read(hh("four", 5), "x:1")


def test_whole_texts_are_refused_under_a_chat_template():
    """All that they share would be one user turn; whole conversations, and texts with prompts, are read."""
    pair = {"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: five"}
    with pytest.raises(UsageError, match=r"^x: chosen and rejected are whole texts without a prompt: .* none$"):
        FORMATS["preference"].converter([pair], True, "x")
    spoken = {name: turns((U, "2+2?"), (A, name)) for name in ("chosen", "rejected")}
    assert FORMATS["preference"].converter([spoken], True, "x")(spoken, "x:1").responses == ("chosen", "rejected")
    assert FORMATS["preference"].converter([pair | {"prompt": "q"}], True, "x") is FORMATS["preference"].convert


def test_a_missing_prompt_is_not_made_up_where_other_rows_have_one():
    pair = {"chosen": "The cat", "rejected": "The dog"}
    read = FORMATS["preference"].converter([pair, {"prompt": "Who?", **pair}], True, "x")
    with pytest.raises(BadRow, match="'prompt' is missing"):
        read(pair, "x:1")


def test_sft_takes_the_best_response_and_no_undesirable_row():
    use = ANSWERS.keep
    ranked = Record("a", ("best", "worst"), "x:1", Facts(scores=(2.0, 1.0), subset="s"))
    assert use(ranked) == Record("a", ("best",), "x:1", Facts(subset="s"))
    assert use(Record("a", ("b",), "x:1", Facts(label=True))) == Record("a", ("b",), "x:1")
    assert use(Record("a", ("b",), "x:1", Facts(label=False))) == "undesirable (not for sft)"


@pytest.mark.parametrize("use", [COMPARISONS, LABELS], ids=["comparisons", "labels"])
def test_a_ranking_without_a_better_response_is_of_no_use(use):
    tied = Record("a", ("b", "c"), "x:1", Facts(ranks=(1.0, 1.0)))
    assert use.keep(tied) == "all responses are tied"
    assert ANSWERS.keep(tied).responses == ("b",)
    for facts in (Facts(ranks=(1.0, 2.0)), Facts(scores=(1.0, 1.0)), Facts(probability=0.3, margin=2.0)):
        assert use.keep(tied._replace(facts=facts)).facts == facts


def test_the_margin_of_a_pair():
    record = convert({**PAIR, "gap": 2}, "x:1", FORMATS["preference"].convert)
    assert record.facts.margin is None
    assert with_margin(record, {"gap": 2}, "gap").facts.margin == 2.0
    for row, message in (
        ({}, "'gap' is missing"),
        ({"gap": None}, "'gap' is null, expected a number"),
        ({"gap": float("-inf")}, "'gap' is not finite"),
    ):
        with pytest.raises(BadRow) as error:
            with_margin(record, row, "gap")
        assert str(error.value) == message


def test_the_recipe_knows_every_format():
    assert get_args(get_type_hints(Source)["format"]) == ("auto", *FORMATS)


def test_a_use_takes_the_formats_that_contain_what_it_needs():
    talks, pairs = ("messages", "sharegpt", "prompt-completion", "alpaca"), ("preference", "hh", "choice", "ranked", "scored")
    assert tuple(ANSWERS.formats) == (*talks, "text", *pairs, "unpaired", "tree")
    assert tuple(COMPARISONS.formats) == (*pairs, "tree")
    assert tuple(LABELS.formats) == (*pairs, "unpaired", "tree")
    assert tuple(PROMPTS.formats) == (*talks, *pairs, "unpaired", "tree", "steps", "prompt")
    assert tuple(STEPS.formats) == ("steps",)


SFT_NEEDS = (
    "messages | conversations | prompt + completion | instruction + output | text | prompt + chosen + rejected"
    " | chosen + rejected | prompt + response_a + response_b + winner | prompt + responses | prompt + completion + label"
    " | message_id + parent_id + role + text"
)
RENAME = "; in a recipe, beside the path, name those that are meant: columns: {ours: theirs}"
REFUSED = [
    ([{"a": 1, "b": 2}], "sft", f"x: found the columns a, b; sft needs {SFT_NEEDS}{RENAME}"),
    ([{}], "sft", f"x: found the columns (none); sft needs {SFT_NEEDS}{RENAME}"),
    ([{"\x1b[2J": 1}], "sft", f"x: found the columns '\\x1b[2J'; sft needs {SFT_NEEDS}{RENAME}"),
    (
        [{"question": "a", "answer": "b"}],
        "sft",
        f"x: the columns question, answer: found prompt data (prompt), which ppo can use; sft needs {SFT_NEEDS}"
        "; in a recipe, beside the path, perhaps columns: {prompt: question, completion: answer}",
    ),
    # Of two columns one would be lost without a word: nothing is suggested.
    (
        [{"question": "a", "input": "b", "output": "c"}],
        "sft",
        f"x: the columns question, input, output: found prompt data (prompt), which ppo can use; sft needs {SFT_NEEDS}{RENAME}",
    ),
    (
        [{"prompt": "a"}],
        "sft",
        f"x: the columns prompt: found prompt data (prompt), which ppo can use; sft needs {SFT_NEEDS}{RENAME}",
    ),
    (
        [{"prompt": "a", "response": "b"}],
        "sft",
        f"x: the columns prompt, response: found prompt data (prompt), which ppo can use; sft needs {SFT_NEEDS}"
        "; in a recipe, beside the path, perhaps columns: {completion: response}",
    ),
    (
        [{"text": "a"}],
        "dpo",
        "x: the columns text: found text data (text), which sft can use; "
        "dpo needs prompt + chosen + rejected | chosen + rejected | prompt + response_a + response_b + winner"
        f" | prompt + responses | message_id + parent_id + role + text{RENAME}",
    ),
    (
        [{"messages": [], **PAIR}],
        "sft",
        "x: the columns messages, prompt, chosen, rejected can be read as messages or as preference"
        "; set format: to the one you mean",
    ),
]


@pytest.mark.parametrize(("rows", "stage", "message"), REFUSED)
def test_what_detection_refuses(rows, stage, message):
    with pytest.raises(UsageError) as error:
        detect(rows, purpose_of(stage), "x")
    assert str(error.value) == message


def test_detection_asks_what_the_stage_can_take():
    both = [{"messages": [], **PAIR}]
    assert detect(both, purpose_of("dpo"), "x").name == "preference"
    assert detect([{"prompt": "a", "prompt_id": "b", "messages": []}], purpose_of("sft"), "x").name == "messages"
    assert detect([{"text": "a", "prompt": "a", "completion": "b"}], purpose_of("sft"), "x").name == "prompt-completion"


def test_detection_goes_with_most_of_the_rows():
    assert detect([{"prompt": "a"}, PAIR, {"text": "a"}, PAIR], purpose_of("sft"), "x").name == "preference"
    assert detect([{"prompt": None, "chosen": GOOD_HH, "rejected": Q}], purpose_of("sft"), "x").name == "hh"
