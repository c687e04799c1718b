"""`rlhf runs`: what it tells of whole runs, unfinished and damaged ones, in JSON, in a pipe and on terminals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.runs.folder import open_run
from rlhf_cli.stages.runs import table
from tests.stages.tiny_runs import make_home, result, write_eval
from tests.terminal import on_terminal
from tests.tiny import rlhf, split_lines, write_recipe

FIELDS = ["path", "stage", "status", "objective", "metric", "value", "finished", "seconds", "parents"]
UNFINISHED = ("manifest.json", "report.md", "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the runs sft, rm and dpo, one that starts from a checkpoint of dpo, and an evaluation of two."""
    home = tmp_path_factory.mktemp("home")
    with contextlib.chdir(home):
        here = make_home(Path(), "sft", "rm", "dpo")
        recipe = write_recipe(Path("more.yaml"), Path("dpo"), Path("pairs.jsonl"), Path("deep/more"))
        (start,) = Path("dpo/checkpoints").iterdir()
        more = ("--set", f"model.path={start}", "--set", "train.steps=1", "--set", "objective.kind=hinge")
        assert rlhf("dpo", recipe, *more) == 0
        asked = {
            "models": {"sft": "HOME/sft", "dpo": "HOME/dpo/checkpoints/*"},
            "prompts": {"path": "HOME/pairs.jsonl", "limit": 4},
            "reward": [{"model": "HOME/rm"}],
            "rollout": {"max_new_tokens": 4},
            "winrate": {"baseline": "sft", "judge": "reward"},
        }
        assert rlhf("eval", write_eval(Path("ev.yaml"), here, **asked)) == 0
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, which is the working directory."""
    copy = shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(copy)
    return copy


def listed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What --json says, by path."""
    capsys.readouterr()
    assert rlhf("runs", *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(each) for each in found] == [FIELDS] * len(found)
    return {each["path"]: each for each in found}


def test_json_tells_what_the_runs_logged(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole)
    found = listed(".", capsys=capsys)
    names = [Path(path).name for path in found]
    assert names == ["sft", "rm", "dpo", "more", "ev"], "the oldest first"
    own = {Path(path).name: each for path, each in found.items()}
    for name, metric in {"sft": "perplexity", "rm": "accuracy", "dpo": "rewards/accuracies"}.items():
        last = split_lines(whole / name, "eval")[-1]
        assert (own[name]["metric"], own[name]["value"]) == (metric, last[metric])
        assert datetime.fromisoformat(own[name]["finished"]).timestamp() == pytest.approx(last["time"], abs=1)
        assert own[name]["seconds"] == json.loads((whole / name / "manifest.json").read_text())["seconds"]
    assert {each["status"] for each in own.values()} == {"finished"}
    assert [own[name]["stage"] for name in names] == ["sft", "train-rm", "dpo", "dpo", "eval"]
    assert [own[name]["objective"] for name in names] == ["sft", "bradley_terry", "dpo", "hinge", None]
    winner, rate = next(iter(result(whole / "ev")["winrate"].items()))
    assert (own["ev"]["metric"], own["ev"]["value"]) == (f"winrate/{winner}", rate["mean"])
    assert own["more"]["value"] is None, "nothing was held out"
    parents = {name: [Path(path).name for path in own[name]["parents"]] for name in names}
    assert parents == {"sft": [], "rm": [], "dpo": ["sft"], "more": ["dpo"], "ev": ["sft", "dpo", "rm"]}
    assert all(parent in found for each in own.values() for parent in each["parents"])


