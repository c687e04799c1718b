"""A row of each format → a Record, and which format a row has."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlhf_cli.data.dialogue import (
    BadRow,
    Prompt,
    a_list,
    a_text,
    as_turns,
    check_order,
    conversation,
    kind_of,
    messages,
    shortened,
    transcript,
)
from rlhf_cli.data.records import Facts, Record
from rlhf_cli.errors import UsageError

Row = Mapping[str, Any]
Converter = Callable[[Row, str], Record]


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"'{name}' is missing")
    return row[name]


def _numbers(value: Any, name: str, count: int) -> list[float]:
    numbers = a_list(value, name)
    if len(numbers) != count:
        raise BadRow(f"{name} and 'responses' differ in number", f"{len(numbers)} and {count}")
    return [_number(number, f"an entry of {name}") for number in numbers]


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise BadRow(f"{name} is {kind_of(value)}, expected a number")
    if not abs(value) <= sys.float_info.max:  # also integers that no float can hold
        raise BadRow(f"{name} is not finite")
    return float(value)


def _prompt(row: Row) -> Prompt:
    value = _field(row, "prompt")
    if type(value) is not list:
        return a_text(value, "'prompt'")
    turns = messages(value, "'prompt'")
    check_order(turns, "'prompt'")
    if turns[-1].role != "user":
        raise BadRow("'prompt' does not end in a user turn")
    return turns


def _response(prompt: Prompt, value: Any, name: str) -> tuple[Prompt, str]:
    """A response to the prompt: text, the assistant's turn, or a whole conversation that begins with the prompt.

    The prompt is returned with it, because turns of `value` before the last belong to it.
    """
    if type(value) is not list:
        return prompt, a_text(value, name)
    turns, start = messages(value, name), as_turns(prompt)
    if turns[0].role == "assistant":
        earlier, response = conversation((*start, *turns), name)
    else:
        earlier, response = conversation(turns, name)
        if earlier[: len(start)] != start:
            raise BadRow(f"{name} does not begin with 'prompt'")
    return (prompt if earlier == start else earlier), response


def _pair(row: Row, prompts: tuple[Prompt, Prompt], responses: tuple[str, str], where: str) -> Record:
    if as_turns(prompts[0]) != as_turns(prompts[1]):
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    if responses[0].strip() == responses[1].strip():
        raise BadRow("'chosen' and 'rejected' are the same")
    return Record(prompts[0], responses, where, _pair_facts(row))


def _pair_facts(row: Row) -> Facts:
    names = ("score_chosen", "score_rejected")
    scores = [_number(row[name], f"'{name}'") for name in names if row.get(name) is not None]
    if len(scores) == 1:
        raise BadRow("one of 'score_chosen' and 'score_rejected' is missing")
    if scores and scores[0] < scores[1]:
        raise BadRow("'score_chosen' is lower than 'score_rejected'")
    probability = _number(row["probability"], "'probability'") if row.get("probability") is not None else None
    if probability is not None and not 0.5 <= probability <= 1:
        raise BadRow("'probability' is not between 0.5 and 1", "that of the chosen response; where it is lower, swap the two")
    return Facts(scores=tuple(scores) or None, probability=probability)


def _from_messages(row: Row, where: str) -> Record:
    prompt, response = conversation(messages(_field(row, "messages"), "'messages'"), "'messages'")
    return Record(prompt, (response,), where)


def _from_completion(row: Row, where: str) -> Record:
    prompt, response = _response(_prompt(row), _field(row, "completion"), "'completion'")
    return Record(prompt, (response,), where)


def _from_text(row: Row, where: str) -> Record:
    return Record("", (a_text(_field(row, "text"), "'text'"),), where)


def _from_preference(row: Row, where: str) -> Record:
    values = [_field(row, name) for name in ("chosen", "rejected")]
    if "prompt" not in row and all(type(value) is list for value in values):
        return _from_whole_pair(row, where)
    prompt = _prompt(row)
    first, chosen = _response(prompt, values[0], "'chosen'")
    second, rejected = _response(prompt, values[1], "'rejected'")
    return _pair(row, (first, second), (chosen, rejected), where)


def _from_whole_pair(row: Row, where: str) -> Record:
    """Two whole conversations: messages, or texts, whose shared words are the prompt."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if type(chosen) is list or type(rejected) is list:
        first, best = conversation(messages(chosen, "'chosen'"), "'chosen'")
        second, worst = conversation(messages(rejected, "'rejected'"), "'rejected'")
        return _pair(row, (first, second), (best, worst), where)
    return _split_texts(row, a_text(chosen, "'chosen'"), a_text(rejected, "'rejected'"), where)


