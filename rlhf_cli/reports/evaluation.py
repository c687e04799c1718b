"""The report of an evaluation, report.md and report.html, from its figures and its samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from rlhf_cli.evaluation.eval_json import About, AskedJudge, Concord, EvaluationResult
from rlhf_cli.evaluation.overoptimisation import Fit
from rlhf_cli.evaluation.samples import Sample, Samples
from rlhf_cli.figures import Interval, count, number, percent, percent_with_interval, sampling, with_interval
from rlhf_cli.metrics import METRICS, metric
from rlhf_cli.reports.document import Column, Definitions, Example, Examples, Finding, Items, Paragraph, Response, Section, Table
from rlhf_cli.reports.findings_evaluation import CHANCE, findings, judge_of, step_of
from rlhf_cli.reports.plots_evaluation import draw_evaluation
from rlhf_cli.reports.write import write
from rlhf_cli.runs.folder import RunFolder

SKEWED_BELOW = 100  # prompts: with fewer the bootstrap of a skewed mean covers 92 % where it says 95 (docs/evaluation.md)
EXAMPLES = 3  # of the largest gains, and of the largest losses, of each model
OTHER = "Other"  # the table of metrics that the catalogue has no column for
SHARE = (0.0, 1.0)
TERMS: dict[str, tuple[tuple[str, str], ...]] = {
    "winrate": (
        ("Win rate", "share of comparisons with the baseline's responses to the same prompts that are won, ties half"),
        ("At equal length", "win rate that a logistic regression on the difference in tokens gives at 0 (Dubois et al. 2024)"),
    ),
    "exploitability": (
        ("Exploitability", "how much more often than half the other model that beats it most is preferred to it"),
    ),
    "ratings": (("Elo", "Bradley–Terry strength by maximum likelihood; 400 points are odds of 10 to 1, the baseline has 1000"),),
    "preferences": (
        ("Accuracy", "share of pairs whose better response has the higher score, ties half"),
        ("ECE", "expected calibration error: mean distance of the accuracy from the confidence σ(|margin|), by bins"),
        ("By length alone", "accuracy of always preferring the longer, or always the shorter, response"),
        ("Ahead of length", "the difference of the two, on the same pairs"),
    ),
    "votes": (
        ("Vote of n", "is the answer right that most of n responses give, of a tie the first one; mean over subsets of n"),
        ("Weighted", "each vote counts as much as its reward, by the logistic function if some reward is not from 0 to 1"),
        ("Best", "the response with the highest reward decides alone"),
    ),
    "overoptimisation": (
        ("Proxy", "the score that is optimised; gold is what it stands for"),
        ("Best of n", "of n responses the best by score, mean over all subsets; its KL is log n − (n − 1)/n, an upper bound"),
    ),
    "at_kl": (("At equal KL", "on straight lines in √KL from the reference through each series' models, and no further"),),
}
"""Part of a result → (term, what it is) of all that its tables name."""


def write_report(folder: RunFolder, result: EvaluationResult, samples: Mapping[str, Samples]) -> None:
    """Write the report, the most important first; what was not measured is left out."""
    found = findings(result) or [Finding("note", "Nothing to compare:", "the tables have all there is.")]
    pictures = draw_evaluation(result)
    sections = (
        Section("findings", "Findings", tuple(found)),
        Section("winrates", "Win rates", (*_win_rates(result), *_pairwise(result), *pictures["winrates"])),
        Section("votes", "Votes", (*_votes(result), *pictures["votes"])),
        Section("overoptimisation", "Over-optimisation", (*pictures["overoptimisation"], *_optimisation(result))),
        Section("kl", "Gold at equal KL", (*pictures["kl"], *_at_kl(result))),
        Section("metrics", "Metrics", tuple(_metrics(result))),
        Section("ratings", "Ratings", (*_ratings(result), *pictures["ratings"])),
        Section("preferences", "Preferences", (*_preferences(result), *pictures["preferences"])),
        Section("samples", "Side by side", tuple(_side_by_side(result, samples))),
        Section("notes", "Notes", (Items(tuple(result.about.notes)),) if result.about.notes else ()),
        Section("methods", "Methods", tuple(_methods(result))),
    )
    write(folder, "evaluation", _lead(result), found, _next(result), sections)


def _next(result: EvaluationResult) -> Iterator[str]:
    if any(own.rate.low <= CHANCE <= own.rate.high for own in result.winrate.values()):
        yield "More prompts, or more responses to each, tell models apart that the intervals do not."
    if result.models:
        yield "Read samples side by side before you trust a figure. `rlhf export RUN FOLDER` writes the model that you take."


def _lead(result: EvaluationResult) -> str:
    about = result.about
    said = []
    if result.models:
        said.append(count(len(result.models), "model") + (f", {_drawn(about)}." if about.prompts else "."))
    if about.judge is not None:
        said.append(f"Judged by {judge_of(about)}" + (f" against {about.baseline}." if about.baseline else "."))
    if about.reference:
        said.append(f"KL from {about.reference}.")
    if result.preferences:
        said.append(f"{count(len(result.preferences), 'judge')} compared with preference data.")
    return " ".join(said) or "Nothing was measured."


def _drawn(about: About) -> str:
    return f"{count(about.responses, 'response')} to each of {count(about.prompts, 'prompt')}"


def _win_rates(result: EvaluationResult) -> Iterator[Table]:
    if not result.winrate:
        return
    rate, equal = Column("Win rate", CHANCE, SHARE), Column("At equal length", CHANCE, SHARE)
    columns = Column("Model"), rate, equal, Column("Ties"), Column("Comparisons")
    best_first = sorted(result.winrate.items(), key=lambda rate: -rate[1].mean)
    rows = tuple((name, own.rate, own.length_controlled, f"{own.ties:.3f}", f"{own.n:,}") for name, own in best_first)
    yield Table(f"Preferred to {result.about.baseline} by {judge_of(result.about)}", columns, rows)


def _pairwise(result: EvaluationResult) -> Iterator[Table]:
    """Everybody against everybody, of the models that all met, by who decides the win rates."""
    own = result.exploitability
    if own:
        columns = Column("Model"), Column("Exploitability", 0.0), *(Column(f"beats {name}") for name in own)
        shares = list(result.pairwise.values())[-1]
        rows: list[tuple[str | Interval, ...]] = [
            (a, Interval(*own[a].values()), *("" if a == b else percent(shares[a][b]) for b in own)) for a in own
        ]
        yield Table(f"Each against each, by {judge_of(result.about)}", columns, tuple(rows))


def _votes(result: EvaluationResult) -> Iterator[Table]:
    if votes := result.voted:
        columns = Column("Model: winner"), *(Column(f"n = {each.n}", None, SHARE) for each in next(iter(votes.values())))
        rows: tuple[tuple[str | Interval, ...], ...] = tuple(
            (name, *(each.interval for each in own)) for name, own in votes.items()
        )
        yield Table("Accuracy of the answer of n responses", columns, rows)


def _ratings(result: EvaluationResult) -> Iterator[Table]:
    own, standard = result.ratings, result.standard
    columns = Column("Model"), Column("Elo", own[standard].mean if standard in own else None)
    rows = tuple(sorted(own.items(), key=lambda rating: -rating[1].mean))
    if rows:
        yield Table("Elo ratings from all comparisons", columns, rows)


def _metrics(result: EvaluationResult) -> Iterator[Table]:
    """A table for each kind of metric; the lines through the bars are the baseline's means."""
    marks = result.models[result.standard] if result.standard else {}
    tables: dict[str, list[str]] = {row.column.table: [] for row in METRICS if row.column} | {OTHER: []}
    for name in result.metrics:
        column = metric(name).column
        tables[column.table if column else OTHER].append(name)
    for table, names in tables.items():
        if names:
            heads = (Column(metric(name).titled(name), marks[name].mean if name in marks else None) for name in names)
            rows = tuple((model, *(own.get(name, "") for name in names)) for model, own in result.models.items())
            yield Table(table, (Column("Model"), *heads), rows)