def test_parents_that_were_moved_are_found_by_their_manifests(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The working directory has them under other names than when they were made, and a new run in the place of one."""
    shutil.move("sft", "first")
    shutil.copytree("rm", "sft")
    assert listed(".", capsys=capsys)["dpo"]["parents"] == ["first"]


def unfinished(run: Path) -> Path:
    for name in UNFINISHED:
        (run / name).unlink(missing_ok=True)
    return run


def test_how_unfinished_runs_stand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sft", "rm", "dpo"):
        unfinished(home / name)
    (home / "rm/.lock").write_text(f"process 7 on {socket.gethostname()}\n")
    (home / "dpo/failed").mkdir()
    refused = home / "dpo/failed/step-00000004.json"
    refused.touch()
    with open_run(home / "sft", resume=True, force=False):
        found = listed(".", capsys=capsys)
    assert {Path(path).name: each["status"] for path, each in found.items()} == {
        "sft": "running",
        "rm": "killed",
        "dpo": "failed",
        "more": "finished",
        "ev": "finished",
    }
    assert (found["sft"]["stage"], found["sft"]["finished"], found["sft"]["seconds"]) == ("sft", None, None)
    assert found["sft"]["value"] == split_lines(home / "sft", "eval")[-1]["perplexity"]
    assert found["dpo"]["objective"] == "dpo"
    refused.rename(refused.with_name("step-00000003.json"))  # it has logged that step since
    (home / "rm/.lock").write_text("process 7 on another-machine\n")
    found = listed(".", capsys=capsys)
    assert [found[path]["status"] for path in ("sft", "rm", "dpo")] == ["stopped", "unknown", "stopped"]
    assert rlhf("runs", ".") == 0
    assert "dpo\tdpo\tstopped, step 3\tdpo\t" in capsys.readouterr().out
    with (home / "rm/.lock").open() as lock:  # as another machine's process does on a shared disk
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert listed(".", capsys=capsys)["rm"]["status"] == "running"


DAMAGES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("manifest.json", b"{", "manifest.json is damaged: not JSON"),
    "a list": ("manifest.json", b"[]", "manifest.json is damaged: an object is expected"),
    "nothing in it": ("manifest.json", b"{}", "what its files say is not what a run writes (KeyError('stage'))"),
    "other kinds of values": (
        "manifest.json",
        b'{"stage": "dpo", "status": "finished", "objective": 3}',
        "not what a run writes",
    ),
    "a number that is none": ("manifest.json", b'{"stage": "dpo", "status": "finished", "seconds": NaN}', "seconds is nan"),
    "a log of something else": ("metrics.jsonl", b'{"split": "eval" oh\n', "not what a run writes"),
    "a year that is none": ("metrics.jsonl", b'{"split": "eval", "time": 1e300}\n', "not what a run writes"),
    "a recipe that is none": ("recipe.yaml", b"data: [", "recipe.yaml is damaged"),
    "bytes that are no text": ("recipe.yaml", b"\xff\xfe", "recipe.yaml is damaged"),
}


@pytest.mark.parametrize(("file", "content", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_shown_as_such(
    home: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, said: str
) -> None:
    (home / "dpo" / file).write_bytes(content)
    assert listed(".", capsys=capsys)["dpo"]["status"] == "damaged"
    assert rlhf("runs", ".") == 0
    shown = capsys.readouterr()
    assert "dpo\t\tdamaged\t" in shown.out
    assert "warning: dpo: " in shown.err and said in shown.err and shown.err.count("\n") == 1


def test_a_pipe_gets_tabs_and_a_tree_branches(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("runs", ".") == 0
    head, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["run", "stage", "status", "objective", "held out", "when", "took", "from"]
    assert {len(row) for row in rows} == {8}
    assert rows[-1][7].endswith(" and 1 more")
    assert rlhf("runs", ".", "--tree") == 0
    drawn = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert drawn == ["sft", "├─ dpo", "│  └─ deep/more", "└─ ev", "rm"]


def test_runs_that_come_from_each_other_are_all_drawn(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("sft", "dpo"), ("dpo", "sft")):
        unfinished(home / name)
        recipe = (home / name / "recipe.yaml").read_text()
        (home / name / "recipe.yaml").write_text(recipe.replace("model:\n  path: ", f"model:\n  path: {start}\n  was: ", 1))
    assert rlhf("runs", ".", "--tree") == 0
    drawn = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(line.strip("├─└│ ") for line in drawn) == ["deep/more", "dpo", "ev", "rm", "sft"]


def test_what_is_no_run_is_not_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe alone, a model, a checkpoint; a run by a link is listed once, and where links lead in a circle there is an end."""
    Path("recipe.yaml").write_text("model: {path: base}\n")
    Path("dpo").rename("elsewhere")
    Path("linked").mkdir()
    Path("linked/dpo").symlink_to("../elsewhere")
    Path("linked/round").symlink_to("..")
    assert sorted(listed(".", capsys=capsys)) == ["deep/more", "elsewhere", "ev", "rm", "sft"]
    assert list(listed("linked/dpo", capsys=capsys)) == ["linked/dpo"]
    assert list(listed("base", capsys=capsys)) == []
    assert rlhf("runs", "base") == 0
    assert capsys.readouterr().out == "no runs below base\n"


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert rlhf("runs") == 2
    assert capsys.readouterr().err == "error: there is no folder runs. name the one with your runs\n"
    (tmp_path / "runs").mkdir()
    assert rlhf("runs", "rnus") == 2
    assert capsys.readouterr().err == "error: there is no folder rnus. did you mean runs?\n"
    assert rlhf("runs", "--json", "--tree") == 2
    assert "give one of the two" in capsys.readouterr().err


ROW = {
    "run": "runs/one-with-a-long-name",
    "stage": "dpo",
    "status": "finished",
    "objective": "hinge",
    "held out": "rewards/accuracies 0.75",
    "when": "2026-01-02 03:04",
    "took": "1 h 2 min",
    "from": "runs/sft",
}


def test_columns_give_way_one_by_one() -> None:
    """25 + 5 + 8 + 9 + 23 + 16 + 9 + 8 characters and 2 between each two: 117."""
    heads = {width: table([ROW], width)[0].split("  ") for width in (117, 116, 106, 95, 84, 66, 58, 50, 30)}
    shown = {width: [name.strip() for name in head if name.strip()] for width, head in heads.items()}
    everything = list(ROW)
    assert shown[117] == everything
    assert shown[116] == everything[:-1]
    assert shown[106] == everything[:-2]
    assert shown[95] == ["run", "stage", "status", "held out", "when"]
    assert shown[84] == ["run", "stage", "status", "held out"]
    assert shown[66] == shown[58] == ["run", "status", "held out"]
    assert shown[50] == shown[30] == ["run", "status"]
    assert [len(line) <= width for width in heads for line in table([ROW], width)] == [True, True] * len(heads)
    assert table([ROW], 58)[1] == "…s/one-with-a-long-name  finished  rewards/accuracies 0.75"
    assert table([ROW], 30)[1] == "…ne-with-a-long-name  finished"


def test_a_long_status_leaves_room_for_the_rest() -> None:
    stopped = ROW | {"status": "stopped: gold/wave 0.2 has lost more than 20% of its best, 0.5"}
    assert "  stopped: gold/wave 0.2 …  rewards/accuracies 0.75" in table([stopped], 86)[1]
    assert table([stopped], None)[1].split("\t")[2] == stopped["status"]


def test_a_terminal_of_eighty_columns(whole: Path) -> None:
    shown, code = on_terminal("runs", "--tree", ".", folder=whole)
    assert code == 0
    rows = shown.splitlines()
    assert rows[0].split() == ["run", "stage", "status", "held", "out"]
    assert max(map(len, rows)) <= 80 and "\x1b" not in shown
    assert rows[2].startswith("├─ dpo           dpo       finished  rewards/accuracies ")
