"""Did-you-mean: the name that a mistyped one most likely stands for."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 60
"""Longer words are no typos of ours, and would take long to compare."""


def distance(a: str, b: str) -> int:
    """Edits (insert, drop, replace, swap of neighbours) that turn a into b."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def closest(word: str, names: Sequence[str]) -> str | None:
    """The name within a third of the word's length in edits, the earliest of equally close ones."""
    if len(word) > LONGEST:
        return None
    plain = word.lower().replace("-", "_")
    scored = [(distance(plain, name.lower()), place, name) for place, name in enumerate(names)]
    edits, _, best = min(scored, default=(len(word) + 1, 0, ""))
    return best if edits <= max(1, len(word) // 3) else None
