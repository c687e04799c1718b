"""Win rates by hand, the regression against another optimiser, and coverage of simulated win rates."""

import numpy as np
import pytest
import torch

from rlhf_cli.evaluation import winrate
from rlhf_cli.evaluation.intervals import resamples
from rlhf_cli.evaluation.winrate import RIDGE, logistic, outcomes, win_rate
from rlhf_cli.figures import Interval


def chance(logit: np.ndarray | float) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-np.asarray(logit)))
    return found


def test_outcomes_by_hand() -> None:
    own = np.array([[1.0, 2.0, 3.0, 3.0], [1.0, 1.0, 1.0, np.nan]])
    other = np.array([[2.0, 1.0, 3.0, 2.0], [1.000008, 1.00002, 0.99998, 1.0]])
    same = np.array([[False, False, False, True], [False, False, False, False]])
    np.testing.assert_array_equal(outcomes(own, other, same), [[0, 1, 0.5, 0.5], [0.5, 0, 1, np.nan]])


def test_win_rate_by_hand() -> None:
    outcome = np.array([[1.0, 1.0, 0.5, 1.0], [0.0, np.nan, np.nan, np.nan], [0.5, 0.0, 1.0, 1.0]])
    found = win_rate(outcome, np.zeros((3, 4)), resamples(3, 0))
    assert (found.rate.mean, found.ties, found.n) == (6 / 9, 2 / 9, 9)
    assert 0 <= found.rate.low < found.rate.mean < found.rate.high <= 1


def test_fewer_than_two_judged_prompts_are_refused() -> None:
    for outcome in (np.ones((1, 4)), np.array([[1.0, 0.0], [np.nan, np.nan]]), np.full((3, 2), np.nan)):
        with pytest.raises(ValueError, match="at least 2 judged prompts"):
            win_rate(outcome, np.zeros(outcome.shape), resamples(len(outcome), 0))


def test_a_model_against_itself_is_a_tie() -> None:
    found = win_rate(np.full((64, 4), 0.5), np.zeros((64, 4)), resamples(64, 0))
    assert (found.rate.mean, found.ties) == (0.5, 1.0)
    assert found.rate.low < 0.5 < found.rate.high < found.rate.low + 0.05
    assert found.length_controlled.low < 0.5 < found.length_controlled.high


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_rates_of_nought_and_one_have_a_width(won: float) -> None:
    """Of 64 prompts, all won: Jeffreys' interval begins at 0.962, Wilson's at 0.943."""
    lengths = np.random.default_rng(0).normal(0, 9, (64, 2))
    found = win_rate(np.full((64, 2), won), lengths, resamples(64, 0))
    for each in (found.rate, found.length_controlled):
        inner, outer = (each.low, each.high) if won else (1 - each.high, 1 - each.low)
        assert 0.943 < inner < 0.967 and outer > 0.999
        assert each.mean == pytest.approx(won, abs=1e-6)


def test_few_prompts_keep_the_interval_inside_nought_and_one() -> None:
    found = win_rate(np.array([[1.0], [0.0], [1.0]]), np.zeros((3, 1)), resamples(3, 0))
    assert (found.rate.low, found.rate.high) == (0.0, 1.0)


def test_equal_responses_of_a_prompt_are_one_observation() -> None:
    outcome = (np.random.default_rng(1).random((40, 1)) < 0.6).astype(float)
    counts = resamples(40, 0)
    once, often = (win_rate(each, np.zeros(each.shape), counts) for each in (outcome, outcome.repeat(8, 1)))
    assert (once.rate.mean, once.rate.low, once.rate.high) == pytest.approx(
        (often.rate.mean, often.rate.low, often.rate.high), abs=1e-12
    )
    assert once.length_controlled == pytest.approx(often.length_controlled, abs=1e-4)


def test_a_draw_divides_by_the_comparisons_that_are_in_it() -> None:
    """All ties: whatever prompts are drawn, and however many comparisons they have, the rate is about 0.5."""
    outcome = np.where(np.arange(8) < np.array([[8]] * 20 + [[1]] * 20), 0.5, np.nan)
    found = win_rate(outcome, np.zeros((40, 8)), resamples(40, 0))
    assert (found.rate.mean, found.n) == (0.5, 180)
    assert 0.46 < found.rate.low < 0.5 < found.rate.high < 0.54


