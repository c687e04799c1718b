"""Runs on the policy's own responses: every kind to its end with the metrics it names, and every fault with its message."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_cli import sections
from rlhf_cli.cli import main
from rlhf_cli.errors import NumberError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.rollout import generate, reward_models
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.runs.manifest import weights_hash
from rlhf_cli.stages import ppo, training
from tests.models.tiny_backbone import draw_trees, packed_logps, plain_logps
from tests.ranks import launch
from tests.tiny import forget_functions, make_base, read_lines, rlhf, split_lines, write_pairs, write_recipe

REWARDS = """
from math import nan, sin
from pathlib import Path

def wave(prompts, responses):
    return [sin(len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]

def letters(prompts, responses):
    return [len(response) / 10 for response in responses]

def even(prompts, responses):
    return [len(response) % 2 for response in responses]

def tied(prompts, responses):
    return [1.0 for _ in responses]

def calls(more):
    counter = Path(__file__).with_suffix(".calls")
    count = more + (int(counter.read_text()) if counter.exists() else 0)
    counter.write_text(str(count))
    return count

def fails(prompts, responses):
    if calls(1) == 2:
        raise KeyError("politeness")
    return wave(prompts, responses)

def spoils(prompts, responses):
    values = wave(prompts, responses)
    return [*values[:-1], nan] if calls(1) == 2 else values
"""
"""`fails` and `spoils` go wrong the second time that they are called, as a file beside them counts."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose responses often end, 13 prompts, a reward model `rm` and functions."""
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 13)
    (folder / "rewards.py").write_text(REWARDS)
    train = {"steps": 3, "learning_rate": 0.02, "save_every": None}
    parts = folder / "base", folder / "pairs.jsonl", folder / "rm"
    assert rlhf("train-rm", write_recipe(folder / "rm.yaml", *parts, lora={"r": 4}, train=train)) == 0
    return folder


def recipe(home: Path, output: Path, functions: Path | None = None, **sections: Any) -> Path:
    """3 steps of 4 prompts; MODEL, ROWS and FILE stand for the reward model, the rows and the file of functions."""
    known = {"MODEL": home / "rm", "ROWS": home / "pairs.jsonl", "FILE": functions or home / "rewards.py"}
    text = json.dumps({"rollout": {"max_new_tokens": 6}, "reward": WAVE} | sections)
    for name, path in known.items():
        text = text.replace(name, str(path))
    sections = json.loads(text)
    sections["data"] = {"max_length": 80} | sections.pop("data", {})
    sections["train"] = {"steps": 3, "save_every": None} | sections.pop("train", {})
    sections["lora"] = sections.pop("lora", {"r": 4})
    return write_recipe(output.with_suffix(".yaml"), home / "base", home / "pairs.jsonl", output, **sections)


MODEL, WAVE, LETTERS = [{"model": "MODEL"}], [{"function": "FILE:wave"}], [{"function": "FILE:letters"}]
TWO = [{"model": "MODEL", "name": "judge"}, {"function": "FILE:letters", "weight": 0.5}]
ONCE: dict[str, Any] = {"epochs": 1}
SEVERAL: dict[str, Any] = {"max_new_tokens": 6, "responses_per_prompt": 3}
DAPO = {"kind": "grpo", "mean_over": "tokens", "clip_high": 0.28, "ties": "redraw", "overlong": 2}