def _preferences(result: EvaluationResult) -> Iterator[Finding | Table]:
    judges = result.preferences
    if not judges:
        return
    columns = (
        Column("Judge"),
        Column("Kind"),
        Column("Accuracy", CHANCE, SHARE),
        Column("By length alone", CHANCE, SHARE),
        Column("Ahead of length", 0.0),
        *(Column(head) for head in ("Pairs", "Prompts", "Ties", "ECE", "ECE if calibrated", "Mean confidence")),
    )
    rows: list[tuple[str | Interval, ...]] = []
    for name, own in judges.items():
        if own.rate and own.weaknesses:
            said = f"its accuracy, {percent_with_interval(own.rate.interval)}, {' and '.join(own.weaknesses)}."
            yield Finding("warning", f"{name}:", said)
        length = own.length_baseline
        rows.append(
            (
                name,
                own.kind if own.beta is None else f"{own.kind}, β = {number(own.beta)}",
                own.rate.interval if own.rate else "no pairs",
                *((length.interval, length.lead) if length else ("", "")),
                *(f"{each:,}" for each in (own.pairs, own.prompts, own.ties)),
                *("" if each is None else f"{each:.3f}" for each in (own.ece, own.ece_expected, own.confidence)),
            )
        )
    yield Table("Agreement with preference data", columns, tuple(rows))
    yield from _agreement("How often two judges of the same pairs agree", result.agreement)
    subsets = tuple(
        (f"{name}: {subset}", rate.interval, f"{rate.pairs:,}", f"{rate.prompts:,}")
        for name, each in judges.items()
        for subset, rate in each.subsets.items()
    )
    if subsets:
        of_subsets = Column("Judge: subset"), Column("Accuracy", CHANCE, SHARE), Column("Pairs"), Column("Prompts")
        yield Table("The same by subset", of_subsets, subsets)
    for subset, between in result.agreement_by_subset.items():
        yield from _agreement(f"How often two judges agree on {subset}", between)


