"""The terms of a run's reward and of gold, before any weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import sections
from rlhf_cli.data.templates import Template
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.rollout.reward_models import FoundRewardModel, find_reward_model
from rlhf_cli.rollout.rewards import FunctionTerm, function_term
from rlhf_cli.runs.manifest import Parent


@dataclass(frozen=True)
class Judge:
    """A term of the reward, or of gold, before any weights are loaded."""

    reward: sections.Reward
    found: FoundRewardModel | FunctionTerm

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common. Not the text of a function: one that failed is mended, and the run goes on."""
        own = {"name": name_of(self.reward), "weight": self.reward.weight}
        if isinstance(self.found, FoundRewardModel):
            return own | self.found.record
        return own | {"function": self.found.reference}

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        if isinstance(self.found, FoundRewardModel):
            return self.identity
        file = self.found.reference.rpartition(":")[0]
        return self.identity | {"hash": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


@dataclass(frozen=True)
class Judges:
    """Everybody who judges the responses of a run."""

    reward: list[Judge]
    gold: list[Judge]

    @property
    def record(self) -> dict[str, Any]:
        return {"reward": [judge.record for judge in self.reward], "gold": [judge.record for judge in self.gold]}

    def parents(self) -> list[Parent]:
        """The runs that reward models come from."""
        found = [judge.found.start.parent for judge in self.reward + self.gold if isinstance(judge.found, FoundRewardModel)]
        return [parent for parent in found if parent is not None]

    def words(self) -> Iterator[str]:
        """What the recipe does not show."""
        for what, judges in (("reward", self.reward), ("gold", self.gold)):
            for judge in judges:
                if isinstance(judge.found, FoundRewardModel):
                    scale = f"less {judge.found.mean:.4g}, over {judge.found.std:.4g}"
                    scores = "as they are" if judge.found.std == 1 and not judge.found.mean else scale
                    yield f"{what} {judge.found.name}: scores {scores}; it reads the policy's {judge.found.reads}"


def find_judges(loaded: Loaded, tokenizer: Any, template: Template, trust_remote_code: bool, check: bool) -> Judges:
    """What `reward` and `gold` name; `tokenizer` and `template` are the policy's.

    Raises:
        UsageError: a model or a function is not there, or is no reward.
    """

    def find(key: str, term: sections.Reward) -> FoundRewardModel | FunctionTerm:
        if term.function is not None:
            return function_term(term, name_of(term), loaded.named(f"{key}.function"))
        return find_reward_model(
            term,
            name_of(term),
            loaded.named(f"{key}.model"),
            tokenizer=tokenizer,
            template=template,
            trust_remote_code=trust_remote_code,
            check=check,
        )

    reward, gold = (
        [Judge(term, find(f"{key}.{number}", term)) for number, term in enumerate(terms)]
        for key, terms in zip(("reward", "gold"), loaded.recipe.judges, strict=True)
    )
    return Judges(reward, gold)
