"""CONTRIBUTING.md to the letter: what it says is done to a copy of the project, and what comes of it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_tokenizer import tiny_tokenizer
from tests.tiny import make_base, write_pairs, write_recipe, write_rows

ROOT = Path(__file__).parents[1]
SECTIONS = ("A loss", "A metric", "A data format", "A kind of reward term", "A command")


def blocks(section: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks under a heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^### {section}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(python|diff)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)


def apply_section(copy: Path, section: str) -> None:
    for language, text in blocks(section):
        if language == "python":
            name, _, rest = text.partition("\n")
            path = copy / name.removeprefix("# ")
            assert not path.exists(), path
            path.write_text(rest, encoding="utf-8")
        else:
            for part in re.split(r"^\+\+\+ ", text, flags=re.MULTILINE)[1:]:
                name, _, hunks = part.partition("\n")
                for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
                    apply_hunk(copy / name, hunk.splitlines())


def apply_hunk(path: Path, hunk: list[str]) -> None:
    """Puts the lines with + in the place of those with -; all but the new ones stand in the file once, in that order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    old = [line[1:] for line in hunk if line[:1] != "+"]
    new = [line[1:] for line in hunk if line[:1] != "-"]
    places = [at for at in range(len(lines)) if lines[at : at + len(old)] == old]
    assert len(places) == 1, f"{path.name} has these lines {len(places)} times:\n" + "\n".join(old)
    lines[places[0] : places[0] + len(old)] = new
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own files, with everything in it that CONTRIBUTING adds."""
    folder = tmp_path_factory.mktemp("contributing")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for section in SECTIONS:
        apply_section(folder, section)
    return folder


def python(copy: Path, *arguments: str) -> str:
    """Runs Python with the copy's package; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_addition_is_told() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^### (.*)$", text, re.MULTILINE)) == SECTIONS


def test_what_is_added_is_in_the_houses_style(copy: Path) -> None:
    python(copy, "-m", "ruff", "check", ".")
    python(copy, "-m", "ruff", "format", "--check", ".")


def test_the_help_of_the_new_command_names_its_keys(copy: Path) -> None:
    told = " ".join(python(copy, "-m", "rlhf_cli", "imitate", "--help").split())
    assert "A model learns another one's probabilities." in told
    assert "kind: imitate" in told and "null: 0.0002 lora, 2e-05 full" in told
    assert "imitate" in python(copy, "-m", "rlhf_cli", "--help")


RUNS = """
import pytest
from rlhf_cli.cli import main
from tests.brief import be_brief
be_brief(pytest.MonkeyPatch())
for words in {calls!r}:
    assert main(words) == 0, words
"""


@pytest.mark.slow
def test_what_is_added_runs(copy: Path, tmp_path: Path) -> None:
    """A run of the new command on rows of the new format, and one of dpo with the new loss, term and metric."""
    base, teacher = (make_base(tmp_path / name, seed, num_hidden_layers=2) for seed, name in enumerate(("base", "teacher")))
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl", 12).read_text().splitlines()]
    asked = tmp_path / "qa.jsonl"
    asked.write_text("".join(json.dumps({"question": row["prompt"], "answer": row["completion"]}) + "\n" for row in rows))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    brief: dict[str, Any] = {"steps": 2}
    reference = {"model": str(teacher)}
    imitate = write_recipe(tmp_path / "imitate.yaml", base, asked, tmp_path / "imitate", train=brief, reference=reference)
    loss = {"kind": "exponential", "beta": 0.3}
    offline = write_recipe(tmp_path / "dpo.yaml", base, pairs, tmp_path / "dpo", train=brief, objective=loss)
    drawn = {"rollout": {"max_new_tokens": 8}, "reward": [{"repeats": 1}, {"length": {"max": 4}}], "objective": loss}
    online = write_recipe(tmp_path / "online.yaml", base, pairs, tmp_path / "online", train=brief, **drawn)
    calls = [["imitate", str(imitate)], ["dpo", str(offline)], ["dpo", str(online)]]
    python(copy, "-c", RUNS.format(calls=calls))

    lines = {name: read(tmp_path / name) for name in ("imitate", "dpo", "online")}
    assert [line["loss"] > 0 for line in lines["imitate"]] == [True, True]
    assert lines["imitate"][1]["loss"] < lines["imitate"][0]["loss"]
    assert json.loads((tmp_path / "imitate/data.json").read_text())["train"]["sources"][0]["format"] == "qa"
    assert lines["dpo"][0]["loss"] == pytest.approx(1.0)  # exp(−0): the policy is the reference
    tokens = tiny_tokenizer()
    texts = [json.loads(line) for line in pairs.read_text().splitlines()]
    longer = [len(tokens(row["chosen"]).input_ids) > len(tokens(row["rejected"]).input_ids) for row in texts]
    assert sum(line["chosen/longer"] for line in lines["dpo"]) / 2 == pytest.approx(sum(longer) / len(longer))
    assert "chosen responses that are longer, share of pairs" in (tmp_path / "dpo/report.md").read_text()
    drawn = lines["online"][0]
    assert -1 < drawn["reward/repeats"] <= 0
    assert drawn["objective/scores"] == pytest.approx(drawn["reward/repeats"] + drawn["reward/length"])


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of the training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_the_projects_own_tests_hold_for_what_is_added(copy: Path) -> None:
    python(copy, "scripts/make_recipe_docs.py")
    chosen = ["exponential", "imitate", "qa", "fields", "golden", "every", "tells", "kind", "reference", "papers", "catalogue"]
    files = ["tests/objectives/test_golden.py", "tests/data/test_formats.py", "tests/test_docs.py", "tests/test_metrics.py"]
    told = python(copy, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *files, "-k", " or ".join(chosen))
    assert int(re.findall(r"(\d+) passed", told)[-1]) > 50
