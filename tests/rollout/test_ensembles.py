"""What is made of the scores of an ensemble's members, against numbers that come from elsewhere."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rlhf_cli.data.batches import DatasetSource, EnsembleSource, member_seed
from rlhf_cli.data.flat import flatten
from rlhf_cli.rollout.ensembles import Combine, Scale, as_one, centred, combine, normalised
from rlhf_cli.sections import Bound

GOLDEN = json.loads((Path(__file__).with_name("ensembles.json")).read_text())
SCORES = [np.array(prompt) for prompt in GOLDEN["reward[prompt][member][response]"]]


@pytest.mark.parametrize(
    ("bound", "name"),
    [
        (Bound(lcb=1.0), "lower bound k=1"),
        (Bound(ucb=1.0), "upper bound k=1"),
        (Bound(ucb=2.0), "upper bound k=2"),
    ],
)
def test_bounds_are_those_computed_elsewhere(bound: Bound, name: str) -> None:
    found = [combine(scores, bound) for scores in SCORES]
    assert np.abs(np.array(found) - GOLDEN[name]).max() < 1e-9


def test_differences_of_centred_scores_vary_as_those_computed_elsewhere() -> None:
    """A constant of a member's own for each prompt changes nothing."""
    shifted = [scores + np.arange(4)[:, None] * 10.0**n for n, scores in enumerate(SCORES)]
    members = centred(np.concatenate(shifted, 1), [5] * len(SCORES)).reshape(len(SCORES), 5, 4)
    assert np.abs(members.mean(1)).max() < 1e-9
    found = [[np.var(prompt[i] - prompt[j]) for i, j in combinations(range(5), 2)] for prompt in members]
    assert np.abs(np.array(found) - GOLDEN["variance"]).max() < 1e-9


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("mean", [0.0, 1.5]),  # of (1, −1) and (1, 2)
        ("min", [-1.0, 1.0]),
        (Bound(lcb=2.0), [-2.0, 0.5]),
        (Bound(ucb=2.0), [2.0, 2.5]),
    ],
)
def test_members_are_normalised_before_they_are_combined(how: Combine, wanted: list[float]) -> None:
    scales = [Scale(3.0, 2.0), Scale(-1.0, 0.5)]
    scores = normalised(np.array([[5.0, 5.0], [-1.5, 0.0]]), scales)
    assert scores.tolist() == [[1, 1], [-1, 2]]
    assert combine(scores, how).tolist() == wanted
    assert as_one(np.array([[5.0, 5.0], [-1.5, 0.0]]), scales, how).tolist() == [each * 1.25 for each in wanted]


PROMPTS = np.array([0.1] * 3 + [0.7] + [0.2] * 2 + [0.5] * 4 + [0.1] * 2)  # the last two stand in another source


def samples(seed: int, members: int = 3) -> list[np.ndarray]:
    """How often each row stands in the sample of each member."""
    source = DatasetSource(flatten([], []), (10, 2), (0.5, 0.5), 4, seed, True)
    found = EnsembleSource.draw(source, members, PROMPTS)
    for own in found.members:
        assert own.sample is not None and sum(own.sizes) == len(own.sample)
        assert own.sizes[0] == (own.sample < 10).sum()
    return [np.bincount(own.sample, minlength=12) for own in found.members if own.sample is not None]


def test_a_sample_has_as_many_prompts_as_there_are_each_with_all_its_rows() -> None:
    drawn = [own for seed in range(200) for own in samples(seed)]
    for counts in drawn:
        of_prompt = [set(counts[prompt == PROMPTS]) for prompt in np.unique(PROMPTS)]
        assert all(len(own) == 1 for own in of_prompt) and sum(own.pop() for own in of_prompt) == 4
    # (1 − 1/4)⁴ of the prompts are left out, here within four deviations of a mean over 600 samples.
    assert np.mean([counts[3] == 0 for counts in drawn]) == pytest.approx(0.75**4, abs=0.08)


def test_members_have_seeds_and_samples_of_their_own() -> None:
    seeds = [member_seed(seed, member) for seed in (0, 1) for member in range(4)]
    assert (seeds[0], seeds[4]) == (0, 1) and len(set(seeds)) == 8 and max(seeds) < 2**32
    first, again = samples(5), samples(5, members=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=False))
    assert len({tuple(own) for seed in range(4) for own in samples(seed)}) > 6
