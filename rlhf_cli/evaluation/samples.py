"""What models said to the same prompts, and what that is like: reward, KL, length, variety."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from rlhf_cli.data.records import PlainPrompt
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.intervals import jackknife, ratio_interval, within_shares
from rlhf_cli.figures import Interval
from rlhf_cli.metrics import golds


@dataclass(frozen=True)
class Sample:
    """One response of a model to a prompt, and what it is worth: a line of samples.jsonl."""

    model: str
    row: int  # the prompt's number, the same for every model
    number: int  # of the response among the model's to this prompt
    where: str  # file and line of the prompt
    prompt: PlainPrompt  # a text, or a conversation
    response: str
    ended: bool  # False: cut off at rollout.max_new_tokens
    tokens: int  # its end included
    logp: float  # Σ log π at temperature 1, nats
    reference_logp: float | None  # Σ log π_ref of the same tokens; None: no reference, or one with other tokens
    terms: dict[str, float | None] = field(
        default_factory=dict
    )  # reward/NAME and gold/NAME → before its weight; None: it says nothing
    score: float | None = None  # all terms of the reward together, penalties taken off

    @property
    def usable(self) -> bool:
        """Can it be learned from? Of a response that was cut off, training would learn to end where it stops."""
        return self.ended and bool(self.response.strip()) and "\0" not in self.response

    def term(self, name: str) -> float:
        """NaN: it says nothing."""
        return np.nan if (value := self.terms[name]) is None else value

    def worth(self, judge: str) -> float | None:
        """By which a judge that gives numbers compares: `reward` the score, `gold` the sum of its terms, or one term.

        A name that both have is the reward's, unless it says gold/NAME. None: it was not measured.
        """
        if judge == "reward":
            return self.score
        if judge == "gold":
            known = [value for name in golds(self.terms) if (value := self.terms[name]) is not None]
            return sum(known) if known else None
        return self.terms.get(judge, self.terms.get(f"reward/{judge}", self.terms.get(f"gold/{judge}")))


@dataclass(frozen=True)
class Samples:
    """K responses of one model to each of P prompts, in the order of the prompts."""

    model: str
    own: tuple[tuple[Sample, ...], ...]  # (P)(K)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.own), len(self.own[0])

    def first(self, count: int) -> Samples:
        """The first `count` responses to each prompt."""
        return Samples(self.model, tuple(responses[:count] for responses in self.own))

    def table(self, read: Callable[[Sample], float]) -> np.ndarray:
        """(P, K) float64 of a number of each response."""
        return np.array([[read(sample) for sample in responses] for responses in self.own], np.float64)

    def worths(self, judge: str) -> np.ndarray:
        """(P, K) what each response is worth to the judge. UsageError: it says nothing of one."""

        def worth(sample: Sample) -> float:
            if (found := sample.worth(judge)) is None:
                raise UsageError(
                    f"{judge} says nothing of a response to {sample.where}, and cannot compare it: name another judge"
                )
            return found

        return self.table(worth)

    def told(self, judge: str) -> bool:
        """Does the judge say something of every response?"""
        return all(sample.worth(judge) is not None for responses in self.own for sample in responses)

    def texts(self) -> list[list[str]]:
        """(P)(K) responses."""
        return [[sample.response for sample in responses] for responses in self.own]


def grouped(samples: Iterable[Sample]) -> Samples:
    """All samples of one model, in any order. ValueError: there are none, of several models, or not as many to each prompt."""
    ordered = sorted(samples, key=lambda sample: (sample.row, sample.number))
    own = tuple(tuple(responses) for _, responses in groupby(ordered, key=lambda sample: sample.row))
    models = {sample.model for sample in ordered}
    if len(models) != 1 or len({len(responses) for responses in own}) != 1:
        raise ValueError("expected the samples of one model, as many to each prompt")
    return Samples(models.pop(), own)


def figures(samples: Samples, counts: np.ndarray) -> dict[str, Interval]:
    """The metrics of one model's responses by name, in the order of a report.

    counts: (B, P), of `resamples`. Means over responses, by prompts: gold/NAME, objective/scores, reward/NAME, objective/kl
    (nats per response), response/length (tokens, the end included), response/eos_rate. objective/kl_per_token is Σ of the
    log-ratios / Σ of the tokens. response/distinct_1, response/distinct_2 and response/duplicates: `distinct`, `duplicates`.

    A metric is absent where a sample lacks its number (no score, a term that is not there, no log-probability of a
    reference), and distinct_n where fewer than 2 prompts have a response of n words.

    ValueError: fewer than 2 prompts, or as `ratio_interval` says.
    """
    every = [sample for responses in samples.own for sample in responses]
    terms = [name for name in every[0].terms if all(name in sample.terms for sample in every)]
    terms = [name for name in terms if any(sample.terms[name] is not None for sample in every)]
    lengths = samples.table(lambda sample: sample.tokens)
    found = {name: _term(samples, name, counts) for name in terms if name.startswith("gold/")}
    if all(sample.score is not None for sample in every):
        found["objective/scores"] = mean_interval(samples.table(lambda sample: sample.score or 0.0), counts)
    found |= {name: _term(samples, name, counts) for name in terms if name.startswith("reward/")}
    for name in terms:
        silent = samples.table(lambda sample, name=name: sample.terms[name] is None)  # type: ignore[misc]
        if silent.any():
            found[f"{name}/na"] = within_shares(mean_interval(silent, counts))
    ratios = log_ratios(samples)
    if ratios is not None:
        found["objective/kl"] = mean_interval(ratios, counts)
        found["objective/kl_per_token"] = ratio_interval(ratios.sum(1), lengths.sum(1), counts)
    found["response/length"] = mean_interval(lengths, counts)
    found["response/eos_rate"] = within_shares(mean_interval(samples.table(lambda sample: sample.ended), counts))
    texts = samples.texts()
    for size in (1, 2):
        if share := distinct(texts, size):
            found[f"response/distinct_{size}"] = share
    found["response/duplicates"] = duplicates(texts)
    return found


def _term(samples: Samples, name: str, counts: np.ndarray) -> Interval:
    """Mean over the responses that it says something of."""
    table = samples.table(lambda sample: sample.term(name))
    return ratio_interval(np.nansum(table, 1), (~np.isnan(table)).sum(1), counts)


def mean_interval(table: np.ndarray, counts: np.ndarray) -> Interval:
    """Mean of a (P, K) table, a prompt's K responses being drawn together; counts: (B, P)."""
    return ratio_interval(table.mean(1), np.ones(len(table)), counts)


