"""Responses drawn from the current policy: what they say, what they are worth, and what every role makes of their tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.errors import MachineError, RunError, Stopped
from rlhf_cli.metrics import ADAPTER_KEPT, LOGP_GAP, LOGP_GAP_MAX
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.memory import is_out_of_memory, return_freed
from rlhf_cli.models.passes import token_figures
from rlhf_cli.objectives.policy_gradient import Experience
from rlhf_cli.ranks import Ranks
from rlhf_cli.rollout.generate import Engine, Request, Response
from rlhf_cli.rollout.rewards import Answers, DenseScorer, Scorer, combined
from rlhf_cli.signals import Pause, no_pause

T = TypeVar("T")


class TokenFigures(NamedTuple):
    """What the roles make of N response tokens; (N,) float64 each."""

    old: np.ndarray  # log π at the rollout's temperature
    reference: np.ndarray  # log π_ref at the rollout's temperature
    plain: np.ndarray  # log π at temperature 1
    plain_reference: np.ndarray  # log π_ref at temperature 1
    value: np.ndarray  # V before the token; NaN where no value is asked for
    dense: np.ndarray = np.zeros(
        0
    )  # what terms of the reward give this very token, times their weights: a part of the response's score
    gap: np.ndarray = np.zeros(0)  # log π less what the engine that drew has for it; NaN where it is the trainer itself


@dataclass(frozen=True)
class Rollout:
    """M responses of N tokens, tree by tree, before anything is learned from them."""

    trees: list[Tree]  # prompts with their responses
    ended: np.ndarray  # (M,) bool
    terms: dict[str, np.ndarray]  # reward/NAME and gold/NAME → (M,) float64, before its weight
    scores: np.ndarray  # (M,) combined, penalties taken off
    tokens: TokenFigures
    seconds: dict[str, float]  # rollout: drawing; score: rewards and log-probabilities
    own: np.ndarray | None = None  # (M,) bool: which of them the policy drew; None: all
    kept: float | None = None  # `Engine.kept` when they were drawn

    @property
    def lengths(self) -> np.ndarray:
        """(M,) tokens of each response, its end included."""
        return np.array([len(response) for tree in self.trees for response in tree.responses], np.int64)

    @property
    def experience(self) -> Experience:
        prompt, own = np.repeat(np.arange(len(self.trees)), [len(tree.responses) for tree in self.trees]), self.tokens
        return Experience(self.lengths, prompt, self.scores, own.old, own.reference, own.value, own.dense)

    @property
    def tempered_kl(self) -> float:
        """Mean over the responses of Σ log π/π_ref at the rollout's temperature, what a KL penalty takes off."""
        return float((self.tokens.old - self.tokens.reference).sum() / len(self.ended))

    def figures(self, kl_coef: float | None = None) -> dict[str, float]:
        """Means over the policy's responses, of a term over those that it says something of; NAME/na is the share of the others.

        KL (at temperature 1) and entropy are sums over tokens, Σ log π/π_ref and −Σ log π.

        `kl_coef`: κ, for the reward that is left when the log-ratio at the rollout's temperature is taken off.
        """
        starts, tokens = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]), self.tokens
        named = self.terms | {
            "objective/scores": self.scores,
            "objective/kl": np.add.reduceat(tokens.plain - tokens.plain_reference, starts),
            "objective/entropy": -np.add.reduceat(tokens.old, starts),
            "response/length": self.lengths,
            "response/eos_rate": self.ended,
        }
        if kl_coef is not None:
            named["objective/rlhf_reward"] = self.scores - kl_coef * np.add.reduceat(tokens.old - tokens.reference, starts)
        if self.own is not None:
            named = {name: values[self.own] for name, values in named.items()}
        found = {name: float(np.nanmean(values)) for name, values in named.items() if not np.isnan(values).all()}
        terms = {name: named[name] for name in self.terms}
        silent = {f"{name}/na": float(np.isnan(values).mean()) for name, values in terms.items() if np.isnan(values).any()}
        apart = np.abs(tokens.gap[np.isfinite(tokens.gap)])
        gap = {LOGP_GAP: float(apart.mean()), LOGP_GAP_MAX: float(apart.max())} if len(apart) else {}
        return found | silent | gap | ({} if self.kept is None else {ADAPTER_KEPT: self.kept})