PAIRED = ("odpo", "simpo", "bco", "rebel", "orpo", "slic", "cal_dpo", "apo_down", "nca", "exo", "discopop", "wpo", "tdpo2", "aot")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"objective": {"epochs": 2, "minibatches": 2}, "reward": MODEL, "gold": LETTERS}),
    "ppo function": ("ppo", {"objective": ONCE, "value": {"init": "policy", "learning_rate": 1e-3}}),
    "ppo ptx": ("ppo", {"objective": ONCE, "ptx": {"data": "ROWS"}}),
    "ppo full": ("ppo", {"objective": ONCE, "reward": MODEL, "lora": None}),
    "ppo min": ("ppo", {"objective": ONCE, "reward": TWO, "reward_combine": "min"}),
    "ppo penalised": ("ppo", {"objective": ONCE, "rollout": {"max_new_tokens": 6, "missing_eos_penalty": 2.0}}),
    "ppo target": ("ppo", {"objective": ONCE, "kl": {"coef": 0.2, "target": 0.01, "horizon": 20}}),
    "bandit": ("ppo", {"objective": {"kind": "bandit", "epochs": 1}, "reward": TWO, "reward_combine": "mean_minus_std"}),
    "reinforce mean": ("ppo", {"objective": {"kind": "reinforce", "whiten": True}, "kl": {"coef": 0}}),
    "reinforce ema": ("ppo", {"objective": {"kind": "reinforce", "baseline": "ema"}}),
    "rloo": ("ppo", {"objective": {"kind": "rloo", "minibatches": 4}, "rollout": SEVERAL}),
    "rloo k2": ("ppo", {"objective": {"kind": "rloo"} | ONCE, "rollout": SEVERAL, "kl": {"estimator": "k2"}}),
    "grpo": ("ppo", {"objective": {"kind": "grpo"} | ONCE, "rollout": SEVERAL | {"temperature": 0.7}}),
    "grpo k3": ("ppo", {"objective": {"kind": "grpo"} | ONCE, "rollout": SEVERAL, "kl": {"estimator": "k3"}}),
    "Dr. GRPO": ("ppo", {"objective": {"kind": "grpo", "scale": "none", "mean_over": "constant"} | ONCE, "rollout": SEVERAL}),
    "DAPO": ("ppo", {"objective": DAPO | ONCE, "rollout": SEVERAL, "kl": {"coef": 0}, "reward": [{"function": "FILE:even"}]}),
    "GSPO": ("ppo", {"objective": {"kind": "grpo", "ratio": "sequence", "clip": 3e-4, "clip_high": 4e-4}, "rollout": SEVERAL}),
    "CISPO": ("ppo", {"objective": {"kind": "grpo", "surrogate": "cispo", "epochs": 2}, "rollout": SEVERAL}),
    "grpo ptx": ("ppo", {"objective": {"kind": "grpo"}, "rollout": SEVERAL, "ptx": {"data": "ROWS", "coef": 0.1}}),
    "dpo": ("dpo", {"gold": LETTERS, "reward": MODEL}),
    "dpo in turns": ("dpo", {"rollout": {"max_new_tokens": 6, "refresh": 2}}),
    "dpo full": ("dpo", {"lora": None}),
    "ipo": ("ipo", {"rollout": SEVERAL}),
    "kto": ("kto", {"rollout": SEVERAL | {"refresh": 2}}),
    "kto bco": ("kto", {"objective": {"kind": "bco"}}),
    "plackett_luce": ("dpo", {"objective": {"kind": "plackett_luce"}, "rollout": SEVERAL}),
    **{kind: ("dpo", {"objective": {"kind": kind}}) for kind in PAIRED},
    "kto apo_zero": ("kto", {"objective": {"kind": "apo_zero"}}),
}
"""Name → command, and what its recipe says beside the common keys."""

FAST = ("ppo", "reinforce ema", "dpo in turns", "kto")
VALUED = [
    name for name, (stage, own) in KINDS.items() if stage == "ppo" and own["objective"].get("kind", "ppo") in ("ppo", "bandit")
]

