"""The shipped recipes, and the Makefile that runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from rlhf_cli.recipe.evaluations import EvalRecipe
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.recipe.recipes import Recipe, TrainingRecipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
STAGE_OF = {
    "rm": "train-rm",
    "rloo": "ppo",
    "grpo": "ppo",
    "pushed": "ppo",
    "online-dpo": "dpo",
    "dpo-again": "dpo",
    "samples": "eval",
    "at-kl": "eval",
    "rm-ensemble": "train-rm",
    "pushed-mean": "ppo",
    "pushed-lcb": "ppo",
    "ensemble": "eval",
    "rounds-label": "label",
    "rounds-rm": "train-rm",
    "rounds-dpo": "dpo",
    "rounds-eval": "eval",
    "eval-more": "eval",
    "solver": "sft",
    "prm": "train-rm",
    "orm": "train-rm",
    "votes": "eval",
    **dict.fromkeys(("brief", "warm", "exact"), "sft"),
    "gpm": "train-rm",
    "sppo": "dpo",
    "dno": "dpo",
}
"""The stage of recipes that are not named after theirs."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
class TestShippedRecipes:
    def test_validates(self, path: Path) -> None:
        loaded: Loaded = load_recipe(STAGE_OF.get(path.stem, path.stem), path)
        assert loaded.recipe.output == f"runs/{path.parent.name}/{path.stem}"

    def test_every_key_has_a_comment(self, path: Path) -> None:
        bare = [line for line in path.read_text().splitlines() if re.match(r"\s*(- )?\w+: *[^ #]", line) and "#" not in line]
        assert bare == []


TOOL = """#!/bin/sh
echo "$(basename $0) $*" >> calls
case "$*" in
  scripts/make_quickstart.py)
    mkdir -p data/quickstart models/quickstart-base
    for name in sft pairs ranked unpaired prompts eval_prompts; do touch data/quickstart/$name.jsonl; done
    touch models/quickstart-base/tokenizer_config.json ;;
  scripts/make_arithmetic.py)
    mkdir -p data/arithmetic models/arithmetic-base
    for name in sft prompts eval_prompts solver steps outcome; do touch data/arithmetic/$name.jsonl; done
    touch models/arithmetic-base/tokenizer_config.json ;;
  scripts/make_cycle.py)
    mkdir -p data/cycle models/cycle-base
    for name in sft brief warm exact pairs prompts eval_prompts; do touch data/cycle/$name.jsonl; done
    touch models/cycle-base/tokenizer_config.json ;;
  *urlopen*) if [ -e offline ]; then exit 1; fi ;;
  scripts/fetch_smollm2.py*) mkdir -p models/smollm2-135m-instruct; touch models/smollm2-135m-instruct/config.json ;;
  *" recipes/"*)
    folder=runs/$(basename $(dirname $2))/$(basename $2 .yaml)
    mkdir -p $folder; touch $folder/recipe.yaml
    if [ -e threads ]; then
      echo "$(basename $2 .yaml) ${OMP_NUM_THREADS:-all}" >> threads
      case $folder in *t/rm) other=dpo ;; *t/dpo) other=rm ;; *) other=$(basename $folder) ;; esac
      for i in $(seq 100); do [ -e runs/quickstart/$other/recipe.yaml ] || sleep 0.1; done
      [ -e runs/quickstart/$other/recipe.yaml ] || exit 1
    fi
    if [ "$1 $3" = "eval --resume" ] && [ -e $folder/manifest.json ]; then echo "the table"; fi
    if [ -e stop ]; then rm stop; exit 1; fi
    touch $folder/manifest.json ;;
esac
"""
INSTALL = "python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[{}]"
REAL_CHAIN = ("sft", "rm", "dpo", "ipo", "kto", "ppo", "online-dpo", "eval")
"""The recipes of smollm2, in the order of the Makefile; the first one's run is where the others start."""
CHAIN = ("sft", "rm", "dpo", "kto", "ppo", "online-dpo", "pushed", "samples", "dpo-again", "eval")
"""Those of the quickstart that `make quickstart` runs."""
MORE = ("ipo", "rloo", "at-kl")
"""Those that `make quickstart-more` runs."""
ENSEMBLE = ("rm-ensemble", "pushed-mean", "pushed-lcb", "ensemble")
"""Those that `make ensemble` runs."""
CYCLE = ("sft", "brief", "warm", "exact", "rm", "gpm", "online-dpo", "sppo", "dno", "eval")
"""Those that `make cycle` runs."""
VOTES = ("solver", "prm", "orm", "votes")
"""Those that `make votes` runs."""
FOLLOW = {
    "sft": [name for name in CHAIN if name != "sft"],
    "rm": ["ppo", "online-dpo", "pushed", "samples", "dpo-again", "eval"],
    "dpo": ["samples", "dpo-again", "eval"],
    "samples": ["dpo-again", "eval"],
    "eval": [],
}
"""Recipe → those that depend on its run; of one that is not here, eval alone."""
SHOW = "rlhf eval recipes/quickstart/eval.yaml --resume"
"""The table of an evaluation that is there already."""


