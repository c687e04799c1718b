"""A reward model's card: figures by hand, and scores that do not depend on the cut into passes or ranks."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree, build_batch, plan_passes
from rlhf_cli.errors import NumberError
from rlhf_cli.evaluation.agreement import Card, LengthBaseline, Rate, beats_length, weaknesses
from rlhf_cli.evaluation.intervals import wilson
from rlhf_cli.evaluation.preference import (
    calibration_error,
    expected_error,
    histogram,
    lead,
    length_baseline,
    margins,
    rate,
    reliability,
    reward_card,
)
from rlhf_cli.figures import Interval
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.passes import Passes, as_scores, head_outputs, score_responses
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.step import evaluate
from tests.models.tiny_backbone import draw_trees, make

PROMPTS = itertools.count()


def tree(*lengths, prompt=None, **facts):
    """Responses of these lengths after a prompt of two tokens, by default one of its own."""
    responses = tuple(np.ones(length, np.int32) for length in lengths)
    name = next(PROMPTS) if prompt is None else prompt
    return Tree(np.array([-1, name], np.int32), np.zeros(2, bool), responses, 0, Facts(**facts))


def pairs_with(values):
    """Pairs, one a tree, whose margins are these."""
    return margins([tree(1, 1) for _ in values], [(value, 0.0) for value in values])


def logit(probability):
    return math.log(probability / (1 - probability))


SIX = [logit(0.62), -logit(0.63), logit(0.82), logit(0.83), -logit(0.97), 0.0]


def test_wilson_bounds_are_where_the_share_is_just_1_96_deviations_away():
    for share, count in ((0.8, 10), (0.5, 1.8), (1.0, 7), (0.0, 10), (0.731, 412)):
        for bound in wilson(share, count):
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-6)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)  # as in tables
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)


def test_a_tie_counts_half():
    found = rate(pairs_with(SIX))
    assert found.accuracy == 3.5 / 6
    assert found.interval[1:] == wilson(3.5 / 6, 6)
    assert (found.pairs, found.prompts) == (6, 6)


def test_the_better_response_is_the_one_that_a_probability_speaks_for():
    """Margins 2 and −1 of the first response; even odds are no pair."""
    odds = (1.0, 0.7, 0.5, 0.3, 0.0)
    trees = [tree(3, 1, probability=p) for p in odds]
    found = margins(trees, [(1.0, -1.0), (0.0, 1.0), (9.0, 0.0), (1.0, -1.0), (0.0, 1.0)])
    assert found.values.tolist() == [2.0, -1.0, -2.0, 1.0]
    assert found.tree.tolist() == [0, 1, 3, 4]
    assert rate(found).accuracy == 0.5
    card = reward_card([np.array([1.0, -1.0])] * 5, trees, ["x"] * 5, trees[3:], [np.array([1.0, -1.0])])
    assert (card.agreement.rate.accuracy, card.agreement.length_baseline.prefers) == (0.5, "shorter")


def test_calibration_of_six_pairs():
    bins = reliability(pairs_with(SIX).values)
    assert [(each.low, each.high, each.count) for each in bins] == [
        (0.5, 0.55, 1),
        (0.6, 0.65, 2),
        (0.8, 0.85, 2),
        (0.95, 1.0, 1),
    ]
    assert [each.confidence for each in bins] == pytest.approx([0.5, 0.625, 0.825, 0.97])
    assert [each.accuracy for each in bins] == [0.5, 0.5, 1.0, 0.0]
    assert calibration_error(bins) == pytest.approx((0 + 2 * 0.125 + 2 * 0.175 + 0.97) / 6)


def test_a_certain_model_is_in_the_last_bin():
    (last,) = reliability(np.array([800.0, -800.0]))
    assert (last.low, last.high, last.count, last.confidence, last.accuracy) == (0.95, 1.0, 2, 1.0, 0.5)


def test_a_ranking_with_a_tie_gives_the_pairs_that_are_not_tied():
    trees = [tree(1, 1, 1, ranks=(1, 2, 2)), tree(1, 1)]
    found = margins(trees, [(1.0, 1.0, -2.0), (0.0, 4.0)])
    assert found.values.tolist() == [0.0, 3.0, -4.0]
    assert found.tree.tolist() == [0, 0, 1]


def test_a_prompt_is_one_observation():
    three = rate(margins([tree(1, 1, 1) for _ in range(4)], [(3.0, 2.0, 1.0)] * 3 + [(1.0, 2.0, 3.0)]))
    assert (three.accuracy, three.pairs, three.prompts) == (0.75, 12, 4)
    assert three.interval[1:] == wilson(0.75, 4)
    # Two pairs of one prompt and one of another: (2 + 1)² / (2² + 1²) observations.
    uneven = rate(margins([tree(1, 1, 1, ranks=(1, 2, 2)), tree(1, 1)], [(1.0, 1.0, -2.0), (0.0, 4.0)]))
    assert (uneven.accuracy, uneven.pairs, uneven.prompts) == (0.5, 3, 2)
    assert uneven.interval[1:] == pytest.approx(wilson(0.5, 9 / 5))


def test_all_tied_is_no_pair():
    assert rate(margins([tree(1, 1, ranks=(1, 1))], [(2.0, 1.0)])) is None


def test_the_histogram_has_an_edge_at_zero():
    found = histogram(np.array([-1.0, -0.05, 0.0, 0.05, 2.0]))
    assert found.mean == pytest.approx(0.2)
    assert (found.edges[0], found.edges[10], found.edges[20]) == (-2.0, 0.0, 2.0)
    assert (found.counts[5], found.counts[9], found.counts[10], found.counts[19]) == (1, 1, 2, 1)
    assert sum(found.counts) == 5
    assert sum(histogram(np.zeros(3)).counts[10:]) == 3


def test_the_length_baseline_takes_its_direction_from_training():
    held_out = [tree(3, 5), tree(3, 6), tree(9, 2), tree(4, 4)]  # the shorter wins two, the longer one
    longer_wins, shorter_wins = [tree(5, 1), tree(5, 1), tree(1, 5)], [tree(1, 5), tree(1, 5), tree(5, 1)]
    pairs = pairs_with([1.0, 1.0, 1.0, -1.0])
    for training, prefers, share in ((longer_wins, "longer", 1.5 / 4), (shorter_wins, "shorter", 2.5 / 4)):
        found = length_baseline(pairs, held_out, training)
        assert (found.prefers, found.accuracy) == (prefers, share)
        assert found.interval[1:] == wilson(share, 4)
        assert found.lead.mean == 0.75 - share
    assert length_baseline(pairs_with([]), [], shorter_wins) is None


def outcomes(table):
    """Margins of two judges, from how often (right, right), (right, wrong), (wrong, right), (wrong, wrong) happened."""
    ours, theirs = (np.repeat(signs, table) for signs in ((1.0, 1.0, -1.0, -1.0), (1.0, -1.0, 1.0, -1.0)))
    return pairs_with(ours), pairs_with(theirs)


def test_a_lead_by_hand():
    """8 of 10 against 5 of 10 that are right on the same pairs: φ = (5·2 − 3·0) / √(8·2·5·5)."""
    found = lead(*outcomes((5, 3, 0, 2)))
    phi = 10 / math.sqrt(8 * 2 * 5 * 5)
    (low, high), (base_low, base_high) = wilson(0.8, 10), wilson(0.5, 10)
    below = (0.8 - low) ** 2 + (base_high - 0.5) ** 2 - 2 * phi * (0.8 - low) * (base_high - 0.5)
    above = (high - 0.8) ** 2 + (0.5 - base_low) ** 2 - 2 * phi * (high - 0.8) * (0.5 - base_low)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - math.sqrt(below), 0.3 + math.sqrt(above)))


def test_a_lead_without_spread_has_an_interval():
    """All right against all wrong, on 4 pairs: nothing is correlated, and 4 pairs are not a proof."""
    found = lead(*outcomes((0, 4, 0, 0)))
    reach = 1 - wilson(1.0, 4)[0]
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - math.sqrt(2) * reach, 1.0))


def test_a_lead_counts_prompts():
    """Four alike pairs of each of ten prompts are as good as ten pairs."""
    trees = [tree(1, 1, 1, 1, ranks=(1, 1, 2, 2)) for _ in range(10)]
    ours = margins(trees, [(1.0, 1.0, 0.0, 0.0)] * 8 + [(0.0, 0.0, 1.0, 1.0)] * 2)
    theirs = margins(trees, [(1.0, 1.0, 0.0, 0.0)] * 5 + [(0.0, 0.0, 1.0, 1.0)] * 5)
    assert len(ours.values) == 40
    found, alone = lead(ours, theirs), lead(*outcomes((5, 3, 0, 2)))
    assert found == pytest.approx(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "chances"),
    [
        (30, (0.5, 0.2, 0.1, 0.2)),
        (30, (0.3, 0.3, 0.3, 0.1)),
        (30, (0.75, 0.15, 0.02, 0.08)),
        (200, (0.75, 0.15, 0.02, 0.08)),
    ],
)
def test_a_lead_lies_in_its_interval_95_times_in_100(pairs, chances):
    draw = np.random.default_rng(5)
    truth = chances[1] - chances[2]
    found = [lead(*outcomes(draw.multinomial(pairs, chances))) for _ in range(800)]
    covered = np.mean([own.low <= truth <= own.high for own in found])
    assert abs(covered - 0.95) < 0.03


def test_intervals_that_overlap_may_belong_to_a_clear_lead():
    """170 of 200 against 150: of the 22 pairs on which they differ the model is right on 21."""
    ours, theirs = outcomes((149, 21, 1, 29))
    own, base, gap = rate(ours), rate(theirs), lead(ours, theirs)
    assert own.low < base.high
    assert gap.low > 0.05
    assert weaknesses(own, LengthBaseline("longer", *base.interval, gap)) == []


def of_prompts(rng, prompts, rows):
    """(truth, rate) of pairs of `rows` rows to a prompt, whose accuracy differs from prompt to prompt as Beta(2, 1) does."""
    chances = rng.beta(2, 1, prompts)
    trees = [tree(1, 1, prompt=number) for number in range(prompts) for _ in range(rows)]
    right = rng.random(len(trees)) < np.repeat(chances, rows)
    return 2 / 3, rate(margins(trees, [(1.0, 0.0) if each else (0.0, 1.0) for each in right]))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_one_prompt_are_one_observation(rows):
    """Else the interval of five rows a prompt would cover the truth in 77 % of the cases."""
    rng = np.random.default_rng(0)
    found = [of_prompts(rng, 60, rows) for _ in range(400)]
    assert all(own.prompts == 60 and own.pairs == 60 * rows for _, own in found)
    covered = np.mean([own.low <= truth <= own.high for truth, own in found])
    assert 0.92 <= covered <= 0.985


def test_what_a_calibrated_judge_would_show():
    """The mean calibration error of judges whose confidence is right, by simulation, and of one pair by hand."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, 90)
    chance = 1 / (1 + np.exp(-np.abs(values)))
    bins = reliability(values)
    drawn = [calibration_error(reliability(np.where(rng.random(90) < chance, 1, -1) * np.abs(values))) for _ in range(2000)]
    assert expected_error(bins) == pytest.approx(np.mean(drawn), rel=0.03)
    assert expected_error(reliability(np.array([logit(0.7)]))) == pytest.approx(0.7 * 0.3 + 0.3 * 0.7)


