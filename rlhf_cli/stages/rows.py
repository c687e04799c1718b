"""`rlhf data`: what is in rows, and which stages can use them, without a model."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.conversations import as_spoken
from rlhf_cli.data.formats import FORMATS, PROMPTS, Purpose, Use
from rlhf_cli.data.records import Record, as_turn, as_turns, plain_prompt, prompt_lines, spoken
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.data.sources import Reading, read_data
from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.stages import ROW_USES

ANY = Use(frozenset({"prompt", "answer", "pair", "ranking", "label"}), "all")
ANSWERS = ("answer", "ground_truth", "final_answer", "solution", "target", "expected_answer")
"""Columns that right answers stand in, beside prompts."""
SHOWN = 400  # characters of a text of the first row


@dataclass(frozen=True)
class Rows:
    """What was read of some sources, and what it is good for."""

    reading: Reading

    @property
    def records(self) -> Sequence[Record]:
        return self.reading.train

    @property
    def stages(self) -> list[str]:
        """Those that can use all of the sources."""
        formats = {report.format for report in self.reading.reports}
        prompted = any(as_turns(record.prompt) for record in self.records[:1])
        return [stage for stage, use in ROW_USES.items() if formats <= use.formats.keys() and (prompted or use is not PROMPTS)]

    @property
    def likely(self) -> str:
        """The stage that the rows are most likely meant for."""
        contents = frozenset[str]().union(*(FORMATS[report.format].contains for report in self.reading.reports))
        meant = "kto" if "label" in contents else "dpo" if contents & {"pair", "ranking"} else "sft"
        return meant if meant in self.stages else next(iter(self.stages), "STAGE")

    @property
    def answer(self) -> tuple[str, Any] | None:
        """The column that right answers stand in, and the first row's."""
        first = json.loads(self.records[0].columns or "{}")
        return next(((name, first[name]) for name in ANSWERS if first.get(name) is not None), None)


def read_rows(sources: Sequence[sections.Source]) -> Rows:
    """All rows of the sources, each in the format that it names or that its rows have; prompts alone where they have no answers.

    UsageError: they cannot be read.
    """
    data, failures = sections.Data(list(sources)), []
    for use in (ANY, PROMPTS):
        purpose = Purpose("rlhf", use, ROW_USES)
        request = RowRequest(purpose, seed=0, where=lambda key: "the rows", columns=dict.fromkeys(ANSWERS))
        try:
            return Rows(read_data(data, request))
        except UsageError as error:
            failures.append(error)
    raise failures[0]


def describe_rows(sources: Sequence[sections.Source], *, as_json: bool) -> None:
    """Print what is in the rows."""
    rows, console = read_rows(sources), Console()
    found = figures(rows.records)
    if as_json:
        own = {"sources": [dataclasses.asdict(report) for report in rows.reading.reports], **found, "stages": rows.stages}
        print(json.dumps(own, indent=2, ensure_ascii=False))
        return
    sections_shown: list[tuple[str, list[tuple[str, object]]]] = []
    for report in rows.reading.reports:
        shown: list[tuple[str, object]] = [("read", f"{report.read:,} rows as {report.format} ({FORMATS[report.format]})")]
        shown += [("kept", f"{report.kept:,}")]
        shown += [("left out", f"{count:,} × {reason}") for reason, count in (report.bad | report.unused).items()]
        shown += [("for example", example) for example in report.bad_examples[:2]]
        unread = ", ".join((*report.left_out, *report.lent))
        shown += [("columns not used", unread)] if unread else []
        shown += [("note", notice) for notice in report.notices]
        sections_shown.append((report.path, shown))
    sections_shown.append(("rows", list(_said(found))))
    stages = ", ".join(f"rlhf {stage}" for stage in rows.stages) or "none of them as they are"
    sections_shown.append(("use", [("for", stages), ("a recipe", f"rlhf init {rows.likely} --data {sources[0].path}")]))
    console.plan(sections_shown)
    console.say(f"\nthe first row:\n{_example(rows.records[0])}")


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Of all rows: repeated ones, prompts, turns, lengths in words, labels, and whether the better response is the longer one."""
    prompts: Counter[str] = Counter()
    whole: set[str] = set()
    words: dict[str, list[int]] = {"prompt": [], "response": []}
    labels: Counter[bool] = Counter()
    longer, pairs, turns, repeated = 0.0, 0, 0, 0
    for start in range(0, len(records), 5000):
        for record in records[start : start + 5000]:
            text, own = record._replace(columns="").serialised, [len(spoken(answer).split()) for answer in record.responses]
            repeated += text in whole
            whole.add(text)
            asked = prompt_lines(plain_prompt(record.prompt)) if record.prompt else ""
            prompts[asked] += 1
            turns += len(as_turns(as_spoken(record.prompt))) > 1
            words["prompt"].append(len(asked.split()))
            words["response"] += own
            if record.facts.label is not None:
                labels[record.facts.label] += 1
            elif len(own) > 1 and (record.facts.ranks is None or record.facts.ranks[0] < record.facts.ranks[-1]):
                pairs += 1
                longer += (own[0] > own[-1]) + (own[0] == own[-1]) / 2
    known = {name: [int(x) for x in np.percentile(values, [50, 90, 99, 100])] for name, values in words.items() if values}
    return {
        "rows": len(records),
        "repeated": repeated,
        "prompts": len(prompts),
        "dialogues": turns,
        "words": {name: dict(zip(("p50", "p90", "p99", "max"), values, strict=True)) for name, values in known.items()},
        "labels": {"desirable": labels[True], "undesirable": labels[False]} if labels else None,
        "better_is_longer": longer / pairs if pairs else None,
    }


def _said(found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield "rows", f"{found['rows']:,}, {found['repeated']:,} of them repeat another one"
    yield (
        "prompts",
        f"{found['prompts']:,} different; holdout: 0.05 would keep about {max(1, found['prompts'] // 20):,} of them apart",
    )
    if found["dialogues"]:
        yield "dialogues", f"{found['dialogues']:,} prompts have several turns"
    for name, own in found["words"].items():
        yield f"words of a {name}", ", ".join(f"{value:,} ({share})" for share, value in own.items())
    if labels := found["labels"]:
        yield "labels", f"{labels['desirable']:,} desirable, {labels['undesirable']:,} undesirable"
    if (share := found["better_is_longer"]) is not None:
        warning = ": a model may learn little but length" if abs(share - 0.5) > 0.25 else ""
        yield "the better one", f"is the longer one in {share:.0%} of the pairs{warning}"


def _example(record: Record) -> str:
    def cut(text: str) -> str:
        return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"

    lines = [f"[{turn.role}] {cut(turn.content)}" for turn in as_turns(record.prompt) if record.prompt]
    ranks = record.facts.ranks or tuple(range(len(record.responses)))
    for rank, answer in zip(ranks, record.responses, strict=True):
        mark = {True: "desirable", False: "undesirable", None: "response"}[record.facts.label]
        if len(ranks) > 1:
            mark = f"rank {sorted(set(ranks)).index(rank) + 1}"
        lines.append(f"[{as_turn(answer).role}, {mark}] {cut(spoken(answer))}")
    return "\n".join(lines)
