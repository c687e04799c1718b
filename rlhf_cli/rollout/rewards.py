"""What a term of a reward is, whatever its kind, and how several terms make one score."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.requests import Lent
from rlhf_cli.data.templates import Template
from rlhf_cli.data.trees import Tree, located
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.placement import FrozenModels, Head
from rlhf_cli.ranks import Ranks
from rlhf_cli.runs.manifest import Parent
from rlhf_cli.runs.parents import Start
from rlhf_cli.signals import Pause, no_pause

SHOWN = 60
"""Characters of a prompt or a response in a message."""


@dataclass(frozen=True)
class Answers:
    """Prompts and the responses that the policy drew to each."""

    trees: list[Tree]  # prompt and its K drawn responses, in the policy's tokens; empty for terms that see texts alone
    records: list[Record]  # of each tree: its prompt as text or messages, and where it stands
    texts: list[list[str]]  # of each tree: its responses without the ending token
    ended: list[list[bool]]  # of each tree: did the response end, or was it cut off?
    tokens: list[list[int]] = field(default_factory=list)  # of each tree: those of its responses, their end included

    @property
    def pairs(self) -> list[tuple[Record, str]]:
        """(M,) prompt and response, tree by tree: the order of all scores."""
        return [(record, text) for record, texts in zip(self.records, self.texts, strict=True) for text in texts]

    @property
    def columns(self) -> list[dict[str, Any]]:
        """(M,) what the row of each response has in the columns that are kept of it."""
        own = [json.loads(record.columns or "{}") for record in self.records]
        return [columns for columns, texts in zip(own, self.texts, strict=True) for _ in texts]


class DenseScorer(ABC):
    """A term that gives steps or tokens of a response numbers of their own; its score of the response is their sum."""

    name: str
    separator: str | None  # of steps; None: each token has a number

    @abstractmethod
    def parts(self, answers: Answers) -> list[np.ndarray]:
        """(S,) of every response, tree by tree; a NaN alone where it says nothing. Raises RunError."""

    def score(self, answers: Answers) -> np.ndarray:
        return np.array([own.sum() for own in self.parts(answers)], np.float64)

    def spread(self, answers: Answers, tokenizer: Any) -> np.ndarray:
        """(N,) of the policy's tokens, that of a step at its last one, else 0. UsageError: these have other steps."""
        trees, found = [located(tree, tokenizer, self.separator) for tree in answers.trees], [np.zeros(0)]
        behind = [np.array(own) for tree in trees for own in tree.facts.ends or ()]
        for size, own, values in zip((len(r) for t in trees for r in t.responses), behind, self.parts(answers), strict=True):
            if len(own) != len(values) and not np.isnan(values).any():
                raise UsageError(f"reward {self.name}: the policy's tokens have {len(own)} steps, and {len(values)} were judged")
            found.append(np.full(size, 0 * values.sum()))
            np.add.at(found[-1], size - 1 - own, values)
        return np.concatenate(found)


class Scorer(Protocol):
    """A term that has all the weights it needs."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def needs_weights(self) -> bool: ...
    @property
    def beside(self) -> tuple[str, ...]:
        """What else it tells of each response, for the log."""

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64 of all responses, tree by tree, before the weight; NaN where it says nothing. Raises RunError.

        With `beside` (1 + its length, M).
        """

    def score_rows(self, rows: Answers, ranks: Ranks) -> list[np.ndarray]:
        """(K,) of the responses of each given row, as they are and not normalised. Raises RunError."""


@dataclass(frozen=True)
class PolicyText:
    """How the policy whose responses are scored reads and writes text, and what may be loaded."""

    tokenizer: Any
    template: Template
    trust_remote_code: bool
    check: bool  # models on the hub are not fetched
    folder: Path = Path()  # the run's, where what a judge says is kept
    pause: Pause = no_pause  # while a judge is waited for


