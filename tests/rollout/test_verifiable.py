"""Terms of a reward that see the row of a response: functions that name columns, and terms that need no code."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.records import Message, Record
from rlhf_cli.data.templates import choose_template
from rlhf_cli.errors import UsageError
from rlhf_cli.rollout.reward_functions import RewardFunction
from rlhf_cli.rollout.rewards import Answers, PolicyText, combined
from rlhf_cli.rollout.terms import TERMS
from rlhf_cli.rollout.verifiable import as_number, extractor
from rlhf_cli.sections import Length, Match, Reward
from tests.data.tiny_tokenizer import tiny_tokenizer

PLACE = "ppo.yaml:9: reward.0"
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "2+2?"))


@pytest.fixture(autouse=True)
def path_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def answers(*rows: tuple[Any, dict[str, Any], list[str]]) -> Answers:
    records = [Record(p, (), f"rows.jsonl:{n}", columns=json.dumps(own)) for n, (p, own, _) in enumerate(rows, 1)]
    texts = [texts for _, _, texts in rows]
    ended = [[k % 2 == 0 for k in range(len(own))] for own in texts]
    return Answers([], records, texts, ended, [[*map(len, own)] for own in texts])


ROWS = answers(("1+1?", {"answer": "2", "level": 1}, ["2", "3"]), (DIALOGUE, {"answer": "4"}, ["It is 4."]))


def term(reward: Reward) -> Any:
    tokenizer = tiny_tokenizer()
    (kind,) = (name for name in TERMS if vars(reward)[name] is not None)
    return TERMS[kind].find(reward, "f", PLACE, PolicyText(tokenizer, choose_template(tokenizer, None), False, False))


def function(tmp_path: Path, source: str, **settings: Any) -> RewardFunction:
    (tmp_path / "mine.py").write_text(source)
    found = term(Reward(function=f"{tmp_path / 'mine.py'}:f", **settings))
    assert isinstance(found, RewardFunction)
    return found


class TestFunctionsOfTheRow:
    def test_a_parameter_names_a_column(self, tmp_path: Path) -> None:
        source = "def f(prompts, responses, answer, level=None):\n"
        source += "    return [10 * (a in r) + (l or 0) for a, r, l in zip(answer, responses, level)]\n"
        assert function(tmp_path, source).score(ROWS).tolist() == [11, 1, 10]

    def test_messages_and_ended_are_no_columns(self, tmp_path: Path) -> None:
        source = "def f(responses, messages, ended, prompts):\n"
        source += "    assert messages[0] == [{'role': 'user', 'content': '1+1?'}] and messages[2][1]['content'] == 'Yes?'\n"
        source += "    return [float(e) for e in ended]\n"
        assert function(tmp_path, source).score(ROWS).tolist() == [1, 0, 1]

    def test_keywords_take_all_columns(self, tmp_path: Path) -> None:
        source = "def f(prompts, responses, **columns):\n"
        source += "    assert columns == {'answer': ['2', '2', '4'], 'level': [1, 1, None]}\n    return [0.5] * 3\n"
        assert function(tmp_path, source).score(ROWS).tolist() == [0.5] * 3

    def test_a_default_other_than_none_is_a_setting_of_its_own(self, tmp_path: Path) -> None:
        source = "def f(prompts, responses, other=None, level=3):\n    return [level + (o or 0) for o in other]\n"
        assert function(tmp_path, source).score(ROWS).tolist() == [3, 3, 3]

    def test_two_parameters_of_any_name_are_prompts_and_responses(self, tmp_path: Path) -> None:
        assert function(tmp_path, "def f(asked, said):\n    return [*map(len, said)]\n").score(ROWS).tolist() == [1, 1, 8]

    def test_none_says_nothing(self, tmp_path: Path) -> None:
        found = function(tmp_path, "def f(prompts, responses):\n    return [None, 1, 2]\n").score(ROWS)
        assert math.isnan(found[0]) and found[1:].tolist() == [1, 2]

    @pytest.mark.parametrize(
        ("signature", "names"),
        [
            ("prompts, responses, answer, level=None, scale=2", {"answer": f"{PLACE}: MINE", "level": None}),
            ("prompts, responses, **rest", {"*": None}),
            ("responses, messages", {}),
        ],
    )
    def test_what_is_kept_of_rows(self, signature: str, names: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(f"def f({signature}): ...\n")
        mine = f"{tmp_path / 'mine.py'}:f"
        wanted = {name: who and who.replace("MINE", mine) for name, who in names.items()}
        assert RewardFunction.columns(Reward(function=mine), PLACE) == wanted

    @pytest.mark.parametrize(
        "signature", ["prompts, completions, answer", "completions, answer", "completions, answer, **kwargs"]
    )
    def test_other_tools_names_are_refused(self, signature: str, tmp_path: Path) -> None:
        """Two alone are prompts and responses, and not responses and answers."""
        (tmp_path / "mine.py").write_text(f"def f({signature}): ...\n")
        with pytest.raises(UsageError, match=rf"takes \({re.escape(signature)}\); expected def f\(prompts, responses\)"):
            RewardFunction.columns(Reward(function=f"{tmp_path / 'mine.py'}:f"), PLACE)


class TestAsyncFunctions:
    SOURCE = """
