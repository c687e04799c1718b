"""Ratings by hand and by another algorithm, and how often their intervals hold the strengths of simulated matches."""

import itertools
import math

import numpy as np
import pytest

from rlhf_cli.evaluation.intervals import resamples
from rlhf_cli.evaluation.winrate import ratings, strengths, win_rate
from rlhf_cli.figures import Interval

ELO = 400 / math.log(10)
TRUE = np.array([0.0, -200.0, -80.0, 90.0, 210.0])
NAMES = ["base", "weak", "fair", "good", "best"]
ALL = list(itertools.combinations(range(5), 2))
STAR = [(0, other) for other in range(1, 5)]


def simulated(random: np.random.Generator, pairs: list[tuple[int, int]], prompts: int) -> dict[tuple[int, int], np.ndarray]:
    return {
        (one, other): (random.random((prompts, 1)) < 1 / (1 + 10 ** ((TRUE[other] - TRUE[one]) / 400))) * 1.0
        for one, other in pairs
    }


def rated(names: list[str], outcomes: dict[tuple[int, int], np.ndarray], anchor: int, counts: np.ndarray) -> dict[str, Interval]:
    """`ratings` of models by their number."""
    named = {(names[one], names[other]): outcome for (one, other), outcome in outcomes.items()}
    return ratings(names, named, names[anchor], counts)


def minorised(wins: np.ndarray) -> np.ndarray:
    """The same maximum by Hunter's 2004 MM algorithm."""
    worth, games = np.ones(len(wins)), wins + wins.T
    for _ in range(20000):
        worth = wins.sum(1) / (games / (worth[:, None] + worth)).sum(1)
    strength = np.log(worth)
    return strength - strength.mean()


def test_two_models_by_hand() -> None:
    outcome = np.array([1.0] * 6 + [0.5] * 2 + [0.0] * 2)[:, None]  # 7 wins, 3 losses
    apart = 400 * math.log10(7.5 / 3.5)
    counts = resamples(10, 0)
    found = rated(["a", "b"], {(0, 1): outcome}, 1, counts)
    assert found["a"].mean == pytest.approx(1000 + apart)
    assert found["b"] == (1000, 1000, 1000)


def test_two_models_have_the_interval_of_their_win_rate() -> None:
    outcome = (np.random.default_rng(0).random((60, 1)) < 0.7) * 1.0
    counts = resamples(60, 0)
    rate = win_rate(outcome, np.zeros((60, 1)), counts)
    found = rated(["a", "b"], {(0, 1): outcome}, 1, counts)["a"]
    expected = [1000 + ELO * math.log(bound / (1 - bound)) for bound in (rate.rate.low, rate.rate.high)]
    assert (found.low, found.high) == pytest.approx(expected, abs=0.5)


def test_strengths_are_those_of_another_algorithm_in_every_draw() -> None:
    random = np.random.default_rng(1)
    wins = random.gamma(2, 3, (6, 5, 5)) * (1 - np.eye(5))
    wins[0, 1:, 1:] = 0  # a star
    wins[1, 4, :4], wins[1, :4, 4] = 1e-3, 50  # one that hardly ever wins
    found = strengths(wins)
    np.testing.assert_allclose(found, [minorised(each) for each in wins], atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-9)


def test_a_cycle_is_a_draw() -> None:
    wins = np.array([[0.0, 8, 2], [2, 0, 8], [8, 2, 0]])
    np.testing.assert_allclose(strengths(wins), 0, atol=1e-9)
    ahead = np.array([1.0] * 8 + [0.0] * 2)[:, None]
    found = rated(["a", "b", "c"], {(0, 1): ahead, (1, 2): ahead, (0, 2): 1 - ahead}, 0, resamples(10, 0))
    assert [each.mean for each in found.values()] == pytest.approx([1000] * 3, abs=1e-6)


def test_strengths_without_a_maximum_are_refused() -> None:
    for wins in ([[0.0, 5], [0, 0]], [[0.0, 5, 5], [0, 0, 5], [0, 5, 0]]):
        with pytest.raises(ValueError, match="no maximum"):
            strengths(np.array(wins))


def test_extreme_draws_converge() -> None:
    wins = np.array([[0.0, 64], [1e-7, 0]])
    assert strengths(wins)[0] == pytest.approx(math.log(64e7) / 2, abs=1e-6)