def _split_texts(row: Row, chosen: str, rejected: str, where: str) -> Record:
    if chosen.strip() == rejected.strip():
        raise BadRow("'chosen' and 'rejected' are the same")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    cut = _last_boundary(chosen[:shared])
    if not chosen[:cut].strip():
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    responses = a_text(chosen[cut:], "the response in 'chosen'"), a_text(rejected[cut:], "the response in 'rejected'")
    return _pair(row, (chosen[:cut], chosen[:cut]), responses, where)


def _last_boundary(text: str) -> int:
    """Where the last whole word ends, so that a cut there splits no word and hardly a token."""
    whole = text.rstrip()
    if whole != text:
        return len(whole)
    words = text.rsplit(maxsplit=1)
    return len(words[0]) if len(words) == 2 else 0


def _from_hh(row: Row, where: str) -> Record:
    first, chosen = transcript(_field(row, "chosen"), "'chosen'")
    second, rejected = transcript(_field(row, "rejected"), "'rejected'")
    return _pair(row, (first, second), (chosen, rejected), where)


def _from_ranked(row: Row, where: str) -> Record:
    prompt, values = _prompt(row), a_list(_field(row, "responses"), "'responses'")
    if len(values) < 2:
        raise BadRow("'responses' has one response, a ranking needs two")
    found = [_response(prompt, value, "a response") for value in values]
    if any(as_turns(other) != as_turns(found[0][0]) for other, _ in found):
        raise BadRow("the prompts of the responses differ")
    responses = [response for _, response in found]
    if len({response.strip() for response in responses}) == 1:
        raise BadRow("all 'responses' are the same")
    ranks = _numbers(row["ranks"], "'ranks'", len(values)) if row.get("ranks") is not None else None
    scores = _numbers(row["scores"], "'scores'", len(values)) if row.get("scores") is not None else None
    order = _best_first(len(values), ranks, scores)
    ordered = tuple(responses[i] for i in order)
    facts = Facts(
        ranks=tuple(ranks[i] for i in order) if ranks else tuple(-scores[i] for i in order) if scores else None,
        scores=tuple(scores[i] for i in order) if scores else None,
    )
    texts = [response.strip() for response in ordered]
    if len(set(zip(texts, facts.ranks or range(len(texts)), strict=True))) > len(set(texts)):
        raise BadRow("the same response has two ranks")
    return Record(found[0][0], ordered, where, facts)


def _best_first(count: int, ranks: list[float] | None, scores: list[float] | None) -> list[int]:
    """Indices best first; ties stay in the order of the row."""
    order = list(range(count))
    if ranks:
        order.sort(key=lambda i: ranks[i])
    elif scores:
        order.sort(key=lambda i: -scores[i])
    if ranks and scores and any(scores[a] < scores[b] for a, b in pairwise(order)):
        raise BadRow("'ranks' and 'scores' contradict each other")
    return order


def _from_unpaired(row: Row, where: str) -> Record:
    label = _field(row, "label")
    if type(label) is not bool:
        raise BadRow(f"'label' is {kind_of(label)}, expected true or false")
    return _from_completion(row, where)._replace(facts=Facts(label=label))


def _from_prompt(row: Row, where: str) -> Record:
    return Record(_prompt(row), (), where)


FORMATS: dict[str, Converter] = {
    "messages": _from_messages,
    "prompt-completion": _from_completion,
    "text": _from_text,
    "preference": _from_preference,
    "hh": _from_hh,
    "ranked": _from_ranked,
    "unpaired": _from_unpaired,
    "prompt": _from_prompt,
}

COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
"""What a row of each format has."""

OPTIONAL = ("ranks", "scores", "score_chosen", "score_rejected", "probability", "subset")
"""`ranks` or `scores` of a ranking; both scores of a pair, and the probability that its chosen response is the better one;
`subset` of any row."""

KNOWN_COLUMNS = (*dict.fromkeys(name for names in COLUMNS.values() for name in names), *OPTIONAL)

_PAIRS = ("preference", "hh", "ranked")
_ANSWERED = ("messages", "prompt-completion", *_PAIRS, "unpaired")
STAGE_TAKES: dict[str, tuple[str, ...]] = {
    "sft": ("messages", "prompt-completion", "text", *_PAIRS, "unpaired"),
    "train-rm": _PAIRS,
    "dpo": _PAIRS,
    "ipo": _PAIRS,
    "kto": (*_PAIRS, "unpaired"),
    "ppo": (*_ANSWERED, "prompt"),
}

ALIASES = {"prompt": ("instruction", "question", "query"), "completion": ("response", "output", "answer")}
"""Names that other data sets use; only for the suggestion in an error, never read on their own."""


def _sft(record: Record) -> Record | str:
    if record.facts.label is False:
        return "undesirable (not for sft)"
    return record._replace(responses=record.responses[:1], facts=Facts(subset=record.facts.subset))


