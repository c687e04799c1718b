"""Discriminator-guided dpo: two rounds of the quickstart's recipes by scripts/rounds.py, of a tiny model."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import make_base, read_lines, rlhf

ROOT = Path(__file__).parents[2]
GOLD = """
def gold(prompts, responses):
    return [float(len(set(response))) for response in responses]
"""

SHORT = ["rollout.max_new_tokens=8"]
BRIEFLY = {"label": SHORT, "eval": SHORT, "train-rm": ["train.steps=2"], "dpo": [*SHORT, "train.steps=1", "train.batch_size=4"]}


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return found


def test_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/quickstart").mkdir(parents=True)
    for path in (ROOT / "recipes/quickstart").glob("rounds-*.yaml"):
        shutil.copy(path, tmp_path / "recipes/quickstart")
    (tmp_path / "recipes/quickstart/gold.py").write_text(GOLD)
    (tmp_path / "data/quickstart").mkdir(parents=True)
    for name, count in (("prompts", 24), ("eval_prompts", 3)):
        rows = "".join(json.dumps({"prompt": f"{name} {n}"}) + "\n" for n in range(count))
        (tmp_path / f"data/quickstart/{name}.jsonl").write_text(rows)
    make_base(tmp_path / "runs/quickstart/sft")

    class Here:
        """Commands are run in this process."""

        @staticmethod
        def run(call: list[str], **_: object) -> None:
            assert rlhf(*call[3:], *BRIEFLY[call[3]]) == 0

    script = runpy.run_path(str(ROOT / "scripts/rounds.py"))
    monkeypatch.setitem(script["stage"].__globals__, "subprocess", Here)
    monkeypatch.setattr(sys, "argv", ["rounds.py", "--by", "uncertainty", "at-once", "--labels", "8", "--rounds", "2"])
    script["main"]()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 |")]
    assert [line.split(" | ")[1:3] for line in table] == [["1", "4"], ["2", "8"]]
    arm, at_once = (tmp_path / "runs/quickstart/rounds/8-labels-seed-0" / by for by in ("uncertainty", "at-once"))
    asked = set()
    for number in (1, 2):
        own = arm / f"round-{number}"
        lines = read_lines(own / "labels/verdicts.jsonl")
        assert len(lines) == 4
        texts: dict[int, list[str]] = {}
        for sample in read_lines(own / "labels/samples.jsonl"):
            known = texts.setdefault(sample["row"], [])
            if sample["ended"] and sample["response"].strip() and sample["response"].strip() not in map(str.strip, known):
                known.append(sample["response"])
        prompts = {sample["row"]: sample["prompt"] for sample in read_lines(own / "labels/samples.jsonl")}
        for line in lines:
            first, second = (len(set(texts[line["row"]][at])) for at in line["order"])
            assert line["verdict"] == ("tie" if first == second else "a" if first > second else "b")
            asked.add(prompts[line["row"]])
        assert manifest(own / "rm")["reward_model"]["score_responses"] == 2 * 4 * number
        start = "runs/quickstart/sft" if number == 1 else arm / "round-1/dpo"
        recipe = yaml.safe_load((own / "dpo/recipe.yaml").read_text())
        assert Path(recipe["model"]["path"]).samefile(start)
    assert len(asked) == 8  # no prompt has a second label while others have none
    values = [each["value"] for each in read_lines(arm / "round-2/labels/selected.jsonl")]
    assert values == sorted(values, reverse=True) and values[0] > 0
    assert len(read_lines(at_once / "round-1/labels/preferences.jsonl")) == 8 and not (at_once / "round-2/rm").exists()