def test_swapping_the_models_mirrors_the_rate() -> None:
    random = np.random.default_rng(2)
    outcome, longer, counts = (
        random.choice([0, 0.5, 1], (50, 4), p=[0.2, 0.2, 0.6]),
        random.normal(0, 9, (50, 4)),
        resamples(50, 0),
    )
    one, other = win_rate(outcome, longer, counts), win_rate(1 - outcome, -longer, counts)
    assert one.rate.mean == pytest.approx(1 - other.rate.mean)
    assert one.length_controlled.mean == pytest.approx(1 - other.length_controlled.mean, abs=1e-8)
    assert one.rate.low == pytest.approx(1 - other.rate.high, abs=0.006)


def test_without_differences_in_length_both_rates_are_the_same() -> None:
    outcome = np.random.default_rng(3).choice([0, 0.5, 1], (50, 4), p=[0.2, 0.2, 0.6])
    found = win_rate(outcome, np.zeros((50, 4)), resamples(50, 0))
    assert found.length_controlled == pytest.approx((found.rate.mean, found.rate.low, found.rate.high), abs=1e-6)


def test_always_longer_by_the_same_tells_nothing_of_equal_length() -> None:
    outcome = (np.random.default_rng(4).random((50, 4)) < 0.7).astype(float)
    found = win_rate(outcome, np.full((50, 4), 12.0), resamples(50, 0))
    assert found.length_controlled.mean == pytest.approx(found.rate.mean, abs=1e-3)
    assert found.length_controlled.high - found.length_controlled.low > 0.9


def test_the_unit_of_length_has_no_effect_and_what_is_not_judged_has_none() -> None:
    random = np.random.default_rng(5)
    outcome, longer, counts = (random.random((50, 2)) < 0.6) * 1.0, random.normal(4, 9, (50, 2)), resamples(50, 0)
    plain = win_rate(outcome, longer, counts).length_controlled
    assert win_rate(outcome, 7 * longer, counts).length_controlled == pytest.approx(plain, abs=1e-9)
    wider = [np.concatenate([each, np.full((50, 1), fill)], 1) for each, fill in ((outcome, np.nan), (longer, 999.0))]
    assert win_rate(*wider, counts).length_controlled == pytest.approx(plain, abs=1e-9)


def test_draws_are_fitted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(6)
    outcome, longer, counts = (random.random((30, 2)) < 0.6) * 1.0, random.normal(4, 9, (30, 2)), resamples(30, 0, 101)
    whole = win_rate(outcome, longer, counts)
    monkeypatch.setattr(winrate, "CELLS", 700)
    assert win_rate(outcome, longer, counts).length_controlled == pytest.approx(whole.length_controlled, abs=1e-9)


