"""What needs weights in an evaluation: what each model says, what reward models make of it, and how it reads given rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_cli.data.batches import derive_seed
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.evaluation.models import EvaluatedModel
from rlhf_cli.evaluation.samples import Sample
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.models.sampling import stop_ids
from rlhf_cli.models.scoring import token_figures
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.rollout.experience import Rollout, Sampler, together
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.reward_models import FoundRewardModel
from rlhf_cli.rollout.rewards import Answers, FunctionTerm, ModelTerm, as_given, combine
from rlhf_cli.rollout.source import HELD_OUT
from rlhf_cli.rollout.terms import Judge, Judges
from rlhf_cli.signals import Pause

TOLD = 30.0
"""Seconds between two words on a model that takes its time."""


@dataclass(frozen=True)
class Rows:
    """The rows of one section of the recipe, as one voice reads them."""

    trees: Sequence[Tree]
    records: Sequence[Record]  # that the trees name by their row
    training: Sequence[Tree]  # beside held-out rows: those that training saw


def draw(
    candidate: EvaluatedModel,
    backbone: Backbone,
    frozen: FrozenModels,
    judges: Judges,
    rows: Rows,
    recipe: recipes.EvalRecipe,
    *,
    samples: int,
    compared: bool,
    budget: int,
    ranks: Ranks,
    say: Callable[[str], None],
) -> list[Sample]:
    """The policy's responses to every prompt, judged by the reward models; the same on every rank. `say` hears that it goes on.

    The randomness is that of held-out prompts while training: at equal prompts, seed and temperature a checkpoint says the same
    here as it said there. Of two models the k-th responses to a prompt come from the same random numbers.

    Raises:
        RunError: a reward model cannot read a response, or memory ran out.
    """
    sampler = Sampler(
        backbone=backbone,
        engine=TransformersEngine(backbone, "policy"),
        tokenizer=candidate.tokenisation.tokenizer,
        ends=tuple(stop_ids(backbone, candidate.tokenisation.tokenizer, candidate.tokenisation.template)),
        settings=recipe.rollout,
        records=rows.records,
        terms=list(_models("reward", judges.reward, frozen, budget)),
        gold=list(_models("gold", judges.gold, frozen, budget)),
        combine="sum",  # not used: `judged` combines, functions among them
        budget=budget,
        ranks=ranks,
        compared=compared,
        pause=_teller(lambda seconds: say(f"{candidate.name}: drawing and scoring, {seconds:.0f} s so far")),
    )
    rollout = sampler.rollout(list(rows.trees), derive_seed(recipe.seed, HELD_OUT), samples=samples)
    return list(_samples(candidate.name, rollout, sampler, rows.records, compared))


def _teller(say: Callable[[float], None]) -> Pause:
    """Says every TOLD seconds how long the work between whose passes it is called has taken."""
    started = told = time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told > TOLD:
            told = time.monotonic()
            say(told - started)

    return tell


def place_judges(judges: Judges, frozen: FrozenModels) -> None:
    """Load every reward model, each base once.

    Raises:
        UsageError: its weights do not fit.
    """
    for role, judge in _numbered(judges):
        if isinstance(judge.found, FoundRewardModel):
            start = judge.found.start
            frozen.add(role, start.base, start.revision, start.adapter, head=True)


def _numbered(judges: Judges) -> Iterator[tuple[str, Judge]]:
    """(role, judge) of all of them."""
    for what, terms in (("reward", judges.reward), ("gold", judges.gold)):
        yield from ((f"{what}{number}", judge) for number, judge in enumerate(terms))


def _models(what: str, judges: Sequence[Judge], frozen: FrozenModels, budget: int) -> Iterator[ModelTerm]:
    for number, judge in enumerate(judges):
        if isinstance(judge.found, FoundRewardModel):
            role = f"{what}{number}"
            yield judge.found.term(judge.reward.weight, frozen.places[role], role, budget)


def _samples(model: str, rollout: Rollout, sampler: Sampler, records: Sequence[Record], compared: bool) -> Iterator[Sample]:
    starts = np.concatenate([[0], np.cumsum(rollout.lengths)[:-1]])
    logps, reference = (np.add.reduceat(values, starts) for values in (rollout.plain, rollout.plain_reference))
    terms = {f"reward/{name}": values for name, values in rollout.terms.items()}
    terms |= {f"gold/{name}": values for name, values in rollout.gold.items()}
    at = 0
    for tree in rollout.trees:
        record = records[tree.row]
        for number, ids in enumerate(tree.responses):
            ended = bool(rollout.ended[at])
            yield Sample(
                model=model,
                row=tree.row,
                number=number,
                where=record.where,
                prompt=as_given(record.prompt),
                response=sampler.text(ids, ended),
                ended=ended,
                tokens=len(ids),
                logp=float(logps[at]),
                reference_logp=float(reference[at]) if compared else None,
                terms={name: float(values[at]) for name, values in terms.items()},
            )
            at += 1


def judged(samples: Sequence[Sample], judges: Judges, records: Sequence[Record], recipe: recipes.EvalRecipe) -> list[Sample]:
    """The samples with the terms of all Python functions and the score.

    Functions see a model's responses all at once, prompt by prompt. Terms of reward models are those that the samples have.

    Raises:
        UsageError: a function fails, or returns something else than numbers.
        NumberError: one of its numbers is not finite.
    """
    answers = Answers(
        trees=[],
        records=[records[sample.row] for sample in samples],
        texts=[[sample.response] for sample in samples],
        ended=[[sample.ended] for sample in samples],
    )
    terms: dict[str, np.ndarray] = {}
    for what, named in (("gold", judges.gold), ("reward", judges.reward)):
        for judge in named:
            key = f"{what}/{name_of(judge.reward)}"
            own = judge.found.score(answers) if isinstance(judge.found, FunctionTerm) else None
            terms[key] = np.array([sample.terms[key] for sample in samples]) if own is None else own
    scores = None
    if judges.reward:
        weighted = np.stack([judge.reward.weight * terms[f"reward/{name_of(judge.reward)}"] for judge in judges.reward])
        ended = np.array([sample.ended for sample in samples])
        scores = combine(weighted, recipe.reward_combine) - recipe.rollout.missing_eos_penalty * ~ended
    return [
        dataclasses.replace(
            sample,
            terms={name: float(values[at]) for name, values in terms.items()},
            score=None if scores is None else float(scores[at]),
        )
        for at, sample in enumerate(samples)
    ]


def function_scores(term: FunctionTerm, rows: Rows) -> list[np.ndarray]:
    """(K,) of every row's responses, as a Python function judges their texts."""
    records = [rows.records[tree.row] for tree in rows.trees]
    texts = [list(record.responses) for record in records]
    scores = term.score(Answers([], records, texts, [[True] * len(own) for own in texts]))
    return np.split(scores, np.cumsum([len(own) for own in texts])[:-1])


def response_logps(host: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks) -> list[np.ndarray]:
    """Σ log π of every tree's responses, (K,) each, on every rank."""
    return [np.array([part.sum() for part in responses]) for responses in _logps(host, role, trees, budget, ranks)]


def text_figures(host: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks) -> np.ndarray:
    """(R, 2): −Σ log π of every row's supervised tokens, and how many there are."""
    found = _logps(host, role, trees, budget, ranks)
    return np.array([[-sum(part.sum() for part in row), sum(part.shape[1] for part in row)] for row in found])


def _logps(host: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks) -> list[list[np.ndarray]]:
    def read(own: Backbone, batch: Batch) -> tuple[Any, ...]:
        return (own.logps(role, batch)[0],)

    share = range(ranks.rank, len(trees), ranks.size)
    mine = together(ranks, lambda: token_figures(host, [trees[i] for i in share], budget, read))
    found: Mapping[int, list[np.ndarray]] = {
        i: part for own in ranks.gather(dict(zip(share, mine, strict=True))) for i, part in own.items()
    }
    return [found[i] for i in range(len(trees))]
