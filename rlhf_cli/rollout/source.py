"""Where the batches of a run come from that learns from its own responses: the policy as it is when a step begins."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource, StepBatches
from rlhf_cli.data.records import Facts
from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Recorded, Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.metrics import OVERLONG, REDRAWN, TRUNCATED, ZERO_SPREAD
from rlhf_cli.objectives.advantages import MOST_WEIGHT, truncated_weights
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.kl import next_coef
from rlhf_cli.objectives.policy_gradient import REDRAWS, Advantages, PolicyGradient
from rlhf_cli.rollout.experience import Rollout, Sampler, TokenFigures, read_logps, together, with_responses

KL_COEF = "kl_coef"
"""The name of an adapted κ among the objective's own numbers."""
PROBE_PROMPTS, PROBE_TOKENS = 4, 16
"""Responses that are drawn to check the start of a run with."""


def probe(sampler: Sampler, prompts: Sequence[Tree], seed: int) -> list[Tree]:
    """A few prompts with short responses, to check what must hold before the first step."""
    few, count = prompts[:PROBE_PROMPTS], sampler.settings.responses_per_prompt
    numbers, longest = range(len(few)), min(PROBE_TOKENS, sampler.settings.max_new_tokens)
    with sampler.backbone.whole():
        drawn = together(sampler.ranks, lambda: sampler.respond(few, numbers, Stream.PROBE.seed(seed), count, longest))
    return with_responses(few, drawn)


@dataclass(frozen=True)
class PolicySource:
    """A rollout for every step, with the advantages that the objective makes of it."""

    sampler: Sampler
    prompts: DatasetSource
    objective: PolicyGradient
    kl: sections.Kl
    ptx: DatasetSource | None
    ptx_coef: float
    seed: int
    truncate: bool = False  # weigh every token by `truncated_weights`

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """The rollout of `step` with what it teaches. What is measured is of the step's own prompts, whatever replaced some."""
        coef, longest = memory.get(KL_COEF, self.kl.coef), self.sampler.settings.max_new_tokens
        rounds, chosen = self._draw(step)
        rollout, learned = rounds[0], chosen_of(rounds, chosen)
        in_loss, penalty = self.kl.estimator in ("k2", "k3"), self.objective.length_penalty
        experience = dataclasses.replace(learned.experience, scores=learned.scores + penalty(learned.lengths, longest))
        advantages = self.objective.estimate_advantages(experience, 0.0 if in_loss else coef, memory)
        own = {REDRAWN: np.mean(chosen >= len(rollout.trees)), OVERLONG: penalty(rollout.lengths, longest).mean()}
        if self.truncate:
            weights = truncated_weights(learned.tokens.gap)
            cut = {TRUNCATED: float(np.mean(weights == MOST_WEIGHT))}
            advantages = advantages._replace(advantages=advantages.advantages * weights, metrics=advantages.metrics | cut)
        metrics = {
            **rollout.figures(coef),
            **zero_spread(rollout),
            "kl_coef": coef,
            **advantages.metrics,
            **{name: float(value) for name, value in own.items() if name in self.objective.metric_names},
            **{f"time/{name}": seconds for name, seconds in learned.seconds.items()},
        }
        after = dict(advantages.memory)
        if self.kl.target is not None:
            assert self.kl.horizon is not None
            after[KL_COEF] = next_coef(coef, rollout.tempered_kl, self.kl.target, self.kl.horizon, len(rollout.ended))
        given = {"temperature": self.sampler.settings.temperature, "max_new_tokens": float(longest)}
        if in_loss:
            given[f"{self.kl.estimator}_coef"] = coef
        drawn = [self.prompts.locations(step + k)[: len(one.trees)] for k, one in enumerate(rounds)]
        trees, locations = with_recorded(learned, advantages), [list(chain(*drawn))[k] for k in chosen]
        if self.ptx is not None:
            given["ptx_coef"] = self.ptx_coef
            offset = len(self.sampler.records)
            trees += [tree._replace(row=offset + tree.row) for tree in self.ptx.batch(step)]
            locations += self.ptx.locations(step)
        return StepBatches(step, (trees,), (locations,), after, given, metrics)

    def _draw(self, step: int) -> tuple[list[Rollout], np.ndarray]:
        """The rollout of a step's own prompts and those that replace some; and which prompts of all are learned from, (P,).

        A round draws to the first prompts of the batch so many steps later. What could be drawn follows from seed and step
        alone, so that nothing of it is to be kept for the steps after.
        """
        draw = partial(self.sampler.rollout, values=self.objective.values)
        rounds = [draw(self.prompts.batch(step), Stream.ROLLOUT.seed(self.seed, step))]
        chosen = np.arange(len(rounds[0].trees))
        missing = np.flatnonzero(tied_prompts(rounds[0]))
        while self.objective.redraws and len(missing) and (k := len(rounds)) <= REDRAWS:
            before = sum(len(one.trees) for one in rounds)
            rounds.append(draw(self.prompts.batch(step + k)[: len(missing)], Stream.REDRAW.seed(self.seed, step, k)))
            found = before + np.flatnonzero(~tied_prompts(rounds[k]))
            chosen[missing[: len(found)]] = found
            missing = missing[len(found) :]
        return rounds, chosen


