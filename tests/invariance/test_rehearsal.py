"""Every stage on a GPU that is rehearsed: no devices meet, the numbers are the CPU's, and what an update launches is bound.

The bounds lie a little above what was measured: who needs more has made a step slower, and says so by raising them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rlhf_cli.training import loop
from tests.rehearsal import CUDA, Counts, Gpu, counts, rehearsal
from tests.stages.tiny_runs import LETTERS, MODEL, PROMPTS, make_home, placed, result, write_eval
from tests.tiny import read_lines, rlhf, write_recipe

FULL = {"lora": None}
DRAWN = {"rollout": {"max_new_tokens": 6}, "reward": [LETTERS]}
PPO: dict[str, Any] = DRAWN | {"objective": {"kind": "ppo", "epochs": 1}}

STAGES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "sft": ("sft", {"data": {"train": "HOME/rows.jsonl"}}, 315, 2),
    "sft, all weights": ("sft", {"data": {"train": "HOME/rows.jsonl"}} | FULL, 230, 2),
    "train-rm": ("train-rm", {}, 355, 2),
    "train-rm, all weights": ("train-rm", FULL, 255, 2),
    "dpo": ("dpo", {}, 470, 2),
    "dpo, all weights": ("dpo", FULL | {"reference": {"cache": False}}, 475, 2),
    "kto": ("kto", {}, 495, 3),
    "online dpo": ("dpo", DRAWN, 470, 2),
    "ppo": ("ppo", PPO | {"reward": [MODEL]}, 700, 3),
    "ppo, all weights": ("ppo", PPO | FULL, 620, 3),
}
"""Name → command, what its recipe says beside the common keys, and at most so many kernels and syncs of an update."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("rehearsal"), "rm", layers=2)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Counts]:
    """What each update of the runs in this test takes."""
    found: list[Counts] = []
    original = loop.optimise

    def counting(*arguments: Any) -> Any:
        before = counts.copy()
        done = original(*arguments)
        found.append(counts - before)
        return done

    monkeypatch.setattr(loop, "optimise", counting)
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_run(name: str, home: Path, updates: list[Counts], tmp_path: Path) -> None:
    command, sections, kernels, syncs = STAGES[name]
    lines = []
    for where in ("cpu", "gpu"):
        more = {"lora": {"r": 4}, "model": {"attention": "sdpa", "dtype": "float32"}} | placed(sections, home)
        more["train"] = {"steps": 2, "save_every": None, "learning_rate": 1e-4, "tokens_per_device": 512}
        path = write_recipe(tmp_path / f"{where}.yaml", home / "base", home / "pairs.jsonl", tmp_path / where, **more)
        if where == "cpu":
            assert rlhf(command, path) == 0
        else:
            with rehearsal():
                assert rlhf(command, path) == 0
        lines.append(read_lines(tmp_path / where / "metrics.jsonl", "memory"))
    assert len(lines[0]) >= 2
    for here, there in zip(*lines, strict=True):
        assert there.pop("split") == here.pop("split")
        if abs(here.get("rewards/margins", 1)) < 1e-5:  # before the first update: rounding, and nothing else
            assert here.pop("rewards/accuracies", 0) <= 1 and there.pop("rewards/accuracies", 0) <= 1
        assert there == pytest.approx(here, rel=1e-5, abs=1e-5)
    last = updates[-1]
    assert kernels * 0.9 < last.kernels.total() <= kernels, last.kernels
    assert last.syncs.total() <= syncs, last.syncs


def test_an_evaluation(home: Path, tmp_path: Path) -> None:
    more = {"models": {"base": "HOME/base"}, "preferences": PROMPTS, "prompts": PROMPTS, "rollout": {"max_new_tokens": 6}}
    found = []
    for where in ("cpu", "gpu"):
        path = write_eval(tmp_path / f"{where}.yaml", home, reward=[MODEL], gold=[LETTERS], attention="sdpa", **more)
        if where == "cpu":
            assert rlhf("eval", path) == 0
        else:
            with rehearsal():
                assert rlhf("eval", path) == 0
        found.append(result(path.with_suffix(""))["models"])
    here, there = map(tree_leaves, found)
    assert len(here) > 20 and all(b == pytest.approx(a, rel=1e-5, abs=1e-5) for a, b in zip(here, there, strict=True))


def test_what_must_not_meet() -> None:
    with rehearsal():
        there = torch.arange(3.0, device=CUDA)
        assert isinstance(there, Gpu) and str(there.device) == "cuda:0" and float(there.sum()) == 3
        with pytest.raises(RuntimeError, match="add: tensors on cuda:0 and on the CPU meet"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="cannot become one of numpy"):
            there.numpy()
        before = counts.copy()
        (there.view(3, 1).T * 2).relu()
        assert (counts - before).kernels == {"mul": 1, "relu": 1} and not (counts - before).syncs
        for waits in (lambda: there.tolist(), lambda: there[there > 1], lambda: there.cpu(), lambda: there.new_tensor([1.0])):
            before = counts.copy()
            waits()
            assert (counts - before).syncs.total() == 1
