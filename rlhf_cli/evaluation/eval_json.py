"""What an evaluation found, as eval.json has it: written and read key by key, without anything that needs weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.agreement import Agreement
from rlhf_cli.evaluation.at_kl import AtKl
from rlhf_cli.evaluation.overoptimisation import Point, SeriesFits, series_of
from rlhf_cli.evaluation.winrate import WinRate
from rlhf_cli.figures import Interval, from_plain, to_plain


@dataclass(frozen=True)
class AskedJudge:
    """A language model that compares: behind an endpoint, or a local one."""

    endpoint: str | None = None
    model: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class About:
    """What was asked for, as far as a reader of the figures must know it."""

    reference: str | None
    baseline: str | None
    judge: str | AskedJudge | None  # gold, reward, or the name of a term
    prompts: int
    responses: int  # to each prompt, of each model
    temperature: float
    max_new_tokens: int
    seed: int
    resamples: int
    notes: list[str]
    warping: dict[str, float] = field(default_factory=dict)  # what else changed the distribution that was drawn from


@dataclass(frozen=True)
class Voted:
    """Accuracy of the answer that n responses to a prompt agree on, with its 95 % interval."""

    n: int
    accuracy: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        return Interval(self.accuracy, self.low, self.high)


@dataclass(frozen=True)
class Share:
    """A share of pairs, with its 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)


Concord = dict[str, dict[str, Share]]
"""Judge → another judge of the same pairs → how often they agree; both ways."""


@dataclass(frozen=True)
class EvaluationResult:
    """All figures of an evaluation; what was not asked for is empty."""

    about: About
    models: dict[str, dict[str, Interval]] = field(default_factory=dict)  # model → metric → its mean
    winrate: dict[str, WinRate] = field(default_factory=dict)  # over the baseline
    ratings: dict[str, Interval] = field(default_factory=dict)  # Elo
    pairwise: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # judge → a → b → how often a is preferred
    exploitability: dict[str, dict[str, float]] = field(default_factory=dict)  # model → value, low, high; by winrate.judge
    preferences: dict[str, Agreement] = field(default_factory=dict)
    votes: dict[str, dict[str, list[Voted]]] = field(default_factory=dict)  # model → who wins a vote → by ascending n
    overoptimisation: list[Point] = field(default_factory=list)
    fits: dict[str, SeriesFits] = field(default_factory=dict)  # by series
    at_kl: AtKl | None = None
    agreement: Concord = field(default_factory=dict)
    agreement_by_subset: dict[str, Concord] = field(default_factory=dict)

    @property
    def standard(self) -> str | None:
        """The model that others are held against: the baseline, else the reference; None without either."""
        return next((name for name in (self.about.baseline, self.about.reference) if name in self.models), None)

    @property
    def metrics(self) -> list[str]:
        """Names of all that was measured of the models, in the order of a report."""
        return list(dict.fromkeys(name for own in self.models.values() for name in own))

    @property
    def series(self) -> dict[str, list[Point]]:
        """The points of over-optimisation by series, each in its order."""
        return series_of(self.overoptimisation)

    @property
    def voted(self) -> dict[str, list[Voted]]:
        """`MODEL: who wins a vote` → accuracies by ascending n, the same n for all."""
        return {f"{model}: {by}": votes for model, own in self.votes.items() for by, votes in own.items()}

    def of(self, metric: str) -> dict[str, Interval]:
        """Model → its mean, of those for which the metric was measured."""
        return {model: own[metric] for model, own in self.models.items() if metric in own}

    def to_json(self) -> dict[str, Any]:
        """eval.json."""
        found: dict[str, Any] = to_plain(self)
        return found | {
            "ratings": {model: {"elo": own.mean, "low": own.low, "high": own.high} for model, own in self.ratings.items()},
            "preferences": {name: own.to_json() for name, own in self.preferences.items()},
            "overoptimisation": [point.to_json() for point in self.overoptimisation],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> EvaluationResult:
        return cls(
            about=from_plain(About, entry["about"]),
            models=from_plain(dict[str, dict[str, Interval]], entry["models"]),
            winrate=from_plain(dict[str, WinRate], entry["winrate"]),
            ratings={model: Interval(own["elo"], own["low"], own["high"]) for model, own in entry["ratings"].items()},
            pairwise=entry.get("pairwise", {}),
            exploitability=entry.get("exploitability", {}),
            preferences={name: Agreement.from_json(own) for name, own in entry["preferences"].items()},
            votes=from_plain(dict[str, dict[str, list[Voted]]], entry.get("votes", {})),  # earlier releases have none
            overoptimisation=[Point.from_json(own) for own in entry["overoptimisation"]],
            fits=from_plain(dict[str, SeriesFits], entry["fits"]),
            at_kl=from_plain(AtKl | None, entry.get("at_kl")),
            agreement=from_plain(Concord, entry.get("agreement", {})),
            agreement_by_subset=from_plain(dict[str, Concord], entry.get("agreement_by_subset", {})),
        )


def read_result(path: Path) -> EvaluationResult:
    """The figures of a finished evaluation. UsageError: the file is damaged."""
    try:
        return EvaluationResult.from_json(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error!r})\n  evaluate again with --force") from error
