"""How well scores agree with preferences, as figures: in eval.json, and in the manifest of a reward model as its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from rlhf_cli.figures import Interval, from_plain, percent, to_plain


@dataclass(frozen=True)
class Rate:
    """A share of pairs, with its 95 % interval."""

    accuracy: float  # ties count half
    low: float
    high: float
    pairs: int
    prompts: int  # that have a pair

    @property
    def interval(self) -> Interval:
        return Interval(self.accuracy, self.low, self.high)


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


@dataclass(frozen=True)
class LengthBaseline:
    """What always preferring the longer (or the shorter) response would reach on the same pairs, with its 95 % interval."""

    prefers: Literal["longer", "shorter"]  # whichever wins more of the training pairs
    accuracy: float
    low: float
    high: float
    lead: Interval  # of the model over this
    of_steps: str | None = None  # what it does, where steps are judged

    @property
    def rule(self) -> str:
        return self.of_steps or f"always preferring the {self.prefers} response"

    def explains(self, model: Rate) -> bool:
        """Is the model right more often than a guess, and this as often?"""
        return model.low > 0.5 and self.lead.mean <= 0

    @property
    def what_would_tell(self) -> str:
        other = {"longer": "shorter", "shorter": "longer"}[self.prefers]
        return f"Pairs whose better response is the {other} one would tell whether it judges anything else."

    @property
    def interval(self) -> Interval:
        return Interval(self.accuracy, self.low, self.high)


@dataclass(frozen=True)
class Agreement:
    """How well the scores of one model or term agree with preferences; None, 0 or empty where there is no pair."""

    kind: str  # reward model | policy | term
    rate: Rate | None
    ece: float | None  # expected calibration error
    confidence: float | None  # mean of σ(|margin|); above the accuracy: over-confident
    reliability: list[Bin]
    margins: Histogram | None
    subsets: dict[str, Rate]  # empty where the data name none
    length_baseline: LengthBaseline | None
    ties: int  # pairs with equal scores, which count half
    beta: float | None = None  # of a policy's implicit rewards
    ece_expected: float | None = None  # of a perfectly calibrated judge of as many pairs

    @property
    def pairs(self) -> int:
        return self.rate.pairs if self.rate else 0

    @property
    def prompts(self) -> int:
        """Those that have a pair."""
        return self.rate.prompts if self.rate else 0

    @property
    def weaknesses(self) -> list[str]:
        """In what respects it is hardly a judge; of policies nobody expects one."""
        return weaknesses(self.rate, self.length_baseline) if self.rate and self.kind != "policy" else []

    def to_json(self) -> dict[str, Any]:
        """As in eval.json: the rate's figures beside the others, null or 0 without a pair."""
        own = to_plain(self)
        rate = own.pop("rate") or {"accuracy": None, "low": None, "high": None, "pairs": 0, "prompts": 0}
        return {"kind": own.pop("kind"), **rate, **own, "faults": self.weaknesses}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Agreement:
        own: Agreement = from_plain(cls, {**entry, "rate": None if entry["accuracy"] is None else entry})
        return own


@dataclass(frozen=True)
class Member:
    """One reward model of an ensemble: the same figures, by itself."""

    seed: int
    rate: Rate | None
    score_mean: float
    score_std: float


@dataclass(frozen=True)
class Card:
    """A reward model's card: `reward_model` in the manifest."""

    agreement: Agreement  # with the held-out pairs
    score_mean: float  # over training responses: what a policy's training subtracts, and divides by
    score_std: float
    score_responses: int
    warning: str | None  # of `beats_length`
    constant: float = 0.5  # accuracy of a score that is the same for all: every pair a tie; of steps, of calling all right
    unit: Literal["pair", "step"] = "pair"  # what it judges
    first_error: float | None = None  # of steps: F1 of the first wrong one of a response
    members: list[Member] = field(default_factory=list)  # of an ensemble, whose mean the rest is about
    disagreement: float | None = None  # mean over held-out responses of the deviation of their normalised scores
    cyclic: int = 0  # of a model that compares: triples of a prompt's responses that go in a circle
    triples: int | None = None  # of all these, held-out ones where there are some; None: the model gives scores

    def to_json(self) -> dict[str, Any]:
        """Figures of pairs are null where nothing was held out."""
        own = self.agreement.to_json()
        bounds = {"accuracy": own.pop("accuracy"), "accuracy_low": own.pop("low"), "accuracy_high": own.pop("high")}
        left_out = ("kind", "ties", "beta", "faults")
        figures = {key: value for key, value in own.items() if key not in left_out}
        return bounds | figures | {key: to_plain(value) for key, value in vars(self).items() if key != "agreement"}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Card:
        bounds = {"low": entry["accuracy_low"], "high": entry["accuracy_high"]}
        agreement = Agreement.from_json({**entry, **bounds, "kind": "reward model", "ties": 0})
        own = {key: value for key, value in entry.items() if key in {own.name for own in fields(cls)} - {"agreement", "members"}}
        return cls(agreement, members=[from_plain(Member, each) for each in entry.get("members", [])], **own)


def weaknesses(model: Rate, baseline: LengthBaseline | None, constant: float = 0.5) -> list[str]:
    """In what respects an accuracy is hardly better than a guess, or than a look at the length. constant: as `Card` has it."""
    found, guess = [], "calling every step right" if baseline and baseline.of_steps else "guessing"
    if model.low <= constant:
        found.append(f"cannot be told from {guess}" if model.high >= constant else f"is worse than {guess}")
    if baseline is None:
        return found
    length = f"{baseline.rule}, which has {_with_interval(baseline.interval)}"
    lead, unit = baseline.lead, "steps" if baseline.of_steps else "pairs"
    if baseline.explains(model):
        found.append(f"is explained by length alone: {length.replace(', which has', ' has')} on the same {unit}")
    elif lead.mean <= 0:
        found.append(f"is no better than {length}")
    elif lead.low <= 0:
        found.append(f"is hardly better than {length}: on the same {unit} it is ahead by {_with_interval(lead)}")
    return found


def beats_length(model: Rate, baseline: LengthBaseline, constant: float = 0.5) -> str | None:
    """A warning where the model is hardly better than a look at the length, or than a guess; else None."""
    found = " and ".join(weaknesses(model, baseline, constant))
    remedy = f"Train on more {'rows' if baseline.of_steps else 'pairs'}, or hold out more of them to be sure."
    if baseline.explains(model) and not baseline.of_steps:
        remedy = baseline.what_would_tell
    return f"The reward model's held-out accuracy, {_with_interval(model.interval)}, {found}. {remedy}" if found else None


def _with_interval(share: Interval) -> str:
    return f"{percent(share.mean)} ({percent(share.low)} to {percent(share.high)})"
