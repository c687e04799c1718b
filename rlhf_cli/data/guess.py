"""Which of somebody's columns are probably meant by ours, from their names and what stands in them. A person is to look at it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_cli.data.columns import Row
from rlhf_cli.data.convert import BAD_WORDS, GOOD_WORDS, LABELS, SIDE
from rlhf_cli.data.formats import FORMATS, Format, Use

WORDS = {
    "messages": "messages conversation conversations dialogue dialog chat turns",
    "chosen": "chosen good better best preferred accepted winner winning positive",
    "rejected": "rejected bad worse worst dispreferred loser losing negative refused",
    "label": "label thumbs liked like good rating feedback upvoted desirable approved helpful",
    "winner": "winner better best preferred preference choice chosen label",
    "response_a": "a 0",
    "response_b": "b 1",
    "completion": "completion response answer output reply assistant target solution bot gpt",
    "prompt": "prompt question instruction query input problem user request task ask asked context human",
}
"""Ours → words that names of such columns have; a column goes to the first of them."""
MEANT = ("prompt-completion", "messages", "unpaired", "preference", "choice", "prompt")
"""Formats that a renaming can make; the first one of use to a stage goes first."""


def guess(rows: Sequence[Row], use: Use) -> tuple[Format, dict[str, str | None]]:
    """The format of use that comes nearest, and ours → theirs for its columns; None: there is no telling.

    A column of numbers is never guessed to say who is better of two: 1 may stand for the first or for the second.
    """
    formats = [FORMATS[name] for name in MEANT if name in use.formats]
    found = [(format, _columns(rows, format.columns)) for format in formats]

    def share(pair: tuple[Format, dict[str, str | None]]) -> tuple[float, int]:
        known = sum(map(bool, pair[1].values()))
        return known / len(pair[1]), known  # of two that are whole the one that reads more: a label must not be overlooked

    return max(found, key=share)


def _columns(rows: Sequence[Row], ours: Sequence[str]) -> dict[str, str | None]:
    left, found = [str(name) for name in dict.fromkeys(name for row in rows for name in row)], dict[str, str | None]()
    for name in (each for each in WORDS if each in ours):
        words = set(WORDS[name].split())
        fits = [theirs for theirs in left if _words(theirs) & words and _may_be(name, [row.get(theirs) for row in rows])]
        found[name] = next((theirs for theirs in fits if theirs.lower() == name), fits[0] if len(fits) == 1 else None)
        left = [theirs for theirs in left if theirs != found[name]]
    return {name: found[name] for name in ours}


def _words(name: str) -> set[str]:
    """ "thumbsUp_2" → {"thumbs", "up", "2"}"""
    return set(re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _may_be(ours: str, values: Sequence[object]) -> bool:
    there = [value.strip().lower() if isinstance(value, str) else value for value in values if value is not None]
    if ours == "messages":
        return all(isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) for value in there)
    if ours == "label":
        return all(type(value) in (bool, int, float, str) and value in (*LABELS, *GOOD_WORDS, *BAD_WORDS) for value in there)
    if ours == "winner":
        return all(isinstance(value, str) and (value == "tie" or SIDE.fullmatch(value)) for value in there)
    return any(isinstance(value, list) or (isinstance(value, str) and value != "") for value in there)
