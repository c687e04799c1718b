"""What an evaluation found, from eval.json and samples.jsonl: on the terminal, as report.md and as report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.figures import Interval, count, give_or_take, mean_and_bounds, number, percent_with_interval, with_interval
from rlhf_cli.files import write_atomic
from rlhf_cli.reports.eval_plots import draw_evaluation
from rlhf_cli.reports.eval_words import (
    CHANCE,
    METRICS,
    OTHER,
    Result,
    findings,
    judge_of,
    measure,
    metric,
    series_of,
    standard_of,
    step_of,
    title,
)
from rlhf_cli.reports.markdown import cell, table
from rlhf_cli.reports.page import (
    Block,
    Cell,
    Column,
    Definitions,
    Example,
    Examples,
    Finding,
    Items,
    Picture,
    Section,
    Side,
    Table,
    page,
    visible,
)

Line = dict[str, Any]

EXAMPLES = 3
"""Of the largest gains, and of the largest losses, of each model."""
NAME_LENGTH, PROMPT_LENGTH, RESPONSE_LENGTH, TEXT_LENGTH = 200, 400, 800, 4000
"""Characters of a cell of report.md that are shown."""
TERMINAL_NAME = 40
"""Characters of a name on the terminal; of a longer one its end is shown."""


def terminal_table(result: Result) -> str:
    """The figures of each model in a line, those of preferences beneath, and where gold peaks in each series."""
    tables = [_aligned(rows) for rows in (_model_rows(result), _preference_rows(result)) if len(rows) > 1]
    peaks = "\n".join(_peaks(result))
    return "\n\n".join(part for part in (*tables, peaks) if part)


def _model_rows(result: Result) -> list[list[str]]:
    """The head, and a row for each model; columns that no model has are left out."""
    models, rates, ratings = result["models"], result["winrate"], result["ratings"]
    names = dict.fromkeys(name for own in models.values() for name in own)
    columns: list[tuple[str, Callable[[str], str]]] = []

    def add(head: str, own: dict[str, Any], say: Callable[[dict[str, Any]], str]) -> None:
        if own:
            columns.append((head, lambda model: say(own[model]) if model in own else ""))

    def add_metric(name: str, head: str, say: Callable[[dict[str, Any]], str]) -> None:
        add(head, {model: own[name] for model, own in models.items() if name in own}, say)

    for name in (name for name in names if name.startswith("gold/")):
        add_metric(name, title(name).lower(), lambda own: give_or_take(measure(own)))
    add_metric("objective/scores", "score", lambda own: give_or_take(measure(own)))
    add("win rate", rates, lambda own: with_interval(measure(own)))
    add_metric("objective/kl", "KL", lambda own: number(own["mean"]))
    add_metric("response/length", "length", lambda own: number(own["mean"]))
    add("Elo", ratings, lambda own: give_or_take(measure(own, "elo")))
    add_metric("perplexity", "perplexity", lambda own: number(own["mean"]))
    every = dict.fromkeys([*models, *rates, *ratings])
    return [["model", *(head for head, _ in columns)], *([_name(model), *(say(model) for _, say in columns)] for model in every)]


def _preference_rows(result: Result) -> list[list[str]]:
    rows = [["preferences", "accuracy", "by length alone", "pairs"]]
    for name, own in result["preferences"].items():
        length = own["length_baseline"]
        beside = f"{with_interval(measure(length, 'accuracy'))}, {length['prefers']}" if length else ""
        rows.append([_name(name), _accuracy_text(own), beside, f"{own['pairs']:,}"])
    return rows


def _peaks(result: Result) -> list[str]:
    """A line for each series with gold."""
    lines = []
    for series in series_of(result):
        if top := (result["fits"].get(series) or {}).get("peak"):
            where = f"{number(top['gold'])} at {step_of(top)}, KL {number(top['kl'])} nats"
            if top["fall"]["mean"]:
                lines.append(f"{_name(series)}: gold peaks at {where}; {with_interval(measure(top['fall']))} lower at the end")
            else:
                lines.append(f"{_name(series)}: gold is highest at the last point, {where}")
    return lines


def _name(name: str) -> str:
    shown = visible(name).replace("\n", " ").replace("\t", " ")
    return shown if len(shown) <= TERMINAL_NAME else f"…{shown[1 - TERMINAL_NAME :]}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def write_report(folder: Path, result: Result, samples: Sequence[Line]) -> None:
    """Write plots/*.png, report.md and report.html. `samples`: the lines of samples.jsonl. Can be repeated at any time."""
    name, lead = folder.resolve().name, _lead(result)
    sections = _sections(result, samples, draw_evaluation(folder / "plots", result))
    write_atomic(folder / "report.md", _markdown(f"{name}: evaluation", lead, sections))
    write_atomic(folder / "report.html", page(f"{name}: evaluation", lead, sections))


def _lead(result: Result) -> str:
    about, models = result["about"], result["models"]
    said = []
    if models:
        said.append(count(len(models), "model") + (f", {_drawn(about)}." if about["prompts"] else "."))
    if about["judge"] is not None:
        said.append(f"Judged by {judge_of(about)}" + (f" against {about['baseline']}." if about["baseline"] else "."))
    if about["reference"]:
        said.append(f"KL from {about['reference']}.")
    if result["preferences"]:
        said.append(f"{count(len(result['preferences']), 'judge')} compared with preference data.")
    return " ".join(said) or "Nothing was measured."


def _drawn(about: Result) -> str:
    return f"{count(about['responses'], 'response')} to each of {count(about['prompts'], 'prompt')}"


def _sections(result: Result, samples: Sequence[Line], pictures: dict[str, list[Picture]]) -> list[Section]:
    """Everything there is to say, the most important first; what was not measured is left out."""
    found = findings(result) or [Finding("note", "Nothing to compare:", "the tables have all there is.")]
    sections = (
        Section("findings", "Findings", tuple(found)),
        Section("winrates", "Win rates", (*_win_rates(result), *pictures["winrates"])),
        Section("overoptimisation", "Over-optimisation", (*pictures["overoptimisation"], *_optimisation(result))),
        Section("metrics", "Metrics", tuple(_metrics(result))),
        Section("ratings", "Ratings", (*_ratings(result), *pictures["ratings"])),
        Section("preferences", "Preferences", (*_preferences(result), *pictures["preferences"])),
        Section("samples", "Side by side", tuple(_side_by_side(result, samples))),
        Section("notes", "Notes", (Items(tuple(result["about"]["notes"])),) if result["about"]["notes"] else ()),
        Section("methods", "Methods", tuple(_methods(result))),
    )
    return [section for section in sections if section.blocks]


def _win_rates(result: Result) -> list[Block]:
    rates, baseline = result["winrate"], result["about"]["baseline"]
    if not rates:
        return []
    columns = (
        Column("Model"),
        Column("Win rate", CHANCE, (0.0, 1.0)),
        Column("At equal length", CHANCE, (0.0, 1.0)),
        Column("Ties"),
        Column("Comparisons"),
    )
    rows = tuple(
        (
            name,
            measure(own),
            measure(own["length_controlled"]) if own["length_controlled"] else "",
            f"{own['ties']:.3f}",
            f"{own['n']:,}",
        )
        for name, own in rates.items()
    )
    return [Table(f"Preferred to {baseline} by {judge_of(result['about'])}", columns, rows)]


def _ratings(result: Result) -> list[Block]:
    ratings = result["ratings"]
    if not ratings:
        return []
    own = {name: measure(rating, "elo") for name, rating in ratings.items()}
    standard = standard_of(result)
    columns = Column("Model"), Column("Elo", own[standard].mean if standard in own else None)
    order = sorted(own, key=lambda name: -own[name].mean)
    return [Table("Elo ratings from all comparisons", columns, tuple((name, own[name]) for name in order))]


def _metrics(result: Result) -> list[Block]:
    """A table for each kind of metric; the lines through the bars are the baseline's means."""
    models, standard = result["models"], standard_of(result)
    names = list(dict.fromkeys(name for own in models.values() for name in own))
    kinds = {name: row[2] if (row := metric(name)) else OTHER for name in names}
    blocks: list[Block] = []
    for kind in dict.fromkeys([*(row[2] for row in METRICS), OTHER]):
        own = [name for name in names if kinds[name] == kind]
        if not own:
            continue
        marks = models[standard] if standard else {}
        columns = Column("Model"), *(Column(title(name), marks[name]["mean"] if name in marks else None) for name in own)
        rows = tuple(
            (model, *(measure(figures[name]) if name in figures else "" for name in own)) for model, figures in models.items()
        )
        blocks.append(Table(kind, columns, rows))
    return blocks


def _preferences(result: Result) -> list[Block]:
    own = result["preferences"]
    if not own:
        return []
    columns = (
        Column("Judge"),
        Column("Kind"),
        Column("Accuracy", CHANCE, (0.0, 1.0)),
        Column("By length alone", CHANCE, (0.0, 1.0)),
        Column("Ahead of length", 0.0),
        *(Column(head) for head in ("Pairs", "Prompts", "Ties", "ECE", "Mean confidence")),
    )
    rows = tuple(_preference_row(name, each) for name, each in own.items())
    warnings = [
        Finding(
            "warning",
            f"{name}:",
            f"its accuracy, {percent_with_interval(measure(each, 'accuracy'))}, {' and '.join(each['faults'])}.",
        )
        for name, each in own.items()
        if each["faults"]
    ]
    blocks: list[Block] = [*warnings, Table("Agreement with preference data", columns, rows)]
    subsets = tuple(
        (f"{name}: {subset}", measure(rate, "accuracy"), f"{rate['pairs']:,}", f"{rate['prompts']:,}")
        for name, each in own.items()
        for subset, rate in each["subsets"].items()
    )
    if subsets:
        of_subsets = (Column("Judge: subset"), Column("Accuracy", CHANCE, (0.0, 1.0)), Column("Pairs"), Column("Prompts"))
        blocks.append(Table("The same by subset", of_subsets, subsets))
    return blocks


def _preference_row(name: str, own: dict[str, Any]) -> tuple[Cell, ...]:
    length, kind = own["length_baseline"], own["kind"]
    beta = own["beta"]
    return (
        name,
        kind if beta is None else f"{kind}, β = {number(beta)}",
        measure(own, "accuracy") if own["accuracy"] is not None else "no pairs",
        measure(length, "accuracy") if length else "",
        measure(length["lead"]) if length else "",
        f"{own['pairs']:,}",
        f"{own['prompts']:,}",
        f"{own['ties']:,}",
        "" if own["ece"] is None else f"{own['ece']:.3f}",
        "" if own["confidence"] is None else f"{own['confidence']:.3f}",
    )


def _accuracy_text(own: dict[str, Any]) -> str:
    return with_interval(measure(own, "accuracy")) if own["accuracy"] is not None else "no pairs"


def _optimisation(result: Result) -> list[Block]:
    blocks: list[Block] = []
    columns = Column("Model"), Column("At"), Column("KL, nats"), Column("Proxy"), Column("Gold")
    for series, points in series_of(result).items():
        rows = tuple(
            (
                point["model"],
                step_of(point),
                *(
                    "" if point[name] is None else Interval(point[name], *(point["intervals"][name] or [point[name]] * 2))
                    for name in ("kl", "proxy", "gold")
                ),
            )
            for point in points
        )
        blocks.append(Table(f"Points of {series}", columns, rows))
    forms = {"bon": "d (α − β d)", "rl": "d (α − β log d)"}
    fitted = tuple(
        (series, value, forms[form], number(fit["alpha"]), number(fit["beta"]), f"{fit['r2']:.3f}")
        for series, fits in result["fits"].items()
        for value in ("proxy", "gold")
        for form in forms
        if (fit := ((fits or {}).get(value) or {}).get(form))
    )
    if fitted:
        heads = ("Series", "Of", "Gain over the start at d = √KL", "α", "β", "R²")
        blocks.append(Table("Fits (Gao, Schulman & Hilton 2023)", tuple(map(Column, heads)), fitted))
    return blocks


def _side_by_side(result: Result, samples: Sequence[Line]) -> list[Block]:
    """Each model's responses beside the baseline's: by the judge's scores those that gain most and lose most, else the first."""
    by_model: dict[str, dict[tuple[int, int], Line]] = {}
    for line in samples:
        by_model.setdefault(line["model"], {})[line["row"], line["number"]] = line
    if not by_model:
        return []
    standard = standard_of(result)
    base = by_model.get(standard) if standard else None
    groups = [
        Examples(name if base is None else f"{name} beside {standard}", _examples(result, name, own, base))
        for name, own in by_model.items()
        if base is None or name != standard or len(by_model) == 1
    ]
    return ["All responses of all models: samples.jsonl.", *(group for group in groups if group.own)]


def _examples(
    result: Result, name: str, own: dict[tuple[int, int], Line], base: dict[tuple[int, int], Line] | None
) -> tuple[Example, ...]:
    if base is None or own is base:
        first = [line for (_, number), line in sorted(own.items()) if number == 0][: 2 * EXAMPLES]
        return tuple(Example(_prompt(line), (_side(line),), "") for line in first)
    judge = result["about"]["judge"]
    pairs = [(own[key], base[key]) for key in sorted(own) if key in base and own[key]["response"] != base[key]["response"]]
    gains = [_gain(mine, theirs, judge) for mine, theirs in pairs]
    known = sorted(((gain, at) for at, gain in enumerate(gains) if gain is not None), key=lambda each: (-each[0], each[1]))
    up = _of_each_prompt([at for gain, at in known if gain > 0], pairs)
    down = _of_each_prompt([at for gain, at in reversed(known) if gain < 0], pairs)
    chosen = [*up, *down] if known else _of_each_prompt(range(len(pairs)), pairs)
    return tuple(_example(*pairs[at], gains[at]) for at in chosen)


def _of_each_prompt(order: Iterable[int], pairs: Sequence[tuple[Line, Line]]) -> list[int]:
    """The first few of different prompts."""
    found: dict[int, int] = {}
    for at in order:
        found.setdefault(pairs[at][0]["row"], at)
        if len(found) == EXAMPLES:
            break
    return list(found.values())


def _example(mine: Line, theirs: Line, gain: float | None) -> Example:
    note = "" if gain is None else f"{'Gain' if gain > 0 else 'Loss'} of {number(abs(gain))}"
    return Example(_prompt(mine), (_side(theirs), _side(mine)), note)


def _gain(mine: Line, theirs: Line, judge: Any) -> float | None:
    own, other = _judged(mine, judge), _judged(theirs, judge)
    return None if own is None or other is None else own - other


def _judged(line: Line, judge: Any) -> float | None:
    """What the judge compares responses by: the score, the sum of the gold terms, or one term. Without a judge, gold or score."""
    terms: dict[str, float] = line["terms"]
    golds = [value for name, value in terms.items() if name.startswith("gold/")]
    if isinstance(judge, dict):
        return None
    if judge == "reward" or (judge is None and not golds):
        found: float | None = line["score"]
        return found
    if judge in ("gold", None):
        return sum(golds) if golds else None
    return terms.get(f"reward/{judge}", terms.get(f"gold/{judge}"))


def _prompt(line: Line) -> str:
    prompt = line["prompt"]
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _side(line: Line) -> Side:
    figures = {**line["terms"], **({} if line["score"] is None else {"objective/scores": line["score"]})}
    if len([name for name in line["terms"] if name.startswith("reward/")]) == 1:
        figures.pop("objective/scores", None)
    facts = [f"{title(name)} {number(value)}" for name, value in figures.items()]
    facts.append(count(line["tokens"], "token") + ("" if line["ended"] else ", did not end"))
    return Side(line["model"], line["response"], ", ".join(facts))


def _methods(result: Result) -> list[Block]:
    """How it was measured, and what each figure is."""
    about, models = result["about"], result["models"]
    drawn = bool(about["prompts"])
    said = []
    if drawn:
        said.append(
            f"{_drawn(about)}, drawn at temperature "
            f"{about['temperature']:g}, at most {count(about['max_new_tokens'], 'token')} each, seed {about['seed']}."
        )
    if models:
        said += [
            "All intervals are 95 % intervals. They tell how far the figures would move with other prompts, not with other "
            "training runs. Of 20 such intervals one is expected to miss; the more models are compared, the more chances.",
            f"Means, shares, win rates and ratings: bootstrap over prompts ({about['resamples']:,} resamples), a prompt's "
            "responses staying together, with percentiles widened to Student's t (Hesterberg 2015). All models share the same "
            "resamples, so comparisons of two models are paired. That two models' intervals overlap does not show them equal.",
        ]
    if drawn:
        said.append("Distinct words and pairs, and duplicates: jackknife over prompts, since a resample repeats prompts.")
    if result["preferences"]:
        said.append("Agreement with preference data: Wilson's interval, all pairs of a prompt being one observation.")
    definitions = [_definition(name) for name in dict.fromkeys(name for own in models.values() for name in own)]
    definitions += [row for kind, row in TERMS_OF if result[kind]]
    return [*([Items(tuple(said))] if said else []), *([Definitions(tuple(definitions))] if definitions else [])]


def _definition(name: str) -> tuple[str, str]:
    row = metric(name)
    return title(name), row[3] if row else "not described"


TERMS_OF: tuple[tuple[str, tuple[str, str]], ...] = (
    ("winrate", ("Win rate", "share of comparisons with the baseline's responses to the same prompts that are won, ties half")),
    (
        "winrate",
        (
            "At equal length",
            "win rate that a logistic regression on the difference in tokens gives at 0 (Dubois et al. 2024)",
        ),
    ),
    ("ratings", ("Elo", "Bradley–Terry strength by maximum likelihood; 400 points are odds of 10 to 1, the baseline has 1000")),
    ("preferences", ("Accuracy", "share of pairs whose better response has the higher score, ties half")),
    (
        "preferences",
        ("ECE", "expected calibration error: mean distance of the accuracy from the confidence σ(|margin|), by bins"),
    ),
    ("preferences", ("By length alone", "accuracy of always preferring the longer, or always the shorter, response")),
    ("preferences", ("Ahead of length", "the difference of the two, on the same pairs")),
    ("overoptimisation", ("Proxy", "the score that is optimised; gold is what it stands for")),
    (
        "overoptimisation",
        (
            "Best of n",
            "the response with the best score of n, mean over all subsets; its KL is log n − (n − 1)/n, an upper bound",
        ),
    ),
)
"""Section of eval.json → a (term, what it is) of it."""


def _markdown(name: str, lead: str, sections: Sequence[Section]) -> str:
    lines = [f"# {cell(name, NAME_LENGTH)}", cell(lead, TEXT_LENGTH)]
    for section in sections:
        lines += [f"## {section.title}", *(_written(block) for block in section.blocks)]
    return "\n\n".join(lines) + "\n"


def _written(block: Block) -> str:
    """A block in Markdown."""
    match block:
        case str():
            return cell(block, TEXT_LENGTH)
        case Finding(_, head, text):
            return f"**{cell(head, NAME_LENGTH)}** {cell(text, TEXT_LENGTH)}"
        case Table(caption, columns, rows):
            heads = [cell(column.name, NAME_LENGTH) for column in columns]
            return f"**{cell(caption, NAME_LENGTH)}**\n\n" + table(heads, [[_written_cell(each) for each in row] for row in rows])
        case Picture():
            return f"![{cell(block.title, NAME_LENGTH)}](plots/{block.name})"
        case Items(items):
            return "\n".join(f"- {cell(item, TEXT_LENGTH)}" for item in items)
        case Definitions(definitions):
            return "\n".join(f"- **{cell(term, NAME_LENGTH)}**: {cell(what, TEXT_LENGTH)}" for term, what in definitions)
        case Examples(caption, own):
            return f"### {cell(caption, NAME_LENGTH)}\n\n" + _written_examples(own)


def _written_examples(own: Sequence[Example]) -> str:
    names = [cell(side.model, NAME_LENGTH) for side in own[0].sides]
    noted = any(example.note for example in own)
    rows = []
    for example in own:
        said = [f"{cell(side.text, RESPONSE_LENGTH)} _({cell(side.facts, NAME_LENGTH)})_" for side in example.sides]
        rows.append([cell(example.prompt, PROMPT_LENGTH), *said, *([example.note] if noted else [])])
    return table(["prompt", *names, *(["difference"] if noted else [])], rows)


def _written_cell(own: Cell) -> str:
    if isinstance(own, str):
        return cell(own, NAME_LENGTH)
    mean, reach = mean_and_bounds(own)
    return f"{mean} ({reach})" if reach else mean