def log_ratios(samples: Samples) -> np.ndarray | None:
    """(P, K) log π(response) − log π_ref(response), nats, whose mean estimates KL(π ‖ π_ref); None without a reference.

    Unbiased for responses drawn at temperature 1 from the whole distribution; a mean may be below 0 by chance.
    """
    if any(sample.reference_logp is None for responses in samples.own for sample in responses):
        return None
    return samples.table(lambda sample: sample.logp - (sample.reference_logp or 0.0))


def distinct(texts: Sequence[Sequence[str]], size: int) -> Interval | None:
    """Different word n-grams / all of them over (P)(K) responses; Li et al. 2016.

    Words are what white space separates, in upper and lower case as they stand. An n-gram stays within its response. The
    share falls with the number of responses: compare models only by as many. Jackknife interval, within [0, 1]; a prompt
    without n-grams is no observation, and the result is None where fewer than 2 prompts have any.
    """
    own = [found for found in (ngrams(responses, size) for responses in texts) if found]
    total: Counter[tuple[str, ...]] = Counter()
    for grams in own:
        total.update(grams)
    if len(own) < 2:
        return None
    only = [sum(total[gram] == count for gram, count in grams.items()) for grams in own]
    return _share(len(total), total.total(), only, [grams.total() for grams in own])


def ngrams(responses: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """How often some texts have each run of so many words."""
    found: Counter[tuple[str, ...]] = Counter()
    for response in responses:
        words = response.split()
        found.update(zip(*(words[start:] for start in range(size)), strict=False))
    return found


def duplicates(texts: Sequence[Sequence[str]]) -> Interval:
    """Share of (P)(K) responses whose text another one has, to any prompt; jackknife. ValueError: fewer than 2 prompts."""
    own = [Counter(responses) for responses in texts]
    total: Counter[str] = Counter()
    for responses in own:
        total.update(responses)
    lost = [
        sum(_repeated(total[text]) - _repeated(total[text] - count) for text, count in responses.items()) for responses in own
    ]
    repeated = sum(_repeated(count) for count in total.values())
    return _share(repeated, total.total(), lost, [responses.total() for responses in own])


def _repeated(count: int) -> int:
    """How many of `count` responses with one text have another beside them."""
    return count if count > 1 else 0


def _share(above: int, below: int, lost_above: Sequence[int], lost_below: Sequence[int]) -> Interval:
    """above / below, and its jackknife from what either loses by leaving out each prompt."""
    return within_shares(jackknife(above / below, (above - np.array(lost_above)) / (below - np.array(lost_below))))