Finished = Callable[[str], tuple[Path, recipes.Recipe]]


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run of a kind, made once, and its recipe."""
    done: dict[str, tuple[Path, recipes.Recipe]] = {}

    def run(name: str) -> tuple[Path, recipes.Recipe]:
        if name not in done:
            command, sections = KINDS[name]
            output = tmp_path_factory.mktemp("kind") / "run"
            path = recipe(home, output, **sections | {"data": {"holdout": 0.2}, "train": {"eval_every": 3}})
            assert rlhf(command, path) == 0
            done[name] = output, load_recipe(command, path).recipe
        return done[name]

    return run


def kinds() -> list[Any]:
    """The kinds as parameters, most of them slow."""
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in KINDS]


@pytest.mark.parametrize("name", kinds())
def test_a_kind_runs_to_its_end(name: str, finished: Finished) -> None:
    run, own = finished(name)
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["steps"], manifest["stage"]) == ("finished", 3, own.stage)
    lines = split_lines(run, "train")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in split_lines(run, "eval")] == [0, 3]
    numbers = [value for line in read_lines(run / "metrics.jsonl") for key, value in line.items() if key != "split"]
    assert all(math.isfinite(value) for value in numbers)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert len(list((run / "model").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("name", kinds())
def test_its_lines_have_the_metrics_it_names(name: str, finished: Finished) -> None:
    """Those of drawn responses stand where some were drawn; held-out lines have nothing else."""
    run, own = finished(name)
    common = {"step", "split", "time"}
    trained, drawn = set(own.training_metrics), set(own.held_out_metrics)
    times = {"time/rollout", "time/score", "time/update"}
    refresh = KINDS[name][1].get("rollout", {}).get("refresh", 1)
    for line in split_lines(run, "train"):
        kept = trained if (line["step"] - 1) % refresh == 0 else trained - drawn - times - {"reward/zero_spread"}
        assert set(line) - common == kept
    assert all(set(line) - common == drawn for line in split_lines(run, "eval"))
    rewards, golds = own.terms
    assert {name for name in drawn if name.startswith(("reward/", "gold/"))} == {
        *(f"reward/{term}" for term in schema_names(rewards)),
        *(f"gold/{term}" for term in schema_names(golds)),
    }


def schema_names(terms: list[sections.Reward]) -> list[str]:
    return [term.name or ("rm" if term.model else str(term.function).rpartition(":")[2]) for term in terms]


@pytest.mark.slow
def test_a_response_that_does_not_end_is_penalised(finished: Finished) -> None:
    run, _ = finished("ppo penalised")
    for line in split_lines(run, "train") + split_lines(run, "eval"):
        assert line["objective/scores"] == pytest.approx(line["reward/wave"] - 2 * (1 - line["response/eos_rate"]), abs=1e-12)
    assert 0 < split_lines(run, "train")[0]["response/eos_rate"] < 1


@pytest.mark.slow
def test_the_kl_coefficient_follows_the_kl(finished: Finished) -> None:
    """Ziegler et al. 2019: 4 responses of a horizon of 20 move it by at most 20 % of a fifth."""
    run, _ = finished("ppo target")
    lines = split_lines(run, "train")
    assert lines[0]["kl_coef"] == 0.2
    for one, two in pairwise(lines):
        error = min(max(one["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        assert two["kl_coef"] == pytest.approx(one["kl_coef"] * (1 + error * 4 / 20), rel=1e-12)
    assert lines[1]["kl_coef"] == pytest.approx(0.192, rel=1e-12), "the first KL is 0"


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Backbone]:
    """The backbones of the runs that follow."""
    found: list[Backbone] = []
    original = training.train_job

    def noting(job: Any, folder: Any, backbone: Backbone, **others: Any) -> Any:
        found.append(backbone)
        return original(job, folder, backbone, **others)

    monkeypatch.setattr(ppo, "train_job", noting)
    return found


TREES = draw_trees(6, branches=2)


def test_the_base_stays_and_plain_peft_loads_the_policy(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged into for every rollout, and yet the base has its bits; so have the frozen roles."""
    backbones, before = noted(monkeypatch), weights_hash(home / "base")
    assert rlhf("ppo", recipe(home, tmp_path / "run", reward=MODEL, train={"learning_rate": 0.01, "steps": 2})) == 0
    (backbone,) = backbones
    assert weights_hash(home / "base") == before
    base = load_file(home / "base" / "model.safetensors")
    named = dict(backbone.model.named_parameters())
    own = {name.replace(".base_layer", ""): p for name, p in named.items() if ".lora_" not in name}
    assert own.keys() == base.keys() and all(torch.equal(own[name], base[name]) for name in base)
    for role, run in {"policy": tmp_path / "run", "reward": home / "rm"}.items():
        saved = load_file(run / "model" / "adapter_model.safetensors")
        adapter = {name: p for name, p in named.items() if f".{role}." in name}
        assert len(adapter) == 14
        assert all(torch.equal(p, saved[f"base_model.model.{name.replace(f'.{role}.', '.')}"]) for name, p in adapter.items())
    plain = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        bare = plain_logps(plain, TREES)
        loaded = plain_logps(PeftModel.from_pretrained(plain, tmp_path / "run" / "model").eval(), TREES)
        assert float((packed_logps(backbone, TREES, 4096) - loaded).abs().max()) < 1e-5
        assert float((packed_logps(backbone, TREES, 4096, "reference") - bare).abs().max()) < 1e-5
    assert float((loaded - bare).abs().max()) > 1e-2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["base_model"]["weights_hash"] == before
    assert [parent["path"] for parent in manifest["parents"]] == [str(home / "rm")]


