"""Two series at equal KL: lines with known differences, values by hand, and intervals that hold the truth."""

import json

import numpy as np
import pytest

from rlhf_cli.evaluation.at_kl import AtKl, compare_at_kl
from rlhf_cli.evaluation.intervals import ratio_interval, resamples
from rlhf_cli.figures import from_plain, to_plain

PROMPTS = 40
COUNTS = resamples(PROMPTS, 0)


def table(points, level=0.0, noise=0.0, seed=0):
    """Models at (KL, gold), whose prompts all have these means; with noise they do in the mean of very many."""
    draw = np.random.default_rng(seed)
    return {
        f"m{k}": (np.full(PROMPTS, kl) + noise * draw.normal(size=PROMPTS), np.full(PROMPTS, level + gold))
        for k, (kl, gold) in enumerate(points)
    }


def means(found):
    """(quarters, 2) KL and difference."""
    return np.array([(at.kl.mean, at.difference.mean) for at in found.matched])


def near(*rows):
    return pytest.approx(np.array(rows), abs=1e-12)


def test_a_series_does_not_differ_from_itself():
    """Noisy models whose KLs cross in many draws."""
    draw = np.random.default_rng(1)
    own = {f"m{k}": (draw.normal(k / 2, 1.0, PROMPTS), draw.normal(size=PROMPTS)) for k in range(6)}
    found = compare_at_kl(("a", "b"), (own, own), COUNTS)
    assert {tuple(at.difference) for at in found.matched} == {(0.0, 0.0, 0.0)} and found.mean == (0.0, 0.0, 0.0)
    assert len(found.matched) == 4 and found.matched[0].a == found.matched[0].b


def test_a_constant_shift_is_the_difference_everywhere():
    draw = np.random.default_rng(2)
    b = {f"m{k}": (draw.normal(k, 1.0, PROMPTS), draw.normal(k, 1.0, PROMPTS)) for k in range(5)}
    a = {name: (kl, gold + 0.25) for name, (kl, gold) in b.items()}
    found = compare_at_kl(("a", "b"), (a, b), COUNTS)
    for own in (*(at.difference for at in found.matched), found.mean):
        assert tuple(own) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)


def test_values_by_hand():
    """Up to √KL 2, the end of b: a is 3 √KL up to 1, then flat; b is 2 √KL. Their difference is d up to 1, then 3 − 2 d."""
    a, b = table([(0, 0), (1, 3), (9, 3)]), table([(4, 4), (0, 0)])
    found = compare_at_kl(("a", "b"), (a, b), COUNTS)
    assert means(found) == near((0.25, 0.5), (1.0, 1.0), (2.25, 0.0), (4.0, -1.0))
    assert np.array([(at.a.mean, at.b.mean) for at in found.matched]) == near((1.5, 1.0), (3.0, 2.0), (3.0, 3.0), (3.0, 4.0))
    assert found.mean is not None and found.mean.mean == pytest.approx((0.5 + 0.0) / 2)  # ∫ d, and ∫ 3 − 2 d from 1 to 2
    assert [point.models for point in found.b.points] == [["m1"], ["m0"]] and found.shorter is found.b
    other = compare_at_kl(("b", "a"), (b, a), COUNTS)
    assert means(other) == near(*(means(found) * (1, -1))) and other.shorter.name == "b"


def test_models_at_one_kl_are_one_point_in_any_order():
    three, one = [(0, 0), (0, 2), (4, 5), (4, 1)], [(0, 0), (4, 0)]
    for points in (three, three[::-1]):
        found = compare_at_kl(("a", "b"), (table(points), table(one)), COUNTS)
        assert means(found) == near((0.25, 1.5), (1.0, 2.0), (2.25, 2.5), (4.0, 3.0))  # from 1 at 0 to 3 at 2
        assert len(found.a.points) == 2
    below = compare_at_kl(("a", "b"), (table([(0, 9), (-0.5, 1), (4, 3)]), table(one)), COUNTS)
    assert means(below)[:, 1] == pytest.approx([9 - 6 / 4, 9 - 6 / 2, 9 - 6 * 3 / 4, 3.0])  # an estimate below 0 is one of 0


