"""What the figures of an evaluation say, in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

from rlhf_cli.evaluation.eval_json import About, AskedJudge, EvaluationResult
from rlhf_cli.evaluation.intervals import apart
from rlhf_cli.evaluation.overoptimisation import Peak, Point
from rlhf_cli.evaluation.winrate import WinRate
from rlhf_cli.figures import Interval, number, percent_with_interval, with_interval
from rlhf_cli.metrics import golds, metric
from rlhf_cli.reports.document import Finding, Kind

NAMED = 4  # models of one finding that are named with their figures; the others are in the tables
CHANCE = 0.5
MORE = 0.05  # a share that is higher by less than this is not worth a word, however certain
MOSTLY = 0.5


def judge_of(about: About) -> str:
    """Who compares, in words."""
    judge = about.judge
    if isinstance(judge, AskedJudge):
        return f"{judge.path} (a local model)" if judge.path else f"{judge.model} (an endpoint)"
    return {"gold": "gold", "reward": "the reward", None: "nobody"}.get(judge) or f"the term {judge}"


def step_of(point: Point | Peak) -> str:
    """Where in its series it is, in words."""
    return f"step {point.step}" if point.n is None else f"n = {point.n}"


def findings(result: EvaluationResult) -> list[Finding]:
    """What a person wants to know first."""
    parts = (_compared, _length, _golds, at_equal_kl, _optimised, _variety, _endings, _text, _preferences)
    return [said for part in parts for said in part(result)]


def _leaning(rate: Interval) -> Kind:
    return "better" if rate.low > CHANCE else "worse" if rate.high < CHANCE else "open"


def _named(own: dict[str, Interval], names: list[str], say: Callable[[Interval], str]) -> str:
    return ", ".join(f"{name} {say(own[name])}" for name in names[:NAMED]) + _others(names)


def _others(names: list[str]) -> str:
    return f"; {len(names) - NAMED} more in the table" if len(names) > NAMED else ""


def _compared(result: EvaluationResult) -> Iterator[Finding]:
    baseline, judge, rates = result.about.baseline, judge_of(result.about), result.winrate
    among = f", and holds among {len(rates)} models (Holm)" if len(rates) > 1 else ""
    heads: tuple[tuple[Kind | Literal["chance"], str, str], ...] = (
        ("better", "Better than", f"the 95 % interval is above 50 %{among}"),
        ("worse", "Worse than", f"the 95 % interval is below 50 %{among}"),
        ("open", "Not told apart from", "the 95 % interval includes 50 %; more prompts narrow it"),
        (
            "chance",
            "Perhaps by chance apart from",
            f"the 95 % interval leaves out 50 %, as one of {len(rates)} may by chance (Holm)",
        ),
    )
    told = apart({name: own.rate for name, own in rates.items()}, CHANCE)
    kinds = {
        name: "chance" if _leaning(own.rate) != "open" and name not in told else _leaning(own.rate) for name, own in rates.items()
    }
    ties = [name for name, own in rates.items() if own.ties == 1]
    if ties:
        yield Finding("warning", "No difference at all:", f"by {judge}, every comparison of {', '.join(ties)} is a tie.")
    for kind, head, meaning in heads:
        names = [name for name in rates if kinds[name] == kind and name not in ties]
        names.sort(key=lambda name: abs(rates[name].rate.mean - CHANCE), reverse=kind != "open")
        if names:
            first = rates[names[0]]
            said = f"{names[0]}'s responses are preferred by {judge} to {baseline}'s in {percent_with_interval(first.rate)} of "
            said += f"{first.n:,} comparisons"
            said += "".join(f"; {name}'s in {percent_with_interval(rates[name].rate)}" for name in names[1:NAMED])
            yield Finding("open" if kind == "chance" else kind, f"{head} {baseline}", f"({meaning}): {said}{_others(names)}.")


def _length(result: EvaluationResult) -> Iterator[Finding]:
    """Where the rate at equal length is another one: outside its interval, or on another side of a half.

    The largest change first. Of a model that cannot be told apart from the baseline there is no gain or loss to explain.
    """
    changed = {name: own for name, own in result.winrate.items() if _follows_length(own)}
    names = sorted(changed, key=lambda name: -abs(changed[name].rate.mean - changed[name].length_controlled.mean))
    if names:
        said = []
        for name in names[:NAMED]:
            raw, equal = changed[name].rate, changed[name].length_controlled
            rates = f"{name} wins {percent_with_interval(raw)}, at equal length {percent_with_interval(equal)}"
            said.append(f"{rates}: {_effect(str(result.about.baseline), raw, equal)}")
        yield Finding("warning", "Length plays a part.", f"{'; '.join(said)}{_others(names)}.")


def _follows_length(own: WinRate) -> bool:
    raw, equal = own.rate, own.length_controlled
    crosses = (raw.mean - CHANCE) * (equal.mean - CHANCE) < 0
    alike = equal.low <= raw.mean <= equal.high and _leaning(raw) == _leaning(equal) and not crosses
    return _leaning(raw) != "open" and not alike


def _effect(baseline: str, raw: Interval, equal: Interval) -> str:
    after = _leaning(equal)
    if _leaning(raw) == "better" and after == "open":
        return f"that it is better than {baseline} for its content cannot be told"
    if _leaning(raw) == "better" and after == "worse":
        return "its gain is its length, and beside that it is worse"
    if _leaning(raw) == "worse" and after != "worse":
        return "its length is what it loses by"
    return "its gain is partly length" if equal.mean < raw.mean else "its length costs it comparisons"


def _golds(result: EvaluationResult) -> Iterator[Finding]:
    """The highest and the lowest mean of each gold term, or of the score where there is none."""
    known = golds(result.metrics)
    scored, standard = "objective/scores" in result.metrics, result.standard
    for name in known or ["objective/scores"] * scored:
        own = result.of(name)
        order = sorted(own, key=lambda model: own[model].mean)
        best, worst = order[-1], order[0]
        alike = math.isclose(own[best].mean, own[worst].mean, abs_tol=1e-9)
        said = f"{'the same for all' if alike and len(own) > 1 else f'highest for {best}'}, {with_interval(own[best])}"
        if not alike:
            said += f"; lowest for {worst}, {with_interval(own[worst])}"
        if standard in own and standard not in (best, worst) and not alike:
            said += f"; {standard} has {with_interval(own[standard])}"
        title = metric(name).titled(name)
        yield Finding("note", f"Mean {title[0].lower()}{title[1:]}:" if len(own) > 1 else f"{title}:", f"{said}.")
    if scored and not known and not isinstance(result.about.judge, AskedJudge):
        said = "Nothing measured whether the responses are better by another yardstick than the reward itself: add gold."
        yield Finding("note", "No second yardstick.", said)


def at_equal_kl(result: EvaluationResult) -> Iterator[Finding]:
    """Which of two series has more gold where both are equally far from the start."""
    own, start = result.at_kl, result.about.reference
    if own is None:
        return
    a, b, end = own.a.name, own.b.name, own.shorter.points[-1].kl
    if own.mean is None:
        near = " and ".join(series.name for series in (own.a, own.b) if len(series.points) == 1)
        said = f"the KL of {near} from {start} cannot be told from 0. train longer, or evaluate on more prompts."
        yield Finding("warning", f"{a} and {b} have no range of KL in common:", said)
        return
    kind: Kind = "better" if own.mean.low > 0 else "worse" if own.mean.high < 0 else "open"
    amount = {"better": "more gold", "worse": "less gold", "open": "not surely more or less gold"}[kind]
    said = f"the difference is {with_interval(own.mean)} in the mean over 0 to {number(end.mean)} nats from {start}, and "
    said += f"{with_interval(own.matched[-1].difference)} at the end of that range."
    for series in (own.a, own.b):
        if sum(point.kl.mean <= end.mean for point in series.points) < 3:
            said += f" {series.name} has hardly a model in that range: its line there is a guess. keep more checkpoints."
    yield Finding(kind, f"{a} has {amount} than {b} at equal KL:", said)


def _optimised(result: EvaluationResult) -> Iterator[Finding]:
    """Where training, or choosing, began to fool the reward; Gao, Schulman & Hilton 2023."""
    for series, points in result.series.items():
        fits, last = result.fits.get(series), points[-1]
        if fits is None or fits.peak is None:
            continue
        top = fits.peak
        at_top = next(point for point in points if (point.step, point.n) == (top.step, top.n))
        where = f"highest at {step_of(top)} ({number(top.gold)}, KL {number(top.kl)} nats)"
        if at_top.place == last.place:
            said = f"It is {where}, the last point: no sign that the reward is fooled."
            yield Finding("note", f"{series}: gold did not fall.", said)
        elif top.fall.low <= 0:
            said = f"Gold is {where}, the last point is lower by {with_interval(top.fall)}, an interval that includes 0."
            yield Finding("open", f"{series}: whether gold fell cannot be told.", said)
        else:
            proxy = at_top.proxy.mean
            rose = last.proxy.mean > proxy
            said = (
                f"gold is {where} and falls by {with_interval(top.fall)} to {step_of(last)}, while the proxy "
                f"{'rises' if rose else 'goes'} from {number(proxy)} to {number(last.proxy.mean)}. The interval holds for "
                "whichever point is the highest; the fall itself is, if anything, overstated."
            )
            head = f"{series} fools the reward after {step_of(top)}:" if rose else f"{series}: gold fell after {step_of(top)}:"
            yield Finding("warning", head, said)


def _variety(result: EvaluationResult) -> Iterator[Finding]:
    own, standard = result.of("response/duplicates"), result.standard
    base = own.get(standard) if standard else None
    found = [
        name
        for name, share in own.items()
        if (base and share.low > base.high and share.mean > base.mean + MORE) or (not base and share.mean > MOSTLY)
    ]
    if found:
        beside = f", against {percent_with_interval(base)} of {standard}'s" if base else ""
        said = f"responses that another one of the same model repeats word for word: {_named(own, found, percent_with_interval)}"
        yield Finding("warning", "Less variety:", f"{said}{beside}.")


def _endings(result: EvaluationResult) -> Iterator[Finding]:
    own, standard = result.of("response/eos_rate"), result.standard
    base = own.get(standard) if standard else None
    found = [
        name
        for name, share in own.items()
        if share.mean < MOSTLY or (base and share.high < base.low and share.mean < base.mean - MORE)
    ]
    if found:
        beside = f", against {percent_with_interval(base)} of {standard}'s" if base and standard not in found else ""
        named = _named(own, found, percent_with_interval)
        said = (
            f"responses that end within {result.about.max_new_tokens} tokens: {named}{beside}. "
            "The others are judged as torsos: `rollout.max_new_tokens` may be too low, or the model no longer stops."
        )
        yield Finding("warning", "Responses are cut off:", said)


def _text(result: EvaluationResult) -> Iterator[Finding]:
    own, standard = result.of("perplexity"), result.standard
    base = own.get(standard) if standard else None
    dearer = [name for name, mean in own.items() if base and mean.low > base.high]
    if base and dearer:
        against = f"against {with_interval(base)} of {standard}; the intervals do not overlap"
        yield Finding("note", "The texts became less likely:", f"perplexity {_named(own, dearer, with_interval)}, {against}.")


def _preferences(result: EvaluationResult) -> Iterator[Finding]:
    """Judges one by one, the implicit rewards of policies in a sentence."""
    policies = []
    for name, own in result.preferences.items():
        rate, length = own.rate, own.length_baseline
        if rate is None:
            yield Finding("warning", "Preferences:", f"there is no pair to measure {name} by.")
            continue
        share = percent_with_interval(rate.interval)
        said = f"{name} ({own.kind}) agrees with the data in {share} of {rate.pairs:,} pairs"
        if own.weaknesses:
            said += f"; that {' and '.join(own.weaknesses)}."
            if length and length.explains(rate):
                yield Finding("warning", "Length explains it:", f"{said} {length.what_would_tell}")
            else:
                yield Finding("warning", "Hardly a judge:", said)
        elif own.kind == "policy":
            policies.append(f"{name} {share}")
        else:
            by_length = length and f"; always the {length.prefers} response reaches {percent_with_interval(length.interval)}"
            yield Finding("note", "Preferences:", f"{said}{by_length or ''}.")
    if policies:
        yield Finding("note", "Implicit rewards", f"agree with the data in these shares of the pairs: {'; '.join(policies)}.")
