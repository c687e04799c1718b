"""What an evaluation found, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.figures import Interval, give_or_take, number, with_interval
from rlhf_cli.metrics import golds, metric
from rlhf_cli.reports.findings_evaluation import at_equal_kl, step_of
from rlhf_cli.reports.text import visible

NAME_LENGTH = 40  # characters of a name that are shown; of a longer one its end


def terminal_table(result: EvaluationResult) -> str:
    """The figures of each model in a line, votes and preferences beneath, where gold peaks, and which has more at equal KL."""
    tables = [_aligned(rows) for rows in (_model_rows(result), _vote_rows(result), _preference_rows(result)) if len(rows) > 1]
    said = [*_peaks(result), *(visible(f"{found.head} {found.text}") for found in at_equal_kl(result))]
    return "\n\n".join(part for part in (*tables, "\n".join(said)) if part)


def _model_rows(result: EvaluationResult) -> list[list[str]]:
    """The head, and a row for each model; columns that no model has are left out."""

    def mean(own: Interval) -> str:
        return number(own.mean)

    rates = {name: own.rate for name, own in result.winrate.items()}
    columns: list[tuple[str, Mapping[str, Interval], Callable[[Interval], str]]] = [
        *((metric(name).titled(name).lower(), result.of(name), give_or_take) for name in golds(result.metrics)),
        ("score", result.of("objective/scores"), give_or_take),
        ("win rate", rates, with_interval),
        ("KL", result.of("objective/kl"), mean),
        ("length", result.of("response/length"), mean),
        ("Elo", result.ratings, give_or_take),
        ("perplexity", result.of("perplexity"), mean),
    ]
    known = [column for column in columns if column[1]]
    rows = [["model", *(head for head, _, _ in known)]]
    for model in dict.fromkeys([*result.models, *rates, *result.ratings]):
        rows.append([_name(model), *(say(own[model]) if model in own else "" for _, own, say in known)])
    return rows


def _vote_rows(result: EvaluationResult) -> list[list[str]]:
    rows = [[_name(name), *(with_interval(each.interval) for each in own)] for name, own in result.voted.items()]
    head = ["accuracy of votes", *(f"n = {each.n}" for own in [*result.voted.values()][:1] for each in own)]
    return [head, *rows]


def _preference_rows(result: EvaluationResult) -> list[list[str]]:
    rows = [["preferences", "accuracy", "by length alone", "pairs"]]
    for name, own in result.preferences.items():
        beside = f"{with_interval(own.length_baseline.interval)}, {own.length_baseline.prefers}" if own.length_baseline else ""
        rows.append([_name(name), with_interval(own.rate.interval) if own.rate else "no pairs", beside, f"{own.pairs:,}"])
    return rows


def _peaks(result: EvaluationResult) -> list[str]:
    lines = []
    for series in result.series:
        fits = result.fits.get(series)
        if fits and (top := fits.peak):
            where = f"{number(top.gold)} at {step_of(top)}, KL {number(top.kl)} nats"
            if top.fall.mean:
                lines.append(f"{_name(series)}: gold peaks at {where}; {with_interval(top.fall)} lower at the end")
            else:
                lines.append(f"{_name(series)}: gold is highest at the last point, {where}")
    return lines


def _name(name: str) -> str:
    shown = visible(name).replace("\n", " ").replace("\t", " ")
    return shown if len(shown) <= NAME_LENGTH else f"…{shown[1 - NAME_LENGTH :]}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
