"""How well scores agree with preferences, as figures: in eval.json, and in the manifest of a reward model as its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rlhf_cli.figures import Interval, percent


@dataclass(frozen=True)
class Rate:
    """A share of pairs."""

    accuracy: Interval  # ties count half
    pairs: int
    prompts: int  # that have a pair

    def to_json(self) -> dict[str, Any]:
        return {**self.accuracy.to_json("accuracy"), "pairs": self.pairs, "prompts": self.prompts}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Rate:
        return cls(Interval.from_json(entry, "accuracy"), entry["pairs"], entry["prompts"])


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence σ(|margin|) is in [low, high), the last bin including 1."""

    low: float
    high: float
    count: int
    confidence: float  # mean of σ(|margin|)
    accuracy: float


@dataclass(frozen=True)
class Histogram:
    """Margins of pairs in bins of equal width, 0 being an edge."""

    mean: float
    edges: tuple[float, ...]  # one more than counts
    counts: tuple[int, ...]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Histogram:
        return cls(entry["mean"], tuple(entry["edges"]), tuple(entry["counts"]))


@dataclass(frozen=True)
class LengthBaseline:
    """What always preferring the longer (or the shorter) response would reach on the same pairs."""

    prefers: Literal["longer", "shorter"]  # whichever wins more of the training pairs
    accuracy: Interval
    lead: Interval  # of the model over this

    def to_json(self) -> dict[str, Any]:
        return {"prefers": self.prefers, **self.accuracy.to_json("accuracy"), "lead": self.lead.to_json()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LengthBaseline:
        return cls(entry["prefers"], Interval.from_json(entry, "accuracy"), Interval.from_json(entry["lead"]))


@dataclass(frozen=True)
class Agreement:
    """How well scores agree with preferences; None, 0 or empty where there is no pair."""

    rate: Rate | None
    ties: int  # pairs with equal scores, which count half
    length_baseline: LengthBaseline | None
    ece: float | None  # expected calibration error
    confidence: float | None  # mean of σ(|margin|); above the accuracy: over-confident
    reliability: list[Bin]
    margins: Histogram | None
    subsets: dict[str, Rate]  # empty where the data name none

    @property
    def pairs(self) -> int:
        return self.rate.pairs if self.rate else 0

    @property
    def prompts(self) -> int:
        """Those that have a pair."""
        return self.rate.prompts if self.rate else 0

    def to_json(self, low: str = "low", high: str = "high") -> dict[str, Any]:
        """What eval.json and a card have in common; `low`, `high`: keys of the accuracy's bounds. Null without a pair."""
        accuracy = self.rate.accuracy if self.rate else (None, None, None)
        return {
            **dict(zip(("accuracy", low, high), accuracy, strict=True)),
            "pairs": self.pairs,
            "prompts": self.prompts,
            "ece": self.ece,
            "confidence": self.confidence,
            "reliability": [asdict(each) for each in self.reliability],
            "margins": self.margins and asdict(self.margins),
            "subsets": {name: each.to_json() for name, each in self.subsets.items()},
            "length_baseline": self.length_baseline and self.length_baseline.to_json(),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], low: str = "low", high: str = "high") -> Agreement:
        margins, length = entry["margins"], entry["length_baseline"]
        accuracy = Interval(entry["accuracy"], entry[low], entry[high]) if entry["accuracy"] is not None else None
        return cls(
            rate=accuracy and Rate(accuracy, entry["pairs"], entry["prompts"]),
            ties=entry.get("ties", 0),
            length_baseline=LengthBaseline.from_json(length) if length else None,
            ece=entry["ece"],
            confidence=entry["confidence"],
            reliability=[Bin(**each) for each in entry["reliability"]],
            margins=Histogram.from_json(margins) if margins else None,
            subsets={name: Rate.from_json(each) for name, each in entry["subsets"].items()},
        )


@dataclass(frozen=True)
class Card:
    """A reward model's card: `reward_model` in the manifest."""

    agreement: Agreement  # with the held-out pairs
    score_mean: float  # over training responses: what a policy's training subtracts, and divides by
    score_std: float
    score_responses: int
    warning: str | None  # of `beats_length`
    constant: float = 0.5  # accuracy of a score that is the same for all: every pair a tie

    def to_json(self) -> dict[str, Any]:
        """Figures of pairs are null where nothing was held out."""
        scores = {key: value for key, value in vars(self).items() if key != "agreement"}
        return self.agreement.to_json("accuracy_low", "accuracy_high") | scores

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Card:
        scores = {own.name: entry[own.name] for own in fields(cls) if own.name != "agreement"}
        return cls(agreement=Agreement.from_json(entry, "accuracy_low", "accuracy_high"), **scores)


def weaknesses(model: Rate, baseline: LengthBaseline | None) -> list[str]:
    """In what respects an accuracy is hardly better than a guess, or than a look at the length."""
    found = []
    if model.accuracy.low <= 0.5:
        found.append("cannot be told from guessing" if model.accuracy.high >= 0.5 else "is worse than guessing")
    if baseline is None:
        return found
    length = f"always preferring the {baseline.prefers} response, which has {_with_interval(baseline.accuracy)}"
    lead = baseline.lead
    if lead.mean <= 0:
        found.append(f"is no better than {length}")
    elif lead.low <= 0:
        found.append(f"is hardly better than {length}: on the same pairs it is ahead by {_with_interval(lead)}")
    return found


def beats_length(model: Rate, baseline: LengthBaseline) -> str | None:
    """A warning where the model is hardly better than a look at the length, or than a guess; else None."""
    found = " and ".join(weaknesses(model, baseline))
    remedy = "Train on more pairs, or hold out more of them to be sure."
    return f"The reward model's held-out accuracy, {_with_interval(model.accuracy)}, {found}. {remedy}" if found else None


def _with_interval(share: Interval) -> str:
    return f"{percent(share.mean)} ({percent(share.low)} to {percent(share.high)})"
