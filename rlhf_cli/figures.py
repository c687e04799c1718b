"""Numbers as people read them."""

from __future__ import annotations

NOISE = 1e-6
"""What is smaller is rounding: the log-ratios of a policy that is its own reference."""


def figure(value: float, sign: str = "") -> str:
    """Four digits; rounding noise is 0.

    >>> figure(0.123456), figure(-3e-9), figure(2.0, "+")
    ('0.1235', '0', '+2')
    """
    return f"{value:{sign}.4g}" if abs(value) >= NOISE else "0"


def percent(share: float | None, sign: str = "") -> str:
    return "n/a" if share is None else f"{100 * share:{sign}.1f} %"


def duration(seconds: float) -> str:
    """In two units.

    >>> duration(3725.0)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
