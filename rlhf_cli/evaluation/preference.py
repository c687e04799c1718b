"""How well scores agree with preferences: the figures of a reward model's card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import harmonic_mean
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from rlhf_cli.errors import NumberError
from rlhf_cli.evaluation.agreement import Agreement, Bin, Card, Histogram, LengthBaseline, Rate, beats_length
from rlhf_cli.evaluation.intervals import NORMAL_95, student, wilson
from rlhf_cli.figures import Interval
from rlhf_cli.models.heads import pair_scores
from rlhf_cli.objectives.preference import ordered_pairs

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Tree

CONFIDENCE_BINS = 10
MARGIN_BINS = 20
NO_SUBSET = "(none)"  # the name of the rows without a subset, where others have one


class Margins(NamedTuple):
    """The P pairs of some trees, tree by tree: by how much the better response has more of something than the worse."""

    values: np.ndarray  # (P,) float64
    tree: np.ndarray  # (P,) int64: index of the pair's tree
    prompt: np.ndarray  # (P,) int64: the same for all pairs of one prompt, in whatever rows they stand


def over(own: Sequence[float] | np.ndarray, one: int, other: int) -> float:
    """By how much one response has more than another: the difference of (K,) numbers, or an entry of (K, K) of pairs."""
    table = np.asarray(own)
    return float(table[one, other] if table.ndim == 2 else table[one] - table[other])


def margins(trees: Sequence[Tree], figures: Iterable[Sequence[float] | np.ndarray]) -> Margins:
    """All ordered pairs of `trees`; `figures` are of every tree's responses, in their order, as `over` takes them.

    The better one of two responses is the one that the data's probability speaks for. Even odds are no pair. Where steps are
    judged, `figures` has one number a step, and each is a pair: what a right step has, and less what a wrong one has.
    """
    prompts: dict[bytes, int] = {}
    found = [
        (margin, number, prompts.setdefault(tree.prompt.tobytes(), len(prompts)))
        for number, (tree, own) in enumerate(zip(trees, figures, strict=True))
        for margin in _margins(tree, own)
    ]
    values, rows, names = zip(*found, strict=True) if found else ((), (), ())
    return Margins(np.array(values, np.float64), np.array(rows, np.int64), np.array(names, np.int64))


def _margins(tree: Tree, figures: Sequence[float] | np.ndarray) -> Iterator[float]:
    if (labels := tree.facts.steps) is not None:
        return (float(own) * (1 if p > 0.5 else -1) for own, p in zip(figures, labels, strict=False) if p != 0.5)
    pairs, sign = ordered_pairs(len(tree.responses), tree.facts), tree.facts.better
    return (sign * over(figures, better, worse) for better, worse in pairs if sign)


def rate(pairs: Margins) -> Rate | None:
    """Share of pairs with a positive margin, ties counted half; None without a pair.

    Wilson's interval of as many observations as the pairs are worth: pairs of one prompt are not independent.
    """
    if not len(pairs.values):
        return None
    won = hits(pairs.values)
    share = float(won.mean())
    return Rate(share, *wilson(share, observations(won, pairs.prompt)), len(won), len(np.unique(pairs.prompt)))


def observations(values: np.ndarray, prompt: np.ndarray) -> float:
    """How many independent values in {0, 1} vary as little in their mean s as these (P,), which several prompts have.

    s(1 − s)/Var · (z/t)², Var that of a mean of clusters, m/(m−1) · Σ_i (Σ_{j in i} (x_j − s))² / P² over m prompts; z/t, the
    normal and Student's 97.5 % quantile with m − 1 degrees of freedom, since it is estimated. Between the number of
    prompts, of different numbers of pairs w (Σw)²/Σw² of them (Kish 1965), and P.
    """
    _, place, weights = np.unique(prompt, return_inverse=True, return_counts=True)
    fewest, m, mean = float(weights.sum() ** 2 / (weights**2).sum()), len(weights), float(values.mean())
    if m == len(values) or m < 2:
        return fewest
    variance = m / (m - 1) * float((np.bincount(place, values - mean) ** 2).sum()) / len(values) ** 2
    worth = mean * (1 - mean) / variance * (NORMAL_95 / student(m - 1)) ** 2 if variance else 0.0
    return min(max(worth, fewest), float(len(values)))


def hits(values: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 1/2 for a tie, else 0."""
    won: np.ndarray = (values > 0) + (values == 0) / 2
    return won


def confidences(values: np.ndarray) -> np.ndarray:
    """The probability σ(|margin|) that a Bradley–Terry model gives to the response it prefers."""
    confidence: np.ndarray = 1 / (1 + np.exp(-np.abs(values)))
    return confidence


