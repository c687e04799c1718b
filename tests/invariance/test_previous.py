"""`reference: {model: previous}`: the policy at the last refresh, by plain PEFT on the weights that were saved then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_cli.data.batches import StepBatches
from rlhf_cli.rollout.source import PreferenceSource
from tests.tiny import make_base, read_lines, rlhf, split_lines, write_pairs, write_recipe

WAVE = """
import math


def wave(prompts, responses):
    return [(1 + math.sin(7 * len(text))) / 2 for text in responses]
"""


WINS = {kind: {"compares": True} for kind in ("sppo", "dno")}
"""What the kinds of self-play want said of a reward."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose responses often end, 13 prompts and a reward."""
    folder = tmp_path_factory.mktemp("previous")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 13)
    (folder / "rewards.py").write_text(WAVE)
    return folder


def recipe(home: Path, output: Path, **sections: Any) -> Path:
    """5 steps, responses drawn before the first, the third and the fifth."""
    known: dict[str, Any] = {
        "lora": {"r": 4},
        "reward": [{"function": f"{home / 'rewards.py'}:wave", **WINS.get(sections["objective"]["kind"], {})}],
        "rollout": {"max_new_tokens": 6, "refresh": 2},
        "data": {"max_length": 80},
        "train": {"steps": 5, "learning_rate": 0.02, "keep_checkpoints": 9},
    }
    return write_recipe(output.with_suffix(".yaml"), home / "base", home / "pairs.jsonl", output, **known | sections)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[StepBatches]:
    """What the runs that follow learn from."""
    found: list[StepBatches] = []
    original = PreferenceSource.collect

    def noting(self: PreferenceSource, *others: Any) -> StepBatches:
        found.append(original(self, *others))
        return found[-1]

    monkeypatch.setattr(PreferenceSource, "collect", noting)
    return found


@torch.no_grad()
def logps(model: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64))
    each = model.eval()(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return each.gather(-1, ids[len(prompt) :, None])[:, 0]


def saved(home: Path, run: Path, step: int) -> Any:
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    return PeftModel.from_pretrained(base, run / "checkpoints" / f"step-{step:08d}" / "model") if step else base


@pytest.mark.parametrize(
    ("stage", "objective"),
    [
        ("dpo", {"kind": "dpo"}),
        ("dpo", {"kind": "rebel"}),
        ("kto", {"kind": "kto"}),
        ("dpo", {"kind": "sppo", "eta": 5}),
        pytest.param("dpo", {"kind": "dno"}, marks=pytest.mark.slow),
    ],
    ids=["dpo", "rebel", "kto", "sppo", "dno"],
)
def test_the_reference_is_the_policy_at_the_last_refresh(
    stage: str, objective: dict[str, Any], home: Path, tmp_path: Path, drawn: list[StepBatches]
) -> None:
    """Of every token that is compared, the mismatched responses of kto among them; the KL is to the start."""
    run = tmp_path / "run"
    asked = {} if objective["kind"] in ("rebel", "sppo", "dno") else {"reference": {"model": "previous"}}
    assert rlhf(stage, recipe(home, run, objective=objective, **asked)) == 0
    assert [batches.first for batches in drawn] == [1, 3, 5]
    start, moved = saved(home, run, 0), 0.0
    for batches in drawn:
        then = saved(home, run, batches.first - 1)
        for tree in (tree for batch in batches.batches for tree in batch):
            assert tree.reference is not None
            assert len(tree.responses) == 2
            for response, known in zip(tree.responses, tree.reference, strict=True):
                wanted = logps(then, tree.prompt, response)
                assert float((torch.from_numpy(known) - wanted).abs().max()) < 2e-5
                moved = max(moved, float((wanted - logps(start, tree.prompt, response)).abs().max()))
    assert moved > 0.01, "the start is another policy by then"
    lines = {line["step"]: line for line in split_lines(run, "train")}
    ratio = "logratio/mean" if stage == "kto" else "rewards/margins"
    assert [abs(lines[step][ratio]) < 1e-5 for step in (1, 2, 3, 4, 5)] == [True, False, True, False, True]
    assert abs(lines[1]["objective/kl"]) < 1e-5
    assert min(abs(lines[3]["objective/kl"]), abs(lines[5]["objective/kl"])) > 1e-3


def test_rebel_starts_each_iteration_from_its_reference(home: Path, tmp_path: Path, drawn: list[StepBatches]) -> None:
    """The loss of the first step after a refresh is the mean square of the leads in reward: all log-ratios are 0."""
    run = tmp_path / "run"
    assert rlhf("dpo", recipe(home, run, objective={"kind": "rebel", "eta": 0.5})) == 0
    losses = [line["loss"] for line in split_lines(run, "train")]
    for batches in drawn:
        scores = [tree.facts.scores or () for tree in batches.batches[0]]
        leads = [(own[0] - own[1]) ** 2 for own in scores]
        assert losses[batches.first - 1] == pytest.approx(sum(leads) / len(leads), abs=1e-4)


@pytest.mark.parametrize(("stage", "kind"), [("dpo", "rebel"), ("kto", "kto"), ("dpo", "sppo")])
def test_a_resumed_run_has_the_reference_that_it_was_stopped_with(stage: str, kind: str, home: Path, tmp_path: Path) -> None:
    """It goes on between two refreshes, from weights that are not those of the reference; the end is the same, to the byte."""
    run, again = tmp_path / "run", tmp_path / "again"
    words = recipe(home, run, objective={"kind": kind}, reference={"model": "previous"})
    assert rlhf(stage, words) == 0
    shutil.copytree(run, again)
    (again / "manifest.json").unlink()
    for step in (4, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    assert rlhf(stage, words, "--output", again, "--resume") == 0
    times = ("time/rollout", "time/score", "time/update")
    assert read_lines(again / "metrics.jsonl", *times) == read_lines(run / "metrics.jsonl", *times)
    one, two = (folder / "model" / "adapter_model.safetensors" for folder in (run, again))
    assert one.read_bytes() == two.read_bytes()


def test_the_default_is_in_the_recipe_that_is_recorded(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """previous for rebel, sppo and dno that draw, start for the rest; a kind without a reference can be repeated from it too."""
    for kind, wanted in {"rebel": "previous", "dno": "previous", "dpo": "start", "simpo": "start"}.items():
        run = tmp_path / kind
        drawn = {"max_new_tokens": 6, "top_p": 0.9}
        words = recipe(home, run, objective={"kind": kind}, rollout=drawn, train={"steps": 1})
        assert rlhf("dpo", words) == 0
        assert f"\nreference:\n  model: {wanted}\n" in (run / "recipe.yaml").read_text()
        said, previous = capsys.readouterr().out, wanted == "previous"
        assert ("reference: the policy at the last refresh (rollout.refresh); objective/kl is to" in said) == (previous)
        assert ("each step begins at its reference" in said) == previous
        assert "they are drawn at temperature 1, top_p 0.9; log-probabilities, KL and entropy are the whole policy's" in said
        assert rlhf("dpo", run / "recipe.yaml", "--output", tmp_path / "again", "--check") == 0
        manifest = json.loads((run / "manifest.json").read_text())
        assert manifest["reference"].get("previous", False) == previous
        alone = "of the KL alone: the loss compares with the policy at the last refresh"
        assert (alone in (run / "report.md").read_text()) == previous
        capsys.readouterr()