def tied_prompts(rollout: Rollout) -> np.ndarray:
    """(P,) bool: the prompts whose responses all have one score."""
    tied: np.ndarray = np.ptp(rollout.scores.reshape(len(rollout.trees), -1), axis=1) == 0
    return tied


def zero_spread(rollout: Rollout) -> dict[str, float]:
    """The share of such prompts, where a prompt has several responses."""
    return {ZERO_SPREAD: float(tied_prompts(rollout).mean())} if len(rollout.ended) > len(rollout.trees) else {}


def chosen_of(rounds: Sequence[Rollout], chosen: np.ndarray) -> Rollout:
    """These prompts, counted through the rounds, with their responses; the time is that of all rounds."""
    trees = [tree for one in rounds for tree in one.trees]
    lengths = np.concatenate([one.lengths for one in rounds])
    responses = np.arange(len(lengths)).reshape(len(trees), -1)[chosen].ravel()
    places = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    tokens = np.concatenate([places[k] for k in responses])
    return Rollout(
        trees=[trees[k] for k in chosen],
        ended=np.concatenate([one.ended for one in rounds])[responses],
        terms={name: np.concatenate([one.terms[name] for one in rounds])[responses] for name in rounds[0].terms},
        scores=np.concatenate([one.scores for one in rounds])[responses],
        tokens=TokenFigures(*(np.concatenate(part)[tokens] for part in zip(*(one.tokens for one in rounds), strict=True))),
        seconds={name: sum(one.seconds[name] for one in rounds) for name in rounds[0].seconds},
        kept=rounds[0].kept,
    )


def with_recorded(rollout: Rollout, advantages: Advantages) -> list[Tree]:
    """The trees with what is known of every token of their responses."""
    tokens, ends = rollout.tokens, np.cumsum(rollout.lengths)[:-1]
    targets = np.full(len(tokens.old), np.nan) if advantages.targets is None else advantages.targets
    known = Recorded(tokens.old, tokens.reference, advantages.advantages, tokens.value, targets)
    parts = zip(*(np.split(values.astype(np.float32), ends) for values in known), strict=True)
    return [tree._replace(recorded=tuple(Recorded(*next(parts)) for _ in tree.responses)) for tree in rollout.trees]


@dataclass(frozen=True)
class SampleSource:
    """The policy's own responses to the prompts of a step, drawn when it begins, as they are."""

    sampler: Sampler
    prompts: DatasetSource
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        started = time.monotonic()
        trees, metrics = drawn(self.sampler, self.prompts.batch(step), Stream.ROLLOUT.seed(self.seed, step))
        metrics["time/rollout"] = time.monotonic() - started
        return StepBatches(step, (trees,), (self.prompts.locations(step),), dict(memory), {}, metrics)


def drawn(sampler: Sampler, prompts: Sequence[Tree], seed: int) -> tuple[list[Tree], dict[str, float]]:
    """Prompts with responses that nothing judges, and what these are like."""
    responses = sampler.draw(prompts, seed, sampler.settings.responses_per_prompt)
    lengths, ended = zip(*((len(own.ids), own.ended) for several in responses for own in several), strict=True)
    metrics = {"response/length": float(np.mean(lengths)), "response/eos_rate": float(np.mean(ended))}
    return with_responses(prompts, responses), metrics


Shape = Callable[[list[Tree], int], list[Tree]]
"""Gives the ranked trees of a step, with the step's seed, the form that an objective takes."""