def calls(folder: str, names: Iterable[str], how: str, *more: str) -> list[str]:
    """The commands that run these recipes of a folder."""
    return [" ".join(["rlhf", STAGE_OF.get(name, name), f"recipes/{folder}/{name}.yaml", how, *more]) for name in names]


FEW_ROWS = [
    "data.train.0.path=my rows.jsonl.gz",
    "data.train.0.name=null",
    "data.train.0.limit=9",
    "data.holdout=0.3",
    "train.batch_size=8",
    "train.eval_every=0.5",
]
"""What `make smollm2 HH=… LIMIT=9` overrides."""
EVAL_FEW_ROWS = [
    *(f"{section}.0.{value}" for section in ("prompts", "preferences") for value in ("path=my rows.jsonl.gz", "name=null")),
    *(f"{section}.0.{value}" for section in ("prompts", "preferences") for value in ("limit=9", "holdout=0.3")),
]
"""The same of its evaluation."""


class TestMakefile:
    """The real Makefile on stand-ins for the tools in .venv/bin that write down how they were called.

    That of rlhf leaves a recipe.yaml and a manifest.json; where a file `stop` lies only the first, as a stopped run does.
    """

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("Makefile", "pyproject.toml", "constraints.txt", *(str(path.relative_to(ROOT)) for path in RECIPES)):
            self.put(tmp_path / name, (ROOT / name).read_text())
        for name in (
            "scripts/make_arithmetic.py",
            "scripts/make_cycle.py",
            "recipes/cycle/gold.py",
            "scripts/make_quickstart.py",
            "scripts/quickstart_model.py",
            "recipes/quickstart/gold.py",
        ):
            self.put(tmp_path / name, "")
        for name in ("pip", "python", "rlhf", "ruff", "mypy"):
            self.put(tmp_path / ".venv/bin" / name, TOOL)
            (tmp_path / ".venv/bin" / name).chmod(0o755)
        return tmp_path

    @staticmethod
    def put(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (1e9, 1e9))

    @staticmethod
    def change(path: Path) -> None:
        time.sleep(0.05)  # file systems count time in steps of some milliseconds
        path.touch()

    @staticmethod
    def run(folder: Path, *words: str, index: str | None = "") -> subprocess.CompletedProcess[str]:
        """One stage at a time, unless the words say otherwise; index is TORCH_INDEX, None: it is not given."""
        (folder / "calls").write_text("")
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "OMP_", "TORCH_INDEX"))
        }
        env |= {"JOBS": "1", "NPM": ""} | ({} if index is None else {"TORCH_INDEX": index})
        return subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=60)

    def make(self, folder: Path, *words: str) -> list[str]:
        """The calls that a target made."""
        done = self.run(folder, *words)
        assert (done.returncode, done.stderr) == (0, "")
        return (folder / "calls").read_text().splitlines()

    def stop_after(self, folder: Path, *words: str) -> list[str]:
        """The calls of a target whose first run of rlhf is stopped."""
        (folder / "stop").touch()
        assert self.run(folder, *words).returncode == 2
        return (folder / "calls").read_text().splitlines()

    def test_quickstart_does_what_is_left_to_do(self, folder: Path) -> None:
        assert self.make(folder, "quickstart") == [
            INSTALL.format("dev"),
            "python scripts/make_quickstart.py",
            *calls("quickstart", CHAIN, "--resume"),
        ]
        assert self.make(folder, "quickstart") == [SHOW]
        self.change(folder / "recipes/quickstart/sft.yaml")
        assert self.make(folder, "quickstart") == [*calls("quickstart", CHAIN, "--force"), SHOW]
        self.change(folder / "models/quickstart-base/tokenizer_config.json")
        assert self.make(folder, "quickstart") == [*calls("quickstart", CHAIN, "--force"), SHOW]

    @pytest.mark.parametrize("name", [name for name in CHAIN if name != "sft"])
    def test_a_recipe_changes_its_own_run_alone(self, name: str, folder: Path) -> None:
        self.make(folder, "quickstart")
        self.change(folder / f"recipes/quickstart/{name}.yaml")
        own = [name, *FOLLOW.get(name, ["eval"])]
        assert self.make(folder, "quickstart") == [*calls("quickstart", own, "--force"), SHOW]

    def test_quickstart_ends_with_the_table_and_reports(self, folder: Path) -> None:
        names = [*(name for name in CHAIN if name != "eval"), "eval"]
        reports = [f"report: runs/quickstart/{name}/report.html" for name in names]
        said = self.run(folder, "quickstart").stdout.splitlines()
        assert said[-len(CHAIN) :] == reports
        assert "the table" not in said  # a new evaluation has printed it itself
        assert self.run(folder, "quickstart").stdout.splitlines() == ["the table", *reports]

    def test_quickstart_runs_two_stages_at_a_time_with_half_of_the_cores_each(self, folder: Path) -> None:
        """The stand-ins of rm and dpo wait for each other."""
        (folder / "threads").touch()
        done = self.run(folder, "quickstart", "JOBS=2", "CORES=6")
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted((folder / "calls").read_text().splitlines()[2:]) == sorted(calls("quickstart", CHAIN, "--resume"))
        first, *between, last = (folder / "threads").read_text().splitlines()
        assert (first, last) == ("sft all", "eval all")
        assert sorted(between) == sorted(f"{name} 3" for name in CHAIN if name not in ("sft", "eval"))

    def test_torch_without_cuda_where_there_is_no_device(self, folder: Path) -> None:
        """NVIDIA holds what was found of a device; a file `offline` makes the index unreachable."""
        usual, said = INSTALL.format("dev"), "torch without CUDA: there is no NVIDIA device (TORCH_INDEX= takes the usual one)"
        small = usual.replace("-c ", "--extra-index-url https://download.pytorch.org/whl/cpu -c ", 1)
        for device, offline, index, wanted in [
            ("", False, None, small),
            ("", True, None, usual),
            ("/dev/nvidia0", False, None, usual),
            ("", False, "", usual),
            ("", False, "https://mine", usual.replace("-c ", "--extra-index-url https://mine -c ", 1)),
        ]:
            self.change(folder / "constraints.txt")
            (folder / "offline").touch() if offline else (folder / "offline").unlink(missing_ok=True)
            done = self.run(folder, "quickstart", f"NVIDIA={device}", index=index)
            installs = [line for line in (folder / "calls").read_text().splitlines() if "pip install" in line]
            assert (done.stderr, installs, said in done.stdout.splitlines()) == ("", [wanted], wanted == small)

    def test_the_other_recipes_have_a_target(self, folder: Path) -> None:
        self.make(folder, "quickstart")
        assert self.make(folder, "quickstart-more") == calls("quickstart", MORE, "--resume")
        assert self.run(folder, "quickstart-more").stdout.splitlines() == [
            f"report: runs/quickstart/{name}/report.md" for name in MORE
        ]

    def test_ensembles_have_one_too(self, folder: Path) -> None:
        """It needs no more of the quickstart than its first stage."""
        assert self.make(folder, "ensemble")[2:] == calls("quickstart", ("sft", *ENSEMBLE), "--resume")
        assert self.run(folder, "ensemble").stdout.splitlines() == ["the table", "report: runs/quickstart/ensemble/report.html"]
        self.change(folder / "recipes/quickstart/rm-ensemble.yaml")
        assert self.make(folder, "ensemble")[:-1] == calls("quickstart", ENSEMBLE, "--force")

    def test_rounds_are_a_script_after_sft(self, folder: Path) -> None:
        assert self.make(folder, "rounds")[2:] == [*calls("quickstart", ("sft",), "--resume"), "python scripts/rounds.py"]
        assert self.make(folder, "rounds", "ROUNDS=--seeds 2") == ["python scripts/rounds.py --seeds 2"]

    def test_the_parts_for_a_gpu_are_a_script(self, folder: Path) -> None:
        assert self.make(folder, "gpu", "GPU=--plan") == [INSTALL.format("dev"), "python scripts/gpu.py --plan"]

    def test_cycle_is_a_chain_of_its_own(self, folder: Path) -> None:
        made = [INSTALL.format("dev"), "python scripts/make_cycle.py"]
        first = self.make(folder, "cycle")
        assert first[:3] == [*made, *calls("cycle", CYCLE[:1], "--resume")]
        assert first[-1:] == calls("cycle", CYCLE[-1:], "--resume")
        assert sorted(first[2:]) == sorted(calls("cycle", CYCLE, "--resume"))
        assert self.run(folder, "cycle").stdout.splitlines() == ["the table", "report: runs/cycle/eval/report.html"]
        self.change(folder / "recipes/cycle/gpm.yaml")
        again = self.make(folder, "cycle")
        assert sorted(again[:-1]) == sorted(calls("cycle", ["gpm", "sppo", "dno", "eval"], "--force"))
        (folder / "data/cycle/pairs.jsonl").unlink()
        assert self.make(folder, "cycle")[0] == made[1]

    def test_arithmetic_is_a_chain_of_its_own(self, folder: Path) -> None:
        first, more = ("sft", "grpo", "eval"), ("rloo", "ppo", "eval-more")
        made = [INSTALL.format("dev"), "python scripts/make_arithmetic.py"]
        assert self.make(folder, "arithmetic") == [*made, *calls("arithmetic", first, "--resume")]
        show = "rlhf eval recipes/arithmetic/{}.yaml --resume"
        assert sorted(self.make(folder, "votes")) == sorted(calls("arithmetic", VOTES, "--resume"))
        assert self.make(folder, "arithmetic") == [show.format("eval")]
        assert sorted(self.make(folder, "arithmetic-more")) == sorted(calls("arithmetic", more, "--resume"))
        assert self.run(folder, "arithmetic-more").stdout.splitlines() == [
            "the table",
            "report: runs/arithmetic/eval-more/report.html",
        ]
        self.change(folder / "recipes/arithmetic/grpo.yaml")
        assert self.make(folder, "arithmetic") == [*calls("arithmetic", ["grpo", "eval"], "--force"), show.format("eval")]
        (folder / "data/arithmetic/prompts.jsonl").unlink()
        again = self.make(folder, "arithmetic")
        assert again == [made[1], *calls("arithmetic", first, "--force"), show.format("eval")]

    def test_a_stopped_run_goes_on(self, folder: Path) -> None:
        assert self.stop_after(folder, "quickstart")[-1:] == calls("quickstart", ["sft"], "--resume")
        assert self.make(folder, "quickstart") == calls("quickstart", CHAIN, "--resume")
        self.change(folder / "recipes/quickstart/dpo.yaml")
        assert self.stop_after(folder, "quickstart") == calls("quickstart", ["dpo"], "--force")
        (folder / "runs/quickstart/dpo/manifest.json").unlink()  # a new run has none
        again = [*calls("quickstart", ["dpo"], "--resume"), *calls("quickstart", FOLLOW["dpo"], "--force"), SHOW]
        assert self.make(folder, "quickstart") == again

    def test_a_stopped_run_whose_parent_is_new_is_begun_anew(self, folder: Path) -> None:
        """rlhf would refuse to resume it: it started from other weights."""
        self.make(folder, "quickstart")
        (folder / "runs/quickstart/kto/manifest.json").unlink()
        self.change(folder / "recipes/quickstart/sft.yaml")
        assert self.make(folder, "quickstart") == [*calls("quickstart", CHAIN, "--force"), SHOW]

    @pytest.mark.parametrize("name", ["sft", "pairs", "ranked", "unpaired", "prompts", "eval_prompts"])
    def test_lost_data_is_made_again(self, name: str, folder: Path) -> None:
        self.make(folder, "quickstart")
        (folder / f"data/quickstart/{name}.jsonl").unlink()
        assert "python scripts/make_quickstart.py" in self.make(folder, "quickstart")

    def test_new_requirements_are_installed(self, folder: Path) -> None:
        self.make(folder, "quickstart")
        self.change(folder / "constraints.txt")
        assert self.make(folder, "quickstart") == [INSTALL.format("dev"), SHOW]

    def test_check_and_test(self, folder: Path) -> None:
        lint = ["ruff check --quiet .", "ruff format --quiet --check .", "mypy --no-error-summary"]
        tests = "python -m pytest -n logical --maxprocesses 8"
        assert self.make(folder, "check") == [INSTALL.format("dev"), *lint, f"{tests} -m not slow"]
        assert self.make(folder, "lint", "test") == [*lint, tests]
        assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "make lint test"

    def test_smollm2_with_rows_from_the_hub_or_a_file(self, folder: Path) -> None:
        fetch = "python scripts/fetch_smollm2.py --dest models/smollm2-135m-instruct"
        start = "--set model.path=models/smollm2-135m-instruct"
        later = [name for name in REAL_CHAIN if name != "sft"]
        wanted = [fetch, *calls("smollm2", ["sft"], "--resume", start), *calls("smollm2", later, "--resume")]
        assert self.make(folder, "smollm2")[-len(wanted) :] == wanted
        show = SHOW.replace("quickstart", "smollm2")
        assert self.make(folder, "smollm2") == [show]
        rows, few = (" ".join(f"--set {override}" for override in some) for some in (FEW_ROWS, EVAL_FEW_ROWS))
        trained = [name for name in later if name != "eval"]
        wanted = [*calls("smollm2", ["sft"], "--force", start, rows), *calls("smollm2", trained, "--force", rows)]
        wanted += calls("smollm2", ["eval"], "--force", few)
        assert self.make(folder, "smollm2", "HH=my rows.jsonl.gz", "LIMIT=9") == [*wanted, f"{show} {few}"]
        assert self.make(folder, "smollm2", "HH=my rows.jsonl.gz", "LIMIT=9") == [f"{show} {few}"]
        self.change(folder / "recipes/smollm2/ipo.yaml")
        again = self.make(folder, "smollm2", "HH=my rows.jsonl.gz", "LIMIT=9")
        wanted = [*calls("smollm2", ["ipo"], "--force", rows), *calls("smollm2", ["eval"], "--force", few)]
        assert again == [*wanted, f"{show} {few}"]

    def test_smollm2_overrides_fit_its_evaluation(self) -> None:
        recipe = load_recipe("eval", ROOT / "recipes/smollm2/eval.yaml", EVAL_FEW_ROWS).recipe
        assert isinstance(recipe, EvalRecipe)
        for sources in (recipe.prompts, recipe.preferences):
            assert sources is not None
            (source,) = sources
            assert (source.path, source.name, source.limit, source.holdout) == ("my rows.jsonl.gz", None, 9, 0.3)

    @pytest.mark.parametrize("name", REAL_CHAIN[:-1])
    def test_smollm2_overrides_fit_its_recipes(self, name: str) -> None:
        recipe = load_recipe(STAGE_OF.get(name, name), ROOT / f"recipes/smollm2/{name}.yaml", FEW_ROWS).recipe
        assert isinstance(recipe, TrainingRecipe)
        (source,) = recipe.data.train
        assert (source.path, source.name, source.limit, source.format) == ("my rows.jsonl.gz", None, 9, "hh")
        assert (recipe.data.holdout, recipe.train.batch_size, recipe.train.eval_every) == (0.3, 8, 0.5)

    def test_an_old_python_is_refused(self, folder: Path) -> None:
        (folder / ".venv/bin/pip").unlink()
        done = subprocess.run(["make", "PYTHON=false", "quickstart"], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[0] == "error: false is older than Python 3.11; name another: make PYTHON=/path/to/python3"

    def test_a_python_without_its_package_of_environments_is_told_what_to_install(self, folder: Path) -> None:
        """As on Debian and Ubuntu without python3-venv: what stands before the real module cannot be imported."""
        (folder / ".venv/bin/pip").unlink()
        bare = folder / "bare"
        self.put(bare, f'#!/bin/sh\nPYTHONPATH={folder}/missing exec {sys.executable} "$@"\n')
        bare.chmod(0o755)
        self.put(folder / "missing/ensurepip.py", "raise ModuleNotFoundError\n")
        done = self.run(folder, f"PYTHON={bare}", "quickstart")
        assert done.returncode == 2
        assert done.stderr.splitlines()[0] == (
            f"error: {bare} cannot make a virtual environment: its module ensurepip is missing. "
            "On Debian and Ubuntu: sudo apt install python3-venv"
        )
        assert (folder / "calls").read_text() == ""


class TestChain:
    """Each folder of recipes is a chain: the later stages start from the first one's run."""

    @pytest.mark.parametrize("folder", ["quickstart", "smollm2"])
    def test_all_hold_out_the_same_prompts(self, folder: str) -> None:
        """A function of prompt, seed and share: else a policy would have learned what later stages hold out."""
        recipes = recipes_of(folder)
        trained = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, TrainingRecipe)}
        share = 0.1 if folder == "quickstart" else 0.05
        assert {(recipe.data.holdout, recipe.seed) for recipe in trained.values()} == {(share, 0)}
        starts = {name: recipe.model.path for name, recipe in trained.items() if name not in ("sft", "dpo-again")}
        assert starts == dict.fromkeys(starts, recipes["sft"].output)
        assert recipes.keys() == ({*CHAIN, *MORE, *ENSEMBLE} if folder == "quickstart" else set(REAL_CHAIN))
        judges = {term.model for recipe in recipes.values() for terms in recipe.terms for term in terms if term.model}
        assert judges == {recipes[name].output for name in ("rm", "rm-ensemble") if name in recipes}

    @pytest.mark.parametrize("folder", ["quickstart", "smollm2"])
    def test_the_evaluation_keeps_what_was_held_out(self, folder: str) -> None:
        recipes = recipes_of(folder)
        evaluation = recipes["eval"]
        assert isinstance(evaluation, EvalRecipe)
        split: dict[str, set[tuple[float, int | None]]] = {}
        for recipe in recipes.values():
            for source in recipe.data.train if isinstance(recipe, TrainingRecipe) else ():
                split.setdefault(source.path, set()).add((recipe.data.holdout, source.limit))
        sources = [source for rows in (evaluation.prompts, evaluation.preferences, evaluation.text) for source in rows or ()]
        known = [source for source in sources if source.path in split]
        assert known
        assert [source.path for source in known if (source.holdout, source.limit) not in split[source.path]] == []
        assert evaluation.seed == 0
        left_out = {"rm", "samples", "eval"} | ({*MORE, *ENSEMBLE} if folder == "quickstart" else set())
        outputs = {recipe.output for name, recipe in recipes.items() if name not in left_out}
        assert {path.removesuffix("/checkpoints/*") for path in evaluation.models.values()} == outputs

    def test_every_method_learns_sums_from_one_start_and_meets_those_that_none_has_seen(self) -> None:
        recipes = {name: recipe for name, recipe in recipes_of("arithmetic").items() if name not in VOTES}
        trained = {name: recipe for name, recipe in recipes.items() if isinstance(recipe, TrainingRecipe)}
        assert recipes.keys() - trained.keys() == {"eval", "eval-more"}
        assert {(recipe.data.holdout, recipe.seed) for recipe in trained.values()} == {(0.05, 0)}
        starts = {name: recipe.model.path for name, recipe in trained.items()}
        assert starts == dict.fromkeys(starts, recipes["sft"].output) | {"sft": "models/arithmetic-base"}
        outputs = {name: recipe.output for name, recipe in trained.items()}
        first, every = recipes["eval"], recipes["eval-more"]
        assert isinstance(first, EvalRecipe) and isinstance(every, EvalRecipe)
        assert every.models == outputs
        assert first.models == {name: outputs[name] for name in ("sft", "grpo")}
        assert (first.prompts, first.gold, first.vote, first.rollout) == (every.prompts, every.gold, every.vote, every.rollout)
        assert [source.path for source in first.prompts or ()] == ["data/arithmetic/eval_prompts.jsonl"]

    def test_reward_models_choose_among_solutions_of_the_policy_that_they_start_from(self) -> None:
        solver, prm, orm, votes = (recipes_of("arithmetic")[name] for name in VOTES)
        assert isinstance(prm, TrainingRecipe) and isinstance(orm, TrainingRecipe) and isinstance(votes, EvalRecipe)
        assert (prm.model, prm.train, prm.data.holdout) == (orm.model, orm.train, orm.data.holdout)
        assert [prm.model.path] == [solver.output] == [*votes.models.values()]
        assert [term.model for term in votes.reward or ()] == [prm.output, orm.output]

    def test_iterative_dpo_learns_from_what_was_sampled(self) -> None:
        recipes = recipes_of("quickstart")
        samples, again = recipes["samples"], recipes["dpo-again"]
        assert isinstance(samples, EvalRecipe)
        assert isinstance(again, TrainingRecipe)
        assert [source.path for source in again.data.train] == [samples.dump_pairs]
        assert list(samples.models.values()) == [again.model.path] == [recipes["dpo"].output]


def recipes_of(folder: str) -> dict[str, Recipe]:
    """Name → recipe of every file in a folder of recipes, but for those that scripts/rounds.py chains in its own way."""
    paths = [path for path in RECIPES if path.parent.name == folder and not path.stem.startswith("rounds-")]
    return {path.stem: load_recipe(STAGE_OF.get(path.stem, path.stem), path).recipe for path in paths}
