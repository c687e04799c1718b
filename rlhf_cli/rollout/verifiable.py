"""Terms of a reward that need no code: is the answer right, is the form kept, is it too long?"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.records import kind_of
from rlhf_cli.data.requests import Lent
from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.rollout.rewards import Answers, PolicyText, TextTerm, shown_answer

NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
BOXED = "\\boxed{"
_POWER = r"\s*(?:\^|\*\*)\s*[{(]*\s*"
TOWER, LONGEST = re.compile(rf"\d{_POWER}\d+{_POWER}\d|{_POWER}\d{{5,}}|\d{{4,}}\s*!|!\s*!"), 500
"""Numbers that no computer writes out, and how long an answer may be that is read as mathematics: others match as text."""


@dataclass(frozen=True)
class MatchTerm(TextTerm):
    """1 where the response has the answer of its row, else 0; nothing is said where the row has none."""

    settings: sections.Match

    @classmethod
    def columns(cls, reward: sections.Reward, place: str) -> Lent:
        assert reward.match is not None
        return {reward.match.column: place}

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        """MachineError: mathematics are to be compared, and math-verify is not installed."""
        assert reward.match is not None
        COMPARE[reward.match.compare]("1", "1")
        return cls(name, reward.weight, place, reward.match)

    @property
    def source(self) -> dict[str, Any]:
        return {"match": vars(self.settings)}

    def score(self, answers: Answers) -> np.ndarray:
        """UsageError: what a row has there is neither text nor a number."""
        extract, compare = extractor(self.settings.extract), COMPARE[self.settings.compare]
        scores = []
        for (record, text), row in zip(answers.pairs, answers.columns, strict=True):
            try:
                right = right_answer(self.settings, row)
            except UsageError as error:
                raise UsageError(f"{self.place}: {error}\n{shown_answer((record, text))}") from None
            found = extract(text)
            scores.append(np.nan if right is None else float(found is not None and compare(found, right)))
        return np.array(scores, np.float64)


def right_answer(match: sections.Match, row: Mapping[str, Any]) -> str | None:
    """The answer of a row, to compare with; None where it has none. UsageError: what it has is neither text nor a number."""
    right = row.get(match.column)
    if right is None or right != right:  # tables have NaN where a number is missing
        return None
    if isinstance(right, bool) or not isinstance(right, (str, int, float)):
        raise UsageError(f"the column '{match.column}' has {kind_of(right)}, expected text or a number")
    # 42.0, which a table makes of 42 beside a missing number, is written 42, and 1e16 with all its digits.
    written = np.format_float_positional(right, trim="-") if isinstance(right, float) else str(right)
    return extractor(match.extract)(written) or written


def extractor(how: str) -> Callable[[str], str | None]:
    """Finds the answer in a text; None where there is none. The last one counts: what comes before may be reasoning."""
    if how == "text":
        return str.strip
    if how == "boxed":
        return _boxed
    pattern = NUMBER if how == "last-number" else re.compile(how)

    def last(text: str) -> str | None:
        found = list(pattern.finditer(text))
        return ((found[-1][1] or "") if pattern.groups else found[-1][0]).strip() if found else None

    return last


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…}, whose braces may hold others."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, inner = 1, start + len(BOXED)
    for at in range(inner, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[inner:at].strip()
    return None


def as_number(text: str) -> Fraction | None:
    """The one number that a text is: "1,200", "$3.50", "1/2" or "40 %"; None if it is none, or more than a number."""
    bare = text.strip().strip("$€£").rstrip(".%").strip()
    try:
        return Fraction(re.sub(r"[,\s]", "", bare).replace("−", "-")) if NUMBER.fullmatch(bare) else None
    except (ValueError, ZeroDivisionError):  # more digits than Python reads (4,300), or a division by 0
        return None


def _as_numbers(found: str, right: str) -> bool:
    one, other = as_number(found), as_number(right)
    return one is not None and one == other


def _as_mathematics(found: str, right: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise MachineError("compare: math needs math-verify: pip install 'rlhf-cli[math]'") from None
    if TOWER.search(found) or len(found) > LONGEST:
        return found == right.strip()
    seconds = 5 if threading.current_thread() is threading.main_thread() else None  # by a signal, which Python gives to one alone
    wrapped = [text if "$" in text or "\\boxed" in text else f"${text}$" for text in (right, found)]
    gold, answer = (parse(text, parsing_timeout=seconds) for text in wrapped)
    return bool(verify(gold, answer, timeout_seconds=seconds))


COMPARE: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda found, right: found == right.strip(),
    "number": _as_numbers,
    "math": _as_mathematics,
}
"""How an answer that was found and the right one are compared."""


@dataclass(frozen=True)
class FormatTerm(TextTerm):
    """1 where all of the response matches a regular expression, white space around it aside, else 0."""

    pattern: re.Pattern[str]

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        assert reward.format is not None
        return cls(name, reward.weight, place, re.compile(reward.format))

    @property
    def source(self) -> dict[str, Any]:
        return {"format": self.pattern.pattern}

    def score(self, answers: Answers) -> np.ndarray:
        return np.array([self.pattern.fullmatch(text.strip()) is not None for _, text in answers.pairs], np.float64)


@dataclass(frozen=True)
class LengthTerm(TextTerm):
    """A penalty on a response's tokens n: −max(0, n − max)/max, or −|n − target|/target."""

    settings: sections.Length

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        assert reward.length is not None
        return cls(name, reward.weight, place, reward.length)

    @property
    def source(self) -> dict[str, Any]:
        return {"length": {name: value for name, value in vars(self.settings).items() if value is not None}}

    def score(self, answers: Answers) -> np.ndarray:
        counts = np.array([count for own in answers.tokens for count in own], np.float64)
        most, target = self.settings.max, self.settings.target
        if target is not None:
            return -np.abs(counts - target) / target
        assert most is not None
        return np.minimum(0.0, most - counts) / most
