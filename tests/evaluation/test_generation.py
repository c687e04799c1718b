"""Figures of responses: by hand, and against counting again without each prompt."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf_cli.evaluation.intervals import Interval, jackknife, ratio_interval, resamples
from rlhf_cli.evaluation.samples import Sample, distinct, duplicates, figures, grouped, log_ratios


def sample(row, number, response="a b", **facts):
    own = {"ended": True, "tokens": 3, "logp": -2.0, "reference_logp": -3.0} | facts
    return Sample(own.pop("model", "sft"), row, number, f"prompts.jsonl:{row + 1}", "say", response, **own)


def four():
    """Two responses to each of two prompts."""
    return [
        sample(
            0,
            0,
            "the cat sat",
            tokens=4,
            logp=-1.0,
            reference_logp=-2.0,
            score=1.0,
            terms={"reward/rm": 2.0, "gold/rule": 0.0, "reward/length": 7.0},
        ),
        sample(
            0,
            1,
            "the cat",
            tokens=3,
            logp=-2.5,
            reference_logp=-2.0,
            score=2.0,
            terms={"reward/rm": 4.0, "gold/rule": 1.0, "reward/length": 7.0},
        ),
        sample(
            1,
            0,
            "the cat",
            tokens=3,
            logp=-1.0,
            reference_logp=-5.0,
            score=-1.0,
            terms={"reward/rm": -2.0, "gold/rule": 1.0, "reward/length": 7.0},
        ),
        sample(
            1,
            1,
            "A  dog\nA",
            tokens=10,
            ended=False,
            logp=-3.0,
            reference_logp=-4.5,
            score=0.0,
            terms={"reward/rm": 0.0, "gold/rule": 1.0, "reward/length": 7.0},
        ),
    ]


def random_texts(seed, prompts=12, responses=3, words=5):
    """Short texts over few words, so that grams and whole texts repeat within prompts and across them."""
    draw = np.random.default_rng(seed)
    return [[" ".join(draw.choice(list("abAB"), draw.integers(0, words))) for _ in range(responses)] for _ in range(prompts)]


def grams(texts, size):
    words = [response.split() for responses in texts for response in responses]
    return [tuple(own[start : start + size]) for own in words for start in range(len(own) - size + 1)]


def distinct_again(texts, size):
    every = grams(texts, size)
    return len(set(every)) / len(every)


def duplicates_again(texts):
    every = [response for responses in texts for response in responses]
    return sum(every.count(response) > 1 for response in every) / len(every)


def without(texts, prompt):
    return texts[:prompt] + texts[prompt + 1 :]


def assert_interval(found, expected):
    assert tuple(found) == pytest.approx(tuple(expected), rel=1e-12, abs=1e-12)


def test_means_of_a_hand_made_case_in_the_order_of_a_report():
    found = figures(grouped(four()), resamples(2, 0))
    assert {name: one.mean for name, one in found.items()} == pytest.approx(
        {
            "gold/rule": 3 / 4,
            "objective/scores": 0.5,
            "reward/rm": 1.0,
            "reward/length": 7.0,
            "objective/kl": (1.0 - 0.5 + 4.0 + 1.5) / 4,
            "objective/kl_per_token": 6.0 / 20,
            "response/length": 5.0,
            "response/eos_rate": 3 / 4,
            "response/distinct_1": 5 / 10,  # the cat sat A dog
            "response/distinct_2": 4 / 6,  # the-cat ×3, cat-sat, A-dog, dog-A
            "response/duplicates": 2 / 4,
        }
    )
    assert list(found) == [
        "gold/rule",
        "objective/scores",
        "reward/rm",
        "reward/length",
        "objective/kl",
        "objective/kl_per_token",
        "response/length",
        "response/eos_rate",
        "response/distinct_1",
        "response/distinct_2",
        "response/duplicates",
    ]


def test_intervals_resample_prompts_and_not_responses():
    """Responses of one prompt that agree are worth one: the interval is that of the prompts' means."""
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    rows = [sample(row, number, score=value) for row, value in enumerate(values) for number in range(4)]
    counts = resamples(5, 1)
    found = figures(grouped(rows), counts)["objective/scores"]
    assert_interval(found, ratio_interval(np.array(values), np.ones(5), counts))
    assert found.low < found.mean < found.high


def test_kl_per_token_weighs_responses_by_their_tokens_in_every_resample():
    kls, tokens = [2.0, 3.0, 8.0], [1, 9, 20]
    rows = [sample(row, 0, tokens=tokens[row], logp=kl, reference_logp=0.0) for row, kl in enumerate(kls)]
    counts = resamples(3, 2)
    found = figures(grouped(rows), counts)["objective/kl_per_token"]
    assert found.mean == pytest.approx(13 / 30)
    assert_interval(found, ratio_interval(np.array(kls), np.array(tokens), counts))