@dataclass(frozen=True)
class Sampler:
    """Draws responses from the policy as it is now, each rank its share of the prompts, and measures them."""

    backbone: Backbone
    engine: Engine
    tokenizer: Any
    ends: tuple[int, ...]
    settings: sections.Sampling
    records: Sequence[Record]  # that trees name by their row
    terms: Sequence[Scorer]
    gold: Sequence[Scorer]
    combine: str
    budget: int
    ranks: Ranks
    compared: bool = True  # is there a role "reference"? Without it the log-probabilities of a reference are NaN
    raw: bool = False  # the engine tells log-probabilities of the whole policy at temperature 1; else at the rollout's
    pause: Pause = no_pause  # between two tokens or passes

    def rollout(
        self,
        prompts: Sequence[Tree],
        seed: int,
        *,
        samples: int | None = None,
        values: bool = False,
        beside: Sequence[list[Response]] | None = None,
    ) -> Rollout:
        """Responses to all prompts, the same on every rank. `samples`: of each prompt, by default the recipe's number.

        `beside`: responses of another model to each prompt, which are judged with the policy's, behind them.

        RunError: a reward could not be computed.
        """
        started = time.monotonic()
        drawn = self.draw(prompts, seed, self.settings.responses_per_prompt if samples is None else samples)
        if beside is not None:
            drawn = [[*mine, *more] for mine, more in zip(drawn, beside, strict=True)]
        drawn_at = time.monotonic()
        trees = with_responses(prompts, drawn)
        share_of_trees = trees[self.ranks.rank :: self.ranks.size]
        answers = self._answers(trees, drawn)
        worth, dense = self._worth(answers)
        self.pause()
        parts = gather_shares(self.ranks, together(self.ranks, lambda: self._tokens(share_of_trees, values), joint=True))
        tokens = TokenFigures(*(np.concatenate(figures) for figures in zip(*parts, strict=True)))
        told = [np.full(len(one.ids), np.nan) if one.logps is None else one.logps for own in drawn for one in own]
        gap = (tokens.plain if self.raw else tokens.old) - np.concatenate(told)
        names = [f"reward/{term.name}" for term in self.terms] + [f"gold/{term.name}" for term in self.gold]
        terms: dict[str, np.ndarray] = {}
        for name, term, rows in zip(names, (*self.terms, *self.gold), worth, strict=True):
            terms |= zip((name, *(f"{name}/{what}" for what in term.beside)), rows, strict=True)
        ended = np.array([response.ended for responses in drawn for response in responses])
        scores = np.zeros(len(ended))
        if self.terms:
            weights = [term.weight for term in self.terms]
            scores = combined(self.combine, np.stack([rows[0] for rows in worth[: len(weights)]]), weights, answers.pairs)
        return Rollout(
            trees=trees,
            ended=ended,
            terms=terms,
            scores=scores - self.settings.missing_eos_penalty * ~ended,
            tokens=tokens._replace(dense=dense, gap=gap),
            kept=self.engine.kept,
            seconds={"rollout": drawn_at - started, "score": time.monotonic() - drawn_at},
        )

    def draw(self, prompts: Sequence[Tree], seed: int, samples: int) -> list[list[Response]]:
        """So many responses to each prompt, without judging them, the same on every rank."""
        share = range(self.ranks.rank, len(prompts), self.ranks.size)
        mine = [prompts[number] for number in share]
        with self.backbone.whole():
            own = together(self.ranks, lambda: self.respond(mine, share, seed, samples, self.settings.max_new_tokens))
        return_freed()  # the copies of the weights that sampling used
        return gather_shares(self.ranks, own)

    def respond(
        self, prompts: Sequence[Tree], numbers: Sequence[int], seed: int, samples: int, max_new_tokens: int
    ) -> list[list[Response]]:
        """This rank's responses. `numbers`: of each prompt, what its randomness follows from."""
        if not prompts:
            return []
        request = Request(
            prompts=[tree.prompt for tree in prompts],
            numbers=list(numbers),
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=self.settings.temperature,
            ends=self.ends,
            seed=seed,
            warping=self.settings if isinstance(self.settings, sections.Warping) else sections.Warping(),
        )
        return self.engine.generate(request, self.pause)

    def text(self, ids: np.ndarray, ended: bool) -> str:
        """What a response says, without the token that ended it."""
        return str(self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))

    def _answers(self, trees: list[Tree], drawn: Sequence[Sequence[Response]]) -> Answers:
        return Answers(
            trees=trees,
            records=[self.records[tree.row] for tree in trees],
            texts=[[self.text(response.ids, response.ended) for response in responses] for responses in drawn],
            ended=[[response.ended for response in responses] for responses in drawn],
            tokens=[[len(response.ids) for response in responses] for responses in drawn],
        )

    def _worth(self, answers: Answers) -> tuple[list[np.ndarray], np.ndarray]:
        """What each term gives all responses, (1 + what it tells beside, M), gold after the reward, on every rank.

        And (N,), what dense terms of the reward give their tokens, weighed.
        A term with weights scores each rank's own answers. One that sees texts alone is asked once, on rank 0, about all of them:
        what it says may depend on the others.
        """
        own = Answers(*(part[self.ranks.rank :: self.ranks.size] for part in vars(answers).values()))
        scorers = (*self.terms, *self.gold)

        def ask(term: Scorer, about: Answers) -> np.ndarray:
            return np.atleast_2d(term.spread(about, self.tokenizer) if isinstance(term, DenseScorer) else term.score(about))

        def share(term: Scorer) -> list[np.ndarray]:
            # Asked without answers, too: where models are in shards the other ranks need this one to forward.
            found = ask(term, own)
            sizes = [sum(each) if isinstance(term, DenseScorer) else len(each) for each in own.tokens]
            return np.split(found, np.cumsum(sizes)[:-1], 1) if sizes else []

        shares = together(self.ranks, lambda: [share(term) for term in scorers if term.needs_weights], joint=True)
        shared = (np.concatenate(gather_shares(self.ranks, each), 1) for each in shares)
        texts = [term for term in scorers if not term.needs_weights and self.ranks.main]
        asked = together(self.ranks, lambda: [ask(term, answers) for term in texts])
        alone = iter(self.ranks.gather(asked)[0])
        worth = [next(shared) if term.needs_weights else next(alone) for term in scorers]
        lengths = np.array([count for each in answers.tokens for count in each])
        starts, dense = np.cumsum(lengths) - lengths, np.zeros(lengths.sum())
        for at, term in enumerate(scorers):
            if isinstance(term, DenseScorer):
                dense += term.weight * np.nan_to_num(worth[at][0]) * (at < len(self.terms))
                worth[at] = np.add.reduceat(worth[at], starts, 1)
        return worth, dense

    def _tokens(self, trees: list[Tree], values: bool) -> list[TokenFigures]:
        """Of the response tokens of every tree."""
        warm = self.settings.temperature

        def read(role: str) -> list[np.ndarray]:
            def rows(host: Backbone, batch: Batch) -> tuple[torch.Tensor, ...]:
                return (host.values(role, batch),) if role == "value" else host.tempered_logps(role, batch, (warm, 1.0))[0]

            found = token_figures(self.backbone.at(role), trees, self.budget, rows, self.pause)
            return [np.concatenate(responses, 1) for responses in found]

        policy = read("policy")
        unknown = [np.full_like(part, np.nan) for part in policy]
        reference, value = read("reference") if self.compared else unknown, read("value") if values else unknown
        return [
            TokenFigures(old=own[0], reference=other[0], plain=own[1], plain_reference=other[1], value=worth[0])
            for own, other, worth in zip(policy, reference, value, strict=True)
        ]


