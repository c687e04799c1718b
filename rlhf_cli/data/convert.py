"""What is made of a row of each format; every converter takes the row under our names and where it stands, and raises BadRow."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlhf_cli.data import records
from rlhf_cli.data.columns import Row
from rlhf_cli.data.conversations import (
    SPEAKERS,
    check_order,
    conversation,
    functions,
    is_talk,
    messages,
    parsed,
    transcript,
    up_to_learned,
    with_system,
)
from rlhf_cli.data.files import RawRow
from rlhf_cli.data.meaning import OWN_VARIABLES, LostMeaning
from rlhf_cli.data.records import Answer, BadRow, Facts, Message, Prompt, Record, a_list, a_text, as_turns, spoken

PROMPTED = ("prompt", "instruction", "messages", "conversations")
"""Columns that a prompt is read from: the first that a row has."""

BESIDE_PROMPTS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
"""What belongs to the prompt of a row in every format."""

GOOD_WORDS = ("up", "yes", "good", "like", "thumbs_up", "desirable", "👍")
BAD_WORDS = ("-1", "down", "no", "bad", "dislike", "thumbs_down", "undesirable", "👎")
LABELS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}
SIDES = {0: 0, 1: 1, "0": 0, "1": 1, "a": 0, "b": 1}
SIDE = re.compile(r"(?:(?:model|response|answer|assistant|output|completion)_?)?([ab])")


def field(row: Row, name: str) -> Any:
    """The row's value; BadRow if it has none."""
    if name not in row:
        raise BadRow(f"'{name}' is missing")
    return row[name]


def number(value: Any, name: str) -> float:
    """The value, if it is a finite number."""
    if type(value) not in (int, float):
        raise BadRow(f"{name} is {records.kind_of(value)}, expected a number")
    if not abs(value) <= sys.float_info.max:  # also integers that no float can hold
        raise BadRow(f"{name} is not finite")
    return float(value)


def _numbers(row: Row, name: str, count: int) -> list[float] | None:
    """One number a response; None if the row says nothing."""
    if row.get(name) is None:
        return None
    numbers = a_list(row[name], f"'{name}'")
    if len(numbers) != count:
        raise BadRow(f"'{name}' and 'responses' differ in number", f"{len(numbers)} and {count}")
    return [number(value, f"an entry of '{name}'") for value in numbers]


def prompt_of(row: Row) -> Prompt:
    column = next((name for name in PROMPTED if row.get(name) is not None), "prompt")
    if column == "instruction":
        return _instruction(row)
    value = field(row, column)
    if type(value) is not list and column == "prompt" and not is_talk(value):
        return a_text(value, "'prompt'")
    turns = messages(value, f"'{column}'")
    check_order(turns, f"'{column}'")
    if turns[-1].role not in ("user", "tool"):
        raise BadRow(f"'{column}' does not end in a user turn")
    return turns


def _instruction(row: Row) -> Prompt:
    """Alpaca's: the instruction, a blank line and the input, after the earlier exchanges."""
    parts = [row[name] for name in ("instruction", "input") if row.get(name) not in (None, "")]
    text = a_text("\n\n".join(a_text(part, "'instruction' or 'input'") for part in parts), "'instruction'")
    earlier: list[Message] = []
    for exchange in row.get("history") or ():
        if type(exchange) is not list or len(exchange) != 2:
            raise BadRow("an entry of 'history' is no [question, answer]")
        said = [a_text(part, "an entry of 'history'") for part in exchange]
        earlier += [Message("user", said[0]), Message("assistant", said[1])]
    return (*earlier, Message("user", text)) if earlier else text


def _response(prompt: Prompt, value: Any, name: str) -> tuple[Prompt, Answer]:
    """A response (text, the assistant's turn, or a whole conversation) and its prompt, to which turns before the last belong."""
    if type(value) is not list and type(value) is not dict and not is_talk(value):
        return prompt, a_text(value, name)
    turns, start = messages([value] if type(value) is dict else value, name), as_turns(prompt)
    if turns[0].role == "assistant":
        earlier, response = conversation((*start, *turns), name)
    else:
        earlier, response = conversation(turns, name)
        after = earlier[1:] if start[0].role != "system" and earlier[0].role == "system" else earlier
        if after[: len(start)] != start:
            raise BadRow(f"{name} does not begin with 'prompt'")
    if isinstance(response, Message) and not response.learned:
        raise BadRow(f"the last turn of {name} has weight 0")
    return (prompt if earlier == start else earlier), response


