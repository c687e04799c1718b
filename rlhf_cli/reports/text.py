"""Texts that are shown literally, whatever is in them, and sentences with code in them."""

from __future__ import annotations

import re

from rlhf_cli.console import clean


def visible(text: str) -> str:
    """Characters that are not to be seen, or would turn the text around them, as escapes.

    >>> visible("a\\x00b\\u202e")
    'a\\\\x00b\\\\u202e'
    """
    return clean(text.replace("\r\n", "\n"))


def pieces(text: str) -> list[str]:
    """The text cut at its code: every second piece is code.

    >>> pieces("set `data.eval` or not")
    ['set ', 'data.eval', ' or not']
    """
    return re.split(r"`([^`]+)`", text)
