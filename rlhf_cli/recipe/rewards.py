"""What a recipe may say of a term of the reward: the kinds of terms, their own keys, and what they are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlhf_cli.sections import Judge, Length, Match, Reward


def _name_of_folder(path: str) -> str:
    """`runs/rm` and `runs/rm/model` are rm, `runs/rm/checkpoints/step-00000100` is rm-step-00000100, `owner/judge` is judge."""
    parts = PurePath(path).parts
    match parts[:-1] if parts[-1:] == ("model",) else parts:
        case [*_, run, "checkpoints", step]:
            return f"{run}-{step}"
        case [*_, folder]:
            return folder
    return "model"


def _check_function(reference: str) -> str | None:
    if re.fullmatch(r".+\.py:[^\W\d]\w*", reference):
        return None
    return f"expected file.py:name, found {reference}. name a function in a Python file"


def _check_pattern(pattern: str, groups: int | None = None) -> str | None:
    try:
        found = re.compile(pattern).groups
    except (re.error, RecursionError) as error:
        return f"not a regular expression: {error}. mend it"
    return None if groups in (None, found) else f"the expression has {found} groups, and one is to hold the answer. write one"


def check_match(match: Match) -> str | None:
    if match.extract in ("text", "last-number", "boxed"):
        return None
    wrong = _check_pattern(match.extract, groups=1)
    named = "text, last-number, boxed, or a regular expression with one group"
    return wrong and f"extract: {match.extract} is none of {named}: {wrong}"


def _check_length(length: Length) -> str | None:
    return None if (length.max is None) != (length.target is None) else "expected one of max and target. give one"


def check_judge(judge: Judge) -> str | None:
    """What is wrong with a judge's section: one that is nobody, or keys that have no effect on it."""
    if (judge.endpoint is None) == (judge.path is None):
        return "expected one of endpoint and path. give one"
    if judge.endpoint is not None and judge.model is None:
        return "an endpoint has several models. name one: model"
    if judge.endpoint is not None and not judge.endpoint.startswith(("http://", "https://")):
        return f"endpoint: expected a URL, found {judge.endpoint}. write http:// or https:// before it"
    usual = {each.name: each.default for each in dataclasses.fields(judge)}
    for name in ("model", "timeout", "retries", "parallel"):
        if judge.path is not None and vars(judge)[name] != usual[name]:
            return f"{name} has no effect on a local model. remove it"
    if judge.draws > 1 and judge.principles is None:
        return "draws has no effect without principles: the same question has the same answer. remove it"
    return None


class Kind(NamedTuple):
    """A kind of term, as far as a recipe shows it."""

    noun: str
    default_name: Callable[[Any], str]  # of its value: under which a term without a name of its own is logged
    options: tuple[str, ...] = ()  # keys of a term that have an effect on this kind alone
    check: Callable[[Any], str | None] = lambda value: None  # what is wrong with its value


OF_FUNCTIONS = ("parallel", "timeout", "compares", "per", "separator")
KINDS: dict[str, Kind] = {
    "model": Kind("reward model", _name_of_folder, options=("revision", "combine", "normalize", "aggregate", "per_step")),
    "function": Kind("function", lambda it: it.rpartition(":")[2], OF_FUNCTIONS, _check_function),
    "match": Kind("match", lambda it: "match", check=check_match),
    "format": Kind("format", lambda it: "format", check=_check_pattern),
    "length": Kind("length", lambda it: "length", check=_check_length),
    "judge": Kind("judge", lambda it: "judge", check=check_judge),
}
"""The key of a term that says what it is → its kind; a term has one of them."""


def kinds_of(reward: Reward) -> list[str]:
    """The keys of KINDS that a term has; one, in a recipe that was checked."""
    return [kind for kind in KINDS if vars(reward)[kind] is not None]


def name_of(reward: Reward) -> str:
    """The name under which a term is logged: its own, or the default of its kind."""
    if reward.name is not None:
        return reward.name
    kinds = kinds_of(reward)
    return KINDS[kinds[0]].default_name(vars(reward)[kinds[0]]) if kinds else ""


def term_names(rewards: Sequence[Reward]) -> list[str]:
    """The names of all terms, in their order."""
    return [name_of(reward) for reward in rewards]