LENGTH = LengthBaseline("longer", 0.6, 0.55, 0.65, Interval(0.15, 0.1, 0.2))


def test_faults_without_a_length_baseline():
    assert weaknesses(Rate(0.53, 0.49, 0.57, 400, 400), None) == ["cannot be told from guessing"]
    assert weaknesses(Rate(0.4, 0.35, 0.45, 400, 400), None) == ["is worse than guessing"]
    assert weaknesses(Rate(0.6, 0.55, 0.65, 400, 400), None) == []


def test_no_warning_for_a_model_that_beats_length():
    assert beats_length(Rate(0.75, 0.70, 0.80, 400, 400), LENGTH) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Rate(0.63, 0.58, 0.68, 400, 400), "is hardly better than always preferring the longer response"),
        (Rate(0.58, 0.53, 0.63, 400, 400), "is explained by length alone: always preferring the longer response"),
        (
            Rate(0.52, 0.47, 0.57, 400, 400),
            "cannot be told from guessing and is no better than always preferring the longer",
        ),
        (
            Rate(0.62, 0.49, 0.73, 60, 60),
            "cannot be told from guessing and is hardly better than always preferring the longer",
        ),
    ],
)
def test_a_warning_in_words(model, words):
    gap = model.accuracy - LENGTH.accuracy
    said = beats_length(model, replace(LENGTH, lead=Interval(gap, gap - 0.05, gap + 0.05)))
    mean, low, high = (100 * value for value in model.interval)
    assert f"{mean:.1f} % ({low:.1f} % to {high:.1f} %), {words}" in said
    assert "has 60.0 % (55.0 % to 65.0 %)" in said
    remedy = "Pairs whose better response is the shorter one would tell whether it judges anything else."
    assert said.endswith(remedy if "explained" in words else "Train on more pairs, or hold out more of them to be sure.")
    ahead = f"on the same pairs it is ahead by {100 * gap:.1f} % ({100 * gap - 5:.1f} % to {100 * gap + 5:.1f} %)"
    assert (ahead in said) == (gap > 0)


