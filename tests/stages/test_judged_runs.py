"""Language models that judge in whole runs: behind a server and local, in ppo, online dpo and eval; and a server that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.judges import asking
from tests.judges.server import Model, Reply, Serve, error, responses, said, serve
from tests.stages.tiny_runs import lines, result, write_eval
from tests.tiny import make_base, read_lines, rlhf, split_lines, write_recipe

__all__ = ["serve"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("judged")
    make_base(folder / "base")
    make_base(folder / "judge", seed=5)
    rows = [{"prompt": f"Is it {n}?"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(asking, "BACKOFF", 0.0)


def recipe(home: Path, folder: Path, judge: dict[str, Any], name: str = "run", **sections: Any) -> Path:
    common: dict[str, Any] = {
        "lora": {"r": 4},
        "rollout": {"max_new_tokens": 6, "responses_per_prompt": 3},
        "data": {"holdout": 0.2, "max_length": 96},
        "train": {"steps": 2, "batch_size": 4, "save_every": 1, "learning_rate": 0.02},
        "reward": [{"judge": judge}],
    }
    return write_recipe(folder / f"{name}.yaml", home / "base", home / "rows.jsonl", folder / name, **common | sections)


def longer(model: Model, message: str) -> Reply:
    a, b = responses(message)
    return said("TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B")


GRPO = {"objective": {"kind": "grpo", "epochs": 1}}


@pytest.mark.parametrize("command", ["ppo", "dpo"])
def test_a_judge_behind_a_server(command: str, serve: Serve, home: Path, tmp_path: Path) -> None:
    """The longer response of each two wins: a response's reward is the share of the others that are shorter, ties half."""
    model = serve(longer)
    judge = {"endpoint": model.url, "model": "m", "mode": "pairwise"}
    assert rlhf(command, recipe(home, tmp_path, judge, **(GRPO if command == "ppo" else {}))) == 0
    train = split_lines(tmp_path / "run", "train")
    assert [line["reward/judge"] for line in train] == [0.5, 0.5]  # of a prompt's responses one wins what another loses
    assert [line["reward/judge/contradicting"] for line in train] == [0.0, 0.0]
    kept = lines(tmp_path / "run" / "verdicts.jsonl")
    assert len(kept) == len({line["key"] for line in kept}) == len(model.asked)
    if command == "ppo":
        assert any(line["reward/zero_spread"] < 1 for line in train)


def test_one_that_says_always_first_teaches_nothing_and_the_report_says_so(serve: Serve, home: Path, tmp_path: Path) -> None:
    judge = {"endpoint": serve(lambda *_: said("A")).url, "model": "m", "mode": "pairwise"}
    assert rlhf("ppo", recipe(home, tmp_path, judge, **GRPO)) == 0
    for line in split_lines(tmp_path / "run", "train"):
        assert (line["reward/judge"], line["objective/scores"], line["reward/zero_spread"]) == (0.5, 0.5, 1.0)
        assert line["loss/policy"] == 0.0
        assert line["reward/judge/contradicting"] > 0.5
    report = " ".join((tmp_path / "run" / "report.md").read_text().split())
    assert "The judge of `reward/judge` contradicts itself" in report


