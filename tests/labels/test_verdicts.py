"""The log of verdicts loses nothing; questions are dealt and shown by chance; preferences and figures say what was judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.labels.figures import measure, position_bias, preferences
from rlhf_cli.labels.questions import Ranking, Row, Shown, queues
from rlhf_cli.labels.verdicts import Judging, Verdict

ROOT = Path(__file__).parents[2]


def rows(count: int, responses: int = 2) -> list[Row]:
    return [Row(k, f"prompt {k}", tuple(f"{'long ' * own}{k}" for own in range(responses))) for k in range(count)]


def judging(log: Path, count: int = 4, names: Sequence[str] = ("ann",), responses: int = 2, by: Ranking = "pairs") -> Judging:
    return Judging(queues(rows(count, responses), [], names, 1.0, by, 0), log)


def judge_all(own: Judging, say: Callable[[str, Shown], Any]) -> None:
    for name in own.queues:
        while (shown := own.ask(name)) is not None:
            assert own.judge(name, shown.id, say(name, shown))


KILLED = """
import sys
from pathlib import Path
from tests.labels.test_verdicts import judging
own = judging(Path(sys.argv[1]), 2000)
while shown := own.ask("ann"):
    own.judge("ann", shown.id, "a")
    print(shown.row.number, flush=True)
