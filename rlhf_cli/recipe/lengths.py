"""Lengths that a model can take: what a recipe leaves at its default shrinks to fit, what it writes must fit."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.load import Loaded


class Lengths(NamedTuple):
    """Tokens of a row with its response, and of a response that is drawn (None: nothing is)."""

    whole: int
    drawn: int | None


def fitted(loaded: Loaded, key: str, lengths: Lengths, positions: int | None, model: str) -> tuple[Lengths, list[str]]:
    """The lengths in force for a model of so many positions, and what to say of those that shrank; `key` holds the whole.

    UsageError: the recipe itself asks for more.
    """
    whole, drawn, said = lengths.whole, lengths.drawn, list[str]()
    if positions is None or whole <= positions:
        return lengths, said
    if key in loaded.lines:
        raise UsageError(f"{loaded.named(key)}: {whole:,} tokens are more than {model} can take, {positions:,}. lower it")
    said.append(f"{key}: {positions:,}, all that {model} can take (default {whole:,})")
    if drawn is not None and drawn >= positions:
        if (own := "rollout.max_new_tokens") in loaded.lines:
            raise UsageError(f"{loaded.named(own)}: leaves no room for a prompt in the {positions:,} tokens of {model}. lower it")
        said.append(f"{own}: {positions // 2:,}, half of that (default {drawn:,})")
        drawn = positions // 2
    return Lengths(positions, drawn), said
