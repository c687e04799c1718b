"""What an evaluation says, in plain words: from eval.json alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.figures import Interval, number, percent_with_interval, with_interval
from rlhf_cli.reports.page import Finding, Kind

Result = dict[str, Any]

NAMED = 4
"""Models of one finding that are named with their figures; the others are in the tables."""
CHANCE = 0.5
MORE = 0.05
"""A share that is higher by less than this is not worth a word, however certain."""
MOSTLY = 0.5


def measure(own: dict[str, Any], key: str = "mean") -> Interval:
    return Interval.from_json(own, key)


def judge_of(about: Result) -> str:
    """Who compares, in words."""
    judge = about["judge"]
    if isinstance(judge, dict):
        return f"{judge['model']} (an endpoint)"
    return {"gold": "gold", "reward": "the reward", None: "nobody"}.get(judge) or f"the term {judge}"


def standard_of(result: Result) -> str | None:
    """The model that others are held against: the baseline, else the reference; None without either."""
    about, models = result["about"], result["models"]
    return next((name for name in (about["baseline"], about["reference"]) if name in models), None)


def series_of(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The points of over-optimisation by series, each in its order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(result["overoptimisation"], key=place):
        found.setdefault(point["series"], []).append(point)
    order = dict.fromkeys(point["series"] for point in result["overoptimisation"])
    return {name: found[name] for name in order}


def place(point: dict[str, Any]) -> int:
    """A point's, or a peak's, in the order of its series."""
    return int((point["step"] if point["n"] is None else point["n"]) or 0)


def step_of(point: dict[str, Any]) -> str:
    return f"step {point['step']}" if point["n"] is None else f"n = {point['n']}"


def leaning(own: Interval) -> Kind:
    """Is a win rate above a half, below, or can it not be told?"""
    return "better" if own.low > CHANCE else "worse" if own.high < CHANCE else "open"


def findings(result: Result) -> list[Finding]:
    """What a person wants to know first."""
    return [said for part in PARTS for said in part(result)]


def _compared(result: Result) -> Iterator[Finding]:
    baseline, judge = result["about"]["baseline"], judge_of(result["about"])
    heads: tuple[tuple[Kind, str, str], ...] = (
        ("better", "Better than", "the 95 % interval is above 50 %"),
        ("worse", "Worse than", "the 95 % interval is below 50 %"),
        ("open", "Not told apart from", "the 95 % interval includes 50 %; more prompts narrow it"),
    )
    ties = [name for name, rate in result["winrate"].items() if rate["ties"] == 1]
    if ties:
        yield Finding("warning", "No difference at all:", f"by {judge}, every comparison of {', '.join(ties)} is a tie.")
    for kind, head, meaning in heads:
        own = {name: rate for name, rate in result["winrate"].items() if leaning(measure(rate)) == kind and name not in ties}
        names = sorted(own, key=lambda name: abs(own[name]["mean"] - CHANCE), reverse=kind != "open")
        if names:
            first = own[names[0]]
            said = (
                f"{names[0]}'s responses are preferred by {judge} to {baseline}'s in {percent_with_interval(measure(first))} of "
            )
            said += f"{first['n']:,} comparisons" + "".join(
                f"; {name}'s in {percent_with_interval(measure(own[name]))}" for name in names[1:NAMED]
            )
            yield Finding(kind, f"{head} {baseline}", f"({meaning}): {said}{_others(names)}.")


def _others(names: list[str]) -> str:
    return f"; {len(names) - NAMED} more in the table" if len(names) > NAMED else ""


def _length(result: Result) -> Iterator[Finding]:
    """Where the rate at equal length is another one: outside its interval, or on another side of a half.

    The largest change first. Of a model that cannot be told apart from the baseline there is no gain or loss to explain.
    """
    baseline = result["about"]["baseline"]
    told: list[tuple[float, str]] = []
    for name, own in result["winrate"].items():
        if not own["length_controlled"]:
            continue
        raw, equal = measure(own), measure(own["length_controlled"])
        if leaning(raw) == "open":
            continue
        if equal.low <= raw.mean <= equal.high and leaning(raw) == leaning(equal) and not _crosses(raw, equal):
            continue
        rates = f"{name} wins {percent_with_interval(raw)}, at equal length {percent_with_interval(equal)}"
        said = f"{rates}: {_effect(name, baseline, raw, equal)}"
        told.append((abs(raw.mean - equal.mean), said))
    if told:
        words = [said for _, said in sorted(told, key=lambda each: -each[0])]
        yield Finding("warning", "Length plays a part.", f"{'; '.join(words[:NAMED])}{_others(words)}.")


def _crosses(raw: Interval, equal: Interval) -> bool:
    return (raw.mean - CHANCE) * (equal.mean - CHANCE) < 0


def _effect(name: str, baseline: str, raw: Interval, equal: Interval) -> str:
    """What the length does to a win rate."""
    after = leaning(equal)
    if leaning(raw) == "better" and after == "open":
        return f"that it is better than {baseline} for its content cannot be told"
    if leaning(raw) == "better" and after == "worse":
        return "its gain is its length, and beside that it is worse"
    if leaning(raw) == "worse" and after != "worse":
        return "its length is what it loses by"
    return "its gain is partly length" if equal.mean < raw.mean else "its length costs it comparisons"


def _golds(result: Result) -> Iterator[Finding]:
    """The highest and the lowest mean of each gold term, or of the score where there is none."""
    names = dict.fromkeys(name for own in result["models"].values() for name in own)
    golds = [name for name in names if name.startswith("gold/")]
    scored = "objective/scores" in names
    for name in golds or ["objective/scores"] * scored:
        own = {model: measure(figures[name]) for model, figures in result["models"].items() if name in figures}
        order = sorted(own, key=lambda model: own[model].mean)
        best, worst = order[-1], order[0]
        said = f"highest for {best}, {with_interval(own[best])}"
        if len(own) > 1:
            said += f"; lowest for {worst}, {with_interval(own[worst])}"
        standard = standard_of(result)
        if standard in own and standard not in (best, worst):
            said += f"; {standard} has {with_interval(own[standard])}"
        yield Finding(
            "note", f"Mean {title(name)[0].lower()}{title(name)[1:]}:" if len(own) > 1 else f"{title(name)}:", f"{said}."
        )
    if scored and not golds and not isinstance(result["about"]["judge"], dict):
        said = "Nothing measured whether the responses are better by another yardstick than the reward itself: add gold."
        yield Finding("note", "No second yardstick.", said)


def _optimised(result: Result) -> Iterator[Finding]:
    """Where training, or choosing, began to fool the reward; Gao, Schulman & Hilton 2023."""
    for series, points in series_of(result).items():
        top = (result["fits"].get(series) or {}).get("peak")
        if not top:
            continue
        last = points[-1]
        where = f"gold is highest at {step_of(top)} ({number(top['gold'])}, KL {number(top['kl'])} nats)"
        if place(top) == place(last):
            yield Finding(
                "note", f"{series}: gold did not fall.", f"It is {where[8:]}, the last point: no sign that the reward is fooled."
            )
            continue
        fall = measure(top["fall"])
        if fall.low <= 0:
            said = f"{where}, the last point is lower by {with_interval(fall)}, an interval that includes 0."
            yield Finding("open", f"{series}: whether gold fell cannot be told.", f"{said[0].upper()}{said[1:]}")
            continue
        peak = next(point for point in points if place(point) == place(top))
        rose = last["proxy"] > peak["proxy"]
        proxy = f"the proxy {'rises' if rose else 'goes'} from {number(peak['proxy'])} to {number(last['proxy'])}"
        said = (
            f"{where} and falls by {with_interval(fall)} to {step_of(last)}, while {proxy}. The peak was chosen by the numbers "
            "that the fall is measured with, so the fall is, if anything, overstated."
        )
        head = f"{series} fools the reward after {step_of(top)}:" if rose else f"{series}: gold fell after {step_of(top)}:"
        yield Finding("warning", head, said)


def _variety(result: Result) -> Iterator[Finding]:
    """Responses that other responses repeat word for word."""
    own, standard = _shares(result, "response/duplicates")
    base = own.get(standard) if standard else None
    found = [
        name
        for name, share in own.items()
        if (base and share.low > base.high and share.mean > base.mean + MORE) or (not base and share.mean > MOSTLY)
    ]
    if found:
        named = [f"{name} {percent_with_interval(own[name])}" for name in found[:NAMED]]
        beside = f", against {percent_with_interval(base)} of {standard}'s" if base else ""
        said = f"responses that another one of the same model repeats word for word: {', '.join(named)}{_others(found)}{beside}."
        yield Finding("warning", "Less variety:", said)


def _endings(result: Result) -> Iterator[Finding]:
    own, standard = _shares(result, "response/eos_rate")
    base = own.get(standard) if standard else None
    found = [
        name
        for name, share in own.items()
        if share.mean < MOSTLY or (base and share.high < base.low and share.mean < base.mean - MORE)
    ]
    if found:
        named = [f"{name} {percent_with_interval(own[name])}" for name in found[:NAMED]]
        beside = f", against {percent_with_interval(base)} of {standard}'s" if base and standard not in found else ""
        limit = result["about"]["max_new_tokens"]
        said = (
            f"responses that end within {limit} tokens: {', '.join(named)}{_others(found)}{beside}. The others are judged as "
            "torsos: rollout.max_new_tokens may be too low, or the model no longer stops."
        )
        yield Finding("warning", "Responses are cut off:", said)


def _shares(result: Result, name: str) -> tuple[dict[str, Interval], str | None]:
    own = {model: measure(figures[name]) for model, figures in result["models"].items() if name in figures}
    return own, standard_of(result)


def _text(result: Result) -> Iterator[Finding]:
    """Models that predict the texts worse than the one they are held against."""
    own, standard = _shares(result, "perplexity")
    base = own.get(standard) if standard else None
    dearer = [name for name, figure in own.items() if base and figure.low > base.high]
    if base and dearer:
        named = [f"{name} {with_interval(own[name])}" for name in dearer[:NAMED]]
        against = f"against {with_interval(base)} of {standard}; the intervals do not overlap"
        said = f"perplexity {', '.join(named)}{_others(dearer)}, {against}."
        yield Finding("note", "The texts became less likely:", said)


def _preferences(result: Result) -> Iterator[Finding]:
    """Judges one by one, the implicit rewards of policies in a sentence."""
    policies = []
    for name, own in result["preferences"].items():
        if own["accuracy"] is None:
            yield Finding("warning", "Preferences:", f"there is no pair to measure {name} by.")
            continue
        share = percent_with_interval(measure(own, "accuracy"))
        said = f"{name} ({own['kind']}) agrees with the data in {share} of {own['pairs']:,} pairs"
        if own["faults"]:
            yield Finding("warning", "Hardly a judge:", f"{said}; that {' and '.join(own['faults'])}.")
        elif own["kind"] == "policy":
            policies.append(f"{name} {share}")
        else:
            length = own["length_baseline"]
            reached = length and percent_with_interval(measure(length, "accuracy"))
            yield Finding(
                "note",
                "Preferences:",
                f"{said}" + (f"; always the {length['prefers']} response reaches {reached}." if length else "."),
            )
    if policies:
        yield Finding("note", "Implicit rewards", f"agree with the data in these shares of the pairs: {'; '.join(policies)}.")


PARTS: tuple[Callable[[Result], Iterator[Finding]], ...] = (
    _compared,
    _length,
    _golds,
    _optimised,
    _variety,
    _endings,
    _text,
    _preferences,
)

METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("gold/", "Gold", "Reward", "what people really want, where it can be computed; before its weight; mean over the responses"),
    ("objective/scores", "Score", "Reward", "all terms of the reward together, penalties taken off; mean over the responses"),
    ("reward/", "Reward", "Reward", "one term of the reward, before its weight; mean over the responses"),
    (
        "objective/kl",
        "KL, nats",
        "Distance",
        "log π − log π_ref of a whole response, mean over the model's own responses: how far it went from the reference",
    ),
    ("objective/kl_per_token", "KL per token", "Distance", "the same, summed over all responses and divided by their tokens"),
    (
        "perplexity",
        "Perplexity",
        "Distance",
        "e to the mean negative log-likelihood of a token of the texts' responses; lower is better",
    ),
    ("response/length", "Length, tokens", "Form", "tokens of a response, its end included"),
    ("response/eos_rate", "Ended", "Form", "share of responses that end within the limit"),
    ("response/distinct_1", "Distinct words", "Form", "different words / all words of the model's responses (Li et al. 2016)"),
    (
        "response/distinct_2",
        "Distinct pairs",
        "Form",
        "the same of neighbouring pairs of words; compare only at equal numbers of responses",
    ),
    (
        "response/duplicates",
        "Duplicates",
        "Form",
        "share of responses that another response of the model, to any prompt, repeats",
    ),
)
"""Metric, or beginning of metrics if it ends in / → its title, its table, and what it is."""
OTHER = "Other"


def metric(name: str) -> tuple[str, str, str, str] | None:
    """The row of METRICS for a name in eval.json."""
    return next((row for row in METRICS if (name.startswith(row[0]) if row[0].endswith("/") else name == row[0])), None)


def title(name: str) -> str:
    """As a column is headed.

    >>> title("gold/helpful"), title("gold/gold"), title("response/length"), title("unheard/of")
    ('Gold helpful', 'Gold', 'Length, tokens', 'unheard/of')
    """
    row = metric(name)
    if row is None:
        return name
    own = name.removeprefix(row[0]) if row[0].endswith("/") else ""
    return f"{row[1]} {own}".strip() if own.lower() != row[1].lower() else row[1]
