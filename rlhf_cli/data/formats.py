"""The data formats: what a row of each has, how others write it, what it is good for, and which one the rows of a source have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

from rlhf_cli.data import convert as of
from rlhf_cli.data.columns import OF_ITEMS, Columns, Row, respelled, shown, value_of
from rlhf_cli.data.convert import BESIDE_PROMPTS, PROMPTED
from rlhf_cli.data.files import RawRow
from rlhf_cli.data.meaning import MEANINGFUL, says_something
from rlhf_cli.data.records import Facts, Record, a_text
from rlhf_cli.data.stepwise import from_steps, is_stepwise
from rlhf_cli.errors import UsageError

Converter = Callable[[Row, str], Record]
Taken = Literal["first", "all", "none"]
"""Which responses of a record are tokenised; none: its prompt alone, to which responses will be drawn."""

Content = Literal["prompt", "answer", "pair", "ranking", "label", "steps"]
"""What rows may have: a prompt to respond to, a response to learn, one that is better than another, several in their order, a
response that is marked good or bad, one whose steps are."""


@dataclass(frozen=True)
class Format:
    """How rows of one kind look."""

    name: str
    columns: tuple[str, ...]
    contains: frozenset[Content]
    convert: Converter
    optional: tuple[str, ...] = ()
    without_prompts: Converter | None = None  # for sources none of whose first rows has a prompt, be they messages or texts
    recognise: Callable[[Row], bool] | None = None  # is a row, without its nulls, one? None: with all columns and no label
    spellings: tuple[Columns, ...] = ()  # how others name its columns; all that a spelling names must be there, but for NAME?
    gather: Callable[[Iterator[RawRow]], Iterator[RawRow]] | None = None  # rows that are one row of ours

    def converter(self, rows: Sequence[Row], chat: bool, place: str, separator: str | None = None) -> Converter:
        """How the rows of a source are read, given its first ones: where these have prompts, a row without one is a bad row.

        UsageError: whole texts without prompts, where a chat template is in force.
        """
        if self.name == "steps":
            return partial(from_steps, separator=separator)
        if self.without_prompts is None:
            return self.convert
        if all(row.get(name) is None for row in rows for name in PROMPTED):
            if chat and all(type(row.get(name)) is str for row in rows for name in self.columns if name in row):
                raise UsageError(
                    f"{place}: chosen and rejected are whole texts without a prompt: under a chat template all that they share "
                    "would be one user turn. give the prompt in a column of its own, write messages, or set "
                    "model.chat_template: none"
                )
            return self.without_prompts
        return partial(of.from_repeating, strip=chat) if of.repeats(rows) else self.convert

    def spelling(self, rows: Sequence[Row]) -> Columns:
        """Our columns as most of the rows name them; empty where they bear our names."""
        counts = Counter(found for row in rows if (found := self.spelled(row)) is not None)
        return _required((*({},), *self.spellings)[counts.most_common(1)[0][0]]) if counts else {}

    def spelled(self, row: Row) -> int | None:
        """Which spelling the row has, from 1; 0: our own names; None: it is no row of this format."""
        there = {name: value for name, value in row.items() if value is not None}
        plain = self.fits(there)
        if plain and ("prompt" not in self.columns or there.keys() & {*PROMPTED}):
            return 0
        for number, names in enumerate(self.spellings, start=1):
            needed = [names[ours] for ours in names if ours not in (*there, *OF_ITEMS) and not names[ours].endswith("?")]
            complete = bool(needed) and all(value_of(there, theirs) is not None for theirs in needed)
            if complete and self.fits(respelled(there, _required(names))):
                return number
        return 0 if plain else None

    def fits(self, row: Row) -> bool:
        return self.recognise(row) if self.recognise is not None else row.keys() >= set(self.columns) and not _is_labelled(row)

    def used(self, rows: Sequence[Row]) -> set[str]:
        """The columns that are read, of rows like these."""
        own = {*self.columns, *self.optional, "subset"} | (set(BESIDE_PROMPTS) if "prompt" in self.contains else set())
        if "prompt" not in self.columns:
            return own
        reads = next((name for name in PROMPTED if any(row.get(name) is not None for row in rows)), "prompt")
        return own | {reads} | ({"input", "history"} if reads == "instruction" else set())

    def __str__(self) -> str:
        return " + ".join(self.columns)


def _required(names: Columns) -> Columns:
    return {ours: theirs.removesuffix("?") for ours, theirs in names.items()}


def _is_hh(row: Row) -> bool:
    if any(name in row for name in PROMPTED) or not row.keys() >= {"chosen", "rejected"}:
        return False
    return type(row["chosen"]) is str and row["chosen"].lstrip().startswith("Human:")


def _is_labelled(row: Row) -> bool:
    """Is it a response with a label, and not one of a class?"""
    label = row.get("label", row.get("kto_tag"))
    word = label.strip().lower() if type(label) is str else label
    known = type(word) in (bool, int, float, str) and word in (*of.LABELS, *of.GOOD_WORDS, *of.BAD_WORDS)
    answered = ({"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"})
    return known and any(row.keys() >= columns for columns in answered)


def _is_chosen(row: Row) -> bool:
    talks = all(type(row.get(name)) in (list, dict) for name in ("response_a", "response_b"))
    judged = row.keys() >= {"response_a", "response_b"} and bool(row.keys() & {"winner", "strength"})
    return judged and (talks or bool(row.keys() & set(PROMPTED)))


def _is_scored(row: Row) -> bool:
    if row.keys() >= {"prompt", "response"}:
        return bool(row.keys() & {"score", "rank"})
    if not row.keys() & set(PROMPTED) or not isinstance(items := row.get("responses"), list):
        return False
    return any(type(item) is dict and item.keys() >= {"text"} and bool(item.keys() & {"score", "rank"}) for item in items)


_OF_PAIRS = ("score_chosen", "score_rejected", "probability")  # the latter: that the chosen response is the better one
_TEXT: frozenset[Content] = frozenset({"answer"})
_ANSWER: frozenset[Content] = frozenset({"prompt", "answer"})
_PAIR: frozenset[Content] = frozenset({"prompt", "answer", "pair"})
_RANKING: frozenset[Content] = frozenset({"prompt", "answer", "ranking"})

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("messages", ("messages",), _ANSWER, of.from_messages),
        Format(
            "sharegpt",
            ("conversations",),
            _ANSWER,
            of.from_messages,
            recognise=lambda row: "conversations" in row and "messages" not in row and not _is_labelled(row),
        ),
        Format("prompt-completion", ("prompt", "completion"), _ANSWER, of.from_completion),
        Format(
            "alpaca",
            ("instruction", "output"),
            _ANSWER,
            of.from_alpaca,
            optional=("input", "history"),
            spellings=({"output": "response", "input": "context?"}, {"instruction": "query", "output": "response"}),
        ),
        Format("text", ("text",), _TEXT, of.from_text, recognise=lambda row: "text" in row and "message_id" not in row),
        Format(
            "preference",
            ("prompt", "chosen", "rejected"),
            _PAIR,
            of.from_preference,
            _OF_PAIRS,
            without_prompts=of.from_whole_pair,
            recognise=lambda row: row.keys() >= {"chosen", "rejected"} and not _is_hh(row),
            spellings=(
                {
                    "prompt": "input.messages",
                    "tools": "input.tools?",
                    "chosen": "preferred_output",
                    "rejected": "non_preferred_output",
                },
                {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
                {"prompt": "question"},
                {"prompt": "input"},
            ),
        ),
        Format("hh", ("chosen", "rejected"), _PAIR, of.from_hh, _OF_PAIRS, recognise=_is_hh),
        Format(
            "choice",
            ("prompt", "response_a", "response_b", "winner"),
            _PAIR,
            of.from_choice,
            ("strength", "id_a", "id_b"),
            recognise=_is_chosen,
            spellings=(
                {"response_a": "response_0", "response_b": "response_1", "winner": "better_response_id"},
                # Their label is 1 where A is better: the place of the better one, counted from B.
                {"prompt": "history", "response_a": "human_ref_B", "response_b": "human_ref_A", "winner": "labels"},
                {"prompt": "info.post", "response_a": "summaries.0.text", "response_b": "summaries.1.text", "winner": "choice"},
                {"response_a": "conversation_a", "response_b": "conversation_b"},
                {"response_a": "response_1", "response_b": "response_2", "strength": "preference_strength"},
                {"prompt": "context", "response_a": "response1", "response_b": "response2", "strength": "overall_preference"},
            ),
        ),
        Format(
            "ranked",
            ("prompt", "responses"),
            _RANKING,
            of.from_ranked,
            ("ranks", "scores"),
            recognise=lambda row: row.keys() >= {"prompt", "responses"} and not _is_scored(row),
            spellings=(
                {
                    "prompt": "question.full_text",
                    "responses.0": "answer_0",
                    "responses.1": "answer_1",
                    "scores.0": "score_0",
                    "scores.1": "score_1",
                },
            ),
        ),
        Format(
            "scored",
            ("prompt", "responses"),
            _RANKING,
            of.from_scored,
            ("response", *OF_ITEMS),
            recognise=_is_scored,
            gather=of.joined_by_prompt,
            spellings=(
                {"prompt": "instruction", "responses": "completions", "text": "response", "score": "overall_score"},
                {"responses": "answers", "text": "answer", "rank": "rank"},
            ),
        ),
        Format(
            "unpaired",
            ("prompt", "completion", "label"),
            frozenset({"prompt", "answer", "label"}),
            of.from_unpaired,
            ("messages", "conversations", "instruction", "output"),
            recognise=lambda row: "label" in row and _is_labelled(row),
            spellings=({"label": "kto_tag"},),
        ),
        Format(
            "tree",
            ("message_id", "parent_id", "role", "text"),
            _RANKING,
            of.from_scored,
            ("rank",),
            recognise=lambda row: row.keys() >= {"message_id", "text", "role"},
            gather=of.answered,
        ),
        Format(
            "steps",
            ("prompt", "steps", "labels"),
            frozenset({"prompt", "steps"}),
            from_steps,
            recognise=is_stepwise,
            spellings=(
                {"steps": "completions"},
                {"steps": "input", "labels": "label"},
                {"prompt": "question.problem", "steps": "label.steps"},
            ),
        ),
        Format(
            "prompt",
            ("prompt",),
            frozenset({"prompt"}),
            of.from_prompt,
            spellings=({"prompt": "question"}, {"prompt": "problem"}),
        ),
    )
}

_COLUMNS = (*(format.columns for format in FORMATS.values()), *(format.optional for format in FORMATS.values()), BESIDE_PROMPTS)
KNOWN_COLUMNS = (*dict.fromkeys(chain(*_COLUMNS)), "subset")  # `subset` of any row is the group it is counted in
RENAME = "; in a recipe, beside the path, name those that are meant: columns: {ours: theirs}"
ALIASES = {"prompt": ("instruction", "question", "query", "problem"), "completion": ("response", "output", "answer", "solution")}
"""Names that other data sets use; only for the suggestion in an error, never read on their own."""


@dataclass(frozen=True)
class Use:
    """What rows are read for."""

    needs: frozenset[Content]  # a format that contains one of these will do
    responses: Taken
    keep: Callable[[Record], Record | str] = lambda record: record  # what of a record, or why there is no use for it
    better: frozenset[int] = frozenset({1, 0, -1})  # which of two responses may be the better one, as Facts.better has it

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
    if len(record.responses) < 2 and record.facts.label is None:
        return "one response to its prompt"
    return record if ranks is None or len(set(ranks)) > 1 else "all responses are tied"


UNFIT = {0: "a tie: neither response is better", -1: "a wrong order: the rejected response is more likely the better one"}
ANSWERS = Use(frozenset({"answer"}), "first", _answer, frozenset({1}))
COMPARISONS = Use(frozenset({"pair", "ranking"}), "all", _comparison)
LABELS = Use(frozenset({"pair", "ranking", "label"}), "all", _comparison)
PROMPTS = Use(frozenset({"prompt"}), "none")
STEPS = Use(frozenset({"steps"}), "all")


def convert(row: Row, where: str, converter: Converter) -> Record:
    """The record of a row, with what stands beside its prompt, and its `subset` if it has one; raises BadRow."""
    record = converter(row, where)
    if record.prompt and not row.keys().isdisjoint(BESIDE_PROMPTS):
        record = of.surrounded(record, row)
    subset = row.get("subset")
    return record if subset is None else record._replace(facts=record.facts._replace(subset=a_text(subset, "'subset'")))


def with_margin(record: Record, row: Row, column: str) -> Record:
    """The record of a pair with the margin that the row has under that name; raises BadRow."""
    return record._replace(facts=record.facts._replace(margin=of.number(of.field(row, column), f"'{column}'")))


@dataclass(frozen=True)
class Purpose:
    """Who reads rows, and what for."""

    label: str  # what errors call it
    use: Use
    others: Mapping[str, Use]  # who else reads rows, for the error about rows that are for others

    @property
    def needs(self) -> str:
        """The columns of every format that it takes."""
        return " | ".join(dict.fromkeys(map(str, self.use.formats.values())))

    def refuse(self, format: Format, place: str, hint: str = "") -> UsageError:
        """The error for rows that it cannot use, and others can."""
        others = [name for name, use in self.others.items() if format.name in use.formats]
        found = f"found {format.name} data ({format})"
        needs = f"{self.label} needs {self.needs}{hint}"
        return UsageError(f"{place}: {found}, which {' and '.join(others)} can use; {needs}")


def detect(rows: Sequence[Row], purpose: Purpose, place: str) -> Format:
    """The one format most of the rows have and is of use; UsageError that begins with `place` otherwise."""
    counts = Counter(found for row in rows if (found := readings(row)))
    columns = shown(rows)
    if not counts:
        hint = _rename_hint(rows, purpose.use)
        raise UsageError(f"{place}: found the columns {columns}; {purpose.label} needs {purpose.needs}{hint or RENAME}")
    found = counts.most_common(1)[0][0]
    fitting = [name for name in found if name in purpose.use.formats]
    if not fitting:
        raise purpose.refuse(FORMATS[found[0]], f"{place}: the columns {columns}", _rename_hint(rows, purpose.use) or RENAME)
    if len(fitting) > 1:
        several = " or as ".join(fitting)
        raise UsageError(f"{place}: the columns {columns} can be read as {several}; set format: to the one you mean")
    return FORMATS[fitting[0]]


def readings(row: Row) -> tuple[str, ...]:
    """The names of the formats that a row can be read as; a prompt or a text alone where no other format takes it."""
    found = [format for format in FORMATS.values() if format.spelled(row) is not None]
    more = {content for format in found if format.name not in LESS for content in format.contains}
    return tuple(format.name for format in found if not (format.name in LESS and format.contains <= more))


LESS = ("prompt", "text")
"""Formats of one column, which rows of many others have too."""


def _rename_hint(rows: Sequence[Row], use: Use) -> str:
    """A `columns:` line that would make a format complete that is taken, where there is one obvious reading."""
    has = {str(name) for row in rows for name in row}
    cells = (cell for row in rows for cell in row.items())
    lost = any(name in MEANINGFUL - {*BESIDE_PROMPTS} and says_something(name, value) for name, value in cells)
    ours = {name: [theirs for theirs in ALIASES.get(name, ()) if theirs in has] for name in KNOWN_COLUMNS}
    for format in use.formats.values():
        missing = [name for name in format.columns if name not in has]
        if missing and not lost and all(len(ours[name]) == 1 for name in missing):
            renamed = ", ".join(f"{name}: {ours[name][0]}" for name in missing)
            return f"; in a recipe, beside the path, perhaps columns: {{{renamed}}}"
    return ""
