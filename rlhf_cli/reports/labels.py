"""The reports of labels and of revisions: how far those who judged agree, what has moved them, how far texts have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cli.figures import Interval, count, duration, number, percent, percent_with_interval
from rlhf_cli.reports.document import Cell, Column, Definitions, Finding, Kind, Section, Table
from rlhf_cli.reports.write import write
from rlhf_cli.runs.folder import RunFolder

LEVEL = 0.05
KNOWN = 0.7  # share of gold questions below which an annotator is worth a talk
OFTEN = 0.25  # share of pairs in which a judge contradicts itself, from which on it is worth a word
LOST = 0.1  # share of prompts that no revision came of, from which on it is worth a warning
SHARE = (0.0, 1.0)
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
DRIFT = {
    "words": "Words",
    "distinct_1": "Distinct 1",
    "distinct_2": "Distinct 2",
    "overlap_1": "Overlap 1",
    "overlap_2": "Overlap 2",
    "unchanged": "Unchanged",
}
DRIFT_METHODS = (
    ("Words", "what white space separates; the mean of a text"),
    ("Distinct n", "different word n-grams over all of them (Li et al. 2016)"),
    ("Overlap n", "share of a text’s n-grams that the answer has too, each as often as there (ROUGE-n’s precision; Lin 2004)"),
    ("Unchanged", "share of texts that are the answer still"),
    ("Intervals", "95 %, by prompts"),
)


def write_report(folder: RunFolder, figures: Mapping[str, Any], left: int) -> None:
    """Of labels; `left`: questions that nobody has answered yet."""
    found = tuple(_findings(figures, left))
    then = [f"`rlhf dpo` and `rlhf train-rm` read the preferences: `data: {{train: {folder.preferences}}}`."]
    sections = (
        Section("findings", "Findings", found),
        Section("agreement", "Agreement", (_agreement(figures),)),
        Section("annotators", "Annotators", (_annotators(figures),)),
        Section("biases", "Biases", (_biases(figures),)),
        Section("methods", "Methods", (Definitions(METHODS),)),
    )
    lead = f"{count(figures['verdicts'], 'verdict')} by {', '.join(figures['annotators'])}; {count(left, 'question')} left."
    write(folder, "labels", lead, found, then, sections)


def _interval(own: Mapping[str, Any]) -> Interval:
    return Interval(own["value"], own["low"], own["high"])


def _cell(own: Mapping[str, Any] | None) -> Cell:
    return "n/a" if own is None else _interval(own)


def _share(own: Mapping[str, Any], what: str) -> str:
    return f"{percent_with_interval(_interval(own))} of {count(own['n'], what)}"


def _findings(figures: Mapping[str, Any], left: int) -> Iterator[Finding]:
    if left:
        yield Finding("warning", "Not finished:", f"{count(left, 'question')} left; the same command with --resume goes on.")
    position, annotators = figures["position_bias"], figures["annotators"]
    if position and position["p_value"] < LEVEL:
        said = f"in {_share(position, 'question')} the response shown first was better; "
        said += f"a fair coin is that far off with p = {position['p_value']:.2g}."
        yield Finding("warning", f"The {'first' if position['value'] > 0.5 else 'last'} one is favoured:", said)
    tested = {name: own["position_bias"] for name, own in annotators.items() if own["position_bias"]}
    for name, own in tested.items() if len(tested) > 1 else ():
        if own["p_value"] * len(tested) < LEVEL:  # Bonferroni
            said = f"{percent(own['value'])} for the first, p = {own['p_value']:.2g}."
            yield Finding("warning", f"{name} favours a side:", said)
    for name, own in annotators.items():
        if (gold := own["gold"]) and gold["high"] < KNOWN:
            head = f"{name} is often wrong where the answer is known:"
            yield Finding("warning", head, f"{_share(gold, 'pair')} with a known answer.")
    for name, own in annotators.items():
        if (both := own["contradictions"]) and both["value"] > OFTEN:
            said = f"the same place won in {_share(both, 'pair')} in both orders; their probabilities are near ½."
            yield Finding("warning", f"{name} contradicts itself:", said)
    length = figures["length_bias"]
    if length and not length["low"] <= 0.5 <= length["high"]:
        said = f"the longer response was better in {percent_with_interval(_interval(length))}; that may be right, or a habit."
        yield Finding("note", f"The {'longer' if length['value'] > 0.5 else 'shorter'} one is mostly preferred:", said)
    alpha = figures["agreement"]["krippendorff"]
    if alpha is None:
        yield Finding("note", "No agreement is measured:", "no row was judged by two annotators who differ at all.")
    else:
        kind: Kind = "better" if alpha["low"] > 0 else "open"
        words = "more than chance" if alpha["low"] > 0 else "no more than chance would, as far as can be told"
        said = f"Krippendorff’s α is {number(alpha['value'])} ({number(alpha['low'])} to {number(alpha['high'])})."
        yield Finding(kind, f"Annotators agree {words}:", said)


def _agreement(figures: Mapping[str, Any]) -> Table:
    rows = tuple((COEFFICIENTS[name][0], _cell(own)) for name, own in figures["agreement"].items())
    columns = Column("Coefficient"), Column("Value", 0.0, (-1.0, 1.0))
    return Table("Agreement beyond chance: 1 is perfect, 0 is chance", columns, rows)


def _annotators(figures: Mapping[str, Any]) -> Table:
    names = ("Verdicts", "Skipped", "Ties")
    measured = Column("Gold", None, SHARE), Column("Others"), Column("First", 0.5, SHARE), Column("Median time")
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
    return Table("Each annotator", (Column("Annotator"), *map(Column, names), *measured), rows)


def _biases(figures: Mapping[str, Any]) -> Table:
    cycles, position = figures["cycles"], figures["position_bias"]
    rows: tuple[tuple[Cell, ...], ...] = (
        ("the response shown first is better", _cell(position), f"p = {position['p_value']:.2g}" if position else ""),
        ("the longer response is better", _cell(figures["length_bias"]), ""),
        ("triples that go in a circle", percent(cycles["share"]), f"{cycles['cyclic']:,} of {cycles['triples']:,}"),
    )
    columns = Column("Share"), Column("Value", 0.5, SHARE), Column("")
    return Table("What beside the responses may have moved verdicts", columns, rows)


def write_revisions(folder: RunFolder, figures: Mapping[str, Any]) -> None:
    """Of critique and revision: what came of the prompts, and how far the texts have moved."""
    found = tuple(_of_revisions(figures))
    then = f"`rlhf sft` reads `data: {{train: {folder.supervised}}}`; `rlhf train-rm` and `rlhf dpo` read `{folder.pairs}`, "
    named = ((f"revision {own['round']}" if own["round"] else "answer", own) for own in figures["rounds"])
    rows = tuple((name, *(_cell(own[key]) for key in DRIFT)) for name, own in named)
    columns = (Column("Text"), *map(Column, DRIFT.values()))
    sections = (
        Section("findings", "Findings", found),
        Section("drift", "Length and drift", (Table("The answers and their revisions", columns, rows),) if rows else ()),
        Section("methods", "Methods", (Definitions(DRIFT_METHODS),)),
    )
    lead = f"{count(figures['prompts'], 'prompt')}; {count(figures['sft'], 'row')} for sft, {count(figures['pairs'], 'pair')}."
    write(folder, "revisions", lead, found, [f"{then}which has other prompts."], sections)


def _of_revisions(figures: Mapping[str, Any]) -> Iterator[Finding]:
    if figures["lost"]:
        share = figures["lost"] / figures["prompts"]
        said = f"of {percent(share)} of the prompts the answer or a revision is empty or was cut off (rollout.max_new_tokens)."
        yield Finding("warning" if share > LOST else "note", f"{count(figures['lost'], 'prompt')} lost:", said)
    if figures["unchanged"]:
        yield Finding("note", f"{count(figures['unchanged'], 'pair')} less:", "the last revision is the answer as it was.")
    if figures["rounds"]:
        first, last = figures["rounds"][0]["words"], figures["rounds"][-1]["words"]
        if first and last and not (first["low"] <= last["value"] and last["low"] <= first["value"]):
            said = f"{last['value']:.1f} words instead of {first['value']:.1f}; what learns from the pairs learns that too."
            yield Finding("warning", f"Revisions are {'longer' if last['value'] > first['value'] else 'shorter'}:", said)
