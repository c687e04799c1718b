"""Where the batches of a run come from that learns from its own responses: the policy as it is when a step begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource, StepBatches
from rlhf_cli.data.records import Facts
from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Recorded, Tree
from rlhf_cli.objectives.kl import next_coef
from rlhf_cli.objectives.policy_gradient import Advantages, PolicyGradient
from rlhf_cli.rollout.experience import Rollout, Sampler, together, with_responses

KL_COEF = "kl_coef"
"""The name of an adapted κ among the objective's own numbers."""
PROBE_PROMPTS, PROBE_TOKENS = 4, 16
"""Responses that are drawn to check the start of a run with."""


def probe(sampler: Sampler, prompts: Sequence[Tree], seed: int) -> list[Tree]:
    """A few prompts with short responses, to check what must hold before the first step."""
    few, count = prompts[:PROBE_PROMPTS], sampler.settings.responses_per_prompt
    numbers = range(len(few))
    drawn = together(sampler.ranks, lambda: sampler.respond(few, numbers, Stream.PROBE.seed(seed), count, PROBE_TOKENS))
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

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """The rollout of `step` with what it teaches."""
        seed, coef = Stream.ROLLOUT.seed(self.seed, step), memory.get(KL_COEF, self.kl.coef)
        rollout = self.sampler.rollout(self.prompts.batch(step), seed, values=self.objective.values)
        in_loss = self.kl.estimator in ("k2", "k3")
        advantages = self.objective.estimate_advantages(rollout.experience, 0.0 if in_loss else coef, memory)
        figures = rollout.figures(coef)
        metrics = {
            **figures,
            "kl_coef": coef,
            **advantages.metrics,
            **{f"time/{name}": seconds for name, seconds in rollout.seconds.items()},
        }
        after = dict(advantages.memory)
        if self.kl.target is not None:
            assert self.kl.horizon is not None
            after[KL_COEF] = next_coef(coef, rollout.tempered_kl, self.kl.target, self.kl.horizon, len(rollout.ended))
        given = {"temperature": self.sampler.settings.temperature}
        if in_loss:
            given[f"{self.kl.estimator}_coef"] = coef
        trees, locations = with_recorded(rollout, advantages), self.prompts.locations(step)
        if self.ptx is not None:
            given["ptx_coef"] = self.ptx_coef
            offset = len(self.sampler.records)
            trees += [tree._replace(row=offset + tree.row) for tree in self.ptx.batch(step)]
            locations += self.ptx.locations(step)
        return StepBatches(step, (trees,), (locations,), after, given, metrics)


def with_recorded(rollout: Rollout, advantages: Advantages) -> list[Tree]:
    """The trees with what is known of every token of their responses."""
    tokens, ends = rollout.tokens, np.cumsum(rollout.lengths)[:-1]
    targets = np.full(len(tokens.old), np.nan) if advantages.targets is None else advantages.targets
    known = Recorded(tokens.old, tokens.reference, advantages.advantages, tokens.value, targets)
    parts = zip(*(np.split(values.astype(np.float32), ends) for values in known), strict=True)
    return [tree._replace(recorded=tuple(Recorded(*next(parts)) for _ in tree.responses)) for tree in rollout.trees]


Shape = Callable[[list[Tree], int], list[Tree]]
"""Gives the ranked trees of a step, with the step's seed, the form that an objective takes."""


@dataclass(frozen=True)
class PreferenceSource:
    """Responses ranked by the reward, drawn anew every `refresh` steps, for objectives on preferences."""

    sampler: Sampler
    prompts: DatasetSource
    refresh: int
    steps: int
    ties: bool  # may responses of one prompt be tied?
    shape: Shape | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.prompts.steps_per_epoch

    def collect(self, step: int, memory: Mapping[str, float]) -> StepBatches:
        """The ranked responses for `step` and the steps until responses are drawn again.

        Prompts whose responses are all tied are left out.
        """
        steps = range(step, min(step + self.refresh, self.steps + 1))
        batches = [self.prompts.batch(k) for k in steps]
        rollout = self.sampler.rollout([tree for batch in batches for tree in batch], Stream.ROLLOUT.seed(self.seed, step))
        trees = iter(ranked(rollout) if self.ties else map(untied, ranked(rollout)))
        shaped = []
        for k, batch in zip(steps, batches, strict=True):
            own = [tree for tree in (next(trees) for _ in batch) if len(set(tree.facts.ranks or ())) > 1]
            shaped.append(self.shape(own, Stream.MISMATCHES.seed(self.seed, step, k)) if self.shape and own else own)
        locations = tuple([self.sampler.records[tree.row].where for tree in own] for own in shaped)
        times = {f"time/{name}": seconds for name, seconds in rollout.seconds.items()}
        return StepBatches(step, tuple(shaped), locations, dict(memory), {}, rollout.figures() | times)


def ranked(rollout: Rollout) -> list[Tree]:
    """The trees with their responses best first, ties marked as such, and the reference's log-probabilities of each."""
    known = iter(np.split(rollout.tokens.plain_reference, np.cumsum(rollout.lengths)[:-1]))
    scores = iter(rollout.scores.tolist())
    found = []
    for tree in rollout.trees:
        own = tuple(next(scores) for _ in tree.responses)
        descending = sorted(set(own), reverse=True)
        facts = Facts(ranks=tuple(float(descending.index(score)) for score in own), scores=own)
        reference = tuple(next(known).astype(np.float32) for _ in own)
        found.append(_select(tree._replace(facts=facts, reference=reference), sorted(range(len(own)), key=lambda k: -own[k])))
    return found


def untied(tree: Tree) -> Tree:
    """The tree with one response of each rank: a ranking of all of them would put some order into a tie."""
    ranks = tree.facts.ranks or ()
    return _select(tree, [k for k, rank in enumerate(ranks) if rank not in ranks[:k]])


def _select(tree: Tree, responses: Sequence[int]) -> Tree:
    """A ranked tree with these of its responses, in this order."""
    ranks, scores = tree.facts.ranks or (), tree.facts.scores or ()
    return tree._replace(
        responses=tuple(tree.responses[k] for k in responses),
        facts=tree.facts._replace(ranks=tuple(ranks[k] for k in responses), scores=tuple(scores[k] for k in responses)),
        reference=tree.reference and tuple(tree.reference[k] for k in responses),
    )
