"""The data formats: what a row of each has, what is made of it, what it is good for, and which one the rows of a source have."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal

from rlhf_cli.data import records
from rlhf_cli.data.meaning import MEANINGFUL, says_something
from rlhf_cli.data.records import BadRow, Facts, Prompt, Record, a_list, a_text, as_turns, messages
from rlhf_cli.errors import UsageError

Row = Mapping[str, Any]
Converter = Callable[[Row, str], Record]
Taken = Literal["first", "all", "none"]
"""Which responses of a record are tokenised; none: its prompt alone, to which responses will be drawn."""


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"'{name}' is missing")
    return row[name]


def _numbers(row: Row, name: str, count: int) -> list[float] | None:
    """One number a response; None if the row says nothing."""
    if row.get(name) is None:
        return None
    numbers = a_list(row[name], f"'{name}'")
    if len(numbers) != count:
        raise BadRow(f"'{name}' and 'responses' differ in number", f"{len(numbers)} and {count}")
    return [_number(number, f"an entry of '{name}'") for number in numbers]


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float):
        raise BadRow(f"{name} is {records.kind_of(value)}, expected a number")
    if not abs(value) <= sys.float_info.max:  # also integers that no float can hold
        raise BadRow(f"{name} is not finite")
    return float(value)


def _prompt(row: Row) -> Prompt:
    value = _field(row, "prompt")
    if type(value) is not list:
        return a_text(value, "'prompt'")
    turns = messages(value, "'prompt'")
    records.check_order(turns, "'prompt'")
    if turns[-1].role != "user":
        raise BadRow("'prompt' does not end in a user turn")
    return turns


def _response(prompt: Prompt, value: Any, name: str) -> tuple[Prompt, str]:
    """A response (text, the assistant's turn, or a whole conversation) and its prompt, to which turns before the last belong."""
    if type(value) is not list:
        return prompt, a_text(value, name)
    turns, start = messages(value, name), as_turns(prompt)
    if turns[0].role == "assistant":
        earlier, response = records.conversation((*start, *turns), name)
    else:
        earlier, response = records.conversation(turns, name)
        if earlier[: len(start)] != start:
            raise BadRow(f"{name} does not begin with 'prompt'")
    return (prompt if earlier == start else earlier), response


def _pair(row: Row, chosen: tuple[Prompt, str], rejected: tuple[Prompt, str], where: str) -> Record:
    """Two responses, each with its prompt."""
    if as_turns(chosen[0]) != as_turns(rejected[0]):
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    if chosen[1].strip() == rejected[1].strip():
        raise BadRow("'chosen' and 'rejected' are the same")
    names = ("score_chosen", "score_rejected")
    scores = tuple(_number(row[name], f"'{name}'") for name in names if row.get(name) is not None)
    if len(scores) == 1:
        raise BadRow("one of 'score_chosen' and 'score_rejected' is missing")
    if scores and scores[0] < scores[1]:
        raise BadRow("'score_chosen' is lower than 'score_rejected'")
    probability = _number(row["probability"], "'probability'") if row.get("probability") is not None else None
    if probability is not None and not 0.5 <= probability <= 1:
        raise BadRow("'probability' is not between 0.5 and 1", "that of the chosen response; where it is lower, swap the two")
    return Record(chosen[0], (chosen[1], rejected[1]), where, Facts(scores=scores or None, probability=probability))


def _from_messages(row: Row, where: str) -> Record:
    prompt, response = records.conversation(messages(_field(row, "messages"), "'messages'"), "'messages'")
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
    return _pair(row, _response(prompt, values[0], "'chosen'"), _response(prompt, values[1], "'rejected'"), where)


def _from_whole_pair(row: Row, where: str) -> Record:
    """Two whole conversations: messages, or texts, whose shared words are the prompt."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if type(chosen) is list or type(rejected) is list:
        best = records.conversation(messages(chosen, "'chosen'"), "'chosen'")
        return _pair(row, best, records.conversation(messages(rejected, "'rejected'"), "'rejected'"), where)
    if a_text(chosen, "'chosen'").strip() == a_text(rejected, "'rejected'").strip():
        raise BadRow("'chosen' and 'rejected' are the same")
    shared = chosen[: records.shared_length(chosen, rejected)]
    # The prompt ends where the last whole word does, so that the cut splits no word and hardly a token.
    prompt = shared.rstrip() if shared[-1:].isspace() else "".join(shared.rsplit(maxsplit=1)[:-1])
    if not prompt.strip():
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    first = a_text(chosen[len(prompt) :], "the response in 'chosen'")
    second = a_text(rejected[len(prompt) :], "the response in 'rejected'")
    return _pair(row, (prompt, first), (prompt, second), where)


def _from_hh(row: Row, where: str) -> Record:
    chosen = records.transcript(_field(row, "chosen"), "'chosen'")
    return _pair(row, chosen, records.transcript(_field(row, "rejected"), "'rejected'"), where)


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
    ranks, scores = (_numbers(row, name, len(values)) for name in ("ranks", "scores"))
    keys = ranks or [-score for score in scores or ()]
    order = sorted(range(len(values)), key=keys.__getitem__ if keys else None)  # ties stay in the order of the row
    if ranks and scores and any(scores[a] < scores[b] for a, b in pairwise(order)):
        raise BadRow("'ranks' and 'scores' contradict each other")
    ordered = tuple(responses[i] for i in order)
    facts = Facts(tuple(keys[i] for i in order) if keys else None, tuple(scores[i] for i in order) if scores else None)
    texts = [response.strip() for response in ordered]
    if len(set(zip(texts, facts.ranks or range(len(texts)), strict=True))) > len(set(texts)):
        raise BadRow("the same response has two ranks")
    return Record(found[0][0], ordered, where, facts)


def _from_unpaired(row: Row, where: str) -> Record:
    label = _field(row, "label")
    if type(label) is not bool:
        raise BadRow(f"'label' is {records.kind_of(label)}, expected true or false", _as_label(label))
    return _from_completion(row, where)._replace(facts=Facts(label=label))


def _as_label(value: Any) -> str:
    """What to write for a label of another kind."""
    word = str(value).strip().lower()
    if word in ("1", "1.0", "up", "yes", "good", "true", "like", "thumbs_up", "desirable"):
        return f"write true for {records.shortened(value)}"
    if word in ("0", "0.0", "-1", "down", "no", "bad", "false", "dislike", "thumbs_down", "undesirable"):
        return f"write false for {records.shortened(value)}"
    return records.shortened(value)


def _from_prompt(row: Row, where: str) -> Record:
    return Record(_prompt(row), (), where)


Content = Literal["prompt", "answer", "pair", "ranking", "label"]
"""What rows may have: a prompt to respond to, a response to learn, one that is better than another, several in their order, a
response that is marked good or bad."""


@dataclass(frozen=True)
class Format:
    """How rows of one kind look."""

    name: str
    columns: tuple[str, ...]
    contains: frozenset[Content]
    convert: Converter
    optional: tuple[str, ...] = ()
    without_prompts: Converter | None = None  # for sources none of whose first rows has a prompt, be they messages or texts
    recognise: Callable[[Row], bool] | None = None  # is a row, without its nulls, one of these? None: if it has all columns

    def converter(self, rows: Sequence[Row], chat: bool, place: str) -> Converter:
        """How the rows of a source are read, given its first ones: where these have prompts, a row without one is a bad row.

        UsageError: whole texts without prompts, where a chat template is in force.
        """
        if self.without_prompts is not None and all(row.get("prompt") is None for row in rows):
            if chat and all(type(row.get(name)) is str for row in rows for name in self.columns if name in row):
                raise UsageError(
                    f"{place}: chosen and rejected are whole texts without a prompt: under a chat template all that they share "
                    "would be one user turn. give the prompt in a column of its own, write messages, or set "
                    "model.chat_template: none"
                )
            return self.without_prompts
        return self.convert

    def fits(self, row: Row) -> bool:
        return self.recognise(row) if self.recognise is not None else row.keys() >= set(self.columns)

    def __str__(self) -> str:
        return " + ".join(self.columns)


def _is_hh(row: Row) -> bool:
    if "prompt" in row or not row.keys() >= {"chosen", "rejected"}:
        return False
    return type(row["chosen"]) is str and row["chosen"].lstrip().startswith("Human:")


_OF_PAIRS = ("score_chosen", "score_rejected", "probability")  # the latter: that the chosen response is the better one

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("messages", ("messages",), frozenset({"prompt", "answer"}), _from_messages),
        Format(
            "prompt-completion",
            ("prompt", "completion"),
            frozenset({"prompt", "answer"}),
            _from_completion,
            recognise=lambda row: row.keys() >= {"prompt", "completion"} and type(row.get("label")) is not bool,
        ),
        Format("text", ("text",), frozenset({"answer"}), _from_text),
        Format(
            "preference",
            ("prompt", "chosen", "rejected"),
            frozenset({"prompt", "answer", "pair"}),
            _from_preference,
            _OF_PAIRS,
            without_prompts=_from_whole_pair,
            recognise=lambda row: row.keys() >= {"chosen", "rejected"} and not _is_hh(row),
        ),
        Format("hh", ("chosen", "rejected"), frozenset({"prompt", "answer", "pair"}), _from_hh, _OF_PAIRS, recognise=_is_hh),
        Format("ranked", ("prompt", "responses"), frozenset({"prompt", "answer", "ranking"}), _from_ranked, ("ranks", "scores")),
        Format("unpaired", ("prompt", "completion", "label"), frozenset({"prompt", "answer", "label"}), _from_unpaired),
        Format("prompt", ("prompt",), frozenset({"prompt"}), _from_prompt),
    )
}

_COLUMNS = (*(format.columns for format in FORMATS.values()), *(format.optional for format in FORMATS.values()), ("subset",))
KNOWN_COLUMNS = tuple(dict.fromkeys(chain(*_COLUMNS)))  # `subset` of any row is the group it is counted in
RENAME = "; name those that are meant in data.train.0.columns: {ours: theirs}"
ALIASES = {"prompt": ("instruction", "question", "query"), "completion": ("response", "output", "answer")}
"""Names that other data sets use; only for the suggestion in an error, never read on their own."""


@dataclass(frozen=True)
class Use:
    """What rows are read for."""

    needs: frozenset[Content]  # a format that contains one of these will do
    responses: Taken
    keep: Callable[[Record], Record | str] = lambda record: record  # what of a record, or why there is no use for it

    @property
    def formats(self) -> dict[str, Format]:
        """The formats that it takes."""
        return {name: format for name, format in FORMATS.items() if self.needs & format.contains}


def _answer(record: Record) -> Record | str:
    if record.facts.label is False:
        return "undesirable (not for sft)"
    return record._replace(responses=record.responses[:1], facts=Facts(subset=record.facts.subset))


def _comparison(record: Record) -> Record | str:
    ranks = record.facts.ranks
    return record if ranks is None or len(set(ranks)) > 1 else "all responses are tied"


ANSWERS = Use(frozenset({"answer"}), "first", _answer)
COMPARISONS = Use(frozenset({"pair", "ranking"}), "all", _comparison)
LABELS = Use(frozenset({"pair", "ranking", "label"}), "all", _comparison)
PROMPTS = Use(frozenset({"prompt"}), "none")


def convert(row: Row, where: str, converter: Converter) -> Record:
    """The record of a row, with the row's `subset` if it has one; raises BadRow."""
    record = converter(row, where)
    subset = row.get("subset")
    return record if subset is None else record._replace(facts=record.facts._replace(subset=a_text(subset, "'subset'")))


def with_margin(record: Record, row: Row, column: str) -> Record:
    """The record of a pair with the margin that the row has under that name; raises BadRow."""
    return record._replace(facts=record.facts._replace(margin=_number(_field(row, column), f"'{column}'")))


@dataclass(frozen=True)
class Purpose:
    """Who reads rows, and what for."""

    label: str  # what errors call it
    use: Use
    others: Mapping[str, Use]  # who else reads rows, for the error about rows that are for others

    @property
    def needs(self) -> str:
        """The columns of every format that it takes."""
        return " | ".join(map(str, self.use.formats.values()))

    def refuse(self, format: Format, place: str, hint: str = "") -> UsageError:
        """The error for rows that it cannot use, and others can."""
        others = [name for name, use in self.others.items() if format.name in use.formats]
        found = f"found {format.name} data ({format})"
        return UsageError(f"{place}: {found}, which {' and '.join(others)} can use; {self.label} needs {self.needs}{hint}")


def detect(rows: Sequence[Row], purpose: Purpose, place: str) -> Format:
    """The one format most of the rows have and is of use; UsageError that begins with `place` otherwise."""
    counts = Counter(found for row in rows if (found := readings(row)))
    columns = shown_columns(rows)
    if not counts:
        hint = _rename_hint(rows, purpose.use)
        raise UsageError(f"{place}: found the columns {columns}; {purpose.label} needs {purpose.needs}{hint or RENAME}")
    found = counts.most_common(1)[0][0]
    fitting = [name for name in found if name in purpose.use.formats]
    if not fitting:
        raise purpose.refuse(FORMATS[found[0]], place, _rename_hint(rows, purpose.use))
    if len(fitting) > 1:
        raise UsageError(
            f"{place}: the columns {columns} can be read as {' or as '.join(fitting)}; set format: to the one you mean"
        )
    return FORMATS[fitting[0]]


def readings(row: Row) -> tuple[str, ...]:
    """The names of the formats that a row can be read as; a prompt alone is one where no other format takes it."""
    there = {name: value for name, value in row.items() if value is not None}
    found = [format for format in FORMATS.values() if format.fits(there)]
    prompted = [format for format in found if "prompt" in format.columns]
    return tuple(format.name for format in found if format.name != "prompt" or prompted == [format])


def shown_columns(rows: Sequence[Row]) -> str:
    """The names of all columns of the rows, for a message."""
    names = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    shown = [name if name.isprintable() else records.shortened(name) for name in names[:12]]
    return ", ".join(shown + ["…"] * (len(names) > 12)) or "(none)"


def _rename_hint(rows: Sequence[Row], use: Use) -> str:
    """A `columns:` line that would make a format complete that is taken, where there is one obvious reading."""
    has = {str(name) for row in rows for name in row}
    lost = any(name in MEANINGFUL and says_something(name, value) for row in rows for name, value in row.items())
    ours = {name: [theirs for theirs in ALIASES.get(name, ()) if theirs in has] for name in KNOWN_COLUMNS}
    for format in use.formats.values():
        missing = [name for name in format.columns if name not in has]
        if missing and not lost and all(len(ours[name]) == 1 for name in missing):
            return f"; perhaps data.train.0.columns: {{{', '.join(f'{name}: {ours[name][0]}' for name in missing)}}}"
    return ""
