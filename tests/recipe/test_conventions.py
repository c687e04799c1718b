"""What recipes may say beside their keys: a base, a stage, variables of the environment; and their schema for editors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.dump import dump_recipe
from rlhf_cli.recipe.evaluations import EvalRecipe
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.recipe.recipes import DpoRecipe, PpoRecipe
from rlhf_cli.recipe.schema import recipe_schema
from rlhf_cli.recipe.stages import STAGES
from rlhf_cli.sections import Judge, Tracker
from tests.tiny import rlhf

ROOT = Path(__file__).parents[2]
COMMON = "model: {path: m}\ndata: {train: x.jsonl}\noutput: o\n"


def load(folder: Path, text: str, stage: str = "dpo", **others: str) -> Loaded:
    for name, other in others.items():
        (folder / f"{name}.yaml").write_text(other)
    (folder / "r.yaml").write_text(text)
    return load_recipe(stage, folder / "r.yaml")


def faults(folder: Path, text: str, stage: str = "dpo", **others: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, text, stage, **others)
    return str(caught.value).replace(f"{folder}/", "")


class TestBase:
    def test_holds_where_the_recipe_says_nothing(self, tmp_path: Path) -> None:
        base = COMMON + "seed: 3\ntrain: {steps: 5, batch_size: 8}\nobjective: {beta: 0.3}\n"
        recipe = load(tmp_path, "base: b.yaml\ntrain: {steps: 9}\nobjective: {kind: dpo, label_smoothing: 0.1}\n", b=base).recipe
        assert isinstance(recipe, DpoRecipe)
        assert (recipe.seed, recipe.train.steps, recipe.train.batch_size) == (3, 9, 8)
        assert vars(recipe.objective) | {"beta": 0.3, "label_smoothing": 0.1} == vars(recipe.objective)

    def test_lists_replace_and_another_kind_replaces_its_section(self, tmp_path: Path) -> None:
        base = COMMON + "objective: {kind: simpo, gamma: 2}\ntrackers: [wandb, mlflow]\n"
        recipe = load(tmp_path, "base: b.yaml\nobjective: {kind: ipo, beta: 1}\ntrackers: [wandb]\n", "ipo", b=base).recipe
        assert (recipe.trackers, recipe.objective.kind) == (["wandb"], "ipo")  # type: ignore[attr-defined]

    def test_several_levels_from_other_folders(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "c.yaml").write_text(COMMON + "seed: 1\n")
        recipe = load(tmp_path, "base: deep/b.yaml\n", **{"deep/b": "base: c.yaml\nseed: 2\n"}).recipe
        assert recipe.seed == 2
        assert "base" not in dump_recipe(recipe, "dpo")

    def test_a_fault_has_its_file_and_line(self, tmp_path: Path) -> None:
        said = faults(tmp_path, "base: b.yaml\nseed: -1\n", b=COMMON + "train:\n  steps: 0\n")
        assert said.splitlines() == [
            "r.yaml:2: seed: expected at least 0, found -1",
            "b.yaml:5: train.steps: expected at least 1, found 0",
        ]

    @pytest.mark.parametrize(
        ("text", "base", "message"),
        [
            ("base: b.yaml\n", "base: r.yaml\n", "b.yaml:1: base: recipes that are each other's base: r.yaml → b.yaml → r.yaml"),
            ("base: a.yaml\n", COMMON, "r.yaml:1: base: a.yaml: no such file. did you mean b.yaml?"),
            ("base: [b.yaml]\n", COMMON, "r.yaml:1: base: expected the file of another recipe. name one"),
        ],
    )
    def test_one_that_cannot_be_used(self, text: str, base: str, message: str, tmp_path: Path) -> None:
        assert faults(tmp_path, text, b=base).startswith(message)


def test_a_recipe_may_say_which_command_it_is_for(tmp_path: Path) -> None:
    assert load(tmp_path, COMMON + "stage: dpo\n").stage == "dpo"
    assert faults(tmp_path, COMMON + "stage: sft\n") == "r.yaml:4: stage: this recipe is for sft, not for dpo. run rlhf sft"
    assert "did you mean dpo?" in faults(tmp_path, COMMON + "stage: dop\n")


class TestEnvironment:
    def test_a_variable_in_any_text_is_not_written_down(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOST", "http://inside:8000")
        text = "models: {a: m}\nprompts: x.jsonl\noutput: o\nreward: [{judge: {endpoint: '${HOST}/v1', model: m}}]\n"
        recipe = load(tmp_path, text, "eval").recipe
        assert isinstance(recipe, EvalRecipe) and recipe.reward is not None
        assert recipe.reward[0].judge == Judge("http://inside:8000/v1", "m")
        assert "endpoint: ${HOST}/v1" in dump_recipe(recipe, "eval")

    def test_one_that_is_not_set_is_told(self, tmp_path: Path) -> None:
        said = faults(tmp_path, COMMON + "rollout: {}\nreward: [{name: '${NO_SUCH}', length: {max: 3}}]\n")
        assert said == "r.yaml:5: reward.0.name: the environment variable NO_SUCH is not set. set it, or write it out"

    def test_env_is_set_before_anything_is_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_PROJECT", "before")
        monkeypatch.delenv("SOME_FLAG", raising=False)
        (tmp_path / "r.yaml").write_text(COMMON + "env: {WANDB_PROJECT: mine, SOME_FLAG: true}\n")
        assert rlhf("dpo", tmp_path / "r.yaml", "--check") != 0  # there is no model
        assert (os.environ["WANDB_PROJECT"], os.environ.pop("SOME_FLAG")) == ("mine", "true")

    @pytest.mark.parametrize("line", ["HF_TOKEN: x", "MY: hf_abcdef", "WANDB_API_KEY: 1", "DB_PASSWORD: x"])
    def test_env_is_no_place_for_a_secret(self, line: str, tmp_path: Path) -> None:
        assert "looks like a secret, and a recipe is kept and shown" in faults(tmp_path, COMMON + f"env: {{{line}}}\n")


def test_trailing_values_are_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(COMMON)
    assert rlhf("dpo", tmp_path / "r.yaml", "seed=-4", "train.steps=0", "--check") == 2
    said = capsys.readouterr().err
    assert "--set seed: expected at least 0, found -4" in said and "--set train.steps: expected at least 1" in said
    assert rlhf("dpo", tmp_path / "r.yaml", "seed", "--check") == 2
    assert "seed: after the recipe stand values, KEY=VALUE" in capsys.readouterr().err


def test_trackers_may_have_a_project_and_a_name(tmp_path: Path) -> None:
    recipe = load(tmp_path, COMMON + "trackers: {wandb: {project: x, name: y}, tensorboard: {project: x}}\n").recipe
    assert recipe.trackers == {"wandb": Tracker("x", "y"), "tensorboard": Tracker("x")}  # type: ignore[attr-defined]


def test_a_shell_completes_commands() -> None:
    settings = os.environ | {"_RLHF_COMPLETE": "complete_bash", "COMP_WORDS": "rlhf s", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "rlhf_cli"], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sft", "schema"]


class TestSchema:
    @pytest.mark.parametrize("stage", STAGES)
    def test_is_one(self, stage: str) -> None:
        jsonschema.Draft202012Validator.check_schema(recipe_schema(stage))

    def test_accepts_every_recipe_of_ours(self) -> None:
        found, schemas = 0, {stage: jsonschema.Draft202012Validator(recipe_schema(stage)) for stage in STAGES}
        for path in sorted((ROOT / "recipes").rglob("*.yaml")):
            recipe = yaml.safe_load(path.read_text())
            command = next(stage for stage in STAGES if _loads(stage, path))
            schemas[command].validate(recipe)
            found += 1
        assert found > 15

    def test_accepts_what_a_run_records(self, tmp_path: Path) -> None:
        recipe = load(
            tmp_path,
            COMMON + "reward: [{function: f.py:g}]\nobjective: {kind: grpo}\nrollout: {responses_per_prompt: 2}\n",
            "ppo",
        )
        assert isinstance(recipe.recipe, PpoRecipe)
        jsonschema.validate(yaml.safe_load(dump_recipe(recipe.recipe, "ppo")), recipe_schema("ppo"))

    @pytest.mark.parametrize(
        "change",
        [
            {"sede": 1},
            {"seed": "one"},
            {"seed": -1},
            {"train": {"schedule": "cosin"}},
            {"train": {"betas": [0.9]}},
            {"objective": {"kind": "sigmoid"}},
            {"objective": {"kind": "simpo", "label_smoothing": 0.1}},
            {"data": {"train": []}},
            {"data": {"train": {"paht": "x"}}},
            {"lora": {"r": 0}},
        ],
    )
    def test_rejects_what_the_loader_refuses(self, change: dict[str, Any], tmp_path: Path) -> None:
        recipe = yaml.safe_load(COMMON) | change
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        with pytest.raises(UsageError):
            load_recipe("dpo", tmp_path / "r.yaml")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe, recipe_schema("dpo"))


def _loads(stage: str, path: Path) -> bool:
    try:
        load_recipe(stage, path)
    except UsageError:
        return False
    return True
