"""What people read: every command of every page runs, on the files that the page shows; every table is whole."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import typer

from rlhf_cli import cli
from rlhf_cli.data.convert import BESIDE_PROMPTS
from rlhf_cli.data.formats import ANSWERS, FORMATS, PROMPTS, Purpose, detect
from rlhf_cli.data.formats import STEPS as STEPWISE
from rlhf_cli.metrics import METRICS
from rlhf_cli.recipe.keys import kind_of
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES
from tests.ranks import two_ranks
from tests.tiny import rlhf, split_lines, write_rows

ROOT = Path(__file__).parents[1]
FIRST = "docs/first-model.md"
"""The worked example, whose files and runs other pages use."""
USERS = ("docs/losses.md", "docs/evaluation.md", "docs/using.md", "docs/reports.md", "docs/data.md", "docs/devices.md")
"""The pages that say so, in an order in which each finds the runs of those before it."""
REST = {"README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))}
PAGES = (FIRST, *USERS, *sorted(REST - {FIRST, *USERS}))

NOT_HERE = {
    "git clone": "fetches from the network",
    "python3 -m venv": "an environment: tests/reports/test_installed.py makes one and installs the wheel",
    ". .venv/bin/activate": "as above",
    "pip install": "as above",
    "pip wheel": "as above",
    "accelerate launch": "wants GPUs; that rlhf understands the rest is tested below",
    "export HF_TOKEN": "a secret of the hub",
    "rlhf export runs/dpo out --push": "writes to the hub: tests/hub/test_push.py does it to a server of its own",
    "rlhf dpo recipes/cycle": "goes on from a run of make cycle",
    "rlhf train-rm recipes/cycle": "as above",
    "vllm serve": "vLLM's own program",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve": "as above; tests/rollout/test_vllm_real.py starts one",
    "python llama.cpp": "llama.cpp's own converter",
    "llama-quantize": "llama.cpp's own program",
    "llama-server": "llama.cpp's own program",
}
"""How commands begin that no test can run here → why. Pages have them in blocks that are marked `sh elsewhere`."""
PREPARED = {
    "python scripts/make_quickstart.py": "tests/test_quickstart_data.py runs it; smaller ones of the same files are made here",
    "python scripts/make_arithmetic.py": "tests/test_arithmetic_data.py runs it; the same",
    "make": "tested as a dry run, and in tests/test_project.py",
}
"""How commands begin that are stood for by something smaller → by what."""
STAND_INS = {
    "quickstart/sft": "sft",
    "quickstart/dpo": "dpo",
    "quickstart/rm": "judge",
    "quickstart/online-dpo": "online",
    "quickstart/ppo": "ppo",
    "quickstart/pushed": "ppo",
    "arithmetic/sft": "sft",
    "arithmetic/grpo": "ppo",
}
"""Runs of `make` that pages go on from → the runs of the example that are as good for it."""
STEPS = {stage: ["train.steps=2", "train.batch_size=4", "data.max_lost=1"] for stage in TRAINING_STAGES}
STEPS["train-rm"].append("train.learning_rate=0.01")  # so that two steps tell responses apart
"""What makes a run short, by its command; it comes after the page's own values, and wins."""
DRAWN = ["rollout.max_new_tokens=6"]
"""The same where the recipe draws responses."""
ROWS = 48
"""So many lines are left of the files that the pages' programs write."""


class Block(NamedTuple):
    language: str
    file: str
    text: str


