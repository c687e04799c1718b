"""The report of a labelling: how far those who judged agree, and what beside the responses has moved them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.figures import Interval, count, duration, number, percent, percent_with_interval
from rlhf_cli.reports.document import Cell, Column, Definitions, Finding, Section, Table
from rlhf_cli.reports.verdict import in_short
from rlhf_cli.reports.write import write
from rlhf_cli.runs.folder import RunFolder

LEVEL = 0.05
KNOWN = 0.7  # share of gold questions below which an annotator is worth a talk
OFTEN = 0.25  # share of pairs in which a judge contradicts itself, from which on it is worth a word
COEFFICIENTS = {
    "cohen": ("Cohen’s κ", "(p_o − p_e)/(1 − p_e) of two annotators; of more the mean over all pairs of them (Light 1971)"),
    "fleiss": ("Fleiss’ κ", "the same of all annotators together, on what every one of them judged"),
    "krippendorff": ("Krippendorff’s α, nominal", "1 − D_o/D_e; rows that some annotators did not see count too"),
    "krippendorff_ordinal": ("Krippendorff’s α, ordinal", "the same, where a tie lies between the two responses"),
}
METHODS = (
    *COEFFICIENTS.values(),
    ("n/a", "nobody varies, or nothing was judged twice: there is nothing to compute, which is neither 0 nor 1"),
    ("Intervals", "95 %; bootstrap over rows for agreement and length, Wilson’s for shares of questions"),
    (
        "Position",
        "how often the response shown first beats the last; sides are drawn by a coin, so the exact binomial test holds",
    ),
    (
        "A model",
        "is asked about each pair in both orders; tested are the pairs in which one place won more often than the other, by the "
        "exact test of McNemar",
    ),
    ("Gold", "share of pairs with a known answer that were judged right; of a model, with the preference that the rows have"),
    ("Others", "mean Cohen’s κ with each other annotator"),
)


def write_report(folder: RunFolder, figures: Mapping[str, Any], left: int) -> None:
    """Write report.md and report.html; `left`: questions that nobody has answered yet."""
    found = tuple(_findings(figures, left))
    then = [f"`rlhf dpo` and `rlhf train-rm` read the preferences: `data: {{train: {folder.preferences}}}`."]
    sections = (
        in_short(found, then),
        Section("findings", "Findings", found),
        Section("agreement", "Agreement", (_agreement(figures),)),
        Section("annotators", "Annotators", (_annotators(figures),)),
        Section("biases", "Biases", (_biases(figures),)),
        Section("methods", "Methods", (Definitions(METHODS),)),
    )
    lead = f"{count(figures['verdicts'], 'verdict')} by {', '.join(figures['annotators'])}; {count(left, 'question')} left."
    write(folder, f"{folder.path.resolve().name}: labels", lead, sections)


def _interval(own: Mapping[str, Any]) -> Interval:
    return Interval(own["value"], own["low"], own["high"])


def _findings(figures: Mapping[str, Any], left: int) -> Iterator[Finding]:
    if left:
        yield Finding("warning", "Not finished:", f"{count(left, 'question')} left; the same command with --resume goes on.")
    position = figures["position_bias"]
    if position and position["p_value"] < LEVEL:
        side = "first" if position["value"] > 0.5 else "last"
        text = (
            f"in {percent_with_interval(_interval(position))} of {count(position['n'], 'question')} the response shown first was "
        )
        yield Finding(
            "warning",
            f"The {side} one is favoured:",
            f"{text}better; a fair coin is that far off with p = {position['p_value']:.2g}.",
        )
    tested = {name: own["position_bias"] for name, own in figures["annotators"].items() if own["position_bias"]}
    for name, own in tested.items() if len(tested) > 1 else ():
        if own["p_value"] * len(tested) < LEVEL:  # Bonferroni
            yield Finding(
                "warning", f"{name} favours a side:", f"{percent(own['value'])} for the first, p = {own['p_value']:.2g}."
            )
    for name, own in figures["annotators"].items():
        if own["gold"] and own["gold"]["high"] < KNOWN:
            text = f"{percent_with_interval(_interval(own['gold']))} of {count(own['gold']['n'], 'pair')} with a known answer."
            yield Finding("warning", f"{name} is often wrong where the answer is known:", text)
    for name, own in figures["annotators"].items():
        if (both := own["contradictions"]) and both["value"] > OFTEN:
            text = (
                f"the same place won in {percent_with_interval(_interval(both))} of {count(both['n'], 'pair')} in both orders; "
            )
            yield Finding("warning", f"{name} contradicts itself:", f"{text}their probabilities are near ½.")
    length = figures["length_bias"]
    if length and not length["low"] <= 0.5 <= length["high"]:
        which = "longer" if length["value"] > 0.5 else "shorter"
        text = f"the longer response was better in {percent_with_interval(_interval(length))}; that may be right, or a habit."
        yield Finding("note", f"The {which} one is mostly preferred:", text)
    alpha = figures["agreement"]["krippendorff"]
    if alpha is None:
        yield Finding("note", "No agreement is measured:", "no row was judged by two annotators who differ at all.")
    else:
        kind, words = (
            ("better", "more than chance") if alpha["low"] > 0 else ("open", "no more than chance would, as far as can be told")
        )
        text = f"Krippendorff’s α is {number(alpha['value'])} ({number(alpha['low'])} to {number(alpha['high'])})."
        yield Finding(kind, f"Annotators agree {words}:", text)  # type: ignore[arg-type]


def _cell(own: Mapping[str, Any] | None) -> Cell:
    return "n/a" if own is None else _interval(own)


def _agreement(figures: Mapping[str, Any]) -> Table:
    rows = tuple((COEFFICIENTS[name][0], _cell(own)) for name, own in figures["agreement"].items())
    return Table(
        "Agreement beyond chance: 1 is perfect, 0 is chance", (Column("Coefficient"), Column("Value", 0.0, (-1.0, 1.0))), rows
    )


def _annotators(figures: Mapping[str, Any]) -> Table:
    share = (0.0, 1.0)
    names = ("Verdicts", "Skipped", "Ties")
    columns = (
        Column("Annotator"),
        *map(Column, names),
        Column("Gold", None, share),
        Column("Others"),
        Column("First", 0.5, share),
        Column("Median time"),
    )
    rows = tuple(
        (
            name,
            *(f"{own[key.lower()]:,}" for key in names),
            _cell(own["gold"]),
            "n/a" if own["others"] is None else number(own["others"]),
            _cell(own["position_bias"]),
            "n/a" if own["seconds"] is None else duration(own["seconds"]["median"]),
        )
        for name, own in figures["annotators"].items()
    )
    return Table("Each annotator", columns, rows)


def _biases(figures: Mapping[str, Any]) -> Table:
    cycles, position = figures["cycles"], figures["position_bias"]
    rows: tuple[tuple[Cell, ...], ...] = (
        ("the response shown first is better", _cell(position), f"p = {position['p_value']:.2g}" if position else ""),
        ("the longer response is better", _cell(figures["length_bias"]), ""),
        ("triples that go in a circle", percent(cycles["share"]), f"{cycles['cyclic']:,} of {cycles['triples']:,}"),
    )
    return Table(
        "What beside the responses may have moved verdicts", (Column("Share"), Column("Value", 0.5, (0.0, 1.0)), Column("")), rows
    )