def test_models_that_cannot_be_told_apart_are_one_point():
    """m1 and m3 differ by 0.3 ± 0.6, m2 from both by much more: one point at 4.15, with the mean gold of both."""
    own = table([(0, 0), (4, 1), (1, 1), (4.3, 2)])
    own["m3"][0][:] += 2 * np.tile([1, -1], PROMPTS // 2)
    found = compare_at_kl(("a", "b"), (own, table([(0, 0), (9, 3)])), COUNTS)
    assert [point.models for point in found.a.points] == [["m0"], ["m2"], ["m1", "m3"]]
    assert (found.a.points[-1].kl.mean, found.a.points[-1].gold.mean) == pytest.approx((4.15, 1.5))
    assert found.matched[-1].difference.mean == pytest.approx(1.5 - 4.15**0.5)
    still = table([(0, 0), (4, 1), (1, 1), (4.3, 2)])
    found = compare_at_kl(("a", "b"), (still, table([(0, 0), (9, 3)])), COUNTS)
    assert [point.models for point in found.a.points] == [["m0"], ["m2"], ["m1"], ["m3"]]


def test_ends_are_the_models_own_figures():
    """One model each, at one KL: the end of the range is the plain paired comparison of the two."""
    draw = np.random.default_rng(3)
    kl, golds = draw.exponential(2.0, PROMPTS), draw.normal(size=(2, PROMPTS))
    start = {"start": (np.zeros(PROMPTS), np.zeros(PROMPTS))}
    found = compare_at_kl(("a", "b"), [start | {"m": (kl, gold)} for gold in golds], COUNTS)
    paired, ones = found.matched[-1], np.ones(PROMPTS)
    assert tuple(paired.difference) == pytest.approx(tuple(ratio_interval(golds[0] - golds[1], ones, COUNTS)))
    assert tuple(paired.kl) == pytest.approx(tuple(ratio_interval(kl, ones, COUNTS)))
    assert tuple(paired.a) == pytest.approx(tuple(ratio_interval(golds[0], ones, COUNTS)))


def test_the_interval_has_the_uncertainty_of_the_kl():
    """Both are on the same line in truth, and gold is without noise: what differs is where a's models are thought to be."""
    b = table([(0, 0), (1, 1), (4, 2), (16, 4)])
    a = table([(0, 0), (4, 2)], noise=3.0)
    a["m0"] = b["m0"]
    found = compare_at_kl(("a", "b"), (a, b), COUNTS)
    end = found.matched[-1]
    assert tuple(end.a) == pytest.approx((2.0, 2.0, 2.0)) and end.difference.low < 0 < end.difference.high
    # There b is √KL of a's model: the interval of the difference is that of 2 − √KL.
    assert (end.difference.low, end.difference.high) == pytest.approx((2 - end.kl.high**0.5, 2 - end.kl.low**0.5), abs=1e-2)


def test_without_a_common_range_nothing_is_compared():
    still, far = table([(0, 0), (0.01, 1)]), table([(0, 0), (4, 2)])
    still["m1"][0][:] += np.tile([0.5, -0.5], PROMPTS // 2)
    found = compare_at_kl(("still", "far"), (still, far), COUNTS)
    assert (found.matched, found.mean) == ([], None)
    assert [[point.models for point in series.points] for series in (found.a, found.b)] == [[["m0", "m1"]], [["m0"], ["m1"]]]
    assert from_plain(AtKl, json.loads(json.dumps(to_plain(found)))) == found


def test_it_is_read_as_it_was_written():
    found = compare_at_kl(("a", "b"), (table([(0, 0), (1, 3)], noise=0.1), table([(0, 0), (4, 4)])), COUNTS)
    assert found.mean is not None and from_plain(AtKl | None, json.loads(json.dumps(to_plain(found)))) == found
    assert from_plain(AtKl | None, None) is None


def test_intervals_cover_the_truth():
    """Of 120 simulations: 95 % ± 5. Gold is 1.5 d at the true d = √KL, of a 1.9 d; KLs are skewed, and gold follows them."""
    draw, covered = np.random.default_rng(5), []
    for _ in range(120):
        easy, tables = draw.normal(0, 0.5, PROMPTS), []  # what all models share of a prompt
        for rate, kls in ((1.9, (0.3, 1.0, 2.0, 4.0)), (1.5, (0.2, 0.8, 2.5, 6.0))):
            own = {"start": (np.zeros(PROMPTS), easy + draw.normal(0, 0.3, PROMPTS))}
            for kl in kls:
                reach = kl * draw.gamma(2.0, 0.5, PROMPTS)
                gold = easy + rate * np.sqrt(kl) + 0.2 * (reach - kl) + draw.normal(0, 0.3, PROMPTS)
                own[str(kl)] = reach, gold
            tables.append(own)
        found = compare_at_kl(("a", "b"), tables, resamples(PROMPTS, int(draw.integers(2**31)), 200))
        assert found.mean is not None
        truths = [0.2, 0.4, 0.6, 0.8, 0.4]  # 0.4 d up to d = 2
        own = [*(at.difference for at in found.matched), found.mean]
        covered.append([each.low <= truth <= each.high for each, truth in zip(own, truths, strict=True)])
    assert np.mean(covered, axis=0) == pytest.approx(0.95, abs=0.05)
