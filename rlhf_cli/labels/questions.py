"""What is to be judged: rows with several responses, the questions they make, who is asked which of them, and in what order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, NamedTuple

from rlhf_cli.data.conversations import messages
from rlhf_cli.data.records import Answer, PlainPrompt, Record, as_turn, plain_prompt, spoken
from rlhf_cli.evaluation.samples import Sample
from rlhf_cli.files import to_json

Ranking = Literal["pairs", "all"]
Question = tuple[bool, int, frozenset[int]]
"""(is its answer known, number of the row, the responses that are compared): the same for all annotators."""
MOST = 9
"""Responses that are ranked at once: each has a digit."""


@dataclass(frozen=True)
class Row:
    """A prompt and the responses to it that are compared."""

    number: int
    prompt: PlainPrompt
    responses: tuple[Answer, ...]  # no two say the same
    beside: Mapping[str, Any] = field(default_factory=dict)  # columns that its preferences have too
    models: tuple[str, ...] = ()  # who wrote each response; nobody who judges sees it
    known: tuple[float, ...] | None = None  # of a gold question: rank of each response, the best is lowest
    asked: tuple[tuple[int, ...], ...] | None = None  # the pairs that were chosen; None: every one
    labels: tuple[float, ...] | None = None  # the same of a row that has preferences, or gold, already
    columns: str = ""  # JSON object of the row's columns that a function which judges reads

    @property
    def plain(self) -> list[Any]:
        """The responses as files have them."""
        return [own if isinstance(own, str) else [as_turn(own).plain()] for own in self.responses]

    @cached_property
    def hash(self) -> str:
        """Of all that is judged."""
        return hashlib.sha256(to_json([self.prompt, self.plain])).hexdigest()[:16]

    @property
    def record(self) -> Record:
        """As models and functions read it."""
        prompt = self.prompt if isinstance(self.prompt, str) else tuple(messages(self.prompt, "the prompt"))
        given = {"tools": self.beside["tools"]} if "tools" in self.beside else {}
        given |= self.beside.get("chat_template_kwargs", {})
        place = f"row {self.number}"
        return Record(prompt, self.responses, place, given=json.dumps(given) if given else "", columns=self.columns)


class Shown(NamedTuple):
    """A question as one annotator sees it."""

    row: Row
    order: tuple[int, ...]  # the responses that are compared, as they are shown

    @property
    def question(self) -> Question:
        return self.row.known is not None, self.row.number, frozenset(self.order)

    @property
    def id(self) -> str:
        return f"{self.row.hash}:{','.join(map(str, self.order))}"


def of_records(records: Iterable[Record], *, gold: bool = False, labelled: bool = False) -> list[Row]:
    """The rows whose responses differ; of gold questions with what is known of the responses.

    `labelled`: their order is a preference too, not only ranks and scores.
    """
    found = []
    for number, record in enumerate(records):
        facts = record.facts
        ranks = facts.ranks or tuple(range(len(record.responses)))
        if facts.probability is not None:
            ranks = {1: (0.0, 1.0), 0: (0.0, 0.0), -1: (1.0, 0.0)}[facts.better]
        first = {spoken(own).strip(): at for at, own in reversed(list(enumerate(record.responses)))}
        kept = sorted(first.values())
        options = record.options
        beside = {name: options.pop(name) for name in ("tools",) if name in options}
        beside |= {"chat_template_kwargs": options} if options else {}
        beside |= {"subset": facts.subset} if facts.subset is not None else {}
        if len(kept) > 1:
            responses = tuple(record.responses[at] for at in kept)
            known = tuple(ranks[at] for at in kept)
            labels = known if facts.ranks or labelled else None
            own = (beside, (), known if gold else None, None, labels, record.columns)
            found.append(Row(number, plain_prompt(record.prompt), responses, *own))
    return found


def of_samples(samples: Iterable[Sample]) -> list[Row]:
    """The rows of an evaluation's samples. Responses that were cut off or are empty, and repeated ones, are left out."""
    together: dict[int, dict[str, Sample]] = {}
    for sample in samples:
        own = together.setdefault(sample.row, {})
        if sample.usable:
            own.setdefault(sample.response.strip(), sample)
    rows = {number: list(own.values()) for number, own in sorted(together.items()) if len(own) > 1}
    found = []
    for number, row in rows.items():
        gold = [-worth for each in row if (worth := each.worth("gold")) is not None]
        texts, models = tuple(each.response for each in row), tuple(each.model for each in row)
        found.append(Row(number, row[0].prompt, texts, models=models, labels=tuple(gold) if len(gold) == len(row) else None))
    return found


def compared(row: Row, ranking: Ranking) -> list[tuple[int, ...]]:
    """The responses of each question that a row makes: every pair, or all of them at once."""
    if row.asked is not None:
        return [*row.asked]
    every = tuple(range(len(row.responses)))
    return list(combinations(every, 2)) if ranking == "pairs" else [every]


def queues(
    rows: Sequence[Row], gold: Sequence[Row], annotators: Sequence[str], overlap: float, ranking: Ranking, seed: int
) -> dict[str, list[Shown]]:
    """The questions of each annotator: a share of the rows that all see, and a part of the rest that nobody else sees.

    Which rows those are, their order, the sides, and where the gold questions come, which all see, is drawn from the seed. Rows
    are dealt whole, and the questions of one row follow each other. The sides of a question depend on nothing but the seed, who
    is asked and what, so that each is a draw of its own.
    """
    drawn = random.Random(f"{seed}")
    dealt = drawn.sample(list(rows), len(rows))
    shared = len(rows) if len(annotators) == 1 else round(overlap * len(rows))
    found = {}
    for at, name in enumerate(annotators):
        own = [*dealt[:shared], *dealt[shared + at :: len(annotators)], *gold]
        asked = []
        for row in random.Random(f"{seed}/{name}").sample(own, len(own)):
            for responses in compared(row, ranking):
                key = f"{seed}/{name}/{row.known is None}/{row.number}/{responses}"
                asked.append(Shown(row, tuple(random.Random(key).sample(responses, len(responses)))))
        found[name] = asked
    return found