def _agreement(title: str, found: Concord) -> Iterator[Table]:
    """A row and a column for each judge; with two there is nothing that the table of preferences lacks."""
    if len(found) > 2:
        columns = (Column("Judge"), *(Column(name, CHANCE, SHARE) for name in found))
        rows = tuple((name, *(own[other].interval if other in own else "" for other in found)) for name, own in found.items())
        yield Table(title, columns, rows)


def _optimisation(result: EvaluationResult) -> Iterator[Table]:
    columns = tuple(map(Column, ("Model", "At", "KL, nats", "Proxy", "Gold")))
    for series, points in result.series.items():
        rows = tuple((point.model, step_of(point), point.kl, point.proxy, point.gold or "") for point in points)
        yield Table(f"Points of {series}", columns, rows)
    fitted = tuple(
        (series, of, form, *_fitted(fit))
        for series, own in result.fits.items()
        for of, fits in (("proxy", own.proxy), ("gold", own.gold))
        if fits
        for form, fit in (("d (α − β d)", fits.bon), ("d (α − β log d)", fits.rl))
        if fit
    )
    if fitted:
        heads = ("Series", "Of", "Gain over the start at d = √KL", "α", "β", "R²", "Nearer of the two")
        yield Table("Fits (Gao, Schulman & Hilton 2023)", tuple(map(Column, heads)), fitted)


def _at_kl(result: EvaluationResult) -> Iterator[Table]:
    own = result.at_kl
    if own and own.mean:
        a, b = own.a.name, own.b.name
        heads = Column("KL, nats"), Column(a), Column(b), Column(f"{a} less {b}", 0.0)
        rows = [(with_interval(at.kl), at.a, at.b, at.difference) for at in own.matched]
        mean = ("mean up to there, even in √KL", "", "", own.mean)
        yield Table(f"Gold at equal KL from {result.about.reference}", heads, (*rows, mean))


def _fitted(fit: Fit) -> tuple[str, ...]:
    """α and β with their intervals, how much the form explains, and in how many draws of prompts it is the nearer one."""
    bounds = (fit.alpha, fit.alpha_low, fit.alpha_high), (fit.beta, fit.beta_low, fit.beta_high)
    said = (
        number(mean) if low is None or high is None else with_interval(Interval(mean, low, high)) for mean, low, high in bounds
    )
    return (*said, f"{fit.r2:.3f}", "" if fit.preferred is None else percent(fit.preferred))


def _side_by_side(result: EvaluationResult, samples: Mapping[str, Samples]) -> Iterator[Paragraph | Examples]:
    """Each model's responses beside the baseline's: by the judge's scores those that gain most and lose most, else the first."""
    if samples:
        yield Paragraph("All responses of all models: `samples.jsonl`.")
    base = samples.get(result.standard) if result.standard else None
    for name, own in samples.items():
        if own is not base or len(samples) == 1:
            title = name if base is None else f"{name} beside {result.standard}"
            if examples := _examples(result.about, own, base):
                yield Examples(title, examples)