def brute(feature: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same maximum, by torch's LBFGS."""
    x, y, w = (torch.tensor(each, dtype=torch.float64) for each in (feature, outcome, weights))
    found = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [found], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        each = torch.nn.functional.binary_cross_entropy_with_logits(found[0] + found[1] * x, y, w, reduction="sum")
        total = each + (torch.tensor(RIDGE, dtype=torch.float64) * found**2).sum() / 2
        total.backward()
        return total

    optimiser.step(loss)
    return found.detach().numpy()


def test_the_fit_is_the_largest_penalised_likelihood() -> None:
    random = np.random.default_rng(7)
    feature = np.tanh(random.normal(0.5, 1, 60))
    noisy = np.where(random.random(60) < 0.2, 0.5, random.random(60) < chance(0.4 + feature))
    many = random.multinomial(60, np.full(60, 1 / 60), 5).astype(float)
    found = logistic(feature, noisy, many)
    for row, weights in zip(found, many, strict=True):
        np.testing.assert_allclose(row, brute(feature, noisy, weights), atol=1e-5)


@pytest.mark.parametrize("shape", ["all won", "all lost", "by length", "by length but one"])
def test_the_fit_of_separable_data_converges(shape: str) -> None:
    feature = np.linspace(-0.9, 0.9, 40)
    outcome = {"all won": np.ones(40), "all lost": np.zeros(40)}.get(shape, (feature > 0.2) * 1.0)
    outcome[0] = 1.0 if shape == "by length but one" else outcome[0]
    intercept, slope = logistic(feature, outcome, np.ones(40))
    surprise = outcome - chance(intercept + slope * feature)
    np.testing.assert_allclose([surprise.sum(), surprise @ feature], RIDGE * np.array([intercept, slope]), atol=1e-8)


def test_the_fit_converges_where_whole_newton_steps_do_not() -> None:
    feature, outcome = np.array([0.5, -0.6, 0.7, 0.7, 0.2, -0.7]), np.array([0.0, 0, 0, 0, 1, 1])
    weights = np.array([4.0, 3260, 126, 18, 2, 182])
    intercept, slope = logistic(feature, outcome, weights)
    surprise = weights * (outcome - chance(intercept + slope * feature))
    np.testing.assert_allclose([surprise.sum(), surprise @ feature], RIDGE * np.array([intercept, slope]), atol=1e-6)


def judged_by_length(random: np.random.Generator, prompts: int, better: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes with the logit `better` + 0.8·tanh(Δ/20), and Δ."""
    longer = random.normal(15, 20, (prompts, 4)).round()
    return (random.random((prompts, 4)) < chance(better + 0.8 * np.tanh(longer / 20))) * 1.0, longer


def test_a_preference_for_length_alone_is_taken_out() -> None:
    """With 512 prompts the raw rate, truly 0.583, is not 0.5; between responses of equal length, it is."""
    found = win_rate(*judged_by_length(np.random.default_rng(8), 512), resamples(512, 0, 500))
    assert 0.5 < found.rate.low < 0.583 < found.rate.high
    assert found.length_controlled.low < 0.5 < found.length_controlled.high < found.rate.mean


@pytest.mark.slow
@pytest.mark.parametrize("better", [0.0, 1.0])
def test_coverage_of_the_length_controlled_rate(better: float) -> None:
    random, counts = np.random.default_rng(9), resamples(64, 0, 400)
    found = [win_rate(*judged_by_length(random, 64, better), counts) for _ in range(100)]
    covered = np.mean([each.length_controlled.low <= chance(better) <= each.length_controlled.high for each in found])
    assert covered >= 0.92
    assert better or np.mean([each.rate.low <= 0.5 for each in found]) < 0.5


def correlated(random: np.random.Generator, share: float, prompts: int, alike: float) -> np.ndarray:
    """(P, 4) outcomes of prompts with chances of their own, their intraclass correlation `alike`."""
    if alike == 1:
        return (random.random((prompts, 1)) < share).repeat(4, 1) * 1.0
    spread = (1 - alike) / alike
    return (random.random((prompts, 4)) < random.beta(share * spread, (1 - share) * spread, (prompts, 1))) * 1.0


def raw_coverage(share: float, prompts: int, alike: float, times: int) -> float:
    """How often the interval of the rate holds `share`; the length-controlled one, which takes longest, is left out."""
    random, counts, lengths = np.random.default_rng(10), resamples(prompts, 0, 400), np.zeros((prompts, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winrate, "_length_controlled", lambda *_: Interval(0.5, 0.5, 0.5))
        found = [win_rate(correlated(random, share, prompts, alike), lengths, counts) for _ in range(times)]
    return float(np.mean([each.rate.low <= share <= each.rate.high for each in found]))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "alike", "times"), [(0.5, 0.3, 500), (0.97, 0.3, 150), (0.97, 1, 150)])
def test_coverage_of_the_rate(share: float, alike: float, times: int) -> None:
    assert raw_coverage(share, 64, alike, times) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [10, 64])
@pytest.mark.parametrize("alike", [0.3, 1])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.97])
def test_coverage_of_the_rate_everywhere(share: float, alike: float, prompts: int) -> None:
    assert raw_coverage(share, prompts, alike, 300) >= 0.92