def _text(answer: Answer) -> str:
    """Equal for responses that say the same."""
    return spoken(answer).strip()


def pair(row: Row, chosen: tuple[Prompt, Answer], rejected: tuple[Prompt, Answer], where: str) -> Record:
    """Two responses, each with its prompt."""
    if as_turns(chosen[0]) != as_turns(rejected[0]):
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    if _text(chosen[1]) == _text(rejected[1]):
        raise BadRow("'chosen' and 'rejected' are the same")
    names = ("score_chosen", "score_rejected")
    scores = tuple(number(row[name], f"'{name}'") for name in names if row.get(name) is not None)
    if len(scores) == 1:
        raise BadRow("one of 'score_chosen' and 'score_rejected' is missing")
    if scores and scores[0] < scores[1]:
        raise BadRow("'score_chosen' is lower than 'score_rejected'")
    probability = number(row["probability"], "'probability'") if row.get("probability") is not None else None
    if probability is not None and not 0 <= probability <= 1:
        raise BadRow("'probability' is not between 0 and 1", "write 70 % as 0.7")
    return Record(chosen[0], (chosen[1], rejected[1]), where, Facts(scores=scores or None, probability=probability))


def from_messages(row: Row, where: str) -> Record:
    column = "conversations" if row.get("messages") is None and row.get("conversations") is not None else "messages"
    name = f"'{column}'"
    turns = up_to_learned(messages(field(row, column), name), name)
    if turns[-1].role in ("user", "tool"):
        check_order(turns, name)
        return Record(turns, (), where)
    prompt, response = conversation(turns, name)
    return Record(prompt, (response,), where)


def from_completion(row: Row, where: str) -> Record:
    prompt, response = _response(prompt_of(row), field(row, "completion"), "'completion'")
    return Record(prompt, (response,), where)


def from_alpaca(row: Row, where: str) -> Record:
    prompt, response = _response(_instruction(row), field(row, "output"), "'output'")
    return Record(prompt, (response,), where)


def from_text(row: Row, where: str) -> Record:
    return Record("", (a_text(field(row, "text"), "'text'"),), where)


def from_preference(row: Row, where: str) -> Record:
    values = [field(row, name) for name in ("chosen", "rejected")]
    if all(row.get(name) is None for name in PROMPTED) and all(type(value) is list for value in values):
        return from_whole_pair(row, where)
    prompt = prompt_of(row)
    return pair(row, _response(prompt, values[0], "'chosen'"), _response(prompt, values[1], "'rejected'"), where)


def from_repeating(row: Row, where: str, *, strip: bool) -> Record:
    """A pair whose responses repeat the prompt, which is cut off; `strip`: with the white space around it."""
    if not _repeats(row):
        raise BadRow("'chosen' or 'rejected' does not begin with 'prompt', as those of the first rows do")
    size = len(row["prompt"].strip())
    cut = {name: row[name].strip()[size:] for name in ("chosen", "rejected")}
    return from_preference({**row, **{name: text.strip() if strip else text for name, text in cut.items()}}, where)


def repeats(rows: Sequence[Row]) -> bool:
    """Do chosen and rejected begin with the prompt in all of the rows?"""
    return all(map(_repeats, rows))


def _repeats(row: Row) -> bool:
    if not all(type(row.get(name)) is str for name in ("prompt", "chosen", "rejected")):
        return False
    prompt = row["prompt"].strip()
    return bool(prompt) and all(
        row[name].strip().startswith(prompt) and not row[name].strip()[len(prompt) :][:1].isalnum()
        for name in ("chosen", "rejected")
    )


