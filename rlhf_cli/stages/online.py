"""What runs share that learn from the policy's own responses: who judges them, and where they are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli import sections
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import Template
from rlhf_cli.data.trees import Tree
from rlhf_cli.data.unpaired import unpaired, with_mismatches
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.placement import Homes
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.rollout.experience import Sampler
from rlhf_cli.rollout.generate import Engine, TransformersEngine
from rlhf_cli.rollout.reward_models import FoundRewardModel, find_reward_model
from rlhf_cli.rollout.rewards import FunctionTerm, Term, function_term
from rlhf_cli.rollout.source import HeldOut, probe
from rlhf_cli.runs.manifest import Parent
from rlhf_cli.stages.reference import Reference
from rlhf_cli.stages.training import Job, stop_ids
from rlhf_cli.training.checkpoint import State
from rlhf_cli.training.loop import Measure


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


@dataclass(frozen=True)
class Drawing:
    """Where responses are drawn and judged, once all weights are loaded."""

    sampler: Sampler
    measure: Measure | None  # None: nothing is held out
    probe: list[Tree]


def open_drawing(job: Job, judges: Judges, backbone: Backbone, homes: Homes, base: str) -> Drawing:
    """Load the reward models; `base` is what the policy's adapter sits on.

    Raises:
        UsageError: a reward model's weights do not fit.
        MachineError: the engine is not installed.
    """
    settings = job.recipe.draws
    assert settings is not None
    terms = [_place(job, judge, f"reward{number or ''}", backbone, homes) for number, judge in enumerate(judges.reward)]
    gold = [_place(job, judge, f"gold{number or ''}", backbone, homes) for number, judge in enumerate(judges.gold)]

    engine = _engine(job, backbone, base)

    def sampler(records: Sequence[Record]) -> Sampler:
        return Sampler(
            backbone=backbone,
            engine=engine,
            tokenizer=job.tokenizer,
            ends=tuple(stop_ids(backbone, job.tokenizer, job.template)),
            settings=settings,
            records=records,
            terms=terms,
            gold=gold,
            combine=_combine(job.recipe),
            budget=job.budget,
            ranks=job.ranks,
        )

    reading, held_out = job.dataset.reading, job.dataset.held_out
    own = sampler(reading.train)
    measure: Measure | None = None
    if held_out is not None:
        unseen = HeldOut(sampler(reading.held_out), list(held_out.trees), job.recipe.seed, _kl_coef(job.recipe))

        def measure(state: State) -> Generator[dict[str, float] | None, None, None]:
            return unseen.measure(state.memory)

    return Drawing(own, measure, probe(own, job.source.batch(1), job.recipe.seed))


def _place(job: Job, judge: Judge, role: str, backbone: Backbone, homes: Homes) -> Term:
    if isinstance(judge.found, FunctionTerm):
        return judge.found
    start = judge.found.start
    homes.add(role, start.base, start.revision, start.adapter, head=True)
    return judge.found.term(judge.reward.weight, backbone, role, job.budget)


def _engine(job: Job, backbone: Backbone, base: str) -> Engine:
    assert job.recipe.draws is not None
    if job.recipe.draws.engine == "transformers":
        return TransformersEngine(backbone, "policy")
    if job.ranks.size > 1:
        place = job.loaded.named("rollout.engine")
        raise UsageError(f"{place}: vllm draws on one device, and there are {job.ranks.size}; use engine: transformers")
    from rlhf_cli.rollout.vllm import VllmEngine

    revision = job.start.revision if base == job.start.base else None
    return VllmEngine(base, revision, job.recipe.model.dtype, partial(backbone.save, "policy"))


def _combine(recipe: recipes.TrainingRecipe) -> str:
    assert isinstance(recipe, recipes.PpoRecipe | recipes.DirectRecipe)
    return recipe.reward_combine


def _kl_coef(recipe: recipes.TrainingRecipe) -> float | None:
    return recipe.kl.coef if isinstance(recipe, recipes.PpoRecipe) else None


def judged(trees: list[Tree], seed: int, records: Sequence[Record], max_length: int, mismatches: bool) -> list[Tree]:
    """Ranked responses one by one, the best of a prompt as desirable and its worst as undesirable.

    Raises:
        NumberError: all of them are one text, and the objective compares each with another one.
    """
    flat = unpaired(flatten(trees, records))
    if not mismatches:
        return list(flat)
    try:
        return list(with_mismatches(flat, seed, max_length))
    except UsageError as error:
        raise NumberError(f"what the policy draws has collapsed: {error}") from error


def recorded(reference: Reference, judges: Judges) -> dict[str, str]:
    """What a resumed run must have in common beside its data."""
    named: dict[str, Any] = {"reference": reference.record}
    for what, judges_of in (("reward", judges.reward), ("gold", judges.gold)):
        if judges_of:
            named[what] = [judge.identity for judge in judges_of]
    return {name: json.dumps(records) for name, records in named.items()}
