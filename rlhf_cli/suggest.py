"""Did-you-mean: the name that a mistyped one most likely stands for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path

LONGEST = 60
"""Longer words are no typos of ours, and would take long to compare."""
ALIKE = 0.6
"""The least likeness of a suggestion, difflib's own; of a word of two letters one is enough."""


def likeness(word: str, name: str) -> float:
    """The share of letters that two names have in common, in their order; capitals and hyphens aside."""
    return SequenceMatcher(None, word.lower().replace("-", "_"), name.lower().replace("-", "_")).ratio()


def closest(word: str, names: Iterable[str]) -> str | None:
    """The name most like the word, the earliest of equal ones; None if none is much like it."""
    if len(word) > LONGEST:
        return None
    found = [(likeness(word, name), name) for name in names]
    ratio, best = max(found, key=lambda pair: pair[0], default=(0.0, ""))
    return best if ratio >= (ALIKE if len(word) > 2 else 0.5) else None


def closest_path(path: str) -> str | None:
    """A file or folder that is there, each part of whose path is called as that of `path` or nearly so."""
    found = Path("/" if path.startswith("/") else "")
    for part in Path(path).parts[found.is_absolute() :]:
        names = [part] if part in (".", "..") else sorted(other.name for other in found.glob("*"))
        near = part if part in names else closest(part, names)
        if near is None:
            return None
        found /= near
    return str(found)


def did_you_mean(word: str, names: Iterable[str], otherwise: str) -> str:
    """The advice on a name that is none of these: the closest one, or `otherwise`."""
    near = closest(word, names)
    return f"did you mean {near}?" if near else otherwise
