"""The terms of a run's reward and of gold: which class each kind is, and all terms together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import sections
from rlhf_cli.data.requests import Lent
from rlhf_cli.errors import UsageError
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.recipes import TrainingRecipe
from rlhf_cli.recipe.rewards import kinds_of, name_of
from rlhf_cli.rollout.judge_terms import JudgeTerm
from rlhf_cli.rollout.reward_functions import RewardFunction
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.rollout.rewards import PolicyText, RewardTerm, Scorer
from rlhf_cli.rollout.verifiable import FormatTerm, LengthTerm, MatchTerm
from rlhf_cli.runs.manifest import Parent

TERMS: dict[str, type[RewardTerm]] = {
    "model": RewardModel,
    "function": RewardFunction,
    "match": MatchTerm,
    "format": FormatTerm,
    "length": LengthTerm,
    "judge": JudgeTerm,
}
"""Key of a term in the recipe → its class."""


@dataclass(frozen=True)
class RewardTerms:
    """The terms of the reward, which is learned from, and of gold, which is only measured."""

    reward: Sequence[RewardTerm]
    gold: Sequence[RewardTerm]

    def __iter__(self) -> Iterator[RewardTerm]:
        yield from (*self.reward, *self.gold)

    @property
    def named(self) -> dict[str, RewardTerm]:
        """reward/NAME and gold/NAME, as in metrics, samples and eval.json → the term."""
        return {f"reward/{term.name}": term for term in self.reward} | {f"gold/{term.name}": term for term in self.gold}

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of them."""
        return {"reward": [term.record for term in self.reward], "gold": [term.record for term in self.gold]}

    @property
    def code(self) -> dict[str, str]:
        """Hashes of what may be mended before a run goes on, by what it is."""
        return {what: digest for term in self for what, digest in term.code.items()}

    @property
    def parents(self) -> list[Parent]:
        """The runs that they come from."""
        return [term.parent for term in self if term.parent is not None]

    @property
    def words(self) -> list[str]:
        """What the recipe does not show."""
        return [f"{name.replace('/', ' ', 1)}: {term.words}" for name, term in self.named.items() if term.words]

    def check_samples(self, count: int) -> None:
        """UsageError: there are so few responses to a prompt that a term has nothing to compare."""
        for term in self:
            if term.compares and count < 2:
                what = "compares the responses of a prompt. set rollout.responses_per_prompt to 2 or more"
                raise UsageError(f"{term.place}: {what}")

    def load(self, models: FrozenModels, budget: int) -> tuple[list[Scorer], list[Scorer]]:
        """Those of the reward and of gold with their weights, each base loaded once; budget: tokens of one forward pass.

        UsageError: the weights do not fit.
        """
        reward = [term.load(models, f"reward{number or ''}", budget) for number, term in enumerate(self.reward)]
        gold = [term.load(models, f"gold{number or ''}", budget) for number, term in enumerate(self.gold)]
        return reward, gold


def find_terms(loaded: Loaded, policy: PolicyText) -> RewardTerms:
    """What `reward` and `gold` name.

    UsageError: a term's source is not there, or is no reward; or a run watches the mean of one that compares.
    """
    found: dict[str, list[RewardTerm]] = {"reward": [], "gold": []}
    policy = dataclasses.replace(policy, folder=Path(loaded.recipe.output))
    for key, kind, term in _terms(loaded):
        found[key.partition(".")[0]].append(TERMS[kind].find(term, name_of(term), loaded.named(f"{key}.{kind}"), policy))
    terms = RewardTerms(**found)
    if isinstance(loaded.recipe, TrainingRecipe):
        train = loaded.recipe.train
        watched = {f"train.stop_if.{name}": name for name in train.stop_if}
        watched |= {"train.keep_best.metric": train.keep_best.metric} if train.keep_best else {}
        for key, name in watched.items():
            if name in terms.named and terms.named[name].compares:
                what = "it compares a prompt's responses with each other. watch another metric"
                raise UsageError(f"{loaded.named(key)}: the mean of {name} is always ½: {what}")
    return terms


def columns_read(loaded: Loaded) -> Lent:
    """The columns of rows that the terms of `reward` and `gold` read. UsageError: a function is not there, or is no reward."""
    read: dict[str, str | None] = {}
    for key, kind, term in _terms(loaded):
        for name, who in TERMS[kind].columns(term, loaded.named(f"{key}.{kind}")).items():
            read[name] = who or read.get(name)
    return read


def _terms(loaded: Loaded) -> Iterator[tuple[str, str, sections.Reward]]:
    """Key, kind and section of every term."""
    for key, terms in zip(("reward", "gold"), loaded.recipe.terms, strict=True):
        for number, term in enumerate(terms):
            (kind,) = kinds_of(term)
            yield f"{key}.{number}", kind, term