class Command(NamedTuple):
    page: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    def begins(self, table: dict[str, str]) -> str | None:
        """The key of the table that it begins with."""
        return next((start for start in table if self.line.startswith(start)), None)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page; the word after the language is `file=NAME` or `elsewhere`."""
    for info, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
        language, _, rest = info.partition(" ")
        assert rest in ("", "elsewhere") or rest.startswith("file="), f"{page}: ```{info}"
        yield Block(info if rest == "elsewhere" else language, rest.removeprefix("file=") if "=" in rest else "", text)


def commands(page: str, language: str) -> list[Command]:
    """Of the blocks of this language, a line each; a line that ends in a backslash goes on."""
    texts = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == language]
    return [Command(page, line.strip()) for text in texts for line in text.splitlines() if line.strip()]


ELSEWHERE = [command for page in PAGES for command in commands(page, "sh elsewhere")]


class TestCommands:
    """The pages are read from the top: a file that a page shows is written, a command is run."""

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder like a checkout, with small files in the place of those that the quickstart and the sums make."""
        place = tmp_path_factory.mktemp("docs")
        for name in ("recipes", "scripts", "Makefile", "pyproject.toml"):
            (place / name).symlink_to(ROOT / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "scripts")
            patch.chdir(place)
            scripts = ("make_quickstart", "make_arithmetic", "quickstart_model")
            make, sums, model = (runpy.run_path(str(ROOT / f"scripts/{name}.py")) for name in scripts)
            for name in ("quickstart", "arithmetic", "arithmetic-2"):
                Path("data", name).mkdir(parents=True)
            small = make["Sizes"](sft=200, pairs=ROWS, ranked=ROWS, unpaired=ROWS, eval_prompts=8)
            make["make_data"](Path("data/quickstart"), 0, small)
            for name in ("arithmetic", "arithmetic-2"):
                sums["make_data"](Path("data", name), 0, sums["Sizes"](sft=ROWS, prompts=ROWS, eval_prompts=8))
            cut(Path("data"))
            for name in ("quickstart-base", "arithmetic-base", "arithmetic-2"):
                model["make_model"](Path("models", name), Path("data/quickstart"), 0, 400, hidden=32, inner=64, layers=2, heads=2)
            talks = Path("models/quickstart-base/generation_config.json")
            talks.write_text(json.dumps({"eos_token_id": list(range(1, 80))}))  # so that responses end
            for name, run in STAND_INS.items():
                Path("runs", name).parent.mkdir(parents=True, exist_ok=True)
                Path("runs", name).symlink_to(place / "runs" / run)
        return place

    @pytest.fixture(scope="class")
    def example(self, place: Path) -> Path:
        """The same folder after the worked example."""
        follow(FIRST, place)
        return place

    @pytest.mark.slow
    def test_the_worked_example_ends_with_a_table_of_its_models(self, example: Path) -> None:
        result = json.loads((example / "runs/eval/eval.json").read_text())
        assert list(result["models"]) == ["sft", "dpo", "gentle"]
        assert {"gold/right", "gold/polite"} <= result["models"]["sft"].keys()
        assert [len(split_lines(example / "runs" / name, "train")) for name in ("sft", "dpo")] == [2, 2]

    @pytest.mark.slow
    @pytest.mark.parametrize("page", [page for page in PAGES if page != FIRST and commands(page, "sh")])
    def test_run(self, page: str, example: Path, tmp_path: Path) -> None:
        """Each page that is no part of the example has the folder for itself."""
        place = example
        if page not in USERS:
            for path in example.iterdir():
                if path.name not in ("runs", "shop"):
                    (tmp_path / path.name).symlink_to(path)
            (tmp_path / "runs").mkdir()
            for name in ("quickstart", "arithmetic"):
                (tmp_path / "runs" / name).mkdir()
                for run in (example / "runs" / name).iterdir():
                    (tmp_path / "runs" / name / run.name).symlink_to(run.resolve())
            (tmp_path / "MODEL").symlink_to(example / "models/quickstart-base")
            write_rows(tmp_path / "rows.jsonl", 60)
            place = tmp_path
        follow(page, place)
        if page == "docs/devices.md":
            one, two = (split_lines(place / "runs" / name, "train")[0]["loss"] for name in ("sft", "two"))
            assert two == pytest.approx(one, abs=1e-5)

    def test_all_are_run_or_listed(self) -> None:
        """A block that is marked holds nothing but what is listed; nothing is listed in vain."""
        assert [command for command in ELSEWHERE if command.begins(NOT_HERE) is None] == []
        assert {command.begins(NOT_HERE) for command in ELSEWHERE} == NOT_HERE.keys()
        languages = {block.language for page in PAGES for block in blocks(page)}
        assert languages <= {"sh", "sh elsewhere", "yaml", "python", "diff", ""}

    @pytest.mark.slow
    def test_those_of_a_launcher_are_understood(self, monkeypatch: pytest.MonkeyPatch, example: Path) -> None:
        calls: list[Any] = []
        for stage in STAGES.values():
            module = ModuleType(stage.module)
            module.run = lambda *given, **flags: calls.append(given)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, stage.module, module)
        monkeypatch.chdir(example)
        launched = [command.words for command in ELSEWHERE if "rlhf_cli" in command.words]
        assert [cli.main(words[words.index("rlhf_cli") + 1 :]) for words in launched] == [0] * len(calls) == [0, 0]


