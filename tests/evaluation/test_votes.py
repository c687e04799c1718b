"""The answer that several responses agree on: by hand, by counting every subset, and in an evaluation."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.evaluation.intervals import resamples
from rlhf_cli.evaluation.samples import mean_interval
from rlhf_cli.evaluation.votes import SUBSETS, as_weights, ballots, drawn_subsets, electors, subsets_of, vote_accuracies, winners
from rlhf_cli.recipe.evaluations import Vote
from rlhf_cli.reports.terminal import terminal_table
from rlhf_cli.sections import Match
from tests.tiny import WORDS, make_base, read_lines, rlhf

BY_HAND: list[tuple[list[str | None], list[float], list[str | None]]] = [
    (
        ["7", "7", "12", "7", "9", None, "12"],
        [0.253486, 0.521254, 0.917324, 0.866249, 0.67725, 0.899056, 0.756641],
        ["7", "12", "12"],
    ),
    (["4", "5", "5", "4", "6"], [0.25, 0.5, 0.125, 0.125, 0.5], ["4", "5", "5"]),
    (["4", "5", "4", "5"], [0.25, 0.5, 0.5, 0.25], ["4", "4", "5"]),
    (["a", "b", "b", "c"], [0.875, 0.25, 0.25, 0.5], ["b", "a", "a"]),
    (["8", "9", "9"], [0.0, 0.0, 0.0], ["9", "8", "8"]),
    ([None, "3", None], [0.75, 0.25, 0.5], ["3", "3", "3"]),
    ([None, None], [0.5, 0.25], [None, None, None]),
    (["2", "1", "1", "2", "1"], [1.0, 1.0, 1.0, 1.0, 1.0], ["1", "1", "2"]),
    (["1", "2", "2"], [math.nan, 0.5, 0.25], ["2", "2", "2"]),  # of the first nothing is known: it has no vote
]
"""Answers and scores in the order of the samples, and what wins by majority, weight and best score."""
TEXT = Match("answer")
MAJORITY = electors(["majority"], {}, {})


@pytest.mark.parametrize(("said", "scores", "expected"), BY_HAND)
def test_who_wins_by_hand(said: list[str | None], scores: list[float], expected: list[str | None]) -> None:
    answers, cast = ballots([answer or "" for answer in said], TEXT)
    every = np.arange(len(said))[None]
    found = [winners(by, cast, np.array(scores), every) for by in ("weighted", "best")]
    alike = [winners(by, cast, np.full(len(said), share), every) for by, share in (("majority", 1.0), ("weighted", 0.1))]
    names = [None if winner < 0 else answers[winner] for (winner,) in (*alike, *found)]
    assert names == [expected[0], *expected]  # equal weights are a majority


def test_an_answer_has_one_vote_however_it_is_written() -> None:
    number = Match("answer", "last-number", "number")
    answers, cast = ballots(["It is 4.", "so 1,000", "4.0", "no idea", "8/2", "1000", "2 or 3"], number)
    assert (answers, cast.tolist()) == (["4", "1,000", "3"], [0, 1, 0, -1, 0, 1, 2])
    answers, cast = ballots(["ten", "4", "ten", "", "4.00"], Match("answer", "text", "number"))
    assert (answers, cast.tolist()) == (["4"], [-1, 0, -1, -1, 0])  # what is no number has no vote
    pytest.importorskip("math_verify")
    answers, cast = ballots(["x+1", "2", "1+x", r"\frac{4}{2}"], Match("answer", "text", "math"))
    assert (answers, cast.tolist()) == (["x+1", "2"], [0, 1, 0, 1])


def drawn(prompts: int, size: int, random: Random) -> list[list[str]]:
    return [[random.choice(["1", "2", "2.0", "3", "4", "none"]) for _ in range(size)] for _ in range(prompts)]


def test_every_subset_is_counted() -> None:
    texts, random = drawn(9, 7, Random(0)), Random(1)
    right = [None, *(random.choice(["1", "2", "3"]) for _ in texts[1:])]
    vote = Vote(Match("answer", "last-number", "number"), n=[7, 1, 2, 4])
    scores = np.array([[random.choice([0.0, 0.25, 0.5, 1.0]) for _ in own] for own in texts])
    by = electors(["majority", "weighted", "best"], {"rm": scores}, {"rm": scores})
    every = vote_accuracies(texts, right, vote, by, resamples(9, 0), 0)
    assert [*every] == ["majority", "weighted", "best"]
    found = every["majority"]
    assert [each.n for each in found] == [1, 2, 4, 7]
    for each in found:
        shares = []
        for own, answer in zip(texts[1:], right[1:], strict=True):
            wins = []
            for subset in combinations(own, each.n):
                votes = Counter(text.removesuffix(".0") for text in subset if text != "none")  # ties: in order of insertion
                wins.append(bool(votes) and votes.most_common(1)[0][0] == answer)
            shares.append(sum(wins) / len(wins))
        assert each.accuracy == pytest.approx(sum(shares) / 8, abs=1e-12)
        assert 0 <= each.low <= each.accuracy <= each.high <= 1
    for kind in ("weighted", "best"):
        for each in every[kind]:
            shares = []
            for own, worth, answer in zip(texts[1:], scores[1:], right[1:], strict=True):
                wins = []
                for subset in combinations(range(7), each.n):
                    sums: dict[str, float] = {}
                    for k in subset:
                        if (said := own[k].removesuffix(".0")) != "none":
                            sums[said] = (
                                sums.get(said, 0.0) + worth[k] if kind == "weighted" else max(sums.get(said, 0.0), worth[k])
                            )
                    # Of a tie what is seen first; of the best, the response that is seen first.
                    order = [own[k].removesuffix(".0") for k in subset]
                    if kind == "best" and sums:
                        best = max(worth[k] for k in subset if own[k] != "none")
                        order = [own[k].removesuffix(".0") for k in subset if own[k] != "none" and worth[k] == best]
                    wins.append(
                        bool(sums)
                        and max(sums, key=lambda said: (sums[said], -order.index(said) if said in order else -9)) == answer
                    )
                shares.append(sum(wins) / len(wins))
            assert each.accuracy == pytest.approx(sum(shares) / 8, abs=1e-12)
    table = np.array([[text.removesuffix(".0") == answer for text in own] for own, answer in zip(texts, right, strict=True)])
    counts = resamples(8, 3)
    (alone, *_) = vote_accuracies(texts[1:], right[1:], vote, MAJORITY, counts, 0)["majority"]
    assert alone.interval == pytest.approx(mean_interval(table[1:].astype(float), counts), abs=1e-12)


def test_of_too_many_subsets_some_are_drawn() -> None:
    assert subsets_of(16, 8, 0).shape == (12_870, 8)  # all
    own = subsets_of(30, 6, seed=4)
    assert own.shape == (SUBSETS, 6)
    assert (np.diff(own, axis=1) > 0).all()
    assert (own == subsets_of(30, 6, seed=4)).all() and (own != subsets_of(30, 6, seed=5)).any()
    assert np.bincount(own.ravel()) == pytest.approx(np.full(30, SUBSETS / 5), rel=0.08)  # 5 standard deviations of 63
    assert [*drawn_subsets(30, [1, 6, 30], 4)] == [
        "Votes of n = 6: over 20,000 of the 593,775 subsets of a prompt's 30 responses, drawn with seed 4."
    ]


def test_many_votes_find_the_likeliest_answer() -> None:
    """Of answers that are right with 0.5, else one of two with a quarter each, how often most of 3 are right is known."""
    generator = np.random.default_rng(0)
    texts = [list(map(str, generator.choice([1, 2, 3], p=[0.5, 0.25, 0.25], size=16))) for _ in range(400)]
    found = vote_accuracies(texts, ["1"] * 400, Vote(TEXT, n=[3]), MAJORITY, resamples(400, 0), 0)["majority"][0]
    likelihood = {answer: {"1": 0.5, "2": 0.25, "3": 0.25}[answer] for answer in "123"}
    wins = [
        np.prod([likelihood[answer] for answer in own])
        for own in product("123", repeat=3)
        if Counter(own).most_common(1)[0][0] == "1"
    ]
    assert found.low < sum(wins) < found.high


ANSWERED = [{"prompt": f"{WORDS[i]} {i}", "answer": "aeo"[i % 3]} for i in range(8)] + [{"prompt": "none", "note": "no answer"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voting")
    make_base(folder / "one")
    make_base(folder / "two", 1)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERED))
    return folder


def write(base: Path, path: Path, **sections: Any) -> Path:
    common = {
        "models": {"one": str(base / "one"), "two": str(base / "two")},
        "prompts": str(base / "rows.jsonl"),
        "rollout": {"max_new_tokens": 8},
        "vote": {"match": {"column": "answer", "extract": "([aeo])"}, "n": [1, 3]},
        "dtype": "float32",
        "max_length": 96,
        "output": str(path.with_suffix("")),
    }
    path.write_text(yaml.safe_dump(common | sections))
    return path


def test_scores_beyond_0_and_1_weigh_by_the_logistic_function_for_all_models() -> None:
    own = {"one": np.array([[0.25, 1.0]]), "two": np.array([[np.nan, 0.0]])}
    assert as_weights(own) is own
    found = as_weights(own | {"two": np.array([[-1e4, 2.0]])})
    assert found["one"] == pytest.approx(np.array([[0.5621765, 0.7310586]]), abs=1e-7)
    assert found["two"] == pytest.approx(np.array([[0.0, 0.8807971]]), abs=1e-7)


def test_an_evaluation_with_rewards_that_choose(base: Path, tmp_path: Path) -> None:
    """A reward that knows the answer chooses it wherever a response has it; each of two terms chooses by its name."""
    oracle = {"match": {"column": "answer", "extract": "([aeo])"}, "name": "oracle"}
    vote = {"match": {"column": "answer", "extract": "([aeo])"}, "by": ["best", "weighted"], "n": [1, 4]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ANSWERED[:-1]))
    terms = [oracle, {"length": {"max": 2}, "name": "short"}]
    path = write(base, tmp_path / "ev.yaml", reward=terms, vote=vote, prompts=str(rows))
    assert rlhf("eval", path) == 0
    found = json.loads((path.with_suffix("") / "eval.json").read_text())["votes"]
    samples = read_lines(path.with_suffix("") / "samples.jsonl")
    for model, own in found.items():
        assert [*own] == ["best by oracle", "best by short", "weighted by oracle", "weighted by short"]
        right: dict[int, list[float]] = {}
        for line in samples:
            if line["model"] == model:
                right.setdefault(line["row"], []).append(line["terms"]["reward/oracle"])
        single, best = np.mean([*right.values()]), np.mean([max(each) for each in right.values()])
        assert [each["accuracy"] for each in own["best by oracle"]] == pytest.approx([single, best])
        assert [each["accuracy"] for each in own["weighted by oracle"]] == pytest.approx([single, best])


def test_an_evaluation(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: None) -> None:
    """Every model says as much as votes, and all of it counts; the other figures are of what was asked for."""
    path = write(base, tmp_path / "ev.yaml")
    assert rlhf("eval", path) == 0
    shown = "".join(capsys.readouterr())
    assert "3 to each prompt" in shown
    folder = path.with_suffix("")
    found, samples = json.loads((folder / "eval.json").read_text()), read_lines(folder / "samples.jsonl")
    assert len(samples) == 2 * 9 * 3
    assert found["about"]["responses"] == 1
    assert "1 prompts have no answer in the column 'answer', and no part in the votes." in found["about"]["notes"]
    answers = {row["prompt"]: row.get("answer") for row in ANSWERED}
    for model, own in found["votes"].items():
        said: dict[str, list[str]] = {}
        for line in samples:
            if line["model"] == model and answers[line["prompt"]] is not None:
                said.setdefault(line["prompt"], []).append("".join(char for char in line["response"] if char in "aeo")[-1:])
        firsts = {prompt: Counter(filter(None, each)).most_common(1) for prompt, each in said.items()}
        right = [bool(first) and first[0][0] == answers[prompt] for prompt, first in firsts.items()]
        alone = [each == answers[prompt] for prompt, own in said.items() for each in own]
        assert [(each["n"], each["accuracy"]) for each in own["majority"]] == [
            (1, pytest.approx(np.mean(alone))),
            (3, pytest.approx(np.mean(right))),
        ]
    assert {each["accuracy"] for own in found["votes"].values() for each in own["majority"]} > {0.125}
    assert EvaluationResult.from_json(found).to_json() == found
    assert terminal_table(EvaluationResult.from_json(found)).splitlines()[-3].split("  ")[0] == "accuracy of votes"
    report = (folder / "report.md").read_text()
    assert "\n## Votes\n" in report and "| two: majority | " in report and "](plots/votes.png)" in report
    old = {key: value for key, value in found.items() if key != "votes"}
    assert EvaluationResult.from_json(old).votes == {}


def test_what_cannot_vote_is_refused_before_weights_are_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**sections: Any) -> str:
        assert rlhf("eval", write(base, tmp_path / "bad.yaml", **sections), "--check") == 2
        return "".join(capsys.readouterr())

    match = {"column": "answr"}
    assert "vote.match reads the column 'answr', and no row of" in refused(vote={"match": match})
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"prompt": "sea", "answer": "1"}\n{"prompt": "sun", "answer": ["1"]}\n')
    said = refused(prompts=str(lists))
    assert f"vote.match: {lists}:2: the column 'answer' has a list, expected text or a number" in said
    lists.write_text('{"prompt": "sea", "answer": "1"}\n{"prompt": "sun"}\n')
    assert "vote.match: fewer than 2 rows have an answer in 'answer'" in refused(prompts=str(lists))
    assert "vote.by.0: " in refused(vote={"match": {"column": "answer"}, "by": ["weighed"]})
    said = refused(vote={"match": {"column": "answer"}, "by": ["weighted"]})
    assert "vote.by: weighted votes, and the best of n, need a score. add a reward" in said
    assert "vote.n: one is there twice. keep one of each" in refused(vote={"match": {"column": "answer"}, "n": [4, 4]})
    assert "vote.n: there is none. name one, or remove vote" in refused(vote={"match": {"column": "answer"}, "n": []})
    assert "vote.match: extract: (a is none of " in refused(vote={"match": {"column": "answer", "extract": "(a"}})
    rest = {"prompts": None, "rollout": {}, "text": str(base / "rows.jsonl")}
    assert "vote: has no effect without prompts. name some, or remove it" in refused(**rest)
