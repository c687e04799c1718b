"""Evaluations that fail or are stopped: the message, what is kept, and that the rest gives what an unbroken one gives."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_cli.models import placement
from rlhf_cli.rollout.generate import TransformersEngine
from tests.ranks import launch, wait_for
from tests.stages.tiny_runs import LETTERS, MODEL, PROMPTS, lines, make_home, note_draws, result, signal_while_drawing, write_eval
from tests.tiny import forget_functions, rlhf, write_recipe

MODELS = {"sft": "HOME/sft", "dpo": "HOME/dpo", "bare": "HOME/base"}
SECTIONS: dict[str, Any] = {
    "models": MODELS,
    "reference": "sft",
    "prompts": PROMPTS,
    "preferences": PROMPTS,
    "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
    "reward": [MODEL],
    "gold": [LETTERS],
    "winrate": {"baseline": "sft", "judge": "gold"},
}

FUNCTIONS = """import os, signal, time
from math import nan, sin
from pathlib import Path

def calls():
    counter = Path(__file__).with_suffix(".calls")
    counter.write_text(counter.read_text() + "." if counter.exists() else ".")
    return len(counter.read_text())

def wave(prompts, responses):
    return [sin(3 * len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]

def raises(prompts, responses):
    if calls() == 2:
        raise KeyError("politeness")
    return wave(prompts, responses)

def short(prompts, responses):
    return wave(prompts, responses)[:-1] if calls() == 2 else wave(prompts, responses)

def text(prompts, responses):
    return "fine" if calls() == 2 else wave(prompts, responses)

def spoils(prompts, responses):
    return [*wave(prompts, responses)[:-1], nan] if calls() == 2 else wave(prompts, responses)

def waits(prompts, responses):
    if calls() == 2:
        Path(__file__).with_suffix(".waits").touch()
        time.sleep(60)
    return wave(prompts, responses)
"""
"""Each but `wave` goes wrong the second time that it is called, which is for the second model."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("faults"), "sft", "rm", "dpo")


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation; its recipe lies beside it."""
    path = write_eval(tmp_path_factory.mktemp("unbroken") / "ev.yaml", home, **SECTIONS)
    assert rlhf("eval", path) == 0
    return path.with_suffix("")


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Callable[[], tuple[Path, Path]]:
    """(recipe, folder) of a copy of `whole` without its end: stopped before the report."""

    def copy() -> tuple[Path, Path]:
        folder, path = tmp_path / "ev", tmp_path / "ev.yaml"
        shutil.copytree(whole, folder)
        path.write_text(whole.with_suffix(".yaml").read_text().replace(str(whole), str(folder)))
        for name in ("manifest.json", "eval.json", "report.md", "report.html"):
            (folder / name).unlink()
        return path, folder

    return copy


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return note_draws(monkeypatch)


def models_in(folder: Path) -> dict[str, int]:
    """Model → its lines."""
    found: dict[str, int] = {}
    for line in lines(folder / "samples.jsonl"):
        found[line["model"]] = found.get(line["model"], 0) + 1
    return found


def refused(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of an evaluation that is refused before anything is written."""
    capsys.readouterr()
    assert rlhf("eval", path, *words) == 2
    assert not path.with_suffix("").exists()
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and len(message.splitlines()) <= 3
    return message


def changed(**sections: Any) -> dict[str, Any]:
    """SECTIONS with some of them replaced, or, if None, left out."""
    return {name: value for name, value in {**SECTIONS, **sections}.items() if value is not None}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"models": MODELS | {"dpo": "HOME/dpp"}}, r"models\.dpo: there is no folder HOME/dpp\. did you mean HOME/dpo\?"),
    "no match": (
        {"models": MODELS | {"dpo": "HOME/dpo/chekpoints/*"}},
        r"models\.dpo: no folder matches HOME/dpo/chekpoints/\*",
    ),
    "two of one name": (
        {"models": MODELS | {"all": "HOME/[sd][fp][to]/model"}},
        r"models\.all: several folders .* are called model",
    ),
    "reference scores": ({"models": MODELS | {"rm": "HOME/rm"}, "reference": "rm"}, "reference: rm is a reward model"),
    "baseline scores": (
        {"models": MODELS | {"rm": "HOME/rm"}, "winrate": {"baseline": "rm", "judge": "gold"}},
        r"winrate\.baseline: rm is a reward model",
    ),
    "only scores": (
        {"models": {"rm": "HOME/rm"}, "reference": None, "winrate": None},
        "prompts: all models are reward models",
    ),
    "nothing to score": ({"models": MODELS | {"rm": "HOME/rm"}, "preferences": None}, "rm is a reward model: name preferences"),
    "judge": (
        {"winrate": {"baseline": "sft", "judge": "leters"}},
        r"winrate\.judge: no term is named leters\. did you mean letters\?",
    ),
    "baseline": (
        {"winrate": {"baseline": "sfd", "judge": "gold"}},
        r"winrate\.baseline: no model is named sfd\. did you mean sft\?",
    ),
    "reference": ({"reference": "dqo"}, r"reference: no model is named dqo\. did you mean dpo\?"),
    "reference is many": (
        {"models": MODELS | {"many": "HOME/*"}, "reference": "many"},
        r"reference: many is several models",
    ),
    "nothing": (
        {"prompts": None, "preferences": None, "rollout": None, "winrate": None, "reward": None, "gold": None},
        "nothing to evaluate on",
    ),
    "rows without preferences": (
        {"preferences": "HOME/rows.jsonl"},
        r"preferences\.0\.path: .* can use; preferences needs prompt \+ chosen \+ rejected \|",
    ),
    "function": (
        {"gold": [{"function": "HOME/functions.py:leters"}], "winrate": None},
        r"has no function leters\. did you mean letters\?",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_recipe_that_is_refused(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections, message = FAULTS[name]
    path = write_eval(tmp_path / "ev.yaml", home, **changed(**sections))
    found = refused(path, capsys)
    assert re.search(message.replace("HOME", str(home)), found), found
    assert f"{path}" in found


@pytest.mark.parametrize("content", ["", '{"prompt": "only one"}\n'])
def test_too_few_prompts(content: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    path = write_eval(tmp_path / "ev.yaml", home, **changed(prompts=str(tmp_path / "prompts.jsonl")))
    message = refused(path, capsys)
    assert "prompts" in message and ("fewer than 2 rows" in message if content else "prompts.jsonl" in message)


def test_an_unfinished_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "dpo", tmp_path / "dpo")
    (tmp_path / "dpo" / "manifest.json").unlink()
    path = write_eval(tmp_path / "ev.yaml", home, **changed(models=MODELS | {"dpo": str(tmp_path / "dpo")}))
    message = refused(path, capsys)
    assert "models.dpo: " in message and str(tmp_path / "dpo") in message and "finish" in message


def test_check_loads_nothing_and_writes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loading(*others: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(placement, "load_model", loading)
    path = write_eval(tmp_path / "ev.yaml", home, **SECTIONS)
    assert rlhf("eval", path, "--check") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["ev.yaml"]
    out = capsys.readouterr().out
    assert re.search(rf"\n  dpo +{home}/dpo\n", out) and re.search(r"\n  prompts +13 rows\n", out)
    assert re.search(r"\n  responses +2 to each prompt, of up to 6 tokens, at temperature 1\n", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        (
            "raises",
            2,
            r"raises failed on 26 responses\nerror: FILE:\d+: KeyError: 'politeness'\nerror: the first: \S+pairs.jsonl:\d+:",
        ),
        ("short", 2, r"short returned 25 numbers for 26 responses\nerror: the first: "),
        ("text", 2, r"text returned 'fine' \(str\), expected a list of numbers"),
        ("spoils", 3, r"spoils gave a response the score nan\nerror: \S+pairs.jsonl:\d+: prompt '"),
    ],
)
def test_a_function_goes_wrong_at_the_second_model(
    function: str,
    code: int,
    message: str,
    home: Path,
    tmp_path: Path,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was drawn is kept, the file is mended, and nothing is drawn twice."""
    file = tmp_path / "own.py"
    file.write_text(FUNCTIONS)
    path = write_eval(tmp_path / "ev.yaml", home, **changed(gold=[{"function": f"{file}:{function}"}]))
    folder = path.with_suffix("")
    assert rlhf("eval", path) == code
    found = capsys.readouterr().err
    assert re.search(rf"error: .*{path}:\d+: gold\.0\.function: {file}:" + message.replace("FILE", str(file)), found), found
    assert drawn == [26, 26] and models_in(folder) == {"sft": 26, "dpo": 26}
    assert not (folder / "eval.json").exists() and not (folder / "manifest.json").exists()
    file.write_text(FUNCTIONS.replace("calls() == 2", "False"))
    forget_functions()
    assert rlhf("eval", path, "--resume") == 0
    assert drawn == [26, 26, 26] and "the responses of sft, dpo are there already" in capsys.readouterr().out
    assert rlhf("eval", path, "--output", tmp_path / "whole") == 0
    assert result(folder) == result(tmp_path / "whole")
    assert (folder / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_other_prompts_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has the same name and other rows."""
    shutil.copy(home / "pairs.jsonl", tmp_path / "rows.jsonl")
    path = write_eval(
        tmp_path / "own.yaml", home, **changed(prompts=str(tmp_path / "rows.jsonl"), models={"sft": "HOME/sft"}, winrate=None)
    )
    assert rlhf("eval", path) == 0
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "chosen": "a", "rejected": "b"}\n')
    assert rlhf("eval", path, "--resume") == 2
    message = capsys.readouterr().err
    assert "what the run was started with has changed" in message and f"  {tmp_path / 'rows.jsonl'}: " in message


def test_pairs_may_be_asked_for_afterwards(broken: Callable[[], tuple[Path, Path]], tmp_path: Path, drawn: list[int]) -> None:
    path, folder = broken()
    assert rlhf("eval", path, "--resume") == 0
    assert rlhf("eval", path, "--resume", "--dump-pairs", tmp_path / "ranked.jsonl") == 0
    assert drawn == [] and len(lines(tmp_path / "ranked.jsonl")) > 3 and (folder / "manifest.json").exists()


@pytest.mark.parametrize("rows", ["prompts", "preferences", "text"])
def test_damaged_weights(rows: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No figure is made of them."""
    shutil.copytree(home / "base", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    save_file(state | {"lm_head.weight": state["lm_head.weight"] * float("nan")}, weights, {"format": "pt"})
    models = {"sft": "HOME/sft", "own": str(tmp_path / "model")}
    sections = {"models": models} | ({"text": "HOME/rows.jsonl"} if rows == "text" else {rows: PROMPTS, "reference": "sft"})
    path = write_eval(tmp_path / "ev.yaml", home, **sections | ({"max_length": 200} if rows == "prompts" else {}))
    assert rlhf("eval", path) == 3
    assert "its weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "ev" / "eval.json").exists()


def test_a_perplexity_beyond_all_numbers(home: Path, tmp_path: Path) -> None:
    """It stands as e^700, as while training."""
    shutil.copytree(home / "base", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    save_file(state | {"lm_head.weight": state["lm_head.weight"] * 1e5}, weights, {"format": "pt"})
    path = write_eval(
        tmp_path / "ev.yaml", home, models={"sft": "HOME/sft", "own": str(tmp_path / "model")}, text="HOME/rows.jsonl"
    )
    assert rlhf("eval", path) == 0
    own = result(tmp_path / "ev")["models"]["own"]["perplexity"]
    assert own == pytest.approx(dict.fromkeys(("mean", "low", "high"), 1.0142320547350045e304))


def test_a_finished_evaluation_says_so(whole: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert rlhf("eval", whole.with_suffix(".yaml"), "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{whole} is finished: {whole / 'report.html'}"
    assert rlhf("eval", whole.with_suffix(".yaml")) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert drawn == [] and {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_changed_recipe_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    words = ("--resume", "--set", "rollout.temperature=0.5", "--set", "seed=3")
    assert rlhf("eval", whole.with_suffix(".yaml"), *words) == 2
    assert [line.split() for line in capsys.readouterr().err.splitlines()[-3:]] == [
        ["key", "old", "new"],
        ["rollout.temperature", "1.0", "0.5"],
        ["seed", "0", "3"],
    ]
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_what_was_drawn_is_not_drawn_again(broken: Callable[[], tuple[Path, Path]], whole: Path, drawn: list[int]) -> None:
    path, folder = broken()
    assert rlhf("eval", path, "--resume") == 0
    assert drawn == [] and result(folder) == result(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("cut", "again"),
    [(-1, 1), (-40, 1), (0.5, 2), (0.2, 3), (3, 3)],
    ids=["last newline", "last line", "second model", "first model", "first bytes"],
)
def test_a_torn_file_of_samples(
    cut: float, again: int, broken: Callable[[], tuple[Path, Path]], whole: Path, drawn: list[int]
) -> None:
    """A kill in the middle of a write: whole models are kept, and the others drawn anew."""
    path, folder = broken()
    content = (folder / "samples.jsonl").read_bytes()
    end = int(cut * len(content)) if isinstance(cut, float) else int(cut)
    (folder / "samples.jsonl").write_bytes(content[:end])
    assert rlhf("eval", path, "--resume") == 0
    assert drawn == [26] * again
    assert result(folder) == result(whole) and models_in(folder) == models_in(whole)


def test_a_model_that_is_added_is_drawn_alone(
    broken: Callable[[], tuple[Path, Path]], whole: Path, home: Path, drawn: list[int], tmp_path: Path
) -> None:
    """Also to a finished evaluation; and one that is taken away is gone."""
    _, folder = broken()
    shutil.copy(whole / "manifest.json", folder)
    more = changed(models=MODELS | {"late": "HOME/dpo"})
    assert rlhf("eval", write_eval(folder.with_suffix(".yaml"), home, **more), "--resume") == 0
    assert drawn == [26] and models_in(folder) == {"sft": 26, "dpo": 26, "bare": 26, "late": 26}
    found = result(folder)
    assert found["models"]["late"] == found["models"]["dpo"] and found["winrate"]["late"] == found["winrate"]["dpo"]
    drawn.clear()
    fewer = changed(models={"sft": "HOME/sft", "late": "HOME/dpo"})
    assert rlhf("eval", write_eval(folder.with_suffix(".yaml"), home, **fewer), "--resume") == 0
    assert drawn == [] and models_in(folder) == {"sft": 26, "late": 26} and list(result(folder)["models"]) == ["sft", "late"]


def test_a_finished_evaluation_that_goes_on_is_not_finished(
    broken: Callable[[], tuple[Path, Path]], whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is gone until it is finished again."""
    _, folder = broken()
    shutil.copy(whole / "manifest.json", folder)

    def dying(*others: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    more = changed(models=MODELS | {"late": "HOME/dpo"})
    assert rlhf("eval", write_eval(folder.with_suffix(".yaml"), home, **more), "--resume") == 130
    assert not (folder / "manifest.json").exists() and models_in(folder) == models_in(whole)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_other_weights_under_the_same_name_are_refused(
    kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "adapter":
        shutil.copytree(home / "dpo" / "model", tmp_path / "model")
    else:
        shutil.copytree(home / "base", tmp_path / "model")
    path = write_eval(tmp_path / "ev.yaml", home, **changed(models={"sft": "HOME/sft", "own": str(tmp_path / "model")}))
    assert rlhf("eval", path) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "ev").rglob("*") if file.is_file()}
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert rlhf("eval", path, "--resume") == 2
    message = capsys.readouterr().err
    assert "what the run was started with has changed" in message and "model own: " in message
    assert {file: file.read_bytes() for file in (tmp_path / "ev").rglob("*") if file.is_file()} == before


def test_a_signal_between_two_tokens(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the second model draws: the first one's lines are there, and nothing of the second's."""
    path = write_eval(tmp_path / "ev.yaml", home, **SECTIONS)
    with monkeypatch.context() as patch:
        signal_while_drawing(patch, signal.SIGTERM, 2)
        assert rlhf("eval", path) == 143
    folder = tmp_path / "ev"
    assert "while dpo was evaluated" in capsys.readouterr().err.splitlines()[-1]
    assert models_in(folder) == {"sft": 26} and not (folder / ".lock").exists()
    assert rlhf("eval", path, "--resume") == 0
    assert result(folder) == result(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_a_process(number: int, code: int, home: Path, tmp_path: Path) -> None:
    """While a function judges the second model."""
    file = tmp_path / "own.py"
    file.write_text(FUNCTIONS)
    path = write_eval(tmp_path / "ev.yaml", home, **changed(gold=[{"function": f"{file}:waits"}]))
    stopped = launch("eval", path)
    wait_for(file.with_suffix(".waits"), stopped)
    stopped.send_signal(number)
    found, errors = stopped.wait()
    assert found == code, errors
    assert code == -9 or errors.splitlines()[-1].endswith("continue with --resume")
    assert models_in(tmp_path / "ev") == {"sft": 26, "dpo": 26}
    assert rlhf("eval", path, "--resume") == 0
    assert rlhf("eval", path, "--output", tmp_path / "whole") == 0
    assert result(tmp_path / "ev") == result(tmp_path / "whole")


class Endpoint(ThreadingHTTPServer):
    """A judge for whom the longer response is better; it answers so many questions, and then says that it is broken."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers = 10**9
        self.asked = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own, other = (
            re.findall(rf"<response_{which}>\n(.*)\n</response_{which}>", body["messages"][0]["content"], re.DOTALL)[0]
            for which in "ab"
        )
        with self.server.lock:
            self.server.asked += 1
            works = self.server.asked <= self.server.answers
        text = "TIE" if len(own) == len(other) else "A" if len(own) > len(other) else "B"
        answer = {"choices": [{"message": {"content": text}}]} if works else {"error": {"message": "the judge is asleep"}}
        content = json.dumps(answer).encode()
        self.send_response(200 if works else 400)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judged_by(endpoint: Endpoint) -> dict[str, Any]:
    judge = {"endpoint": f"http://127.0.0.1:{endpoint.server_port}/v1", "model": "length", "parallel": 1, "retries": 0}
    return {"baseline": "sft", "judge": judge}


def test_a_judge_that_goes_down(
    endpoint: Endpoint, home: Path, tmp_path: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its verdicts are kept, and only the others asked for."""
    path = write_eval(tmp_path / "ev.yaml", home, **changed(winrate=judged_by(endpoint)))
    folder = tmp_path / "ev"
    endpoint.answers = 7
    assert rlhf("eval", path) == 4
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("error: winrate.judge: http://127.0.0.1:") and first.endswith("HTTP 400: the judge is asleep")
    total = int(re.search(r"7 of (\d+) verdicts are kept: mend the cause, then continue with --resume", second)[1])  # type: ignore[index]
    assert len(lines(folder / "verdicts.jsonl")) == 7 and drawn == [26, 26, 26] and not (folder / "eval.json").exists()
    endpoint.answers, endpoint.asked = 10**9, 0
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "torn')
    assert rlhf("eval", path, "--resume") == 0
    assert endpoint.asked == total - 7 and len(drawn) == 3 and len(lines(folder / "verdicts.jsonl")) == total
    endpoint.asked = 0
    assert rlhf("eval", path, "--output", tmp_path / "whole") == 0
    assert endpoint.asked == total and result(folder) == result(tmp_path / "whole")


def test_an_endpoint_as_judge(endpoint: Endpoint, home: Path, tmp_path: Path) -> None:
    """What it says is what `letters` says; its wins are pairs that dpo reads."""
    pairs = tmp_path / "pairs.jsonl"
    path = write_eval(tmp_path / "ev.yaml", home, **changed(winrate=judged_by(endpoint)))
    assert rlhf("eval", path, "--dump-pairs", pairs) == 0
    samples = {(line["model"], line["row"], line["number"]): line for line in lines(tmp_path / "ev" / "samples.jsonl")}
    found, expected = result(tmp_path / "ev"), []
    address = f"http://127.0.0.1:{endpoint.server_port}/v1"
    assert found["about"]["judge"] == {"endpoint": address, "model": "length", "path": None}
    assert found["about"]["notes"][-1].startswith("The judge contradicted itself in 0 of ")
    for name in ("dpo", "bare"):
        outcomes = []
        for (_, row, number), mine in [item for item in samples.items() if item[0][0] == name]:
            other = samples["sft", row, number]
            gain = len(mine["response"]) - len(other["response"])
            outcomes.append((gain > 0) + (gain == 0) / 2)
            better, worse = (mine, other) if gain > 0 else (other, mine)
            usable = all(s["ended"] and s["response"].strip() and "\0" not in s["response"] for s in (mine, other))
            if gain and usable:
                own = {"prompt": better["prompt"], "chosen": better["response"], "rejected": worse["response"]}
                expected.append(own | {"models": [better["model"], worse["model"]]})
        assert found["winrate"][name]["mean"] == pytest.approx(sum(outcomes) / 26)
    assert lines(pairs) == expected and len(expected) > 3
    assert set(found["ratings"]) == {"sft", "dpo", "bare"}
    checked = write_recipe(tmp_path / "dpo.yaml", home / "sft", pairs, tmp_path / "run", data={"max_length": 96})
    assert rlhf("dpo", checked, "--check", "--set", "data.max_lost=0") == 0
