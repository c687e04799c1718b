"""Held-out rows stay held out: over seeds, stages and supervised rows beside a reward; what breaks that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.runs.ancestry import Split, ancestors
from tests.tiny import make_model, rlhf, write_pairs, write_recipe, write_rows

QUICK: dict[str, Any] = {"train": {"steps": 1, "save_every": None}, "lora": {"r": 2}}
HELD = {"data": {"holdout": 0.3}}
PPO = {"reward": [{"function": "f.py:worth"}], "rollout": {"max_new_tokens": 4}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft with a hold-out, and dpo on it with the same."""
    folder = tmp_path_factory.mktemp("splits")
    make_model(folder / "base")
    write_pairs(folder / "pairs.jsonl", 30)
    write_rows(folder / "rows.jsonl", 30)
    shutil.copy(folder / "pairs.jsonl", folder / "same-pairs.jsonl")
    (folder / "f.py").write_text("def worth(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    for stage, start, more in (("sft", "base", HELD), ("dpo", "sft", HELD | {"seed": 7})):
        path = write_recipe(folder / "r.yaml", folder / start, folder / "pairs.jsonl", folder / stage, **QUICK, **more)
        assert rlhf(stage, path) == 0
    return folder


@pytest.fixture(autouse=True)
def in_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "learning_rate" not in line]


def check(stage: str, start: str, rows: str, **sections: Any) -> None:
    path = write_recipe(Path("check.yaml"), Path(start), Path(rows), Path("check"), **{**QUICK, **sections})
    assert rlhf(stage, path, "--check") == 0


def test_another_seed_holds_out_the_same_prompts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [json.loads((home / run / "data.json").read_text())["train"]["held_out"] for run in ("sft", "dpo")]
    assert counts[0] == counts[1] > 3
    check("dpo", "sft", "pairs.jsonl", seed=3, **HELD)
    assert warnings(capsys) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"holdout": 0.3, "holdout_seed": 5}, "0.3 of the prompts by holdout_seed 5"),
        ({"holdout": 0.1}, "0.1 of the prompts by holdout_seed 0"),
        ({}, "nothing"),
    ],
)
def test_another_hold_out_than_the_parents_is_said(data: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the content of the file, whatever its name, and of every run before."""
    check("dpo", "dpo", "same-pairs.jsonl", data=data)
    words = f"this run holds out {said}: rows that one of them keeps the other learns from. give both the same"
    assert warnings(capsys) == [
        f"warning: data.holdout: {run} held out 0.3 of the prompts by holdout_seed 0, {words}"
        for run in ("dpo", str(Path("sft").resolve()))
    ]


def test_other_rows_are_no_matter(capsys: pytest.CaptureFixture[str]) -> None:
    check("sft", "dpo", "rows.jsonl")
    assert warnings(capsys) == []


def test_evaluation_rows_that_are_trained_on_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    check("dpo", "base", "pairs.jsonl", data={"eval": "same-pairs.jsonl"})
    assert warnings(capsys) == [
        "warning: data.eval: same-pairs.jsonl has the very rows of data.train: what is held out is trained on"
    ]
    check("sft", "sft", "rows.jsonl", data={"eval": "pairs.jsonl"})
    assert warnings(capsys) == ["warning: data.eval: sft was trained on the rows of pairs.jsonl"]


def test_supervised_rows_beside_a_reward_leave_the_same_prompts_out(home: Path) -> None:
    path = write_recipe(Path("ppo.yaml"), home / "base", home / "pairs.jsonl", home / "ppo", **QUICK, **PPO, **HELD)
    recipe = yaml.safe_load(path.read_text()) | {"ptx": {"data": "rows-and-more.jsonl"}}
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    more = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    Path("rows-and-more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    path.write_text(yaml.safe_dump(recipe))
    from rlhf_cli.recipe.load import load_recipe
    from rlhf_cli.stages import ppo
    from rlhf_cli.stages.prepare import prepare_job

    job = prepare_job(load_recipe("ppo", path), check=True, resume=False)
    ptx = ppo._ptx_rows(job)
    assert ptx is not None and job.dataset.held_out is not None
    held_out = {record.prompt for record in job.dataset.reading.held_out}
    learned = {record.prompt for record in ptx.reading.train}
    assert len(held_out) > 3 and not held_out & learned
    assert held_out | learned == {row["prompt"] for row in rows}


def test_ancestors_are_all_runs_before(home: Path) -> None:
    found = list(ancestors("dpo/checkpoints/step-00000001"))
    assert [Path(each.path).name for each in found] == ["dpo", "sft"]
    assert {each.split for each in found} == {Split(0.3, 0)}
    assert len({each.trained_on for each in found}) == 1
    assert list(ancestors("base")) == []
    shutil.copy("r.yaml", "recipe.yaml")
    assert list(ancestors("base")) == [], "a recipe that lies about is no run"
    Path("recipe.yaml").unlink()


def test_a_damaged_recipe_of_a_parent_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = shutil.copytree(home / "sft", tmp_path / "sft")
    for damage in ("data: [", "- a list", "\udcff"):
        (parent / "recipe.yaml").write_bytes(damage.encode("utf-8", "surrogateescape"))
        path = write_recipe(tmp_path / "r.yaml", parent, home / "pairs.jsonl", tmp_path / "run", **QUICK)
        assert rlhf("dpo", path, "--check") == 2
        assert f"error: {parent / 'recipe.yaml'} is damaged: " in capsys.readouterr().err


def evaluate(capsys: pytest.CaptureFixture[str], **source: Any) -> list[str]:
    recipe = {"models": {"sft": "sft", "dpo": "dpo", "base": "base"}, "output": "eval"}
    Path("e.yaml").write_text(yaml.safe_dump(recipe | {"prompts": {"path": "same-pairs.jsonl"} | source}))
    assert rlhf("eval", "e.yaml", "--check") == 0
    return warnings(capsys)


def test_an_evaluation_takes_the_models_hold_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(capsys, holdout=0.3) == []
    rows = "may have been trained on rows of same-pairs.jsonl, prompts here"
    learned = "learned from that file, and held out 0.3 of the prompts by holdout_seed 0."
    wanted = [("dpo", "dpo"), ("dpo", str(Path("sft").resolve())), ("sft", "sft")]
    for source in ({}, {"holdout": 0.3, "holdout_seed": 1}, {"holdout": 0.2}):
        assert sorted(evaluate(capsys, **source)) == sorted(f"warning: {name} {rows}: {run} {learned}" for name, run in wanted)