def test_what_a_sample_lacks_is_left_out():
    whole = four()
    names = set(figures(grouped(whole), resamples(2, 0)))
    lacking = {
        "reference_logp": ({"reference_logp": None}, {"objective/kl", "objective/kl_per_token"}),
        "score": ({"score": None}, {"objective/scores"}),
        "term": ({"terms": {"reward/rm": 1.0, "gold/rule": 1.0}}, {"reward/length"}),
    }
    for change, gone in lacking.values():
        for number in range(4):
            rows = [replace(one, **change) if place == number else one for place, one in enumerate(whole)]
            assert names - set(figures(grouped(rows), resamples(2, 0))) == gone


def test_a_score_and_a_log_probability_of_zero_are_there():
    found = figures(grouped([sample(row, 0, score=0.0, logp=0.0, reference_logp=0.0) for row in range(3)]), resamples(3, 0))
    assert found["objective/scores"] == found["objective/kl"] == Interval(0, 0, 0)


def test_no_grams_no_share_and_no_number_is_ever_nan():
    for texts, expected in ((["", " \n"], set()), (["a", "b"], {"response/distinct_1"})):
        found = figures(grouped([sample(row, 0, text) for row, text in enumerate(texts)]), resamples(2, 0))
        assert {name for name in found if "distinct" in name} == expected
        assert np.isfinite(list(found.values())).all()


def test_log_ratios_are_a_table_of_prompts_by_responses():
    assert log_ratios(grouped(four())).tolist() == [[1.0, -0.5], [4.0, 1.5]]
    assert log_ratios(grouped([sample(0, 0), sample(0, 1, reference_logp=None)])) is None


def test_distinct_is_over_all_responses_in_words_as_they_are_written():
    assert distinct([["b a"], ["b a"]], 1).mean == 1 / 2  # of each response alone it is 1
    assert distinct([["B b"], ["c"]], 1).mean == 1
    assert distinct([["a b", "b a"], ["c d"]], 2).mean == 1  # no gram goes over the end of a response, and the order counts
    assert distinct([["a a a a"], ["a a"]], 2).mean == 1 / 4


def test_one_prompt_alone_says_nothing_of_others():
    assert distinct([["a"], ["b"]], 2) is None
    assert distinct([["a a b b"], [""], ["c"]], 2) is None
    assert distinct([["a a b b", "c"]], 1) is None
    with pytest.raises(ValueError, match="at least 2 prompts"):
        figures(grouped(four()[:2]), resamples(1, 0))


def test_duplicates_count_every_copy_and_only_exact_ones():
    assert duplicates([["a", "a", "a"], ["b", "c", "a "]]).mean == 3 / 6
    assert duplicates([["x", "y"], ["x", "y"]]).mean == 1
    assert duplicates([["x"], ["y"]]).mean == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_distinct_is_what_counting_again_without_each_prompt_gives(seed, size):
    texts = random_texts(seed)
    telling = [prompt for prompt in range(12) if grams(texts[prompt : prompt + 1], size)]
    point, left_out = distinct_again(texts, size), [distinct_again(without(texts, prompt), size) for prompt in telling]
    expected = jackknife(point, np.array(left_out))
    assert_interval(distinct(texts, size), (point, max(expected.low, 0), min(expected.high, 1)))
    assert expected.low < point < expected.high


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("words", [4, 7])
def test_duplicates_are_what_counting_again_without_each_prompt_gives(seed, words):
    texts = random_texts(seed, responses=4, words=words)
    point, left_out = duplicates_again(texts), [duplicates_again(without(texts, prompt)) for prompt in range(12)]
    expected = jackknife(point, np.array(left_out))
    assert_interval(duplicates(texts), (point, max(expected.low, 0), min(expected.high, 1)))
    assert expected.low < point < expected.high


def test_shares_stay_within_0_and_1():
    few = [["a", "a"], ["b", "c"], ["d", "e"], ["f", "g"]]
    assert duplicates(few).mean == 1 / 4 and duplicates(few).low == 0
    assert distinct(few, 1).mean == 7 / 8 and distinct(few, 1).high == 1


def test_the_same_samples_under_two_names_have_the_same_figures():
    draw = np.random.default_rng(3)
    texts = random_texts(4)
    rows = [
        sample(row, number, text, tokens=int(draw.integers(1, 9)), logp=-draw.random(), score=draw.normal())
        for row, responses in enumerate(texts)
        for number, text in enumerate(responses)
    ]
    counts = resamples(len(texts), 0)
    other = [replace(row, model="dpo") for row in reversed(rows)]
    assert figures(grouped(rows), counts) == figures(grouped(other), counts)
