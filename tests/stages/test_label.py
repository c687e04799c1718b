"""`rlhf label`: in a pipe, in a terminal and on its page; from rows, samples and models; what comes out is trained on."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stages.tiny_runs import make_home
from tests.terminal import ROOT, terminal
from tests.tiny import rlhf, write_pairs, write_recipe


def recipe(folder: Path, **keys: Any) -> Path:
    path = folder / "label.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "labels"), **keys}, sort_keys=False))
    return path


def people(**keys: Any) -> dict[str, Any]:
    return {"people": keys}


def typed(monkeypatch: pytest.MonkeyPatch, keys: str, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(keys))
    return rlhf("label", *arguments, "--terminal")


def lines(folder: Path, name: str = "verdicts.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "labels" / name).read_text().splitlines()]


class TestFromRows:
    def test_preferences_are_learned_from(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Two annotators with an overlap; then the data room reads the file, and dpo, train-rm and kto take a step on it."""
        home = make_home(tmp_path / "home")
        own = recipe(
            tmp_path,
            rows=str(write_pairs(tmp_path / "pairs.jsonl", 12)),
            judge=people(annotators=["ann", "bo"], overlap=0.5, gold=str(write_pairs(tmp_path / "gold.jsonl", 2, seed=9))),
        )
        assert typed(monkeypatch, "nobody\nann\naabtx rwhy\n saab ab z bo\nabbaa bbabb b", own) == 0
        made = tmp_path / "labels"
        said = lines(tmp_path)
        assert len(said) == 2 * (6 + 3 + 2)
        assert [line["reason"] for line in said].count("why") == 1
        rows = lines(tmp_path, "preferences.jsonl")
        judged = {line["row"] for line in said if not line["gold"] and line["verdict"] != "skip"}
        assert len(rows) == len(judged)
        assert {row["annotator"] for row in rows} == {"ann", "bo", "ann, bo"}
        assert {row["probability"] for row in rows} <= {0.5, 0.75, 1.0}
        figures = json.loads((made / "label.json").read_text())
        assert figures["agreement"]["krippendorff"].keys() == {"value", "low", "high"}
        assert json.loads((made / "manifest.json").read_text())["stage"] == "label"
        assert "Krippendorff" in (made / "report.md").read_text() and (made / "report.html").exists()
        for stage in ("dpo", "train-rm", "kto"):
            path = write_recipe(
                tmp_path / f"{stage}.yaml", home / "base", made / "preferences.jsonl", tmp_path / stage, train={"steps": 1}
            )
            assert rlhf(stage, path) == 0
            data = json.loads((tmp_path / stage / "data.json").read_text())["train"]
            assert (data["read"], data["dropped"]) == (len(rows), {})

    def test_rankings_are_learned_from(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        home = make_home(tmp_path / "home")
        sizes = [4, 2, 4, 2]
        rows = tmp_path / "ranked.jsonl"
        made = [{"prompt": f"sea {k}", "responses": [f"sun {k} {own}" for own in range(size)]} for k, size in enumerate(sizes)]
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in made))
        own = recipe(tmp_path, rows=str(rows), judge=people(ranking="all"))
        assert rlhf("label", own, "--check") == 0
        assert not (tmp_path / "labels").exists()
        monkeypatch.setattr("sys.stdin", Presses())
        assert rlhf("label", own, "--terminal") == 0
        found = lines(tmp_path, "preferences.jsonl")
        assert [len(row["responses"]) for row in found] == sizes
        ranks = [line["verdict"] for line in lines(tmp_path) if isinstance(line["verdict"], list)]
        assert sorted(ranks) == [[2, 1, 1, 3]] * 2
        path = write_recipe(tmp_path / "rm.yaml", home / "base", tmp_path / "labels/preferences.jsonl", tmp_path / "rm")
        assert rlhf("train-rm", path, "train.steps=1", "objective.kind=pairs") == 0

    def test_all_that_a_row_says_is_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Its functions, options of the template, subset, conversation, reasoning."""
        turns = [{"role": "system", "content": "be old"}, {"role": "user", "content": "sea?"}]
        tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
        thought = {"role": "assistant", "content": "sun", "reasoning_content": "hm"}
        row = {"prompt": turns, "responses": [[thought], "moon"], "subset": "s"}
        row |= {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert typed(monkeypatch, "a", recipe(tmp_path, rows=str(tmp_path / "rows.jsonl"))) == 0
        (line,), (found,) = lines(tmp_path), lines(tmp_path, "preferences.jsonl")
        assert sorted(line["order"]) == [0, 1]
        assert {name: found[name] for name in ("prompt", "subset", "chat_template_kwargs")} == {
            name: row[name] for name in ("prompt", "subset", "chat_template_kwargs")
        }
        assert found["tools"][0]["function"]["name"] == "look"
        (turn,) = next(found[side] for side in ("chosen", "rejected") if found[side] != "moon")
        assert turn | thought == turn


class Presses:
    """A pipe in which a tie of 2 and 3 stands first, then 1, then the rest; of two responses b."""

    def __init__(self) -> None:
        self.keys = iter("")

    def isatty(self) -> bool:
        return False

    def read(self, _: int) -> str:
        found = next(self.keys, "")
        if not found:
            self.keys = iter("2=314b")
            found = next(self.keys)
        return found


class TestEnds:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        return recipe(tmp_path, rows=str(write_pairs(tmp_path / "pairs.jsonl", 6)))

    def test_an_end_before_the_end(
        self, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert typed(monkeypatch, "aa", own) == 0
        assert "4 questions left: continue with --resume" in capsys.readouterr().out
        assert not (tmp_path / "labels/manifest.json").exists()
        assert len(lines(tmp_path, "preferences.jsonl")) == 2
        assert typed(monkeypatch, "bbbb", own) == 2  # neither --resume nor --force
        assert typed(monkeypatch, "ubbbbubbz", own, "--resume") == 0
        said = ["undo" if line["undo"] else line["verdict"] for line in lines(tmp_path)]
        assert said == ["a", "a", "undo", "b", "b", "b", "b", "undo", "b", "b"]
        assert len(lines(tmp_path, "preferences.jsonl")) == 6
        assert (tmp_path / "labels/manifest.json").exists()

    def test_other_rows_are_not_gone_on_with(
        self, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert typed(monkeypatch, "aa", own) == 0
        write_pairs(tmp_path / "pairs.jsonl", 6, seed=2)
        assert typed(monkeypatch, "aa", own, "--resume") == 2
        assert "what the run was started with has changed" in capsys.readouterr().err

    def test_in_a_terminal_until_ctrl_c(self, own: Path, tmp_path: Path) -> None:
        with terminal("label", own, "--terminal", folder=tmp_path) as shell:
            shell.read_until("question 1 of 6 · me")
            shell.type("a\x1b[Ab")
            shell.read_until("question 3 of 6")
            shell.type("r")
            shell.read_until("reason, then Enter: ")
            shell.type("it is kind\nt")
            shown = shell.read_until("question 4 of 6")
            assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines())) <= 80
            shell.read_until("q stop")
            shell.type("\x03")
            assert shell.end() == 128 + signal.SIGINT
            assert "stopped by SIGINT while people judged; what they said is kept" in " ".join(shell.shown.split())
        assert [(line["verdict"], line["reason"]) for line in lines(tmp_path)] == [("a", ""), ("b", ""), ("tie", "it is kind")]
        assert len(lines(tmp_path, "preferences.jsonl")) == 3

    def test_on_its_page_until_sigterm_and_again(self, own: Path, tmp_path: Path) -> None:
        """The process itself: a verdict by HTTP, a signal, another port with --resume, all the rest, the end."""
        for start, (count, code) in enumerate([(2, 143), (4, 0)]):
            command = [sys.executable, "-m", "rlhf_cli", "label", str(own), *(["--resume"] if start else [])]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            assert process.stdout is not None
            link = next(found[0] for line in process.stdout if (found := re.search(r"http://127.0.0.1:\S+", line)))
            for _ in range(count):
                with urllib.request.urlopen(f"{link}/state") as answer:
                    question = json.load(answer)["question"]["id"]
                self.post(f"{link}/verdict", {"question": question, "verdict": "b"})
            if code:
                process.terminate()
            else:
                self.post(f"{link}/finish", {})
            process.stdout.read()
            assert process.wait(60) == code
        assert [line["verdict"] for line in lines(tmp_path)] == ["b"] * 6
        assert (tmp_path / "labels/manifest.json").exists()

    def post(self, url: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200


class TestOfModels:
    def test_drawn_and_from_the_samples_of_an_evaluation(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        home = make_home(tmp_path / "home")
        drawn = recipe(
            tmp_path,
            models={"one": str(home / "base"), "other": str(home / "base")},
            prompts=str(home / "rows.jsonl"),
            rollout={"max_new_tokens": 6, "responses_per_prompt": 2, "temperature": 2},
            dtype="float32",
        )
        assert typed(monkeypatch, "aaa", drawn) == 0
        samples = lines(tmp_path, "samples.jsonl")
        assert len(samples) == 24 * 4
        assert typed(monkeypatch, "b", drawn, "--resume") == 0
        assert "the responses of one, other are there already" in capsys.readouterr().out
        rows = lines(tmp_path, "preferences.jsonl")
        assert [set(row["models"]) <= {"one", "other"} for row in rows] == [True] * 4
        usable = [line for line in samples if line["ended"] and line["response"].strip()]
        assert all(any(line["response"] == row["chosen"] for line in usable) for row in rows)
        (tmp_path / "again").mkdir()
        again = recipe(tmp_path / "again", samples=str(tmp_path / "labels/samples.jsonl"))
        assert typed(monkeypatch, "aaab", again) == 0
        assert lines(tmp_path / "again", "preferences.jsonl") == rows


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "rows: expected one of rows, models and samples, found none. give one"),
        ({"rows": "r.jsonl", "samples": "s.jsonl"}, "samples: expected one of rows, models and samples, found rows and samples"),
        ({"rows": "r.jsonl", "prompts": "p.jsonl"}, "prompts: has no effect without models, which it is for"),
        ({"rows": "r.jsonl", "max_length": 5}, "max_length: has no effect without models"),
        (
            {"models": {"a": "x"}, "prompts": "p.jsonl"},
            "rollout.responses_per_prompt: one response to a prompt cannot be compared",
        ),
        ({"models": {"a": "x", "b": "y"}}, "prompts: there is nothing that the models could respond to"),
        ({"rows": "r.jsonl", "judge": people(annotators=["a", "a"])}, "judge.people.annotators: a name is there twice"),
        ({"rows": "r.jsonl", "judge": people(annotators=["a b"])}, "judge.people.annotators: 'a b' is no name"),
        ({"rows": "r.jsonl", "judge": people(annotators=[])}, "judge.people.annotators: there is nobody"),
        (
            {"rows": "r.jsonl", "judge": people(overlap=0.5)},
            "judge.people.overlap: has no effect where one annotator sees every row",
        ),
        ({"samples": "s.jsonl"}, "s.jsonl: no such file. name the samples.jsonl of an evaluation"),
    ],
    ids=str,
)
def test_refused(keys: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("label", recipe(tmp_path, **keys)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()