@dataclass(frozen=True)
class PreferenceSource:
    """Responses ranked by the reward, drawn anew every `refresh` steps, for objectives on preferences."""

    sampler: Sampler
    prompts: DatasetSource
    refresh: int
    steps: int
    objective: Objective
    shape: Shape | None
    seed: int
    previous: bool = False  # is the reference the policy that draws? Its log-probabilities are kept, so its weights need not be
    explore: sections.Explore | None = None
    explorer: Sampler | None = None  # that draws from the reference; with `explore`

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """The ranked responses for `step` and the steps until responses are drawn again.

        Prompts whose responses are all tied are left out.
        """
        steps = range(step, min(step + self.refresh, self.steps + 1))
        batches = [self.prompts.batch(k) for k in steps]
        rollout, known = self._draw([tree for batch in batches for tree in batch], step)
        pick = best_and_worst if self.objective.self_play else (lambda tree: tree) if self.objective.learns_ties else untied
        trees = map(pick, known)
        shaped = []
        for k, batch in zip(steps, batches, strict=True):
            own = [tree for tree in (next(trees) for _ in batch) if len(set(tree.facts.ranks or ())) > 1]
            if self.shape and own:
                own = self.shape(own, Stream.MISMATCHES.seed(self.seed, step, k))
                if self.previous:  # a response may belong to another prompt by now
                    own = with_policy_logps(self.sampler, own)
            shaped.append(own)
        locations = tuple([self.sampler.records[tree.row].where for tree in own] for own in shaped)
        times = {f"time/{name}": seconds for name, seconds in rollout.seconds.items()}
        given: dict[str, float] = {self.explore.kind: self.explore.alpha} if self.explore else {}
        return StepBatches(step, tuple(shaped), locations, dict(memory), given, rollout.figures() | zero_spread(rollout) | times)

    def _draw(self, prompts: list[Tree], step: int) -> tuple[Rollout, list[Tree]]:
        """The policy's responses, and the trees with their ranks; with `explore` the last response is the reference's."""
        draw = partial(self.sampler.rollout, prompts, Stream.ROLLOUT.seed(self.seed, step))
        if self.explorer is None or self.explore is None:
            rollout = draw()
            return rollout, ranked(rollout, rollout.tokens.plain if self.previous else rollout.tokens.plain_reference)
        beside = self.explorer.draw(prompts, Stream.EXPLORE.seed(self.seed, step), 1)
        if self.explore.kind == "xpo":
            others = self.sampler.settings.responses_per_prompt - 1
            rollout = draw(samples=others, beside=beside)
            rollout = dataclasses.replace(rollout, own=np.tile([True] * others + [False], len(prompts)))
            return rollout, ranked(rollout, rollout.tokens.plain_reference, ordered=False)
        rollout, more = draw(), with_responses(prompts, beside)
        logps = read_logps(self.explorer.backbone, "reference", more, self.sampler.budget, self.sampler.ranks)
        rows = zip(ranked(rollout, rollout.tokens.plain_reference), more, logps, strict=True)
        return rollout, [
            tree._replace(responses=tree.responses + one.responses, reference=(*(tree.reference or ()), known[0].astype("f4")))
            for tree, one, (known,) in rows
        ]


def with_policy_logps(sampler: Sampler, trees: list[Tree]) -> list[Tree]:
    """The trees with the policy as it is now for their reference."""
    read = read_logps(sampler.backbone, "policy", trees, sampler.budget, sampler.ranks)
    known = [tuple(logps[0].astype(np.float32) for logps in own) for own in read]
    return [tree._replace(reference=own) for tree, own in zip(trees, known, strict=True)]


def ranked(rollout: Rollout, logps: np.ndarray, *, ordered: bool = True) -> list[Tree]:
    """The trees with their responses best first, ties marked as such, and the reference's log-probabilities (N,) of each.

    ordered: false leaves the responses in the order in which they were drawn.
    """
    known = iter(np.split(logps, np.cumsum(rollout.lengths)[:-1]))
    scores = iter(rollout.scores.tolist())
    found = []
    for tree in rollout.trees:
        own = tuple(next(scores) for _ in tree.responses)
        descending = sorted(set(own), reverse=True)
        facts = Facts(ranks=tuple(float(descending.index(score)) for score in own), scores=own)
        reference = tuple(next(known).astype(np.float32) for _ in own)
        order = sorted(range(len(own)), key=lambda k: -own[k]) if ordered else range(len(own))
        found.append(_select(tree._replace(facts=facts, reference=reference), order))
    return found


def untied(tree: Tree) -> Tree:
    """The tree with one response of each rank: a ranking of all of them would put some order into a tie."""
    ranks = tree.facts.ranks or ()
    return _select(tree, [k for k, rank in enumerate(ranks) if rank not in ranks[:k]])


def best_and_worst(tree: Tree) -> Tree:
    """Of K ranked responses the first and the last, their scores, a mean over the others, as a mean over all: ½ against itself.

    UsageError: a score is no probability.
    """
    scores, k = tree.facts.scores or (), len(tree.responses)
    if wrong := [score for score in scores if not 0 <= score <= 1]:
        raise UsageError(
            f"reward: expected the probability to win, from 0 to 1, and a response has {wrong[0]:g}. mend the function"
        )
    facts = tree.facts._replace(scores=tuple(((k - 1) * score + 0.5) / k for score in scores))
    return _select(tree._replace(facts=facts), (0, k - 1))


def _select(tree: Tree, responses: Sequence[int]) -> Tree:
    """A ranked tree with these of its responses, in this order."""
    ranks, scores = tree.facts.ranks or (), tree.facts.scores or ()
    return tree._replace(
        responses=tuple(tree.responses[k] for k in responses),
        facts=tree.facts._replace(ranks=tuple(ranks[k] for k in responses), scores=tuple(scores[k] for k in responses)),
        reference=tree.reference and tuple(tree.reference[k] for k in responses),
    )