def _judged(record: Record) -> Record | str:
    ranks = record.facts.ranks
    return record if ranks is None or len(set(ranks)) > 1 else "all responses are tied"


def _whole(record: Record) -> Record | str:
    return record


STAGE_USE: dict[str, Callable[[Record], Record | str]] = {
    "sft": _sft,
    "train-rm": _judged,
    "dpo": _judged,
    "ipo": _judged,
    "kto": _judged,
    "ppo": _whole,
}
"""Stage → what it keeps of a record, or why it has no use for a row that is not bad."""


def convert(row: Row, where: str, converter: Converter) -> Record:
    """The record of a row, with the row's `subset` if it has one; raises BadRow."""
    record = converter(row, where)
    subset = row.get("subset")
    return record if subset is None else record._replace(facts=record.facts._replace(subset=a_text(subset, "'subset'")))


def with_margin(record: Record, row: Row, column: str) -> Record:
    """The record of a pair with the margin that the row has under that name; raises BadRow."""
    return record._replace(facts=record.facts._replace(margin=_number(_field(row, column), f"'{column}'")))


def converter_of(format: str, rows: Sequence[Row]) -> Converter:
    """How rows of a source are read, given its first ones: pairs without any prompt are whole conversations.

    This is decided once for a source: in a source that has prompts, a row that lacks its own is a bad row.
    """
    if format == "preference" and all(row.get("prompt") is None for row in rows):
        return _from_whole_pair
    return FORMATS[format]


def readings(row: Row) -> tuple[str, ...]:
    """The formats that a row can be read as; a format that uses every column of another one covers it."""
    has = {name for name, value in row.items() if value is not None}
    found = []
    if "messages" in has:
        found.append("messages")
    if {"prompt", "completion"} <= has:
        labelled = type(row.get("label")) is bool
        found += ["unpaired"] if labelled else ["prompt-completion"] if "label" not in has else ["prompt-completion", "unpaired"]
    if "text" in has:
        found.append("text")
    if {"chosen", "rejected"} <= has:
        found.append("hh" if "prompt" not in has and _looks_like_hh(row["chosen"]) else "preference")
    if {"prompt", "responses"} <= has:
        found.append("ranked")
    if "prompt" in has and not any("prompt" in COLUMNS[name] for name in found):
        found.append("prompt")
    return tuple(found)


def _looks_like_hh(chosen: Any) -> bool:
    return type(chosen) is str and chosen.lstrip().startswith("Human:")


def detect(rows: Sequence[Row], stage: str, place: str) -> str:
    """The one format most of the rows have and the stage takes; UsageError that begins with `place` otherwise."""
    counts = Counter(found for row in rows if (found := readings(row)))
    columns = shown_columns(rows)
    if not counts:
        raise UsageError(f"{place}: found the columns {columns}; {stage} needs {needs(stage)}{_rename_hint(rows, stage)}")
    found = counts.most_common(1)[0][0]
    fitting = [format for format in found if format in STAGE_TAKES[stage]]
    if not fitting:
        raise wrong_stage(found[0], stage, place, _rename_hint(rows, stage))
    if len(fitting) > 1:
        raise UsageError(
            f"{place}: the columns {columns} can be read as {' or as '.join(fitting)}; set format: to the one you mean"
        )
    return fitting[0]


def shown_columns(rows: Sequence[Row]) -> str:
    """The names of all columns of the rows, for a message."""
    names = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    shown = [name if name.isprintable() else shortened(name) for name in names[:12]]
    return ", ".join(shown + ["…"] * (len(names) > 12)) or "(none)"


def wrong_stage(format: str, stage: str, place: str, hint: str = "") -> UsageError:
    """The error for data that another stage takes."""
    others = [name for name, formats in STAGE_TAKES.items() if format in formats]
    found = f"found {format} data ({' + '.join(COLUMNS[format])})"
    return UsageError(f"{place}: {found}, which {' and '.join(others)} can use; {stage} needs {needs(stage)}{hint}")


def needs(stage: str) -> str:
    """The columns of every format that a stage takes, for a message."""
    return " | ".join(" + ".join(COLUMNS[format]) for format in STAGE_TAKES[stage])


def _rename_hint(rows: Sequence[Row], stage: str) -> str:
    """A `columns:` line that would make a format of the stage complete, where there is one obvious reading."""
    has = {str(name) for row in rows for name in row}
    ours = {name: [theirs for theirs in ALIASES.get(name, ()) if theirs in has] for name in KNOWN_COLUMNS}
    for format in STAGE_TAKES[stage]:
        missing = [name for name in COLUMNS[format] if name not in has]
        if missing and "input" not in has and all(len(ours[name]) == 1 for name in missing):
            return f"; perhaps columns: {{{', '.join(f'{name}: {ours[name][0]}' for name in missing)}}}"
    return ""