@dataclass(frozen=True)
class RewardTerm(ABC):
    """A term of the reward, or of gold, before any weights are loaded. Each kind of term is a class of its own."""

    name: str  # under which it is logged
    weight: float
    place: str  # begins every message

    kind: ClassVar[str]  # what an evaluation's preferences call it

    @property
    def needs_weights(self) -> bool:
        """False: it sees texts alone, and one process can score those of all."""
        return False

    @property
    def compares(self) -> bool:
        """Does it give the probability to be preferred to the prompt's other responses, a mean over them?"""
        return False

    @classmethod
    @abstractmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> RewardTerm:
        """What the recipe's term names. UsageError: it is not there, or is no reward."""

    @classmethod
    def columns(cls, reward: sections.Reward, place: str) -> Lent:
        """The columns of rows that the recipe's term reads. UsageError: it is not there, or is no reward."""
        return {}

    @abstractmethod
    def load(self, models: FrozenModels, role: str, budget: int) -> Scorer:
        """The term with its weights under `role`, where it needs some; budget: tokens of one forward pass."""

    @property
    @abstractmethod
    def source(self) -> dict[str, Any]:
        """What scores, and how, beside name and weight."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common."""
        return {"name": self.name, "weight": self.weight, **self.source}

    @property
    def code(self) -> dict[str, str]:
        """Hashes of what may be mended before a run goes on, by what it is."""
        return {}

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return self.identity

    @property
    def words(self) -> str | None:
        """What the recipe does not show."""
        return None

    @property
    def parent(self) -> Parent | None:
        """The run that it comes from."""
        return None

    @property
    def text_form(self) -> tuple[Any, Template] | None:
        """Tokenizer and chat template in which it reads given rows; None: it reads their texts."""
        return None

    def value_start(self) -> tuple[Start, Head] | None:
        """Weights that a value may start from, with the head that gives this term's part of the score; None: it has none."""
        return None


@dataclass(frozen=True)
class TextTerm(RewardTerm):
    """A term that sees texts alone."""

    kind: ClassVar[str] = "term"
    beside: ClassVar[tuple[str, ...]] = ()

    def load(self, models: FrozenModels, role: str, budget: int) -> Self:
        return self

    @abstractmethod
    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64 of all responses, tree by tree, before the weight; NaN where it says nothing. Raises RunError."""

    def score_rows(self, rows: Answers, ranks: Ranks) -> list[np.ndarray]:
        return np.split(self.score(rows), np.cumsum([len(own) for own in rows.texts])[:-1])


def check_finite(scores: np.ndarray, pairs: Sequence[tuple[Record, str]], what: str, silent: np.ndarray | None = None) -> None:
    """NumberError with the first response whose score is NaN or infinite. `silent`: (M,) bool, of which it says nothing."""
    bad = np.flatnonzero(~np.isfinite(scores) & (True if silent is None else ~silent))
    if len(bad):
        raise NumberError(f"{what} gave a response the score {scores[bad[0]]}\n{shown_answer(pairs[bad[0]])}")


def shown_answer(pair: tuple[Record, str]) -> str:
    """A prompt and a response in a message, with their place."""
    record, text = pair
    return f"{record.where}: prompt {shortened(record.question)!r}, response {shortened(text)!r}"


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda weighted: np.nansum(weighted, 0),
    "min": lambda weighted: np.nanmin(weighted, 0),
    "mean_minus_std": lambda weighted: np.nanmean(weighted, 0) - np.nanstd(weighted, 0),
}
"""How (terms, M) terms times their weights make (M,) scores; min and mean less the population deviation are pessimistic ensembles
(Coste et al. 2024, "Reward model ensembles help mitigate overoptimization"; Eisenstein et al. 2023, "Helping or herding?")."""


def combined(how: str, terms: np.ndarray, weights: Sequence[float], pairs: Sequence[tuple[Record, str]]) -> np.ndarray:
    """(M,) scores of (terms, M) terms; one that says nothing of a response (NaN) has no part in its score.

    UsageError: no term says anything of a response.
    """
    mute = np.flatnonzero(np.isnan(terms).all(0))
    if len(mute):
        raise UsageError(
            f"reward: no term applies to a response, so that it has no score\n{shown_answer(pairs[mute[0]])}\n"
            "let one of the terms return a number for it"
        )
    return COMBINE[how](terms * np.array(weights)[:, None])