"""


class TestLog:
    @pytest.mark.parametrize("number", [1, 2, 31])
    def test_a_killed_process_has_lost_nothing_that_it_took(self, number: int, tmp_path: Path) -> None:
        log = tmp_path / "verdicts.jsonl"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", KILLED, log], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        assert process.stdout is not None
        taken = [int(process.stdout.readline()) for _ in range(number)]
        process.kill()
        taken += [int(line) for line in process.stdout.read().split()]
        process.wait()
        kept = [line.row for line in judging(log, 2000).lines]
        assert kept[: len(taken)] == taken
        assert len(taken) >= number and len(kept) <= len(taken) + 1

    def test_half_a_line_is_no_line_and_the_rest_goes_on(self, tmp_path: Path) -> None:
        whole = tmp_path / "whole.jsonl"
        judge_all(judging(whole, 3), lambda name, shown: "b")
        text = whole.read_bytes()
        for cut in range(0, len(text), 7):
            log = tmp_path / f"{cut}.jsonl"
            log.write_bytes(text[:cut])
            own = judging(log, 3)
            assert len(own.lines) == text[:cut].count(b"\n")
            shown = own.ask("ann")
            assert shown is not None and own.judge("ann", shown.id, "tie")
            assert [json.loads(line)["verdict"] for line in log.read_text().splitlines()] == [
                *["b"] * (len(own.lines) - 1),
                "tie",
            ]

    def test_undo_adds_a_line_and_opens_the_last_question(self, tmp_path: Path) -> None:
        log = tmp_path / "verdicts.jsonl"
        own = judging(log)
        asked = []
        for verdict in ("a", "b"):
            shown = own.ask("ann")
            assert shown is not None
            asked.append(shown.id)
            assert own.judge("ann", shown.id, verdict, "so it is")
        assert own.undo("ann") and own.undo("ann") and not own.undo("ann")
        again = own.ask("ann")
        assert again is not None and again.id == asked[0]
        assert not own.judge("ann", asked[1], "a")  # not the one that is open
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(line["verdict"], line["undo"], line["reason"]) for line in lines] == [
            ("a", False, "so it is"),
            ("b", False, "so it is"),
            ("skip", True, ""),
            ("skip", True, ""),
        ]
        assert judging(log).standing() == []

    def test_rows_that_changed_are_refused(self, tmp_path: Path) -> None:
        log = tmp_path / "verdicts.jsonl"
        judge_all(judging(log), lambda name, shown: "a")
        with pytest.raises(UsageError, match=r"verdicts.jsonl:1: was said of another row"):
            judging(log, responses=3)

    @pytest.mark.parametrize("verdict", ["c", "", None, 1, [1, 2], ["a"], {}])
    def test_no_verdict(self, verdict: Any, tmp_path: Path) -> None:
        own = judging(tmp_path / "verdicts.jsonl")
        shown = own.ask("ann")
        assert shown is not None
        with pytest.raises(ValueError, match="is no verdict on 2 responses"):
            own.judge("ann", shown.id, verdict)
        assert own.lines == []


class TestQuestions:
    def test_a_share_is_for_all_and_the_rest_for_one(self) -> None:
        gold = [Row(k, f"gold {k}", ("a", "b"), known=(0, 1)) for k in range(5)]
        own = queues(rows(100), gold, ("ann", "bo", "cy"), 0.25, "pairs", 3)
        seen = Counter(shown.row.prompt for asked in own.values() for shown in asked)
        assert Counter(seen.values()) == {3: 25 + 5, 1: 75}
        assert [len(asked) for asked in own.values()] == [25 + 25 + 5] * 3
        places = [k for k, shown in enumerate(own["ann"]) if shown.row.known is not None]
        assert places != sorted(range(5)) and max(places) - min(places) > 5
        assert own == queues(rows(100), gold, ("ann", "bo", "cy"), 0.25, "pairs", 3)
        assert own != queues(rows(100), gold, ("ann", "bo", "cy"), 0.25, "pairs", 4)

    def test_sides_are_a_fair_coin_for_each_annotator(self) -> None:
        own = queues(rows(2000), [], ("ann", "bo"), 1.0, "pairs", 0)
        sides = {name: {shown.row.number: shown.order[0] for shown in asked} for name, asked in own.items()}
        first = np.array([[sides[name][k] for k in range(2000)] for name in sides])
        assert abs(first.mean(1) - 0.5).max() < 0.04  # 3.5 standard errors
        assert abs((first[0] == first[1]).mean() - 0.5) < 0.04

    def test_pairs_of_a_row_follow_each_other(self) -> None:
        own = queues(rows(5, 3), [], ("ann",), 0.2, "pairs", 0)["ann"]
        assert [sorted(shown.order) for shown in own[:3]] == [[0, 1], [0, 2], [1, 2]]
        assert len({shown.row.number for shown in own[:3]}) == 1
        assert len(queues(rows(5, 3), [], ("ann",), 0.2, "all", 0)["ann"]) == 5


def better_is(own: int) -> Callable[[str, Shown], str]:
    """Says that this response is the better one, wherever it stands."""
    return lambda name, shown: "ab"[shown.order.index(own)]


class TestWhatComesOfIt:
    def test_votes_become_a_probability(self, tmp_path: Path) -> None:
        own = judging(tmp_path / "v.jsonl", 2, ("ann", "bo", "cy"))
        judge_all(
            own, lambda name, shown: {"ann": better_is(1), "bo": lambda *_: "both-bad", "cy": better_is(1)}[name](name, shown)
        )
        (row, _) = preferences(rows(2), own.standing(), "pairs")
        assert row == {
            "prompt": "prompt 0",
            "chosen": "long 0",
            "rejected": "0",
            "probability": pytest.approx(2.5 / 3),
            "annotator": "ann, bo, cy",
        }

    def test_rankings_become_mean_places(self, tmp_path: Path) -> None:
        own = judging(tmp_path / "v.jsonl", 1, ("ann", "bo"), 3, "all")
        ranks = {"ann": [1, 2, 3], "bo": [2, 1, 1]}  # of responses 0, 1, 2
        judge_all(own, lambda name, shown: [ranks[name][at] for at in shown.order])
        (row,) = preferences(rows(1, 3), own.standing(), "all")
        assert row["ranks"] == [(1 + 3) / 2, (2 + 1.5) / 2, (3 + 1.5) / 2]
        assert row["responses"] == ["0", "long 0", "long long 0"]

    def test_what_is_skipped_is_nowhere(self, tmp_path: Path) -> None:
        own = judging(tmp_path / "v.jsonl", 3)
        judge_all(own, lambda name, shown: "skip")
        assert preferences(rows(3), own.standing(), "pairs") == []
        found = measure(rows(3), [], own.standing(), ["ann"], 0)
        assert found["annotators"]["ann"]["skipped"] == 3
        assert found["position_bias"] is found["length_bias"] is found["agreement"]["cohen"] is None

    def test_gold_questions_measure_people_and_are_no_preferences(self, tmp_path: Path) -> None:
        gold = [Row(k, f"gold {k}", ("right", "wrong"), known=(0, 1)) for k in range(10)]
        own = Judging(queues(rows(4), gold, ("ann", "bo"), 1.0, "pairs", 0), tmp_path / "v.jsonl")
        judge_all(own, lambda name, shown: better_is(0 if name == "ann" or shown.row.number < 2 else 1)(name, shown))
        found = measure(rows(4), gold, own.standing(), ["ann", "bo"], 0)["annotators"]
        assert (found["ann"]["gold"]["value"], found["bo"]["gold"]["value"], found["bo"]["gold"]["n"]) == (1.0, 0.2, 10)
        assert len(preferences(rows(4), own.standing(), "pairs")) == 4

    def test_a_pool_of_known_noise_is_recovered(self) -> None:
        """Response 1 is always the better one, and each of three is right 9 times in 10, so that two agree in 0.9² + 0.1² of
        the pairs, where chance has ½: 0.64. In the rows' own order chance would have 0.82 too, and the coefficients 0."""
        rng, names = np.random.default_rng(4), ["ann", "bo", "cy"]
        right = rng.random((600, 3)) < 0.9
        said = [
            Verdict(k, [0, 1], "b" if right[k, at] else "a", float(not right[k, at]), name, 1.0, "", "")
            for k in range(600)
            for at, name in enumerate(names)
        ]
        found = measure(rows(600), [], said, names, 0)
        for coefficient in found["agreement"].values():
            assert coefficient["low"] < 0.64 < coefficient["high"]
            assert coefficient["high"] - coefficient["low"] < 0.13
        assert found["annotators"]["ann"]["others"] == pytest.approx(0.64, abs=0.05)
        assert found["length_bias"]["value"] == pytest.approx(0.9, abs=0.03)  # response 1 is the longer one

    def test_a_planted_position_bias_is_found_and_none_is_not_claimed(self, tmp_path: Path) -> None:
        """200 annotations, 400 times: those who prefer a response, on either side, are accused in at most 5 % of them."""
        rng, accused = np.random.default_rng(0), 0
        for _ in range(400):
            said = [Verdict(k, [1, 0] if rng.random() < 0.5 else [0, 1], "tie", 0.5, "ann", 1, "", "") for k in range(200)]
            judged = [
                Verdict(**vars(line) | {"verdict": "ab"[line.order.index(0 if rng.random() < 0.8 else 1)]}) for line in said
            ]
            found = position_bias(judged)
            accused += found is not None and found["p_value"] < 0.05
        assert 4 <= accused <= 20 + 3 * np.sqrt(400 * 0.05 * 0.95)
        lazy = position_bias(Verdict(**vars(line) | {"verdict": "a" if rng.random() < 0.65 else "b"}) for line in said)
        assert lazy is not None and lazy["p_value"] < 0.01 and lazy["low"] > 0.5

    def test_cycles(self, tmp_path: Path) -> None:
        own = judging(tmp_path / "v.jsonl", 2, ("ann",), 3)
        circle = {(0, 1): 0, (1, 2): 1, (0, 2): 2}  # 0 beats 1, 1 beats 2, 2 beats 0
        judge_all(
            own,
            lambda name, shown: better_is(min(shown.order) if shown.row.number else circle[min(shown.order), max(shown.order)])(
                name, shown
            ),
        )
        assert measure(rows(2, 3), [], own.standing(), ["ann"], 0)["cycles"] == {"cyclic": 1, "triples": 2, "share": 0.5}
