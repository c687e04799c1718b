"""Pieces of a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def cell(text: str, length: int) -> str:
    """Any text as one cell of a Markdown table that shows it literally."""
    shown = text if len(text) <= length else text[:length] + "…"
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", shown.replace("\r\n", "\n"))
    return re.sub(r"([\\`*_\[\]|<>~$&])", r"\\\1", shown.strip("\n")).replace("\n", "<br>")