def reliability(values: np.ndarray) -> list[Bin]:
    """How often the preferred response is the better one, by confidence: the bins of [0.5, 1] that have pairs."""
    confidence = confidences(values)
    edges = np.linspace(0.5, 1.0, CONFIDENCE_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, CONFIDENCE_BINS - 1)
    bins = []
    for number in np.unique(place):
        mine = place == number
        mean, right = float(confidence[mine].mean()), float(hits(values[mine]).mean())
        bins.append(Bin(round(float(edges[number]), 2), round(float(edges[number + 1]), 2), int(mine.sum()), mean, right))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Σ count |accuracy − confidence| / Σ count; Naeini et al. 2015 with bins of equal width."""
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / sum(each.count for each in bins)


def expected_error(bins: Sequence[Bin]) -> float:
    """What `calibration_error` is in the mean for a judge that is perfectly calibrated, of as many pairs in these bins.

    Σ count · E|X/count − c| / Σ count, X ~ Binomial(count, c): E|X − nc| = 2(k+1) C(n, k+1) c^{k+1} (1 − c)^{n−k}, k = ⌊nc⌋
    (de Moivre 1730).
    """

    def deviation(n: int, c: float) -> float:
        k = min(math.floor(n * c), n - 1)
        logs = math.lgamma(n + 1) - math.lgamma(k + 2) - math.lgamma(n - k) + (k + 1) * math.log(c)
        return 2 * (k + 1) * math.exp(logs + ((n - k) * math.log1p(-c) if c < 1 else -math.inf))

    return sum(deviation(each.count, each.confidence) for each in bins) / sum(each.count for each in bins)


def histogram(values: np.ndarray) -> Histogram:
    reach = float(np.abs(values).max()) or 1.0
    counts, edges = np.histogram(values, MARGIN_BINS, (-reach, reach))
    return Histogram(float(values.mean()), tuple(edges.tolist()), tuple(counts.tolist()))


def lead(first: Margins, second: Margins) -> Interval:
    """The accuracy of the first margins above that of the second ones of the same pairs, at least one.

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired data": the
    distances of both Wilson intervals, squared and added, less twice their product by the correlation of the two. Deviations:
    the intervals are of as many `observations` as the pairs are worth, the correlation is that of the prompts' means, and it is
    not corrected for continuity.
    """
    _, place, weights = np.unique(first.prompt, return_inverse=True, return_counts=True)
    ours, theirs = (np.bincount(place, hits(each.values)) / weights for each in (first, second))
    means = [float(np.average(each, weights=weights)) for each in (ours, theirs)]
    (up, between), (_, down) = np.cov(ours, theirs, aweights=weights, ddof=0).tolist()
    alike = between / math.sqrt(up * down) if up and down else 0.0
    (low, high), (base_low, base_high) = (
        wilson(mean, observations(hits(each.values), each.prompt)) for mean, each in zip(means, (first, second), strict=True)
    )

    def distance(own: float, other: float) -> float:
        return math.sqrt(max(own**2 + other**2 - 2 * alike * own * other, 0.0))

    gap = means[0] - means[1]
    below, above = distance(means[0] - low, base_high - means[1]), distance(high - means[0], means[1] - base_low)
    return Interval(gap, gap - below, gap + above)


def length_baseline(pairs: Margins, held_out: Sequence[Tree], training: Sequence[Tree]) -> LengthBaseline | None:
    """Longer or shorter is decided on the training pairs and measured on the held-out ones; None where those have no pair.

    `pairs`: a model's margins of the held-out pairs. Which steps are long is decided on the training too.
    """
    seen, lengths = (margins(trees, map(_lengths, trees)) for trees in (training, held_out))
    rule = None
    if any(tree.facts.steps for tree in held_out[:1]):
        surplus = np.bincount(np.abs(seen.values).astype(np.int64), np.sign(seen.values), minlength=1).cumsum()
        tokens = int(np.abs(2 * surplus - surplus[-1]).argmax())  # of right steps over wrong ones, up to so many tokens
        seen, lengths = (own._replace(values=own.values - np.sign(own.values) * (tokens + 0.5)) for own in (seen, lengths))
        rule = f"calling steps of {'at most' if 2 * surplus[tokens] > surplus[-1] else 'more than'} {tokens} tokens right"
    learned = rate(seen)
    sign = -1 if learned and learned.accuracy < 0.5 else 1
    lengths = lengths._replace(values=sign * lengths.values)
    found = rate(lengths)
    if found is None:
        return None
    prefers: Literal["longer", "shorter"] = "longer" if sign > 0 else "shorter"
    return LengthBaseline(prefers, *found.interval, lead(pairs, lengths), rule)


def _lengths(tree: Tree) -> Sequence[int] | np.ndarray:
    """Tokens of the responses; where steps are judged, of each step and what stands before it."""
    sizes = [*map(len, tree.responses)]
    return sizes if tree.facts.ends is None else np.diff(sizes[0] - 1 - np.array(tree.facts.ends[0]), prepend=-1)


def first_error_f1(trees: Sequence[Tree], logits: Sequence[np.ndarray]) -> float | None:
    """The harmonic mean of two shares, None without either: of responses with a wrong step, those whose first one has the first
    logit below 0; of others, those without any. Zheng et al. 2024, "ProcessBench".
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for tree, own in zip(trees, logits, strict=True):
        signs = np.array(tree.facts.steps)[: len(own)] - 0.5, own
        known, found = (next((k for k, value in enumerate(each) if value < 0), None) for each in signs)
        hits[known is None].append(found == known)
    return harmonic_mean([sum(own) / len(own) for own in hits.values()]) if all(hits.values()) else None


