"""Numbers as people read them, a mean with its interval, and figures as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

NOISE = 1e-6
"""What is smaller is rounding: the log-ratios of a policy that is its own reference."""


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def to_plain(value: Any) -> Any:
    """A figure, or many in lists and dictionaries, as JSON is made of; a dataclass or an interval becomes its fields."""
    if isinstance(value, Interval):
        return value._asdict()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: to_plain(own) for key, own in value.items()}
    return [to_plain(own) for own in value] if isinstance(value, list | tuple) else value


def from_plain(kind: Any, entry: Any) -> Any:
    """What `to_plain` made of such a value; other keys are left out. KeyError, TypeError, AttributeError: another shape."""
    has_fields = is_dataclass(kind) or kind is Interval
    if has_fields:
        types = get_type_hints(kind)
        return kind(**{key: from_plain(types[key], own) for key, own in entry.items() if key in types})
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict:
        return {key: from_plain(inner[1], own) for key, own in entry.items()}
    if origin in (list, tuple):
        return origin(from_plain(inner[0], own) for own in entry)
    # Of a union: an object is the one among its types that has fields.
    classes = [each for each in inner if is_dataclass(each) or each is Interval]
    return from_plain(classes[0], entry) if classes and isinstance(entry, dict) else entry


def short(value: float, sign: str = "") -> str:
    """A number that stands alone: four digits; rounding noise is 0.

    >>> short(0.123456), short(-3e-9), short(2.0, "+")
    ('0.1235', '0', '+2')
    """
    return f"{value:{sign}.4g}" if abs(value) >= NOISE else "0"


def number(value: float) -> str:
    """A number beside means with intervals, in their digits.

    >>> number(0.6), number(12.34), number(4.8)
    ('0.600', '12.3', '4.80')
    """
    return rounded(value, decimals([value]))


def decimals(values: Sequence[float]) -> int | None:
    """Digits behind the point: three digits of the largest value, shares to a thousandth, and how far the values differ.

    None: they are too large or too small for that.

    >>> decimals([0.721, 1.0]), decimals([12.3, 11.8]), decimals([1043.0]), decimals([5.001, 5.004]), decimals([1e-7])
    (3, 1, 0, 3, None)
    """
    largest, spread = max(map(abs, values)), max(values) - min(values)
    if not 1e-4 <= largest < 1e6:
        return None
    told = min(6, -math.floor(math.log10(spread))) if spread else 0
    usual = 3 if 0.01 <= largest < 2 else 2 - math.floor(math.log10(largest))
    return max(0, usual, told)


def rounded(value: float, places: int | None) -> str:
    """A number with as many digits behind the point as `decimals` says.

    >>> rounded(0.6, 3), rounded(-0.0001, 2), rounded(1.5e9, None)
    ('0.600', '0.00', '1.5e+09')
    """
    if places is None:
        return f"{value:.3g}" if abs(value) >= 1e-9 else "0"
    return f"{round(value, places) + 0.0:.{places}f}"


def mean_and_bounds(own: Interval) -> tuple[str, str]:
    """A mean and its interval; no interval where it is the mean itself.

    >>> mean_and_bounds(Interval(0.721, 0.68, 0.759))
    ('0.721', '0.680 to 0.759')
    """
    places = decimals(own)
    mean, low, high = (rounded(value, places) for value in own)
    return mean, "" if own.low == own.high else f"{low} to {high}"


def with_interval(own: Interval) -> str:
    """A mean with its interval.

    >>> with_interval(Interval(12.34, 11.8, 12.9))
    '12.3 (11.8 to 12.9)'
    """
    mean, bounds = mean_and_bounds(own)
    return f"{mean} ({bounds})" if bounds else mean


def give_or_take(own: Interval) -> str:
    """A mean ± half its interval.

    >>> give_or_take(Interval(0.721, 0.69, 0.752))
    '0.721 ±0.031'
    """
    places, half = decimals(own), (own.high - own.low) / 2
    return rounded(own.mean, places) + (f" ±{rounded(half, places)}" if half else "")


def percent(share: float | None, sign: str = "") -> str:
    return "n/a" if share is None else f"{100 * share:{sign}.1f} %"


def percent_with_interval(own: Interval) -> str:
    """A share with its interval.

    >>> percent_with_interval(Interval(0.721, 0.68, 0.759))
    '72.1 % (68.0 to 75.9 %)'
    """
    if own.low == own.high:
        return percent(own.mean)
    return f"{percent(own.mean)} ({100 * own.low:.1f} to {percent(own.high)})"


def sampling(temperature: float, warps: Mapping[str, float]) -> str:
    """From which distribution responses are drawn.

    >>> sampling(0.7, {"top_k": 50, "top_p": 0.9})
    'temperature 0.7, top_k 50, top_p 0.9'
    """
    return ", ".join(f"{name} {value:g}" for name, value in {"temperature": temperature, **warps}.items())


def count(amount: int, what: str) -> str:
    """How many of what.

    >>> count(1, "step"), count(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{amount:,} {what}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """In two units.

    >>> duration(3725.0)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