def follow(page: str, place: Path) -> None:
    """Write and run all that a page shows, in its order, in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TORCH_INDEX", "")  # or make would ask the network
        for block in blocks(page):
            if block.file:
                Path(block.file).parent.mkdir(exist_ok=True)
                Path(block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "sh":
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.strip():
                        run(Command(page, line.strip()), patch)


def run(command: Command, patch: pytest.MonkeyPatch) -> None:
    """To its good end, in this process where that can be."""
    words = command.words
    if words[0] == "rlhf":
        arguments, source = redirected(words[1:])
        with pytest.MonkeyPatch.context() as own, source.open(encoding="utf-8") as typed:
            own.setattr("sys.stdin", typed)
            assert rlhf(*arguments, *shortened(arguments)) == 0, command
    elif words[0] == "torchrun":
        arguments = words[words.index("rlhf_cli") + 1 :]
        two_ranks(*arguments, *shortened(arguments))
    elif words[0] == "make":
        done = subprocess.run(
            ["make", "-n", f"PYTHON={sys.executable}", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    elif command.begins(PREPARED) is None:
        assert words[0] in ("python", "echo", "mkdir"), command
        if words[0] == "python":
            patch.setattr("sys.argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
            cut(Path(words[1]).parent)
        else:
            subprocess.run(command.line, shell=True, check=True, timeout=60)


def redirected(words: list[str]) -> tuple[list[str], Path]:
    """The words of rlhf, and the file of its input; else nothing is typed."""
    at = words.index("<") if "<" in words else len(words)
    return words[:at], Path((words[at + 1 :] or [os.devnull])[0])


def shortened(words: list[str]) -> list[str]:
    """The overrides that make a command short."""
    if words[0] not in STAGES or "--check" in words:
        return []
    recipe = load_recipe(words[0], Path(words[1]), [value for value in words[2:] if re.match(r"[\w.]+=", value)]).recipe
    short = STEPS.get(words[0], []) + (DRAWN if words[0] == "eval" or getattr(recipe, "draws", None) else [])  # type: ignore[union-attr]
    return [word for value in short for word in ("--set", value)]


def cut(folder: Path) -> None:
    """Leave the first lines of each file of rows."""
    for path in [*folder.rglob("*.jsonl"), *folder.rglob("*.csv")]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:ROWS]), encoding="utf-8")


def section(page: str, begins: str) -> list[list[str]]:
    """The cells of the rows of the table whose head begins so."""
    (table,) = re.findall(rf"^{re.escape(begins)}.*?\n\n", text_of(page), re.MULTILINE | re.DOTALL)
    return [line.split("|") for line in table.strip().splitlines()[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


class TestTables:
    """What a page lists is all that there is."""

    def test_every_format_has_a_row_that_is_one(self) -> None:
        text = text_of("docs/data.md")
        rows = dict(re.findall(r"^\| `([a-z-]+)` \| `(\{.*?\})`[,| ]", text, re.MULTILINE))
        assert list(rows) == list(FORMATS)
        uses = {name: {"prompt": PROMPTS, "steps": STEPWISE}.get(name, ANSWERS) for name in rows}
        found = {name: detect([json.loads(row)], Purpose(name, uses[name], {}), "data.md") for name, row in rows.items()}
        assert found == FORMATS

    def test_every_optional_column(self) -> None:
        rows = section("docs/data.md", "| optional column ")
        named = [name for row in rows for name in re.findall(r"`([a-z_]+)`", row[1])]
        elsewhere = {name for format in FORMATS.values() for name in format.columns if format.name != "tree"}
        optional = {name for format in FORMATS.values() for name in format.optional} - (elsewhere - {"text"})
        assert set(named) == {"subset", *optional, *BESIDE_PROMPTS, "text"}
        formats = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row[2])}
        assert formats == {"alpaca", "preference", "hh", "choice", "ranked", "scored", "tree"}

    def test_every_kind_of_loss(self) -> None:
        found: dict[str, list[str]] = {}
        stage = ""
        for cells in section("docs/losses.md", "| command | `objective.kind` "):
            stage = cells[1].strip(" `") or stage
            found.setdefault(stage, []).extend(quoted(cells[2]))
        found["ppo"] = [
            name for cells in section("docs/losses.md", "| `rlhf ppo`: `objective.kind` ") for name in quoted(cells[1])
        ]
        known = {name: set(map(kind_of, stage.objectives)) for name, stage in TRAINING_STAGES.items() if name != "sft"}
        assert {stage: set(kinds) for stage, kinds in found.items()} == known
        assert sum(map(len, found.values())) == sum(map(len, known.values()))

    def test_every_command(self) -> None:
        named = [name.removeprefix("rlhf ") for cells in section("README.md", "| command | what ") for name in quoted(cells[1])]
        assert sorted(named) == sorted(str(known.name) for known in cli.app.registered_commands)

    def test_every_metric(self) -> None:
        text = text_of("docs/metrics.md")
        named = [name for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in quoted(cell)]
        assert sorted(named) == sorted(row.name for row in METRICS)

    def test_every_page_is_in_the_guide(self) -> None:
        guide = text_of("docs/README.md")
        assert {name for name in re.findall(r"\]\(([\w-]+\.md)\)", guide)} | {"README.md"} == {
            path.name for path in ROOT.glob("docs/*.md")
        }

    def test_papers_name_every_objective_and_a_recipe_that_exists(self) -> None:
        text = text_of("docs/papers.md")
        kinds = {kind_of(objective) for stage in TRAINING_STAGES.values() for objective in stage.objectives}
        assert {kind for kind in kinds if f"| `{kind}` |" in text} == kinds
        recipes = re.findall(r"`(recipes/[^`]+)`", text)
        assert recipes
        assert [path for path in recipes if not (ROOT / path).exists()] == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings, code in fences left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


class TestWords:
    def test_links_lead_somewhere(self) -> None:
        links = [(ROOT / page, link) for page in PAGES for link in re.findall(r"\]\(([^): ]+)\)", text_of(page))]
        assert len(links) > 100
        for page, link in links:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"

    def test_commands_within_sentences_exist_with_their_options(self) -> None:
        known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
        spans = [(page, span) for page in PAGES for span in re.findall(r"`(rlhf [^`\n]+)`", text_of(page))]
        assert len(spans) > 50
        for page, span in spans:
            _, name, *rest = span.split()
            if name in ("COMMAND", "STAGE", "--help", "--install-completion"):
                continue
            if page == "CONTRIBUTING.md" and name == "imitate":
                continue  # what that page adds
            options = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)} | {
                "--help"
            }
            assert {word for word in rest if word.startswith("--")} <= options, f"{page}: {span}"

    def test_readme_is_read_in_ten_minutes(self) -> None:
        assert len(text_of("README.md").splitlines()) <= 200


class TestRecipeReference:
    made = runpy.run_path(str(ROOT / "scripts/make_recipe_docs.py"))

    def test_is_up_to_date(self) -> None:
        assert text_of("docs/recipes.md") == self.made["reference"]()

    def test_names_every_option_once(self) -> None:
        known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
        options = {option for stage in STAGES for each in known[stage].params for option in each.opts if option.startswith("--")}
        assert sorted(re.findall(r"^- `(--[a-z-]+)", text_of("docs/recipes.md"), re.MULTILINE)) == sorted(options)

    @pytest.mark.parametrize("stage", STAGES)
    def test_has_a_recipe_of_every_stage_that_is_read(self, stage: str, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(self.made["RECIPES"][stage])
        assert load_recipe(stage, recipe).recipe.output.startswith("runs/")

    def test_names_every_key_once(self) -> None:
        text = text_of("docs/recipes.md")
        rows = [
            (key, part.splitlines()[0])
            for part in re.split(r"^##+ ", text, flags=re.MULTILINE)
            for key in re.findall(r"^\| `([A-Za-z0-9_.]+)` \|", part, re.MULTILINE)
        ]
        assert len(rows) == len(set(rows))
        assert len([key for key, _ in rows if key == "objective.kind"]) == sum(
            len(stage.objectives) for stage in TRAINING_STAGES.values()
        )
        of_several = ("objective.", "reference", "rollout", "reward", "gold")
        common = [key for key, part in rows if not key.startswith(of_several) and part != "`rlhf eval`"]
        assert len(common) == len(set(common))
        assert {"model.path", "data.train.0.limit", "lora.r", "train.keep_best.mode", "train.stop_if.NAME.above", "seed"} <= set(
            common
        )
        assert ("objective.gamma", "`dpo`, `kind: simpo`") in rows
        assert ("reference.cache", "`rlhf kto`") in rows
        assert ("reward.0.weight", "`rlhf ppo`") in rows