def agreement(
    kind: str, scores: Sequence[np.ndarray], trees: Sequence[Tree], training: Sequence[Tree], beta: float | None = None
) -> Agreement:
    """How well the scores of every tree's responses, as `over` takes them, agree with the preferences of the data.

    `training`: trees that decide whether the length baseline prefers longer or shorter responses; without any, longer ones.
    """
    pairs = margins(trees, scores)
    found, bins = rate(pairs), reliability(pairs.values)
    names = [tree.facts.subset for tree in trees]
    of_pair = np.array([names[tree] or NO_SUBSET for tree in pairs.tree.tolist()])
    own = {name: rate(Margins(*(each[of_pair == name] for each in pairs))) for name in sorted(set(of_pair.tolist()))}
    return Agreement(
        kind=kind,
        rate=found,
        ece=calibration_error(bins) if bins else None,
        confidence=float(confidences(pairs.values).mean()) if found else None,
        reliability=bins,
        margins=histogram(pairs.values) if found else None,
        subsets={name: share for name, share in own.items() if share} if any(names) else {},
        length_baseline=length_baseline(pairs, trees, training),
        ties=int((pairs.values == 0).sum()),
        beta=beta,
        ece_expected=expected_error(bins) if bins else None,
    )


def reward_card(
    scores: Sequence[np.ndarray],
    held_out: Sequence[Tree],
    locations: Sequence[str],
    training: Sequence[Tree],
    training_scores: Sequence[np.ndarray],
) -> Card:
    """The card of a reward model. Where steps are judged they take the place of pairs, and their logits that of margins.

    `scores`: of every held-out tree, as `over` takes them. `locations`: file and line of each held-out tree. `training`: the
    trees it was trained on, for the length baseline. `training_scores`: of some of them, at least one, for mean and standard
    deviation.

    NumberError: a score is not finite.
    """
    remedy = "the reward model is broken: train it again with a lower train.learning_rate"
    check_finite(scores, locations, remedy)
    check_finite(training_scores, [f"training tree {number}" for number in range(len(training_scores))], remedy)
    agreed = agreement("reward model", scores, held_out, training)
    spread = np.concatenate([own.ravel() for own in training_scores]).astype(np.float64)
    stepwise = any(tree.facts.steps for tree in training[:1])
    right = margins(held_out, [np.ones(len(own)) for own in scores]).values > 0 if stepwise else np.zeros(0)
    constant = float(right.mean()) if len(right) else 0.5
    return Card(
        agreement=agreed,
        score_mean=float(spread.mean()),
        score_std=float(spread.std()),
        score_responses=len(spread),
        warning=beats_length(agreed.rate, agreed.length_baseline, constant) if agreed.rate and agreed.length_baseline else None,
        constant=constant,
        unit="step" if stepwise else "pair",
        first_error=first_error_f1(held_out, scores) if stepwise else None,
    )


def circles(trees: Sequence[Tree], vectors: Sequence[np.ndarray], tau: float) -> tuple[int, int]:
    """How many triples of a prompt's different responses a general preference model puts in a circle, and how many there are.

    `vectors`: (K, W) of every tree's responses; the responses of a prompt may stand in several rows.
    """
    prompts: dict[bytes, dict[bytes, np.ndarray]] = {}
    for tree, own in zip(trees, vectors, strict=True):
        known = prompts.setdefault(tree.prompt.tobytes(), {})
        known |= {ids.tobytes(): vector for ids, vector in zip(tree.responses, own, strict=True)}
    cyclic = triples = 0
    for known in prompts.values():
        v = np.stack([*known.values()])
        beats = (pair_scores(v[:, None], v[None], tau) > 0).astype(np.int64)
        cyclic, triples = cyclic + int(np.trace(beats @ beats @ beats)) // 3, triples + math.comb(len(v), 3)
    return cyclic, triples


def check_finite(scores: Sequence[np.ndarray], locations: Sequence[str], remedy: str) -> None:
    """NumberError with the place of the first response, (K,) of every tree, whose score is NaN or infinite."""
    for own, where in zip(scores, locations, strict=True):
        if not np.isfinite(own).all():
            number = int(np.argwhere(~np.isfinite(own))[0, 0])
            raise NumberError(f"{where}: the score of response {number + 1} is {own[number]}\n{remedy}")