def _examples(about: About, own: Samples, base: Samples | None) -> tuple[Example, ...]:
    if base is None or own is base:
        return tuple(Example(_prompt(sample), (_response(sample),)) for sample, *_ in own.own[: 2 * EXAMPLES])
    every = zip(chain(*own.own), chain(*base.own), strict=True)
    pairs = [(mine, theirs) for mine, theirs in every if mine.response != theirs.response]
    worths = [(_worth(mine, about), _worth(theirs, about)) for mine, theirs in pairs]
    gains = [None if mine is None or theirs is None else mine - theirs for mine, theirs in worths]
    known = sorted(((gain, at) for at, gain in enumerate(gains) if gain is not None), key=lambda each: (-each[0], each[1]))
    up = _of_each_prompt([at for gain, at in known if gain > 0], pairs)
    down = _of_each_prompt([at for gain, at in reversed(known) if gain < 0], pairs)
    chosen = [*up, *down] if known else _of_each_prompt(range(len(pairs)), pairs)
    return tuple(_example(*pairs[at], gains[at]) for at in chosen)


def _of_each_prompt(order: Iterable[int], pairs: Sequence[tuple[Sample, Sample]]) -> list[int]:
    found: dict[int, int] = {}
    for at in order:
        found.setdefault(pairs[at][0].row, at)
    return list(found.values())[:EXAMPLES]


def _example(mine: Sample, theirs: Sample, gain: float | None) -> Example:
    note = "" if gain is None else f"{'Gain' if gain > 0 else 'Loss'} of {number(abs(gain))}"
    return Example(_prompt(mine), (_response(theirs), _response(mine)), note)


def _worth(sample: Sample, about: About) -> float | None:
    """To the judge; without one, by gold, else by the score. None: no number tells."""
    if isinstance(about.judge, AskedJudge):
        return None
    has_gold = any(name.startswith("gold/") for name in sample.terms)
    return sample.worth(about.judge or ("gold" if has_gold else "reward"))


def _prompt(sample: Sample) -> str:
    prompt = sample.prompt
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _response(sample: Sample) -> Response:
    figures = {name: value for name, value in sample.terms.items() if value is not None}
    if sample.score is not None and len([name for name in figures if name.startswith("reward/")]) != 1:
        figures["objective/scores"] = sample.score
    facts = [f"{metric(name).titled(name)} {number(value)}" for name, value in figures.items()]
    facts.append(count(sample.tokens, "token") + ("" if sample.ended else ", did not end"))
    return Response(sample.model, sample.response, ", ".join(facts))


def _methods(result: EvaluationResult) -> Iterator[Items | Definitions]:
    about = result.about
    said = []
    if about.prompts:
        said.append(
            f"{_drawn(about)}, drawn at {sampling(about.temperature, about.warping)}, at most "
            f"{count(about.max_new_tokens, 'token')} each, seed {about.seed}."
        )
    if result.models:
        said += [
            "All intervals are 95 % intervals. They tell how far the figures would move with other prompts, not with other "
            "training runs. Of 20 such intervals one is expected to miss; the more models are compared, the more chances.",
            f"Means, shares, win rates and ratings: bootstrap over prompts ({about.resamples:,} resamples), a prompt's "
            "responses staying together, with percentiles widened to Student's t (Hesterberg 2015). All models share the same "
            "resamples, so comparisons of two models are paired. That two models' intervals overlap does not show them equal.",
        ]
    if 0 < about.prompts < SKEWED_BELOW:
        said.append(
            "Figures with a long tail, such as a KL or a length, have intervals that hold the truth a little less often than "
            f"they say where there are fewer than {SKEWED_BELOW} prompts."
        )
    if about.prompts:
        said.append("Distinct words and pairs, and duplicates: jackknife over prompts, since a resample repeats prompts.")
    if result.preferences:
        said.append(
            "Agreement with preference data: Wilson's interval, of as many observations as pairs of one prompt are worth."
        )
    if said:
        yield Items(tuple(said))
    columns = [(metric(name).titled(name), metric(name).column) for name in result.metrics]
    terms = [(title, column.meaning if column else "not described") for title, column in columns]
    terms += [term for part, own in TERMS.items() if vars(result)[part] for term in own]
    if terms:
        yield Definitions(tuple(terms))
