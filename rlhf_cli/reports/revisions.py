"""The report of critique and revision: what came of the prompts, and how far the texts have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.figures import Interval, count, percent
from rlhf_cli.reports.document import Cell, Column, Definitions, Finding, Section, Table
from rlhf_cli.reports.verdict import in_short
from rlhf_cli.reports.write import write
from rlhf_cli.runs.folder import RunFolder

OFTEN = 0.1  # share of prompts that were lost, from which on it is worth a warning
COLUMNS = {
    "words": "Words",
    "distinct_1": "Distinct 1",
    "distinct_2": "Distinct 2",
    "overlap_1": "Overlap 1",
    "overlap_2": "Overlap 2",
    "unchanged": "Unchanged",
}
METHODS = (
    ("Words", "what white space separates; the mean of a text"),
    ("Distinct n", "different word n-grams over all of them (Li et al. 2016)"),
    ("Overlap n", "share of a text’s n-grams that the answer has too, each as often as there (ROUGE-n’s precision; Lin 2004)"),
    ("Unchanged", "share of texts that are the answer still"),
    ("Intervals", "95 %, by prompts"),
)


def write_report(folder: RunFolder, figures: Mapping[str, Any]) -> None:
    """Write report.md and report.html."""
    found = tuple(_findings(figures))
    then = [
        f"`rlhf sft` reads `data: {{train: {folder.supervised}}}`; `rlhf train-rm` and `rlhf dpo` read `{folder.pairs}`, "
        "which has other prompts."
    ]
    columns = (Column("Text"), *map(Column, COLUMNS.values()))
    rows = tuple((_name(own["round"]), *(_cell(own[key]) for key in COLUMNS)) for own in figures["rounds"])
    sections = (
        in_short(found, then),
        Section("findings", "Findings", found),
        Section("drift", "Length and drift", (Table("The answers and their revisions", columns, rows),) if rows else ()),
        Section("methods", "Methods", (Definitions(METHODS),)),
    )
    lead = f"{count(figures['prompts'], 'prompt')}; {count(figures['sft'], 'row')} for sft, {count(figures['pairs'], 'pair')}."
    write(folder, f"{folder.path.resolve().name}: revisions", lead, sections)


def _name(number: int) -> str:
    return f"revision {number}" if number else "answer"


def _cell(own: Mapping[str, float] | None) -> Cell:
    return "n/a" if own is None else Interval(own["value"], own["low"], own["high"])


def _findings(figures: Mapping[str, Any]) -> Iterator[Finding]:
    if figures["lost"]:
        share = figures["lost"] / figures["prompts"]
        text = f"of {percent(share)} of the prompts the answer or a revision is empty or was cut off (rollout.max_new_tokens)."
        yield Finding("warning" if share > OFTEN else "note", f"{count(figures['lost'], 'prompt')} lost:", text)
    if figures["unchanged"]:
        yield Finding("note", f"{count(figures['unchanged'], 'pair')} less:", "the last revision is the answer as it was.")
    if figures["rounds"]:
        first, last = figures["rounds"][0]["words"], figures["rounds"][-1]["words"]
        if first and last and not (first["low"] <= last["value"] and last["low"] <= first["value"]):
            text = f"{last['value']:.1f} words instead of {first['value']:.1f}; what learns from the pairs learns that too."
            yield Finding("warning", f"Revisions are {'longer' if last['value'] > first['value'] else 'shorter'}:", text)