import asyncio
most = running = 0
async def f(prompts, responses, answer):
    global most, running
    assert len(prompts) == len(responses) == len(answer) == 1
    running += 1
    most = max(most, running)
    await asyncio.sleep(PAUSE)
    running -= 1
    return RETURNED
"""

    def test_one_call_a_response_and_so_many_at_once(self, tmp_path: Path) -> None:
        many = answers(*(("1+1?", {"answer": str(n)}, [str(n)] * 3) for n in range(4)))
        source = self.SOURCE.replace("PAUSE", "0.001").replace("RETURNED", "[float(responses[0])]")
        found = function(tmp_path, source, parallel=5)
        assert found.score(many).tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert found.function.__globals__["most"] == 5

    def test_a_number_may_stand_alone(self, tmp_path: Path) -> None:
        source = self.SOURCE.replace("PAUSE", "0").replace("RETURNED", "None if responses == ['3'] else 1.5")
        assert np.nan_to_num(function(tmp_path, source).score(ROWS), nan=-1).tolist() == [1.5, -1, 1.5]

    def test_so_may_an_array_of_one(self, tmp_path: Path) -> None:
        source = "import numpy" + self.SOURCE.replace("PAUSE", "0").replace("RETURNED", "numpy.array([1.5])")
        assert function(tmp_path, source).score(ROWS).tolist() == [1.5, 1.5, 1.5]

    def test_one_that_takes_too_long_ends_the_run(self, tmp_path: Path) -> None:
        source = self.SOURCE.replace("PAUSE", "9").replace("RETURNED", "1")
        with pytest.raises(UsageError, match=r"it took longer than 0.05 s \(timeout\) for a response"):
            function(tmp_path, source, timeout=0.05).score(ROWS)

    def test_what_it_raises_is_told_with_its_line(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"mine.py:11: ZeroDivisionError"):
            function(tmp_path, self.SOURCE.replace("PAUSE", "0").replace("RETURNED", "1 / 0")).score(ROWS)

    def test_its_settings_have_no_effect_on_another(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="called once with all responses, so that parallel and timeout have no effect"):
            function(tmp_path, "def f(prompts, responses): ...\n", parallel=2)


class TestMatch:
    @pytest.mark.parametrize(
        ("how", "text", "found"),
        [
            ("text", "  Paris \n", "Paris"),
            ("last-number", "2 apples and -3.5 pears, so 1,200.", "1,200"),
            ("last-number", "x is 5-3", "3"),
            ("last-number", "a half: 1/2", "1/2"),
            ("last-number", "none", None),
            ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
            ("boxed", r"cut off \boxed{\frac{1}", None),
            (r"Answer:\s*(\w+)", "Answer: A. No. Answer:  B", "B"),
        ],
    )
    def test_finds_the_last_answer(self, how: str, text: str, found: str | None) -> None:
        assert extractor(how)(text) == found

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1,200", 1200),
            ("$3.50", 3.5),
            ("−4", -4),
            ("1/2", 0.5),
            ("40 %", 40),
            ("7.", 7),
            ("1/0", None),
            ("1e9", None),
            ("0" * 5000, None),
        ],
    )
    def test_reads_numbers(self, text: str, number: float | None) -> None:
        assert as_number(text) == number

    @pytest.mark.parametrize(
        ("match", "scores"),
        [
            (Match("answer"), [1, 0, 0]),
            (Match("answer", "last-number"), [1, 0, 1]),
            (Match("answer", "last-number", "number"), [1, 0, 1]),
            (Match("answer", r"is (\d)"), [0, 0, 1]),
        ],
    )
    def test_is_one_where_the_answer_is_the_rows(self, match: Match, scores: list[float]) -> None:
        assert term(Reward(match=match)).score(ROWS).tolist() == scores

    def test_the_rows_answer_may_stand_in_a_text_and_be_written_otherwise(self) -> None:
        rows = answers(("?", {"answer": "So 3 · 4 makes\n#### 1,200"}, ["It is 1200.0"]), ("?", {"answer": 0.5}, ["1/2"]))
        assert term(Reward(match=Match("answer", "last-number", "number"))).score(rows).tolist() == [1, 1]

    def test_mathematics(self) -> None:
        rows = answers(
            ("?", {"answer": r"\frac{1}{2}"}, ["0.5", r"\boxed{\frac{2}{4}}", "2"]), ("?", {"answer": "(1, 2)"}, ["x"])
        )
        assert term(Reward(match=Match("answer", "text", "math"))).score(rows).tolist() == [1, 1, 0, 0]

    @pytest.mark.parametrize(("answer", "text"), [(42.0, "42"), (1e16, "1" + "0" * 16), (0.00001, "0.00001"), (-0.5, "-0.5")])
    def test_a_number_of_a_table_is_written_as_people_do(self, answer: float, text: str) -> None:
        rows = answers(("?", {"answer": answer}, [text, f"{text}1"]))
        for match in (Match("answer"), Match("answer", "last-number", "number")):
            assert term(Reward(match=match)).score(rows).tolist() == [1, 0]

    @pytest.mark.parametrize("answer", ["9^{9^{9}}", "9**9**9", "10^{123456789}", "99999!", "1+" * 400 + "1"])
    def test_mathematics_that_take_too_long_are_text(self, answer: str) -> None:
        rows = answers(("?", {"answer": "7"}, [answer, "7"]), ("?", {"answer": answer}, [answer]))
        assert term(Reward(match=Match("answer", "text", "math"))).score(rows).tolist() == [0, 1, 1]

    @pytest.mark.parametrize("missing", [None, math.nan])
    def test_says_nothing_of_a_row_without_an_answer(self, missing: float | None) -> None:
        assert math.isnan(term(Reward(match=Match("answer"))).score(answers(("?", {"answer": missing}, ["x"])))[0])

    def test_an_answer_that_is_no_text_is_told(self) -> None:
        with pytest.raises(UsageError, match="the column 'answer' has a list, expected text or a number"):
            term(Reward(match=Match("answer"))).score(answers(("?", {"answer": ["a"]}, ["x"])))


def test_format_is_one_where_all_of_it_matches() -> None:
    rows = answers(("?", {}, [" <think>a\nb</think> c\n", "so <think></think>", "<think>"]))
    assert term(Reward(format="(?s)<think>.*</think>.*")).score(rows).tolist() == [1, 0, 0]


@pytest.mark.parametrize(("length", "scores"), [(Length(max=4), [0, 0, -0.25, -1]), (Length(target=4), [-0.75, 0, -0.25, -1])])
def test_length_counts_tokens(length: Length, scores: list[float]) -> None:
    rows = answers(("?", {}, ["a", "a" * 4, "a" * 5, "a" * 8]))
    assert term(Reward(length=length)).score(rows).tolist() == scores


class TestCombined:
    TERMS = np.array([[1.0, np.nan, 3.0], [2.0, 5.0, np.nan]])

    @pytest.mark.parametrize(
        ("how", "scores"), [("sum", [5, 10, 3]), ("min", [1, 10, 3]), ("mean_minus_std", [2.5 - 1.5, 10, 3])]
    )
    def test_a_term_that_says_nothing_is_left_out(self, how: str, scores: list[float]) -> None:
        assert combined(how, self.TERMS, [1, 2], []).tolist() == scores

    def test_a_response_without_any_is_told(self) -> None:
        with pytest.raises(UsageError, match="no term applies to a response, so that it has no score"):
            combined("sum", np.array([[1, np.nan, 2]]), [1], ROWS.pairs)
