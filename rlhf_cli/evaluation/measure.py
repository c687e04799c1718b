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
from rlhf_cli.rollout.experience import Rollout, Sampler, together
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.reward_functions import as_given
from rlhf_cli.rollout.rewards import Answers, RewardTerm, Scorer, combine
from rlhf_cli.rollout.source import HELD_OUT
from rlhf_cli.rollout.terms import RewardTerms
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
    terms: RewardTerms,
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
    reward, gold = terms.load(frozen, budget)
    sampler = Sampler(
        backbone=backbone,
        engine=TransformersEngine(backbone, "policy"),
        tokenizer=candidate.tokenisation.tokenizer,
        ends=tuple(stop_ids(backbone, candidate.tokenisation.tokenizer, candidate.tokenisation.template)),
        settings=recipe.rollout,
        records=rows.records,
        terms=_with_weights(terms.reward, reward),
        gold=_with_weights(terms.gold, gold),
        combine="sum",  # not used: `judged` combines, functions among them
        budget=budget,
        ranks=ranks,
        compared=compared,
        pause=_teller(lambda seconds: say(f"{candidate.name}: drawing and scoring, {seconds:.0f} s so far")),
    )
    rollout = sampler.rollout(list(rows.trees), derive_seed(recipe.seed, HELD_OUT), samples=samples)
    return list(_samples(candidate.name, rollout, sampler, rows.records, compared))


def _with_weights(terms: Sequence[RewardTerm], scorers: Sequence[Scorer]) -> list[Scorer]:
    return [scorer for term, scorer in zip(terms, scorers, strict=True) if term.needs_weights]


def _teller(say: Callable[[float], None]) -> Pause:
    """Says every TOLD seconds how long the work between whose passes it is called has taken."""
    started = told = time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told > TOLD:
            told = time.monotonic()
            say(told - started)

    return tell


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


def judged(
    samples: Sequence[Sample], terms: RewardTerms, frozen: FrozenModels, records: Sequence[Record], recipe: recipes.EvalRecipe
) -> list[Sample]:
    """The samples with the terms that need texts alone, such as Python functions, and with the score.

    Functions see a model's responses all at once, prompt by prompt. The other terms are those that the samples have.

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
    reward, gold = terms.load(frozen, int(recipe.tokens_per_device))
    scorers = {f"gold/{scorer.name}": scorer for scorer in gold} | {f"reward/{scorer.name}": scorer for scorer in reward}
    found = {
        name: np.array([sample.terms[name] for sample in samples]) if terms.named[name].needs_weights else scorer.score(answers)
        for name, scorer in scorers.items()
    }
    scores = None
    if reward:
        weighted = np.stack([scorer.weight * found[f"reward/{scorer.name}"] for scorer in reward])
        ended = np.array([sample.ended for sample in samples])
        scores = combine(weighted, recipe.reward_combine) - recipe.rollout.missing_eos_penalty * ~ended
    return [
        dataclasses.replace(
            sample,
            terms={name: float(values[at]) for name, values in found.items()},
            score=None if scores is None else float(scores[at]),
        )
        for at, sample in enumerate(samples)
    ]


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