@pytest.mark.slow
def test_plain_transformers_loads_a_policy_that_was_trained_whole(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen copy of the base, which the other roles share, has its bits at the end."""
    backbones = noted(monkeypatch)
    assert rlhf("ppo", recipe(home, tmp_path / "run", reward=MODEL, lora=None, train={"steps": 2})) == 0
    (backbone,) = backbones
    base = load_file(home / "base" / "model.safetensors")
    host = backbone.at("reference")
    own = {n.replace(".base_layer", ""): p for n, p in host.model.named_parameters() if ".lora_" not in n}
    assert own.keys() == base.keys() and all(torch.equal(own[name], base[name]) for name in base)
    with torch.no_grad():
        loaded = plain_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval(), TREES)
        assert float((packed_logps(backbone, TREES, 4096) - loaded).abs().max()) < 1e-5
        bare = plain_logps(AutoModelForCausalLM.from_pretrained(home / "base").eval(), TREES)
    assert float((loaded - bare).abs().max()) > 1e-2


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    """A file of the test's own: it counts its calls beside itself, and a file is imported once a process."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def broken_off(home: Path, functions: Path, function: str, code: int) -> Path:
    """A recipe whose function went wrong in step 2 of 3; its run has a checkpoint of step 1."""
    run = functions.parent / "run"
    reward = [{"function": f"FILE:{function}"}]
    path = recipe(home, run, functions, objective=ONCE, reward=reward, train={"save_every": 1})
    assert rlhf("ppo", path) == code
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (run / "manifest.json").exists() and not (run / "model").exists()
    return path


def resumes(home: Path, path: Path, function: str) -> None:
    """The run goes on, and ends as one whose function was never wrong."""
    run, whole = path.with_suffix(""), path.with_name("whole")
    assert rlhf("ppo", path, "--resume") == 0
    assert rlhf("ppo", path, "--output", whole) == 0
    times = ("time/rollout", "time/score", "time/update")
    assert read_lines(run / "metrics.jsonl", *times) == read_lines(whole / "metrics.jsonl", *times)
    one, two = (folder / "model" / "adapter_model.safetensors" for folder in (run, whole))
    assert one.read_bytes() == two.read_bytes()


def test_a_function_that_raises(home: Path, functions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken_off(home, functions, "fails", 3)
    first, second, third = capsys.readouterr().err.splitlines()[-3:]
    line = REWARDS.splitlines().index('        raise KeyError("politeness")') + 1
    assert first.startswith(f"error: step 2 (what was trained before is saved): {path}:") and first.endswith(
        f"reward.0.function: {functions}:fails failed on 4 responses"
    )
    assert second == f"error: {functions}:{line}: KeyError: 'politeness'"
    assert third.startswith(f"error: the first: {home / 'pairs.jsonl'}:") and "prompt '" in third and ", response '" in third
    resumes(home, path, "fails")


def test_after_a_function_raised_the_run_is_still_the_one_that_was_started(
    home: Path, functions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken_off(home, functions, "fails", 3)
    run = path.with_suffix("")
    assert {"recipe.yaml", "inputs.json", "data.json"} <= {file.name for file in run.iterdir()}
    capsys.readouterr()
    assert rlhf("ppo", path, "--resume", "--set", "kl.coef=0.5") == 2
    assert "kl.coef  0.05  0.5" in capsys.readouterr().err


@pytest.mark.parametrize(("function", "code"), [("fails", 3), ("spoils", 3)])
def test_what_was_done_before_a_function_failed_is_kept(function: str, code: int, home: Path, functions: Path) -> None:
    """Whatever `save_every` is, as with a loss that is NaN."""
    run = functions.parent / "run"
    assert rlhf("ppo", recipe(home, run, functions, objective=ONCE, reward=[{"function": f"FILE:{function}"}])) == code
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_function_that_fails_on_held_out_prompts(home: Path, functions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fourth call is for the held-out prompts after step 2: step 0's, step 1, step 2, these."""
    run = functions.parent / "run"
    functions.write_text(functions.read_text() + FOURTH)
    reward = [{"function": "FILE:fourth"}]
    train = {"eval_every": 2, "save_every": None}
    path = recipe(home, run, functions, objective=ONCE, reward=reward, train=train, data={"holdout": 0.2})
    assert rlhf("ppo", path) == 3
    assert "error: held-out responses after step 2 (what was trained before is saved): " in capsys.readouterr().err
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert (run / "recipe.yaml").exists() and (run / "inputs.json").exists()
    assert rlhf("ppo", path, "--resume") == 0


FOURTH = """
calls = []
def fourth(prompts, responses):
    calls.append(len(prompts))
    if len(calls) == 4:
        raise ValueError("four")
    return [float(len(response)) for response in responses]
"""


def test_a_mended_function_goes_on_with_the_run(home: Path, functions: Path) -> None:
    """Its file has changed since the run was started; each `rlhf` imports it anew, as it is here."""
    path = broken_off(home, functions, "fails", 3)
    functions.write_text(REWARDS.replace('raise KeyError("politeness")', "pass"))
    forget_functions()
    assert rlhf("ppo", path, "--resume") == 0
    assert [line["step"] for line in read_lines(path.with_suffix("") / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_a_function_that_returns_nan(home: Path, functions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken_off(home, functions, "spoils", 3)
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.endswith(f"{functions}:spoils gave a response the score nan")
    assert second.startswith(f"error: {home / 'pairs.jsonl'}:") and "prompt '" in second and ", response '" in second
    resumes(home, path, "spoils")


@pytest.mark.parametrize("held_out", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rule_on_the_kl_ends_a_run(held_out: bool, home: Path, tmp_path: Path) -> None:
    """The first KL above 0 that is logged, in training or held out, is the last."""
    settings = {"stop_if": {"objective/kl": {"above": 0.001}}, "steps": 12, "learning_rate": 0.02}
    path = recipe(home, tmp_path / "run", objective=ONCE, train=settings, data={"holdout": 0.2 if held_out else 0.0})
    assert rlhf("ppo", path) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kl = lines[-1]["objective/kl"]
    assert manifest["status"] == f"stopped: objective/kl {kl:.4g} is above 0.001"
    assert manifest["steps"] == lines[-1]["step"] < 12
    assert [line["objective/kl"] > 0.001 for line in lines] == [False] * (len(lines) - 1) + [True]
    assert {line["split"] for line in lines} == ({"train", "eval"} if held_out else {"train"})
    assert rlhf("ppo", path, "--resume") == 0, "it is finished"
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == len(lines)


TIED: dict[str, Any] = {"reward": [{"function": "FILE:tied"}], "rollout": SEVERAL}


@pytest.mark.parametrize(
    "kind",
    [
        "dpo",
        pytest.param("odpo", marks=pytest.mark.slow),
        pytest.param("orpo", marks=pytest.mark.slow),
        pytest.param("bco", marks=pytest.mark.slow),
        pytest.param("wpo", marks=pytest.mark.slow),
        "aot",
        "plackett_luce",
        "kto",
    ],
)
def test_ties_teach_nothing(kind: str, home: Path, tmp_path: Path) -> None:
    """No pair, no loss, no update: the adapter is as PEFT made it, with B = 0."""
    command = "kto" if kind == "kto" else "dpo"
    assert rlhf(command, recipe(home, tmp_path / "run", objective={"kind": kind}, train={"steps": 2}, **TIED)) == 0
    lines = split_lines(tmp_path / "run", "train")
    assert [(line["loss"], "grad_norm" in line, line["objective/scores"]) for line in lines] == [(0, False, 1)] * 2
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) == 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.slow
def test_with_ties_a_policy_gradient_learns_nothing_but_the_kl(home: Path, tmp_path: Path) -> None:
    """rloo against a constant score, without a penalty."""
    sections = TIED | {"objective": {"kind": "rloo"}, "kl": {"coef": 0}, "train": {"steps": 2}}
    assert rlhf("ppo", recipe(home, tmp_path / "run", **sections)) == 0
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) == 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "rloo", "dpo", "kto"])
def test_a_batch_of_one_prompt(name: str, home: Path, tmp_path: Path) -> None:
    """13 prompts in batches of 6: the third step has one; mini-batches are as many as there are prompts."""
    command, sections = KINDS[name]
    assert rlhf(command, recipe(home, tmp_path / "run", **sections | {"train": {"batch_size": 6}})) == 0
    assert len(split_lines(tmp_path / "run", "train")) == 3


@pytest.fixture
def with_ptx(home: Path, tmp_path: Path) -> Path:
    """A finished run of one step that read `ptx.jsonl` beside it."""
    (tmp_path / "ptx.jsonl").write_text((home / "pairs.jsonl").read_text())
    path = recipe(home, tmp_path / "run", objective=ONCE, ptx={"data": str(tmp_path / "ptx.jsonl")}, train={"steps": 1})
    assert rlhf("ppo", path) == 0
    return path


def test_other_ptx_rows_are_refused_on_resume(
    with_ptx: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert {str(home / "pairs.jsonl"), str(tmp_path / "ptx.jsonl"), "reward", "reference"} <= inputs.keys()
    with (tmp_path / "ptx.jsonl").open("a") as file:
        file.write('{"prompt": "one", "chosen": "two", "rejected": "three"}\n')
    capsys.readouterr()
    assert rlhf("ppo", with_ptx, "--resume") == 2
    error = capsys.readouterr().err
    assert "what the run was started with has changed" in error and f"  {tmp_path / 'ptx.jsonl'}: " in error


def test_the_manifest_names_all_data(with_ptx: Path, home: Path, tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"].keys() == {str(home / "pairs.jsonl"), str(tmp_path / "ptx.jsonl")}


def test_the_value_may_learn_alone(home: Path, tmp_path: Path) -> None:
    """A policy that stays where it is while the value gets to know it."""
    settings: dict[str, Any] = {"train": {"steps": 2, "learning_rate": 0.0}, "value": {"learning_rate": 1e-3}}
    assert rlhf("ppo", recipe(home, tmp_path / "run", objective=ONCE, **settings)) == 0
    lines = split_lines(tmp_path / "run", "train")
    assert [line["learning_rate"] for line in lines] == [0, 0]
    assert lines[0]["learning_rate/value"] == pytest.approx(1e-3, rel=0.5)
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(float(value.abs().max()) == 0 for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (Backbone, "tempered_logps"),
        pytest.param(reward_models, "score_responses", marks=pytest.mark.slow),
        pytest.param(generate, "choose", marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_while_responses_are_drawn_or_judged(
    module: Any, function: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 4 and what to lower, or a smaller pass and no exit at all; not an error that nobody foresaw, which is exit 1."""
    original, calls = getattr(module, function), [0]

    def scarce(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **settings)

    monkeypatch.setattr(module, function, scarce)
    code = rlhf("ppo", recipe(home, tmp_path / "run", objective=ONCE, reward=MODEL))
    assert code == 0 or (code == 4 and "tokens_per_device" in capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "lora"), [(1, None), (3, {"r": 4})], ids=["1-full", "3-lora"])
def test_a_signal_between_two_tokens(
    step: int, lora: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is saved while the adapter is merged into the base is the adapter, and the step is drawn again, the same."""
    path = recipe(home, tmp_path / "run", objective=ONCE, lora=lora, reward=MODEL)
    assert rlhf("ppo", path) == 0
    collect, choose, drawn = PolicySource.collect, generate.choose, []

    def noting(self: PolicySource, number: int, *others: Any) -> Any:
        drawn[:] = [number]
        return collect(self, number, *others)

    def signalled(*arguments: Any) -> Any:
        drawn.append(0)
        if drawn == [step, 0, 0]:
            signal.raise_signal(signal.SIGTERM)
        return choose(*arguments)

    again = tmp_path / "again"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(PolicySource, "collect", noting)
        patch.setattr(generate, "choose", signalled)
        assert rlhf("ppo", path, "--output", again) == 143
    assert drawn == [step, 0, 0]  # and no further token
    assert [folder.name for folder in (again / "checkpoints").iterdir()] == [f"step-{step - 1:08d}"]
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped after step {step - 1} of 3; continue with --resume"
    assert rlhf("ppo", path, "--output", again, "--resume") == 0
    one, two = (next((run / "model").glob("*.safetensors")) for run in (tmp_path / "run", again))
    assert one.read_bytes() == two.read_bytes()


def broken_on_one_rank(*words: str) -> int:
    """`rlhf` on a rank; on the second one, logits that are not finite."""

    def broken(*_: Any) -> Any:
        raise NumberError("the logits of this rank are not finite")

    if os.environ["RANK"] == "1":
        generate.choose = broken
    return main(words)


@pytest.mark.slow
def test_logits_that_are_not_finite_on_one_rank_alone(home: Path, tmp_path: Path) -> None:
    code, errors = launch("ppo", recipe(home, tmp_path / "run"), ranks=2, function=broken_on_one_rank).wait()
    assert code != 0
    assert errors.count("the logits of this rank are not finite") == 1


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_scores_that_are_equal_everywhere_are_said_once(
    kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "constant.py").write_text("def one(prompts, responses):\n    return [1.0] * len(responses)\n")
    run = tmp_path / "run"
    path = recipe(
        home,
        run,
        objective={"kind": kind},
        rollout={"max_new_tokens": 6, "responses_per_prompt": 2},
        reward=[{"function": f"{tmp_path / 'constant.py'}:one"}],
    )
    assert rlhf("ppo", path) == 0
    said = "step 1: all responses to a prompt have one score, for every prompt; nothing says which is better"
    assert capsys.readouterr().err.count(said) == 1
    assert {line["reward/zero_spread"] for line in split_lines(run, "train")} == {1.0}
    assert "**All scores of a prompt were equal in every step:**" in (run / "report.md").read_text()