@pytest.mark.parametrize("anchor", [0, 3])
def test_the_order_of_the_models_has_no_effect(anchor: int) -> None:
    random, counts = np.random.default_rng(2), resamples(16, 0, 300)
    tables = simulated(random, ALL, 16)
    tables[(0, 4)][:] = 0  # where the prior has its say
    plain = rated(NAMES, tables, anchor, counts)
    order = [3, 1, 4, 0, 2]
    place = {model: at for at, model in enumerate(order)}
    moved = {}
    for (one, other), outcome in tables.items():
        first, second = place[one], place[other]
        moved[(min(first, second), max(first, second))] = outcome if first < second else 1 - outcome
    other = rated([NAMES[model] for model in order], moved, place[anchor], counts)
    for name in NAMES:
        assert other[name] == pytest.approx(plain[name], abs=1e-5)


def test_the_responses_of_a_prompt_are_one_match() -> None:
    random, counts = np.random.default_rng(3), resamples(20, 0)
    once = (random.random((20, 1)) < 0.7) * 1.0
    plain = rated(["a", "b"], {(0, 1): once}, 1, counts)
    assert rated(["a", "b"], {(0, 1): once.repeat(4, 1)}, 1, counts)["a"] == pytest.approx(plain["a"], abs=1e-6)


def test_what_was_not_judged_is_no_match() -> None:
    outcome = np.array([[1.0, 1.0], [1.0, np.nan], [0.0, 0.5], [np.nan, np.nan]])  # 1 + ½ + ¼ prompts won, ¾ lost
    nothing = np.full((4, 2), np.nan)
    found = rated(["a", "b", "c"], {(0, 1): outcome, (0, 2): nothing, (1, 2): outcome}, 1, resamples(4, 0))
    assert found["a"].mean == pytest.approx(1000 + 400 * math.log10(2.25 / 1.25))
    assert found["c"].mean == pytest.approx(1000 - 400 * math.log10(2.25 / 1.25))


def test_a_star_has_the_ratings_of_its_pairs() -> None:
    tables = simulated(np.random.default_rng(4), STAR, 50)
    found = rated(NAMES, tables, 0, resamples(50, 0))
    for (_, other), outcome in tables.items():
        expected = 1000 + 400 * math.log10((50.5 - outcome.sum()) / (outcome.sum() + 0.5))
        assert found[NAMES[other]].mean == pytest.approx(expected)


def test_a_chain_of_models_is_enough() -> None:
    names, outcome = list("abcdefghi"), np.array([[1.0]] * 7 + [[0.0]] * 3)
    found = rated(names, {(at, at + 1): outcome for at in range(8)}, 0, resamples(10, 0))
    assert found["i"].mean == pytest.approx(1000 - 8 * 400 * math.log10(7.5 / 3.5))


def test_models_that_never_met_are_named() -> None:
    outcome, counts = np.ones((4, 1)), resamples(4, 0)
    with pytest.raises(ValueError, match="none connects a, c with b, d"):
        rated(list("abcd"), {(0, 2): outcome, (1, 3): outcome}, 0, counts)
    with pytest.raises(ValueError, match="none connects a with b"):
        rated(["a", "b"], {(0, 1): np.full((4, 1), np.nan)}, 0, counts)
    assert rated(["a"], {}, 0, counts) == {"a": (1000, 1000, 1000)}


def test_a_model_that_always_wins_has_a_finite_rating_with_a_wide_interval() -> None:
    """64 of 64: 400·log10(64.5/0.5) = 844 above; Jeffreys' lower bound of the share, 0.962, is 562 above."""
    found = rated(["base", "best"], {(0, 1): np.zeros((64, 4))}, 0, resamples(64, 0))["best"]
    assert found.mean == pytest.approx(1844.2, abs=0.1)
    assert found.low == pytest.approx(1562, abs=15)
    assert 2500 < found.high < 4000


def covered(pairs: list[tuple[int, int]], prompts: int, times: int, draws: int) -> np.ndarray:
    """(M − 1,) how often the interval of a model holds its true rating."""
    random, counts = np.random.default_rng(5), resamples(prompts, 0, draws)
    hits = []
    for _ in range(times):
        found = rated(NAMES, simulated(random, pairs, prompts), 0, counts)
        hits.append([found[name].low <= 1000 + true <= found[name].high for name, true in zip(NAMES[1:], TRUE[1:], strict=True)])
    return np.mean(hits, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "prompts"), [(ALL, 16), (STAR, 16), (ALL, 128)])
def test_intervals_hold_the_true_strengths(pairs: list[tuple[int, int]], prompts: int) -> None:
    shares = covered(pairs, prompts, 400, 400)
    assert shares.min() >= 0.925 and shares.max() <= 0.985
