"""Rows as public data have them: what each is read as and what of it is learned, and a fault of each, which is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.dataset import Dataset, prepare
from rlhf_cli.data.sources import read_data
from rlhf_cli.data.templates import choose_template
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Data, SftData, Source
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.data.uses import request_of

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] %}{{ '<call>' + c['function']['name'] + ' ' + (c.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that knows reasoning, tools and calls."""

CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"fruit": "plum"}}}
WEIGH = {"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}
WRITTEN_CALL = '<call>weigh {"fruit": "plum"}</call>'
ASK, SAY = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Plum."}
ASKED = [{"from": "human", "value": "Which?"}]
TREE = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Which?", "rank": None},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Mud.", "rank": 1},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "Plum.", "rank": 0},
]

Shape = tuple[str, str, list[dict[str, Any]], str, list[str]]
READ: dict[str, Shape] = {
    # name: (stage, format, rows, prompt as the reader sees it: "role: text" lines, responses as they are learned)
    "tools and a call": (
        "sft",
        "messages",
        [{"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [WEIGH]}],
        f"system: {json.dumps([WEIGH])}|user: Which?",
        [WRITTEN_CALL],
    ),
    "a call without content, its arguments called parameters": (
        "sft",
        "messages",
        [{"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "weigh", "parameters": {"fruit": "plum"}}]}]}],
        "user: Which?",
        [WRITTEN_CALL],
    ),
    "arguments and tools as JSON text": (
        "sft",
        "messages",
        [
            {
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "content": "I look.",
                        "tool_calls": [{"id": "c1", "function": {"name": "weigh", "arguments": '{"fruit": "plum"}'}}],
                    },
                ],
                "tools": json.dumps([WEIGH["function"]]),
            }
        ],
        f"system: {json.dumps([{'type': 'function', 'function': WEIGH['function']}])}|user: Which?",
        ["I look." + WRITTEN_CALL],
    ),
    "what a tool returned is not learned": (
        "sft",
        "messages",
        [
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    ASK,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "name": "weigh", "tool_call_id": "c1", "content": "12"},
                    SAY,
                ]
            }
        ],
        f"system: Be brief.|user: Which?|assistant: [{WRITTEN_CALL}]|tool: 12",
        ["Plum."],
    ),
    "reasoning": (
        "sft",
        "messages",
        [{"messages": [ASK, {**SAY, "reasoning_content": "It is blue."}]}],
        "user: Which?",
        ["<think>It is blue.</think>Plum."],
    ),
    "weights": (
        "sft",
        "messages",
        [{"messages": [ASK, {"role": "assistant", "content": "Mud.", "weight": 0}, {"role": "user", "content": "No."}, SAY]}],
        "user: Which?|assistant: Mud.|user: No.",
        ["Plum."],
    ),
    "nothing is learned after the last weight": (
        "sft",
        "messages",
        [{"messages": [ASK, SAY, {"role": "user", "content": "No."}, {"role": "assistant", "content": "Mud.", "train": False}]}],
        "user: Which?",
        ["Plum."],
    ),
    "JSON text in pairs": (
        "dpo",
        "preference",
        [{"prompt": json.dumps([ASK]), "chosen": json.dumps([SAY]), "rejected": "Mud."}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "a question and a pair": (
        "dpo",
        "preference",
        [{"system": "Be brief.", "question": "Which?", "chosen": "Plum.", "rejected": "Mud."}],
        "system: Be brief.|user: Which?",
        ["Plum.", "Mud."],
    ),
    "JSON text": ("sft", "messages", [{"messages": json.dumps([ASK, SAY])}], "user: Which?", ["Plum."]),
    "parts": (
        "sft",
        "messages",
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}, SAY], "system": "Be brief."}],
        "system: Be brief.|user: Which?",
        ["Plum."],
    ),
    "blocks of a call": (
        "sft",
        "messages",
        [
            {
                "system": [{"type": "text", "text": "Be brief."}],
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "Hm."},
                            {"type": "tool_use", "id": "c", "name": "weigh", "input": {"fruit": "plum"}},
                        ],
                    },
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "12"}]},
                    SAY,
                ],
            }
        ],
        f"system: Be brief.|user: Which?|assistant: [<think>Hm.</think>{WRITTEN_CALL}]|tool: 12",
        ["Plum."],
    ),
    "an empty system turn": (
        "sft",
        "messages",
        [{"messages": [{"role": "system", "content": ""}, ASK, SAY]}],
        "system: |user: Which?",
        ["Plum."],
    ),
    "the assistant first": (
        "sft",
        "messages",
        [{"messages": [{"role": "assistant", "content": "Hello."}, ASK, SAY]}],
        "assistant: Hello.|user: Which?",
        ["Plum."],
    ),
    "preference of OpenAI": (
        "dpo",
        "preference",
        [
            {
                "input": {"messages": [ASK], "tools": [WEIGH], "parallel_tool_calls": True},
                "preferred_output": [SAY],
                "non_preferred_output": [{"role": "assistant", "content": "Mud."}],
            }
        ],
        f"system: {json.dumps([WEIGH])}|user: Which?",
        ["Plum.", "Mud."],
    ),
    "a system turn in the responses alone": (
        "dpo",
        "preference",
        [
            {
                "prompt": "Which?",
                **{
                    k: [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": t}]
                    for k, t in (("chosen", "Plum."), ("rejected", "Mud."))
                },
            }
        ],
        "system: Be brief.|user: Which?",
        ["Plum.", "Mud."],
    ),
    "from and value": (
        "sft",
        "sharegpt",
        [
            {
                "system": "Be brief.",
                "conversations": [
                    *ASKED,
                    {"from": "function_call", "value": '{"name": "weigh", "arguments": {"fruit": "plum"}}'},
                    {"from": "observation", "value": "12"},
                    {"from": "gpt", "value": "Plum."},
                ],
            }
        ],
        f"system: Be brief.|user: Which?|assistant: [{WRITTEN_CALL}]|tool: 12",
        ["Plum."],
    ),
    "from and value in pairs": (
        "dpo",
        "preference",
        [{"conversations": ASKED, "chosen": {"from": "gpt", "value": "Plum."}, "rejected": {"from": "gpt", "value": "Mud."}}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "a conversation with a label": (
        "kto",
        "unpaired",
        [{"conversations": [*ASKED, {"from": "gpt", "value": "Plum."}], "kto_tag": True}],
        "user: Which?",
        ["Plum."],
    ),
    "labels 0 and 1": ("kto", "unpaired", [{"prompt": "Which?", "completion": "Plum.", "label": 1}], "user: Which?", ["Plum."]),
    "alpaca": (
        "sft",
        "alpaca",
        [
            {
                "instruction": "Pick.",
                "input": "Plum or mud",
                "output": "Plum.",
                "system": "Be brief.",
                "history": [["Hi", "Hello."]],
                "text": "as one text",
            }
        ],
        "system: Be brief.|user: Hi|assistant: [Hello.]|user: Pick.\n\nPlum or mud",
        ["Plum."],
    ),
    "alpaca in pairs": (
        "dpo",
        "preference",
        [{"instruction": "Pick.", "input": "", "chosen": "Plum.", "rejected": "Mud."}],
        "user: Pick.",
        ["Plum.", "Mud."],
    ),
    "dolly": (
        "sft",
        "alpaca",
        [{"instruction": "What?", "context": "Here is plum.", "response": "Plum.", "category": "closed_qa"}],
        "user: What?\n\nHere is plum.",
        ["Plum."],
    ),
    "query and response": (
        "sft",
        "alpaca",
        [{"system": "Be brief.", "query": "Which?", "response": "Plum.", "history": []}],
        "system: Be brief.|user: Which?",
        ["Plum."],
    ),
    "a transcript as prompt, repeated": (
        "dpo",
        "preference",
        [
            {
                "prompt": "Human: Which?\n\nAssistant:",
                "chosen": "Human: Which?\n\nAssistant: Plum.",
                "rejected": "Human: Which?\n\nAssistant: Mud.",
            }
        ],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "better_response_id": (
        "dpo",
        "choice",
        [{"prompt": "Which?", "response_0": "Mud.", "response_1": "Plum.", "better_response_id": 1}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "labels where 1 is A": (
        "dpo",
        "choice",
        [{"history": "Which?", "human_ref_A": "Plum.", "human_ref_B": "Mud.", "labels": 1, "score_ratio": 3.0}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "summaries": (
        "dpo",
        "choice",
        [{"info": {"post": "Which?", "id": "x"}, "summaries": [{"text": "Mud."}, {"text": "Plum."}], "choice": 1}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "an arena": (
        "train-rm",
        "choice",
        [
            {
                "model_a": "x",
                "model_b": "y",
                "winner": "model_b",
                "conversation_a": [ASK, {"role": "assistant", "content": "Mud."}],
                "conversation_b": [ASK, SAY],
            }
        ],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "strength": (
        "train-rm",
        "choice",
        [{"prompt": "Which?", "response_1": "Plum.", "response_2": "Mud.", "preference_strength": -2}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "response j before response k": (
        "dpo",
        "preference",
        [{"qid": 1, "question": "Which?", "response_j": "Plum.", "response_k": "Mud."}],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "completions with scores": (
        "train-rm",
        "scored",
        [
            {
                "instruction": "Which?",
                "completions": [{"response": "Mud.", "overall_score": 2.0}, {"response": "Plum.", "overall_score": 8.0}],
                "models": ["a"],
            }
        ],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "answers with ranks": (
        "train-rm",
        "scored",
        [
            {
                "prompt": "Human: Which?\n\nAssistant: ",
                "answers": [{"answer": "Mud.", "rank": 2.0}, {"answer": "Plum.", "rank": 1.0}],
            }
        ],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "two answers with scores": (
        "train-rm",
        "ranked",
        [
            {
                "question": {"full_text": "Which?", "id": "q"},
                "answer_0": "Mud.",
                "answer_1": "Plum.",
                "score_0": -1.0,
                "score_1": 1.0,
            }
        ],
        "user: Which?",
        ["Plum.", "Mud."],
    ),
    "a tree": ("dpo", "tree", TREE, "user: Which?", ["Plum.", "Mud."]),
    "a question with an answer": ("ppo", "prompt", [{"question": "2+2?", "answer": "4"}], "user: 2+2?", []),
    "a prompt with the truth": (
        "ppo",
        "prompt",
        [{"prompt": [ASK], "reward_model": {"ground_truth": "4", "style": "rule"}, "data_source": "x"}],
        "user: Which?",
        [],
    ),
    "messages that wait for an answer": ("ppo", "messages", [{"messages": [ASK]}], "user: Which?", []),
}


def dataset(stage: str, rows: list[dict[str, Any]], **source: Any) -> Dataset:
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = SftData if stage == "sft" else Data
    tokenizer = tiny_tokenizer(template=TOOLS)
    return prepare(kind([Source("x.jsonl", **source)]), request_of(stage), tokenizer, choose_template(tokenizer, None))


def as_read(tree: Any, tokenizer: Any) -> tuple[str, list[str]]:
    """The prompt as "role: text|…", what is supervised of it in brackets, and the responses without their ends."""
    text = ""
    for i, (token, learned) in enumerate(zip(tree.prompt, tree.supervised, strict=True)):
        text += "⟦" * (bool(learned) and not tree.supervised[i - 1]) + tokenizer.decode([token])
        text += "⟧" * (bool(learned) and (i + 1 == len(tree.prompt) or not tree.supervised[i + 1]))
    turns = text.removesuffix("<|im_start|>assistant\n").replace("<|im_end|>⟧", "⟧<|im_end|>").split("<|im_end|>\n")[:-1]
    shown = "|".join(turn.removeprefix("<|im_start|>").replace("\n", ": ", 1) for turn in turns)
    return shown.replace("⟦", "[").replace("⟧", "]"), [tokenizer.decode(r).removesuffix("<|im_end|>") for r in tree.responses]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", READ)
def test_a_public_shape_is_read_as_it_is(name: str) -> None:
    stage, format, rows, prompt, responses = READ[name]
    read = dataset(stage, rows)
    assert [report.format for report in read.reading.reports] == [format]
    assert [as_read(tree, tiny_tokenizer()) for tree in read.train.trees] == [(prompt, responses)]


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a call without a name": (
        "sft",
        {"messages": [ASK, {**SAY, "tool_calls": [{"function": {}}]}]},
        "a call in a turn of 'messages' names no function (turn 2)",
    ),
    "arguments that are no JSON": (
        "sft",
        {"messages": [ASK, {**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "the arguments of a call in a turn of 'messages' is text that is not JSON ('{')",
    ),
    "a tool without a name": (
        "sft",
        {"messages": [ASK, SAY], "tools": [{"type": "function"}]},
        "an entry of 'tools' names no function ({'type': 'function'})",
    ),
    "a picture": (
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAY]},
        "a turn of 'messages' has a part of type image_url, and only text is read (turn 1)",
    ),
    "sound": (
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, SAY]},
        "a turn of 'messages' has a part of type input_audio, and only text is read (turn 1)",
    ),
    "no weight is above 0": ("sft", {"messages": [ASK, {**SAY, "weight": 0}]}, "every assistant turn of 'messages' has weight 0"),
    "two system texts": (
        "sft",
        {"messages": [{"role": "system", "content": "a"}, ASK, SAY], "system": "b"},
        "the row has a system turn and another text in the column 'system'",
    ),
    "no answer": ("sft", {"messages": [ASK]}, "messages does not end in an assistant turn"),
    "a tool speaks first": (
        "sft",
        {"messages": [{"role": "tool", "content": "12"}, SAY]},
        "wrong role order in 'messages' (turn 1 is tool, expected user or assistant)",
    ),
    "an option that is none": (
        "sft",
        {"messages": [ASK, SAY], "chat_template_kwargs": {"chat_template": "x"}},
        "'chat_template_kwargs' is no object of a chat template's options ({'chat_template': 'x'})",
    ),
    "from nobody": (
        "sft",
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "a role of 'conversations' is not system, user, assistant or tool (turn 1: 'narrator')",
    ),
    "an empty instruction": ("sft", {"instruction": "", "input": "", "output": "x"}, "'instruction' is empty"),
    "half an exchange": (
        "sft",
        {"instruction": "x", "output": "x", "history": [["q"]]},
        "an entry of 'history' is no [question, answer]",
    ),
    "a call with nothing that is known": (
        "sft",
        {"messages": [ASK, {**SAY, "tool_calls": [{"name": "f", "args": {"x": 1}}]}]},
        "a call in a turn of 'messages' has no arguments (turn 2: it has args)",
    ),
    "the place of a picture": (
        "sft",
        {"messages": [{"role": "user", "content": "<image> Which?"}, SAY]},
        "the place of a picture (<image>) in the text, and only text is read",
    ),
    "no winner": (
        "dpo",
        {"prompt": "Which?", "response_0": "a", "response_1": "b", "better_response_id": 3},
        "'winner' is not 0 or 1, a or b, tie, or one of id_a and id_b (3)",
    ),
    "strength in words": (
        "train-rm",
        {"prompt": "Which?", "response_1": "a", "response_2": "b", "preference_strength": "much"},
        "'strength' is text, expected a number",
    ),
    "a score is missing": (
        "train-rm",
        {"instruction": "Which?", "completions": [{"response": "a", "overall_score": 1}, {"response": "b"}]},
        "not every entry of 'responses' has a score, or a rank",
    ),
    "a label of a class": (
        "kto",
        {"prompt": "Which?", "completion": "a", "label": True, "subset": 3},
        "'subset' is a number, expected text",
    ),
    "a lost parent": (
        "dpo",
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "x"},
        "the parent of a message is not among the rows",
    ),
    "a pair that does not repeat": (
        "dpo",
        {"input": {"messages": []}, "preferred_output": [SAY], "non_preferred_output": [SAY]},
        "'prompt' is empty",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_public_shape_is_named(name: str) -> None:
    stage, row, message = FAULTS[name]
    with pytest.raises(UsageError) as error:
        dataset(stage, [row])
    assert str(error.value).endswith(f"x.jsonl:1: {message}")


def test_ties_are_pairs_of_even_odds() -> None:
    row = {"prompt": "Which?", "response_a": "Plum.", "response_b": "Mud."}
    rows = [{**row, "winner": word} for word in ("tie", "tie (bothbad)", "A", "response_b")]
    read = dataset("train-rm", rows)
    assert [facts.probability for facts in read.train.trees.facts] == [0.5, 0.5, None, None]
    assert [as_read(tree, tiny_tokenizer())[1][0] for tree in read.train.trees] == ["Plum.", "Plum.", "Plum.", "Mud."]


def test_strength_is_a_probability() -> None:
    row = {"prompt": "Which?", "response_1": "Plum.", "response_2": "Mud."}
    read = dataset("train-rm", [{**row, "preference_strength": strength} for strength in (-3, 0, 1)])
    odds = [facts.probability for facts in read.train.trees.facts]
    assert odds == pytest.approx([0.952574, 0.5, 0.731059], abs=1e-6)  # 1/(1 + e^-3), 1/2, 1/(1 + 1/e)
    assert [as_read(tree, tiny_tokenizer())[1][0] for tree in read.train.trees] == ["Plum.", "Plum.", "Mud."]


def test_rows_of_one_prompt_become_a_ranking() -> None:
    rows = [
        {"prompt": "Which?", "response": "Mud.", "helpfulness": 1},
        {"prompt": "What?", "response": "Mud.", "helpfulness": 1},
        {"prompt": "Which?", "response": "Plum.", "helpfulness": 4},
    ]
    read = dataset("train-rm", rows, format="scored", columns={"score": "helpfulness"})
    (tree,) = read.train.trees
    assert as_read(tree, tiny_tokenizer()) == ("user: Which?", ["Plum.", "Mud."])
    assert tree.facts.scores == (4.0, 1.0)
    assert read.reading.reports[0].unused == {"one response to its prompt": 1}


def test_a_joined_column() -> None:
    rows = [
        {"instruction": "Pick.", "input": "Plum or mud", "answer": "Plum."},
        {"instruction": "Say.", "input": "", "answer": "Mud."},
    ]
    read = dataset("sft", rows, columns={"prompt": "{instruction}\n\n{input}", "completion": "answer"})
    shown = [as_read(tree, tiny_tokenizer())[0] for tree in read.train.trees]
    assert shown == ["user: Pick.\n\nPlum or mud", "user: Say."]
    with pytest.raises(UsageError, match="the data has no column 'inptu'; found instruction, input, answer"):
        dataset("sft", rows, columns={"prompt": "{instruction}\n\n{inptu}", "completion": "answer"})


def test_undesirable_conversations_are_not_fine_tuned() -> None:
    rows = [{"messages": [ASK, SAY], "label": good} for good in (True, False)]
    assert dataset("sft", rows).reading.reports[0].unused == {"undesirable (not for sft)": 1}


def test_what_the_recipe_names_wins_over_what_public_data_call_it() -> None:
    completions = [{"response": r, "overall_score": a, "honesty": b} for r, a, b in (("Plum.", 1, 9), ("Mud.", 8, 2))]
    scored = dataset("train-rm", [{"instruction": "Which?", "completions": completions}], columns={"score": "honesty"})
    assert as_read(scored.train.trees[0], tiny_tokenizer())[1] == ["Plum.", "Mud."]
    judged = {"prompt": "Which?", "response_0": "Mud.", "response_1": "Plum.", "safer_response_id": 1}
    safe = dataset("dpo", [judged], columns={"winner": "safer_response_id"})
    assert as_read(safe.train.trees[0], tiny_tokenizer())[1] == ["Plum.", "Mud."]
    with pytest.raises(UsageError, match="'better_response_id' is not read"):
        dataset("dpo", [judged | {"better_response_id": 0}], columns={"winner": "safer_response_id"})
    titled = {"title": "Fruit", "question": "Which?", "response_j": "Plum.", "response_k": "Mud."}
    joined = dataset("dpo", [titled], columns={"prompt": "{title}\n\n{question}"})
    assert as_read(joined.train.trees[0], tiny_tokenizer())[0] == "user: Fruit\n\nWhich?"


def test_a_winner_that_counts_from_one_is_refused() -> None:
    row = {"prompt": "Which?", "response_1": "Plum.", "response_2": "Mud.", "preferred": 1}
    columns = {"response_a": "response_1", "response_b": "response_2", "winner": "preferred"}
    with pytest.raises(UsageError, match="2 counts from 1; write a or b"):
        dataset("dpo", [row, row | {"preferred": 2}], columns=columns)


def test_calls_in_earlier_turns_need_a_place_too() -> None:
    rows = READ["what a tool returned is not learned"][2]
    Path("x.jsonl").write_text(json.dumps(rows[0]))
    tokenizer = tiny_tokenizer(template=CHATML)
    with pytest.raises(UsageError, match=r"the chat template has no place for calls of functions \(1\)"):
        prepare(SftData([Source("x.jsonl")]), request_of("sft"), tokenizer, choose_template(tokenizer, None))


def test_an_answer_below_another_is_context_in_a_tree() -> None:
    more = [
        {"message_id": "4", "parent_id": "2", "role": "prompter", "text": "No.", "system": "Be brief."},
        {"message_id": "5", "parent_id": "4", "role": "assistant", "text": "Plum."},
    ]
    trees = dataset("sft", TREE + more).train.trees
    assert [as_read(tree, tiny_tokenizer()) for tree in trees] == [
        ("user: Which?", ["Plum."]),
        ("user: Which?|assistant: Mud.|user: No.", ["Plum."]),  # "Mud." is in no brackets: not learned
    ]


def test_rewards_read_the_columns_of_a_trees_prompt() -> None:
    rows = [row | {"answer": row["text"].upper()} for row in TREE]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_data(Data([Source("x.jsonl")]), request_of("ppo", columns={"answer": "it"}))
    assert [json.loads(record.columns) for record in reading.train] == [{"answer": "WHICH?"}]


def test_a_source_that_lacks_what_a_reward_reads_is_named() -> None:
    for name, own in (("x.jsonl", {"answer": "4"}), ("y.jsonl", {})):
        Path(name).write_text(json.dumps({"prompt": "2+2?"} | own) + "\n")
    asked = request_of("ppo", columns={"answer": "it", "level": None})
    reading = read_data(Data([Source("x.jsonl"), Source("y.jsonl")]), asked)
    assert [report.notices for report in reading.reports] == [
        (),
        ("y.jsonl: no row has the column 'answer', which a term of the reward reads: elsewhere it is given null",),
    ]


def test_conversations_beside_messages_are_not_read() -> None:
    read = dataset("sft", [{"messages": [ASK, SAY], "conversations": [*ASKED, {"from": "gpt", "value": "Mud."}]}])
    assert as_read(read.train.trees[0], tiny_tokenizer())[1] == ["Plum."]
    assert read.reading.reports[0].left_out == ("conversations",)


def test_repeated_prompts_are_cut_at_words_and_said() -> None:
    rows = [{"prompt": "P", "chosen": "Plum.", "rejected": "Pear."}]
    assert as_read(dataset("dpo", rows).train.trees[0], tiny_tokenizer())[1] == ["Plum.", "Pear."]
    rows = [{"prompt": "Which?", "chosen": "Which? Plum.", "rejected": "Which? Mud."}]
    read = dataset("dpo", rows)
    assert as_read(read.train.trees[0], tiny_tokenizer())[1] == ["Plum.", "Mud."]
    assert "x.jsonl: the responses repeat the prompt, which is cut off them" in read.train.notices
