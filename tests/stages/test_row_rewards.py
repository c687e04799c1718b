"""Rewards that see the row, in whole runs: what they are given, what is said before anything is loaded, and what is logged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import launch
from tests.stages.tiny_runs import lines, result, write_eval
from tests.tiny import forget_functions, make_base, read_lines, rlhf, split_lines, write_recipe

FUNCTIONS = """
seen = []

def level(prompts, responses, answer, level=None):
    seen.append((len(responses), sorted(set(answer))))
    return [None if l is None else l + len(r) / 100 for l, r in zip(level, responses)]

def rank(prompts, responses):
    order = sorted(responses)
    return [order.index(r) / len(order) for r in responses]

def letters(prompts, responses):
    return [len(r) / 10 for r in responses]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rows")
    make_base(folder / "base")
    rows = [{"prompt": f"Is it {n}?", "answer": str(n), **({"level": n} if n % 2 else {})} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(FUNCTIONS)
    yield folder
    forget_functions()


Write = Callable[..., Path]


@pytest.fixture
def write(home: Path, tmp_path: Path) -> Write:
    """A recipe of ppo with these terms of the reward."""

    def written(reward: Any, name: str = "run", **sections: Any) -> Path:
        terms = json.loads(json.dumps(reward).replace("HOME", str(home)))
        common: dict[str, Any] = {
            "lora": {"r": 4},
            "objective": {"kind": "grpo", "epochs": 1},
            "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
            "data": {"holdout": 0.2, "max_length": 96},
            "train": {"steps": 2, "batch_size": 4, "save_every": 1, "learning_rate": 0.02},
            "reward": terms,
        }
        path = tmp_path / f"{name}.yaml"
        return write_recipe(path, home / "base", home / "rows.jsonl", tmp_path / name, **common | sections)

    return written


LEVEL = {"function": "HOME/mine.py:level"}
FORM = {"format": ".{3,}"}


def test_a_term_of_the_row_is_given_its_columns_and_says_of_how_many_it_says_nothing(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [LEVEL, {"match": {"column": "answer", "extract": "last-number"}}, FORM, {"length": {"max": 3}, "weight": 0.1}]
    path = write([{"match": {"column": "level"}}, FORM], "checked")
    assert rlhf("ppo", path, "--check") == 0
    assert "4 of 8 rows have the column 'level', which a term of the reward reads" in " ".join(capsys.readouterr().err.split())
    assert rlhf("ppo", write(terms)) == 0
    first, second = split_lines(tmp_path / "run", "train")
    for line in (first, second):
        assert {"reward/match", "reward/format", "reward/length"} <= line.keys()
        assert line["reward/length"] <= 0 <= line["reward/match"] <= 1
        level, share = line.get("reward/level", 0.0), line.get("reward/level/na", 0.0)
        parts = level * (1 - share) + line["reward/match"] + line["reward/format"] + 0.1 * line["reward/length"]
        assert line["objective/scores"] == pytest.approx(parts, abs=1e-9)
    assert 0 < first["reward/level/na"] < 1


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            [{"match": {"column": "solution"}}],
            "reads the column 'solution', and no row of HOME/rows.jsonl has it. beside what is read of them",
        ),
        (
            [{"match": {"column": "anser"}}],
            "reads the column 'anser', and no row of HOME/rows.jsonl has it. did you mean answer?",
        ),
        ([{"match": {"column": "answer", "extract": "number"}}], "reward.0.match: extract: number is none of text, last-number"),
        ([{"format": "(a"}], "reward.0.format: not a regular expression: missing ), unterminated subpattern"),
        ([{"length": {}}], "reward.0.length: expected one of max and target"),
        ([{"length": {"max": 3}, "parallel": 2}], "reward.0.parallel: has no effect on a length, it is for functions"),
    ],
)
def test_is_checked_before_anything_is_loaded(
    reward: Any, message: str, home: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rlhf("ppo", write(reward), "--check") == 2
    assert message.replace("HOME", str(home)) in " ".join(capsys.readouterr().err.split())


def test_a_resumed_run_whose_answers_have_changed_is_refused(
    write: Write, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [{"match": {"column": "answer", "extract": "last-number"}}, FORM]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((home / "rows.jsonl").read_text())
    path = write(terms)
    path.write_text(path.read_text().replace(str(home / "rows.jsonl"), str(rows)))
    assert rlhf("ppo", path, "--set", "train.steps=1") == 0
    rows.write_text(rows.read_text().replace('"answer": "3"', '"answer": "33"'))
    assert rlhf("ppo", path, "--resume", "--set", "train.steps=2") == 2
    assert "columns" in capsys.readouterr().err


def test_an_evaluation_leaves_out_what_a_term_says_nothing_of(home: Path, tmp_path: Path) -> None:
    reward = [{"function": f"{home}/mine.py:level"}, {"format": ".{3,}"}]
    models = {"base": f"{home}/base"}
    sections = {"models": models, "prompts": f"{home}/rows.jsonl", "rollout": {"max_new_tokens": 6}, "reward": reward}
    assert rlhf("eval", write_eval(tmp_path / "eval.yaml", home, **sections)) == 0
    found = result(tmp_path / "eval")["models"]["base"]
    samples = lines(tmp_path / "eval" / "samples.jsonl")
    known = [sample["terms"]["reward/level"] for sample in samples if sample["terms"]["reward/level"] is not None]
    assert len(known) == 4
    assert found["reward/level"]["mean"] == pytest.approx(sum(known) / 4)
    assert found["reward/level/na"]["mean"] == 0.5
    for sample in samples:
        terms = [value for value in sample["terms"].values() if value is not None]
        assert sample["score"] == pytest.approx(sum(terms))


def test_a_run_with_an_async_function_that_failed_goes_on_bit_for_bit(write: Write, home: Path, tmp_path: Path) -> None:
    """Its calls end in any order; the run that is broken at its second step ends as the one that was not."""
    source = (
        "import asyncio, random\nfrom pathlib import Path\nasync def slow(prompts, responses, answer):\n"
        "    await asyncio.sleep(random.random() / 200)\n"
        "    if Path(FLAG).exists():\n        with Path(FLAG).open('a') as calls:\n            calls.write('x')\n"
        "        if Path(FLAG).stat().st_size > 12:\n            raise OSError('the server is gone')\n"
        "    return len(responses[0]) % 3 + int(answer[0]) / 10\n"
    )
    flag, train = tmp_path / "flag", {"steps": 3, "batch_size": 4, "save_every": 1, "learning_rate": 0.02}
    (tmp_path / "slow.py").write_text(source.replace("FLAG", repr(str(flag))))
    reward = [{"function": f"{tmp_path}/slow.py:slow", "parallel": 3}]
    assert rlhf("ppo", write(reward, "whole", train=train)) == 0
    path = write(reward, "broken", train=train)
    flag.touch()
    assert rlhf("ppo", path) == 3
    assert [line["step"] for line in split_lines(tmp_path / "broken", "train")] == [1]
    flag.unlink()
    assert rlhf("ppo", path, "--resume") == 0
    whole, broken = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken"))
    assert whole == broken


@pytest.mark.slow
def test_two_processes_ask_once_about_all_responses(write: Write, tmp_path: Path) -> None:
    """A function that ranks responses among all of a step sees the same ones, in the same order, on one process and on two."""
    terms = [{"function": "HOME/mine.py:rank"}, LEVEL]
    for name, ranks in (("one", 1), ("two", 2)):
        train = {"steps": 2, "batch_size": 4, "learning_rate": 0.0}
        code, errors = launch("ppo", write(terms, name, train=train), ranks=ranks).wait()
        assert code == 0, errors
    own = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, two in zip(*own, strict=True):
        for name in ("reward/rank", "reward/level", "objective/scores"):
            assert one.get(name) == two.get(name)