def test_a_server_that_goes_down_ends_the_run_and_it_goes_on_bit_for_bit(
    serve: Serve, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    down = [False]

    def behave(model: Model, message: str) -> Reply:
        if down[0] or ("Is it" in message and len(model.asked) > 40):
            return error(400, "no more")
        return longer(model, message)

    whole, broken = serve(longer), serve(behave)
    judge = {"model": "m", "mode": "pairwise", "retries": 0, "parallel": 1}
    train = {"steps": 3, "batch_size": 4, "save_every": 1, "learning_rate": 0.02}
    assert rlhf("ppo", recipe(home, tmp_path, judge | {"endpoint": whole.url}, "whole", train=train, **GRPO)) == 0
    path = recipe(home, tmp_path, judge | {"endpoint": broken.url}, "broken", train=train, **GRPO)
    assert rlhf("ppo", path) == 4
    assert "reward.0.judge: http" in capsys.readouterr().err
    asked = len(broken.asked)
    moved = serve(longer)
    path = recipe(home, tmp_path, judge | {"endpoint": f"{moved.url}?key=S3CRET", "retries": 2}, "broken", train=train, **GRPO)
    assert rlhf("ppo", path, "--resume") == 0
    for name in ("manifest.json", "inputs.json", "report.md", "report.html"):
        assert "S3CRET" not in (tmp_path / "broken" / name).read_text()
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken"))
    assert one == two
    assert 0 < len(moved.asked) < len(whole.asked) and len(broken.asked) == asked


@pytest.mark.parametrize(("command", "mode"), [("ppo", "score"), ("dpo", "pairwise")])
def test_a_local_judge(command: str, mode: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"path": str(home / "judge"), "mode": mode}
    sections = {"objective": {"kind": "ppo", "epochs": 1}} if command == "ppo" else {}
    assert rlhf(command, recipe(home, tmp_path, judge, **sections)) == 0
    for line in split_lines(tmp_path / "run", "train"):
        assert -1 < line["reward/judge"] < 1
        if mode == "pairwise":
            assert line["reward/judge"] == pytest.approx(0.5, abs=1e-9)
    if command == "ppo":
        said = " ".join("".join(capsys.readouterr()).split())
        assert "value: starts as 0, on the policy's weights: no reward model reads its tokens" in said


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"endpoint": "http://x/v1"}, "reward.0.judge: an endpoint has several models. name one: model"),
        ({"path": "BASE", "parallel": 2}, "reward.0.judge: parallel has no effect on a local model"),
        ({"path": "BASE", "draws": 2}, "reward.0.judge: draws has no effect without principles"),
        ({"path": "HOME/nobody"}, "reward.0.judge"),
        ({}, "reward.0.judge: expected one of endpoint and path"),
    ],
)
def test_is_checked_before_anything_is_loaded(
    judge: dict[str, Any], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = json.loads(json.dumps(judge).replace("BASE", str(home / "base")).replace("HOME", str(home)))
    assert rlhf("ppo", recipe(home, tmp_path, own, **GRPO), "--check") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_judges_of_one_name_have_one_address(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they say is kept by the model's name."""
    judges = [{"judge": {"endpoint": f"http://{host}/v1", "model": "m"}, "name": host} for host in ("a", "b")]
    path = recipe(
        home,
        tmp_path,
        {},
        reward=judges[:1],
        gold=[*json.loads(json.dumps(judges)), {"judge": {"path": str(home / "judge")}}],
        **GRPO,
    )
    assert rlhf("ppo", path, "--check") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("m is a judge at http://a/v1 too") == 1 and "gold.1.judge.model" in said


def test_comparing_needs_two_responses(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"path": str(home / "judge"), "mode": "pairwise"}
    rollout = {"max_new_tokens": 6, "responses_per_prompt": 1}
    assert rlhf("ppo", recipe(home, tmp_path, judge, rollout=rollout), "--check") == 2
    assert "pairwise compares the responses of a prompt. set rollout.responses_per_prompt to 2 or more" in capsys.readouterr().err


def test_what_is_always_a_half_keeps_no_checkpoint(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"path": str(home / "judge"), "mode": "pairwise"}
    train = {"steps": 2, "keep_best": {"metric": "reward/judge", "mode": "max"}}
    assert rlhf("ppo", recipe(home, tmp_path, judge, train=train, **GRPO), "--check") == 2
    assert "the mean of reward/judge is always ½" in capsys.readouterr().err


def test_an_evaluation_by_a_local_judge(home: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", seed=3)
    sections = {
        "models": {"base": str(home / "base"), "other": str(tmp_path / "other")},
        "prompts": str(home / "rows.jsonl"),
        "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
        "reward": [{"judge": {"path": str(home / "judge"), "mode": "pairwise"}}],
        "winrate": {"baseline": "base", "judge": {"path": str(home / "judge")}},
    }
    assert rlhf("eval", write_eval(tmp_path / "eval.yaml", home, **sections)) == 0
    found = result(tmp_path / "eval")
    assert found["about"]["judge"] == {"endpoint": None, "model": None, "path": str(home / "judge")}
    assert 0 <= found["winrate"]["other"]["mean"] <= 1
    assert found["models"]["other"]["reward/judge"]["mean"] == pytest.approx(0.5, abs=1e-6)
    assert "reward/judge/contradicting" in found["models"]["other"]


def test_what_stands_beside_gold_is_no_gold(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a pairwise judge alone as gold every model wins half against itself, whatever it contradicts."""
    make_base(tmp_path / "other", seed=3)
    rows = [{"prompt": f"Is it {n}?", "answer": None if n == 3 else "yes"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = {"judge": {"path": str(home / "judge"), "mode": "pairwise"}}
    sections: dict[str, Any] = {
        "models": {"base": str(home / "base"), "other": str(tmp_path / "other")},
        "reference": "base",
        "best_of_n": [2],
        "prompts": str(tmp_path / "rows.jsonl"),
        "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
        "reward": [{"length": {"max": 4}}],
    }
    assert rlhf("eval", write_eval(tmp_path / "judge.yaml", home, **sections, gold=[judge])) == 0
    found = result(tmp_path / "judge")
    assert found["models"]["base"]["gold/judge/contradicting"]["mean"] > 0
    assert [point["gold"] for point in found["overoptimisation"] if point["n"] == 1] == [pytest.approx(0.5, abs=1e-6)]
    table = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
    assert table.split("  ")[:2] == ["model", "gold judge"] and "contradicting" not in table
    gold = [{"match": {"column": "answer"}}]
    assert rlhf("eval", write_eval(tmp_path / "match.yaml", home, **sections, gold=gold)) == 0
    found = result(tmp_path / "match")
    assert [point["gold"] for point in found["overoptimisation"]] == [None, None]
    assert found["models"]["base"]["gold/match/na"]["mean"] == 1 / 8
    assert any("says nothing of some responses" in note for note in found["about"]["notes"])


def test_an_evaluation_that_asks_a_local_judge_otherwise_is_another(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scores are kept with the responses: in the first words, under the second, they would be somebody else's."""
    words = tmp_path / "words.txt"
    words.write_text("{prompt} {response} good?")
    sections = {
        "models": {"base": str(home / "base")},
        "prompts": str(home / "rows.jsonl"),
        "rollout": {"max_new_tokens": 6},
        "reward": [{"judge": {"path": str(home / "judge"), "prompt": str(words)}}],
    }
    path = write_eval(tmp_path / "eval.yaml", home, **sections)
    assert rlhf("eval", path) == 0
    words.write_text("{prompt} {response} is bad?")
    assert rlhf("eval", path, "--resume") == 2
    assert "reward judge: judge" in capsys.readouterr().err
