"""What is decided on Apple's MPS, without one; and that nothing in float64 is asked of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rlhf_cli import ranks as ranks_module
from rlhf_cli.errors import UsageError
from rlhf_cli.models import backbone as backbone_module
from rlhf_cli.models.load import refuse_on_mps, resolve_dtype
from rlhf_cli.models.memory import FITS, Memory, auto_budget, is_out_of_memory
from rlhf_cli.ranks import Ranks
from tests.tiny import make_base, read_lines, rlhf, write_pairs, write_recipe

MPS = torch.device("mps")


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A machine that says it has MPS; what accelerate was asked for."""
    asked: dict[str, Any] = {}

    def state(cpu: bool, **_: Any) -> Any:
        asked["cpu"] = cpu
        return SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu") if cpu else MPS)

    for name in ("RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(ranks_module, "PartialState", state)
    yield asked


@pytest.mark.parametrize(
    ("environment", "device"),
    [({}, "mps"), ({"ACCELERATE_USE_CPU": "1"}, "cpu"), ({"RANK": "0"}, "cpu")],
    ids=["alone", "asked for the CPU", "one of several"],
)
def test_the_device(environment: dict[str, str], device: str, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(Ranks().device) == device == str(Ranks(expected=False).device)
    assert mac["cpu"] == (device == "cpu")


def test_cuda_goes_before(mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(Ranks(expected=False).device) == "cuda"


def test_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 14)
    assert resolve_dtype("auto", MPS) == torch.float32
    assert resolve_dtype("bfloat16", MPS) == torch.bfloat16
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 13)
    with pytest.raises(UsageError, match=r"dtype: bfloat16: Apple's MPS has it from macOS 14 on. set float32, or run on the CPU"):
        resolve_dtype("bfloat16", MPS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.attention", "flash"),
        ("model.attention", "flex"),
        ("model.quantize", "4bit"),
        ("model.quantize", "8bit"),
        ("train.optimizer", "adamw_8bit"),
    ],
)
def test_what_has_no_kernels(name: str, value: str) -> None:
    said = f"{name}: {value}: there are no kernels for it on Apple's MPS. take it out, or run on the CPU"
    with pytest.raises(UsageError, match=said):
        refuse_on_mps(MPS, **{name: value})
    refuse_on_mps(torch.device("cuda"), **{name: value})
    refuse_on_mps(MPS, attention="auto", quantize=None, optimizer="adamw")


def test_check_refuses_it(mac: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before weights are read: the model's folder has none."""
    base = make_base(tmp_path / "base")
    rows = write_pairs(tmp_path / "rows.jsonl", 8)
    recipe = write_recipe(tmp_path / "r.yaml", base, rows, tmp_path / "run", model={"attention": "flex"})
    assert rlhf("sft", recipe, "--check") == 2
    assert "error: model.attention: flex: there are no kernels for it on Apple's MPS" in capsys.readouterr().err


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * 2**30)
    memory = Memory(2**30, 0, 2**20, moments=(({"weights": 2**30}, {"activations": 2**20}),))
    assert auto_budget(memory, 1, MPS) == int((FITS * 8 * 2**30 - 2**30) / 2**20)
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)."))


STAND_IN, HOME = torch.device("cpu", 0), torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor that stands for one on MPS."""


class NoFloat64(TorchFunctionMode):
    """The CPU as if cpu:0 were another device, without float64; what is moved there, or computed from that, lies there."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if not isinstance(found, torch.Tensor) or isinstance(found, torch.nn.Parameter) or func is torch.empty:
            return found
        moved = func in (torch.Tensor.to, torch.Tensor.cpu)
        home = func is torch.Tensor.cpu or (moved and HOME in named)
        there = STAND_IN in named or (any(isinstance(x, OnDevice) for x in args) and not home)
        if there:
            NoFloat64.calls += 1
            assert found.dtype != torch.float64, f"{func}"
            return found.as_subclass(OnDevice)
        return found.as_subclass(torch.Tensor) if home else found


@pytest.mark.parametrize("stage", ["dpo", "train-rm", "ppo"])
def test_nothing_on_the_device_is_in_float64(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    rows = write_pairs(tmp_path / "rows.jsonl", 12)
    more: dict[str, Any] = {"train": {"steps": 2, "save_every": None}, "model": {"attention": "sdpa"}}
    if stage == "ppo":
        (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
        more |= {"reward": [{"function": f"{tmp_path / 'f.py'}:score"}], "objective": {"kind": "ppo"}}
        more |= {"rollout": {"max_new_tokens": 6}}
    runs = []
    for name in ("plain", "watched"):
        recipe = write_recipe(tmp_path / "r.yaml", base, rows, tmp_path / name, **more)
        if name == "plain":
            assert rlhf(stage, recipe) == 0
        else:
            monkeypatch.setattr(backbone_module.Backbone, "home", HOME)
            init: Callable[..., None] = backbone_module.Backbone.__init__

            def start(self: Any, *args: Any, init: Any = init, **kwargs: Any) -> None:
                init(self, *args, **kwargs)
                self.device = STAND_IN

            monkeypatch.setattr(backbone_module.Backbone, "__init__", start)
            with NoFloat64():
                assert rlhf(stage, recipe) == 0
        runs.append(read_lines(tmp_path / name / "metrics.jsonl", "memory"))
    assert len(runs[0]) > 1 and NoFloat64.calls > 1000
    for plain, watched in zip(*runs, strict=True):
        del plain["split"], watched["split"]
        assert plain == pytest.approx(watched, rel=1e-5, abs=1e-6)
