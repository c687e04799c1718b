"""Texts that are shown literally, whatever is in them, and sentences with code in them."""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What would not be shown, is forbidden in HTML, or turns the direction of what stands around it."""


def visible(text: str) -> str:
    """Characters that are not to be seen, or would turn the text around them, as escapes.

    >>> visible("a\\x00b\\u202e")
    'a\\\\x00b\\\\u202e'
    """

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return STEERING.sub(escaped, text.replace("\r\n", "\n"))


def pieces(text: str) -> list[str]:
    """The text cut at its code: every second piece is code.

    >>> pieces("set `data.eval` or not")
    ['set ', 'data.eval', ' or not']
    """
    return re.split(r"`([^`]+)`", text)