def with_responses(prompts: Sequence[Tree], drawn: Sequence[Sequence[Response]]) -> list[Tree]:
    """The prompts with what was drawn to each."""
    return [
        tree._replace(responses=tuple(response.ids for response in responses))
        for tree, responses in zip(prompts, drawn, strict=True)
    ]


def read_logps(backbone: Backbone, role: str, trees: Sequence[Tree], budget: int, ranks: Ranks) -> list[list[np.ndarray]]:
    """(1, n) log π of the n supervised tokens of every response, [tree][response], on every rank."""
    own = trees[ranks.rank :: ranks.size]
    read = partial(token_figures, backbone, own, budget, lambda host, batch: (host.logps(role, batch)[0],))
    return gather_shares(ranks, together(ranks, read, joint=True))


def gather_shares(ranks: Ranks, own: Sequence[T]) -> list[T]:
    """What all ranks found in their order, where a rank has every `ranks.size`-th from the one of its own number."""
    shares = ranks.gather(own)
    return [shares[number % ranks.size][number // ranks.size] for number in range(sum(map(len, shares)))]


def together(ranks: Ranks, work: Callable[[], T], *, joint: bool = False) -> T:
    """`work` on this rank; what it raises on any rank ends the run on all, in order.

    `joint`: models forward in it. Where those lie in shards, the others wait in the middle of a pass, and are cut off.
    """
    cut_off = joint and ranks.sharding is not None
    error: RunError | None = None
    result: T | None = None
    try:
        result = work()
    except Stopped:
        raise
    except RunError as own:
        if cut_off:
            raise own.on_one_rank() from own
        error = own
    except (RuntimeError, MemoryError) as own:
        if not is_out_of_memory(own):
            raise
        advice = "set tokens_per_device lower, or draw fewer or shorter responses, then --resume"
        error = MachineError(f"out of memory while responses were drawn and judged; {advice}")
        if cut_off:
            raise error.on_one_rank() from own
    for found in ranks.gather(error and (type(error), str(error))):
        if found is not None:
            raise found[0](found[1]) from error
    return result  # type: ignore[return-value]