def from_whole_pair(row: Row, where: str) -> Record:
    """Two whole conversations: messages, or texts, whose shared words are the prompt."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if type(chosen) is list or type(rejected) is list:
        best = conversation(messages(chosen, "'chosen'"), "'chosen'")
        return pair(row, best, conversation(messages(rejected, "'rejected'"), "'rejected'"), where)
    if a_text(chosen, "'chosen'").strip() == a_text(rejected, "'rejected'").strip():
        raise BadRow("'chosen' and 'rejected' are the same")
    shared = chosen[: records.shared_length(chosen, rejected)]
    # The prompt ends where the last whole word does, so that the cut splits no word and hardly a token.
    prompt = shared.rstrip() if shared[-1:].isspace() else "".join(shared.rsplit(maxsplit=1)[:-1])
    if not prompt.strip():
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    first = a_text(chosen[len(prompt) :], "the response in 'chosen'")
    second = a_text(rejected[len(prompt) :], "the response in 'rejected'")
    return pair(row, (prompt, first), (prompt, second), where)


def from_hh(row: Row, where: str) -> Record:
    chosen = transcript(field(row, "chosen"), "'chosen'")
    return pair(row, chosen, transcript(field(row, "rejected"), "'rejected'"), where)


def from_choice(row: Row, where: str) -> Record:
    """Two responses, and a column that names the better one, or says how much better the second is."""
    values, names = [field(row, name) for name in ("response_a", "response_b")], ("'response_a'", "'response_b'")
    if any(row.get(name) is not None for name in PROMPTED):
        prompt = prompt_of(row)
        both = [_response(prompt, value, name) for value, name in zip(values, names, strict=True)]
    else:
        both = [conversation(messages(value, name), name) for value, name in zip(values, names, strict=True)]
    if row.get("strength") is not None:
        text = row["strength"]
        strength = number(float(text) if type(text) is str and text.strip("-+.0123456789") == "" else text, "'strength'")
        better, row = int(strength > 0), {**row, "probability": 1 / (1 + math.exp(-abs(strength)))}
    elif (side := _winner(row)) is None:
        better, row = 0, {**row, "probability": 0.5}
    else:
        better = side
    return pair(row, both[better], both[1 - better], where)


def _winner(row: Row) -> int | None:
    """The better of two: 0, 1 or None for a tie."""
    value = field(row, "winner")
    ids = [row.get(name) for name in ("id_a", "id_b")]
    if value is not None and value in ids and ids[0] != ids[1]:
        return ids.index(value)
    word = value.strip().lower() if type(value) is str else value
    if word in (2, "2"):
        raise LostMeaning("winner", "2 counts from 1; write a or b, or name the columns so that 0 or 1 is meant")
    if type(word) in (int, float, str) and word in SIDES:
        return SIDES[word]
    if type(word) is str:
        if word.startswith(("tie", "both")) or word in ("equal", "draw", "neither", "same"):
            return None
        if found := SIDE.fullmatch(word):
            return SIDES[found[1]]
    raise BadRow("'winner' is not 0 or 1, a or b, tie, or one of id_a and id_b", records.shortened(value))


def from_ranked(row: Row, where: str) -> Record:
    values = a_list(field(row, "responses"), "'responses'")
    if len(values) < 2:
        raise BadRow("'responses' has one response, a ranking needs two")
    return _ranking(row, values, where)


def _ranking(row: Row, values: Sequence[Any], where: str) -> Record:
    prompt = prompt_of(row)
    found = [_response(prompt, value, "a response") for value in values]
    if any(as_turns(other) != as_turns(found[0][0]) for other, _ in found):
        raise BadRow("the prompts of the responses differ")
    responses = [response for _, response in found]
    if len(responses) > 1 and len({_text(response) for response in responses}) == 1:
        raise BadRow("all 'responses' are the same")
    ranks, scores = (_numbers(row, name, len(values)) for name in ("ranks", "scores"))
    keys = ranks or [-score for score in scores or ()]
    order = sorted(range(len(values)), key=keys.__getitem__ if keys else None)  # ties stay in the order of the row
    if ranks and scores and any(scores[a] < scores[b] for a, b in pairwise(order)):
        raise BadRow("'ranks' and 'scores' contradict each other")
    ordered = tuple(responses[i] for i in order)
    facts = Facts(tuple(keys[i] for i in order) if keys else None, tuple(scores[i] for i in order) if scores else None)
    texts = [_text(response) for response in ordered]
    if len(set(zip(texts, facts.ranks or range(len(texts)), strict=True))) > len(set(texts)):
        raise BadRow("the same response has two ranks" if keys else "two 'responses' are the same")
    return Record(found[0][0], ordered, where, facts)


def from_scored(row: Row, where: str) -> Record:
    """A list of {text, score} or {text, rank}."""
    items = a_list(field(row, "responses"), "'responses'")
    if not all(type(item) is dict for item in items):
        raise BadRow("an entry of 'responses' is no object with text, and score or rank")
    key = next((name for name in ("score", "rank") if all(item.get(name) is not None for item in items)), None)
    if key is None:
        raise BadRow("not every entry of 'responses' has a score, or a rank")
    return _ranking({**row, f"{key}s": [item[key] for item in items]}, [item.get("text") for item in items], where)


def joined_by_prompt(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """Rows of {prompt, response, score} → one row a prompt, where the first of them stood; other rows as they are."""
    together: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, row in rows:
        if isinstance(row, BadRow) or "responses" in row or "prompt" not in row:
            yield line, row
            continue
        prompt = json.dumps([row["prompt"], *(row.get(name) for name in BESIDE_PROMPTS)])
        own = together.setdefault(prompt, (line, {**row, "responses": []}))[1]
        own["responses"].append({"text": row.get("response"), "score": row.get("score"), "rank": row.get("rank")})
    yield from together.values()


def answered(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """Messages that name their parents → a row for each that the assistant answered: the turns up to it, and the answers."""
    nodes: dict[Any, tuple[int, Mapping[str, Any]]] = {}
    answers: defaultdict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for line, row in rows:
        if isinstance(row, BadRow):
            yield line, row
        elif type(row.get("message_id")) is not str or type(row.get("role")) is not str or SPEAKERS.get(row["role"]) is None:
            yield line, BadRow("a message has no message_id, or a role that is not prompter or assistant")
        else:
            nodes[row["message_id"]] = line, row
            if SPEAKERS[row["role"]] == "assistant":
                answers[row.get("parent_id")].append(row)
    for identity, replies in answers.items():
        turns: list[Mapping[str, Any]] = []
        at, seen = identity, set()
        while at in nodes and at not in seen:
            seen.add(at)
            turns.insert(0, nodes[at][1])
            at = turns[0].get("parent_id")
        line = nodes[replies[0]["message_id"]][0]
        if at is not None or not turns:
            yield line, BadRow("the parent of a message is not among the rows")
            continue
        ranks = [reply.get("rank") for reply in replies]
        ranks = ranks if None not in ranks else [0] * len(ranks)  # nobody compared them
        items = [{"text": reply.get("text"), "rank": rank} for reply, rank in zip(replies, ranks, strict=True)]
        # Of the turns before an answer, those of the assistant may be ones that people ranked low.
        spoken_before = [{"role": turn["role"], "content": turn.get("text"), "weight": 0} for turn in turns]
        beside = {name: replies[0][name] for name in (*BESIDE_PROMPTS, "subset") if name in replies[0]}
        beside |= {"*": turns[-1]["*"]} if "*" in turns[-1] else {}  # what rewards read is the prompt's
        yield line, {**beside, "prompt": spoken_before, "responses": items}


def from_unpaired(row: Row, where: str) -> Record:
    value = field(row, "label")
    word = value.strip().lower() if type(value) is str else value
    if type(word) not in (bool, int, float, str) or word not in LABELS:
        raise BadRow("'label' is neither true nor false, 1 nor 0", _as_label(value))
    read = next((c for name, c in _ANSWERED.items() if row.get(name) is not None), from_completion)
    record = read(row, where)
    if not record.responses:
        raise BadRow("the conversation does not end in an assistant turn")
    return record._replace(facts=Facts(label=LABELS[word]))


_ANSWERED = {
    "completion": from_completion,
    "messages": from_messages,
    "conversations": from_messages,
    "output": from_alpaca,
}


def _as_label(value: Any) -> str:
    """What to write for a label of another kind."""
    word = str(value).strip().lower()
    meant = "write true for " if word in GOOD_WORDS else "write false for " if word in BAD_WORDS else ""
    return f"{meant}{records.shortened(value)}"


def from_prompt(row: Row, where: str) -> Record:
    return Record(prompt_of(row), (), where)


def surrounded(record: Record, row: Row) -> Record:
    """The record with the row's system text, its functions, and its options for the chat template."""
    system, *others = [row[name] for name in ("system", "system_prompt") if row.get(name)] or [None]
    if others and others != [system]:
        raise BadRow("'system' and 'system_prompt' differ")
    if isinstance(system, list):
        system = "".join(part["text"] for part in system if isinstance(part, dict) and type(part.get("text")) is str)
    if system is not None and a_text(system, "'system'"):
        record = record._replace(prompt=with_system(as_turns(record.prompt), system))
    tools = next((row[name] for name in ("tools", "functions") if row.get(name) not in (None, "", [], {}, "[]")), None)
    options = row.get("chat_template_kwargs") or {}
    options = parsed(options, "'chat_template_kwargs'") if type(options) is str else options
    if type(options) is not dict or any(name in OWN_VARIABLES for name in options):
        raise BadRow("'chat_template_kwargs' is no object of a chat template's options", records.shortened(options))
    given = ({"tools": functions(tools)} if tools is not None else {}) | options
    return record._replace(given=a_text(json.dumps(given, ensure_ascii=False), "'tools'")) if given else record