def test_the_card():
    held_out = [tree(3, 5, subset="help"), tree(3, 6, subset="harm"), tree(9, 2, subset="help"), tree(4, 4)]
    scores = [np.array(own) for own in ((2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (3.0, 0.0))]
    card = reward_card(scores, held_out, ["a:1", "a:2", "a:3", "a:4"], [tree(1, 5)], [np.array([1.0, 3.0]), np.array([5.0, 7.0])])
    own = card.agreement
    assert own.rate == Rate(2.5 / 4, *wilson(2.5 / 4, 4), 4, 4)
    assert card.constant == 0.5
    assert own.length_baseline.prefers == "shorter"
    assert own.subsets == {
        "help": Rate(0.75, *wilson(0.75, 2), 2, 2),
        "harm": Rate(0.0, *wilson(0.0, 1), 1, 1),
        "(none)": Rate(1.0, *wilson(1.0, 1), 1, 1),
    }
    assert (card.score_mean, card.score_std, card.score_responses) == (4.0, math.sqrt(5.0), 4)
    sigma = [1 / (1 + math.exp(-gap)) for gap in (1.0, 1.0, 0.0, 3.0)]
    assert own.confidence == pytest.approx(sum(sigma) / 4)
    # σ(1) = 0.731 twice, once right; the tie at 0.5; σ(3) = 0.953, right.
    assert own.ece == pytest.approx((2 * (sigma[0] - 0.5) + 0 + (1 - sigma[3])) / 4)
    assert own.margins.mean == pytest.approx(0.75)
    assert card.warning.startswith("The reward model's held-out accuracy, 62.5 % (")
    written = card.to_json()
    assert Card.from_json(json.loads(json.dumps(written))) == replace(card, agreement=replace(own, ties=0))
    assert [written[key] for key in ("accuracy", "accuracy_low", "pairs")] == [2.5 / 4, wilson(2.5 / 4, 4)[0], 4]
    assert list(written["reliability"][0]) == ["low", "high", "count", "confidence", "accuracy"]


def test_the_card_without_held_out_rows_has_the_scores_alone():
    card = reward_card([], [], [], [tree(1, 5)], [np.array([1.0, 3.0])])
    written = card.to_json()
    nothing = ("accuracy", "accuracy_low", "accuracy_high", "length_baseline", "ece", "margins", "warning")
    assert [written[key] for key in nothing] == [None] * 7
    assert [written[key] for key in ("pairs", "prompts", "reliability", "subsets")] == [0, 0, [], {}]
    assert (card.score_mean, card.score_std) == (2.0, 1.0)
    assert Card.from_json(written) == card


def test_a_score_that_is_not_finite_names_its_row():
    with pytest.raises(NumberError, match=r"^hh\.jsonl:8: the score of response 2 is nan\n"):
        reward_card([np.zeros(2), np.array([1.0, np.nan])], [tree(1, 1)] * 2, ["hh.jsonl:7", "hh.jsonl:8"], [], [np.zeros(2)])
    with pytest.raises(NumberError, match=r"training tree 0: the score of response 1 is inf"):
        reward_card([], [], [], [], [np.array([np.inf, 0.0])])


class SumOfTokens:
    """A backbone whose score of a response is the sum of its token ids."""

    shards = None

    def __init__(self, layout):
        self.layout = layout
        self.model = torch.nn.Identity().train()
        self.roles = set()

    def batches(self, trees, budget, rank, ranks):
        for rows in plan_passes(trees, ranks, budget, self.layout)[rank]:
            yield build_batch(trees, rows)

    def vectors(self, role, batch):
        assert not torch.is_grad_enabled()
        assert not self.model.training
        self.roles.add(role)
        totals = torch.zeros(len(batch.last))
        return totals.index_add(0, batch.owner, batch.target.float())[:, None]


class Other:
    """One of two ranks; `gather` puts what the other one found beside its own."""

    size = 2

    def __init__(self, rank, others):
        self.rank = rank
        self.others = others

    def gather(self, value):
        self.others[self.rank] = value
        return list(self.others.values())


class Alone:
    rank, size, sharding = 0, 1, None

    def gather(self, value):
        return [value]


@pytest.mark.parametrize("layout", ["long", "packed", "alone"])
def test_scores_come_back_in_the_order_of_trees_and_responses(layout):
    trees = draw_trees(5, seed=1, branches=2) + draw_trees(4, seed=2, branches=4) + draw_trees(3, seed=3)
    wanted = [[float(response.sum()) for response in each.responses] for each in trees]
    backbone = SumOfTokens(layout)
    for batch_size in (5, 64):
        found = as_scores(head_outputs(backbone, "reward", trees, 40, Alone(), batch_size), None)
        assert [own.tolist() for own in found] == wanted
    assert backbone.roles == {"reward"}
    shares = {}
    with pytest.raises(KeyError):  # the first rank alone has not all of them
        score_responses(backbone, "reward", trees, 40, Other(0, shares))
    assert [own.tolist() for own in score_responses(backbone, "reward", trees, 40, Other(1, shares))] == wanted
    assert 0 < len(shares[0]) < len(trees)


def test_the_accuracy_is_the_one_that_training_logs():
    backbone = Backbone(make(), torch.float32)
    torch.manual_seed(0)
    backbone.add_lora("reward", lora_config(sections.Lora(r=4, alpha=8), "", None), None, trained=True)
    backbone.add_head("reward", torch.randn(1, 16))
    trees = draw_trees(20, seed=1, branches=2) + draw_trees(15, seed=2, branches=4)
    trees = [each._replace(facts=Facts(ranks=(1, 2, 2, 3))) if len(each.responses) == 4 else each for each in trees]
    logged = evaluate(Passes(backbone, 60, Ranks(expected=False)), BradleyTerry(), trees)
    scores = score_responses(backbone, "reward", trees, 60, Ranks(expected=False))
    card = reward_card(scores, trees, ["row"] * 35, trees, scores)
    own = card.agreement
    assert 0.2 < own.rate.accuracy < 0.8
    assert own.pairs == 20 + 15 * 5
    assert own.rate.accuracy == pytest.approx(logged["accuracy"], abs=1e-6)
    assert own.margins.mean == pytest.approx(logged["margin"], abs=1e-6)
    assert (card.score_mean, card.score_std) == pytest.approx((logged["score_mean"], logged["score_std"]), abs=1e-6)
