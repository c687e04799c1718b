"""Judged responses one by one, as KTO sees them, and the mismatched responses that its z0 is estimated from."""

from __future__ import annotations

import random
from functools import partial

import numpy as np

from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.flat import Trees, regroup
from rlhf_cli.data.records import Facts
from rlhf_cli.data.streams import DataStream
from rlhf_cli.errors import UsageError

TRIES = 64  # partners that are tried at random for a tree before all are looked at
HOPELESS = 100  # trees without any partner after which the rest are left as they are


def unpaired_dataset(dataset: Dataset, place: str, seed: int, max_length: int, *, mismatches: bool) -> Dataset:
    """The data of a stage that learns from single responses; `place` is the recipe key of the training data.

    Raises UsageError if all training responses have the same label, or all responses the same text (see `with_mismatches`).
    """
    dataset = dataset.map_trees(unpaired)
    labels = {facts.label for facts in dataset.train.trees.facts}
    if len(labels) == 1:
        has, lacks = ("desirable", "undesirable") if True in labels else ("undesirable", "desirable")
        raise UsageError(f"{place}: every response is {has}; without {lacks} ones there is nothing to tell apart")
    if not mismatches:
        return dataset
    held_out = dataset.held_out.trees if dataset.held_out is not None else None
    if held_out is not None and not _classes(held_out, held_out.first[:-1] + 1).any():
        raise UsageError(
            f"{place}: the {len(held_out)} held-out responses are one text ({held_out.locations[0]}), and KTO compares each "
            "with another one; hold out more rows (data.holdout or data.eval)"
        )
    return dataset.map_trees(partial(with_mismatches, seed=seed, max_length=max_length))


def unpaired(trees: Trees) -> Trees:
    """One tree for each judged response.

    An unpaired row keeps its response and label. A pair gives two trees, the chosen response as desirable and then the rejected
    one as undesirable; a ranking its best and its worst response so, and nothing of those between.
    """
    labels = [(True, False) if facts.label is None else (facts.label,) for facts in trees.facts]
    tree = np.repeat(np.arange(len(trees)), [len(one) for one in labels])
    label = np.array([label for one in labels for label in one])
    own = [trees.facts[i] for i in tree]
    facts = [Facts(label=one, probability=f.probability, subset=f.subset) for one, f in zip(label.tolist(), own, strict=True)]
    response = np.where(label, trees.first[tree] + 1, trees.first[tree + 1] - 1)
    parts = np.stack([trees.first[tree], response], axis=1).ravel()
    return regroup(trees, tree, np.full(len(tree), 2), parts, facts)


def with_mismatches(trees: Trees, seed: int, max_length: int) -> Trees:
    """Each tree of one response with a second one: the response of another tree, drawn once by `mismatch`.

    It only feeds an estimate, so it is cut where max_length is reached behind the prompt. Raises UsageError if all responses
    are the same.
    """
    prompts, responses = trees.first[:-1], trees.first[:-1] + 1
    texts = _classes(trees, responses)
    if not texts.any():
        raise UsageError(f"all {len(trees)} responses are the same ({trees.locations[0]}); KTO compares each with another one")
    others = responses[mismatch(texts, _classes(trees, prompts), seed)]
    parts = np.stack([prompts, responses, others], axis=1)
    lengths = np.diff(trees.segments)[parts]
    lengths[:, 2] = np.minimum(lengths[:, 2], max_length - lengths[:, 0])
    return regroup(trees, np.arange(len(trees)), np.full(len(trees), 3), parts.ravel(), trees.facts, lengths.ravel())


def _classes(trees: Trees, segments: np.ndarray) -> np.ndarray:
    """(S,) the same number for the same tokens, counted from 0 in the order they are met."""
    numbers: dict[bytes, int] = {}
    bounds = zip(trees.segments[segments].tolist(), trees.segments[segments + 1].tolist(), strict=True)
    return np.array([numbers.setdefault(trees.ids[a:b].tobytes(), len(numbers)) for a, b in bounds], np.int64)


def mismatch(texts: np.ndarray, prompts: np.ndarray, seed: int) -> np.ndarray:
    """(N,) σ: tree i gets the response of tree σ(i), which has another text and, if that can be had, another prompt.

    texts, prompts: (N,) numbers that are equal where these are. σ is a permutation, unless one text has more than half of the
    trees: then the responses of the others are used several times. No prompt meets itself where no text and no prompt has more
    than a quarter of the trees, and hardly any beyond that. A pure function of its arguments.
    """
    drawn = np.random.default_rng([seed, DataStream.MISMATCHES])
    # Trees in random order, those of one text side by side, the largest text first: each takes from the one that stands as many
    # places on as that text has trees, which is of another text.
    sizes = np.bincount(texts)
    largest, count, total = int(sizes.argmax()), int(sizes.max()), len(texts)
    turn = drawn.permutation(len(sizes))
    turn[largest] = -1
    order = drawn.permutation(total)
    order = order[np.argsort(turn[texts[order]], kind="stable")]
    at = np.arange(total)
    others = total - count
    target = (at + count) % total if count <= others else np.where(at < count, count + at % others, at - count)
    sigma = np.empty(total, np.int64)
    sigma[order] = order[target]
    _part_prompts(sigma, texts, prompts, random.Random(int(drawn.integers(2**63))))
    return sigma


def _part_prompts(sigma: np.ndarray, texts: np.ndarray, prompts: np.ndarray, draw: random.Random) -> None:
    """Swaps the responses of trees that got one of their own prompt with those of others, in place."""
    text: list[int] = texts.tolist()
    prompt: list[int] = prompts.tolist()
    given: list[int] = sigma.tolist()
    stuck: list[int] = np.flatnonzero(prompts == prompts[sigma]).tolist()
    everyone = range(len(text))
    hopeless = 0

    def fits(i: int, j: int) -> bool:
        return text[i] != text[j] and prompt[i] != prompt[j]

    def partner(i: int) -> int | None:
        for n in range(TRIES):
            j = draw.choice(stuck if stuck and n % 2 else everyone)  # among large groups, the stuck help each other
            if fits(i, given[j]) and fits(j, given[i]):
                return j
        mine = given[i]
        takes = (texts[sigma] != text[i]) & (prompts[sigma] != prompt[i]) & (texts != text[mine]) & (prompts != prompt[mine])
        found = np.flatnonzero(takes)
        return int(found[draw.randrange(len(found))]) if len(found) else None

    while stuck and hopeless < HOPELESS:
        i = stuck.pop()
        if prompt[i] != prompt[given[i]]:
            continue
        j = partner(i)
        if j is None:
            hopeless += 1
        else:
            given[i], given[j] = given[j], given[i]
            sigma[[i, j]] = given[i], given[j]
