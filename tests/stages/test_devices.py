"""The memory of a step: by the closed formula, by simulation, and what is said of machines that one does not have."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.models import simulate as simulation
from rlhf_cli.models.memory import FITS, auto_budget, estimate
from rlhf_cli.models.simulate import Step, simulate
from rlhf_cli.recipe.load import Devices, load_recipe
from rlhf_cli.stages.devices import Needs, check_memory
from tests.tiny import make_model, rlhf, write_recipe, write_rows

GIB, BF16 = 2**30, torch.bfloat16


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 128256) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=False, **sizes
    )


LLAMA_8B, SMALL = llama(4096, 14336, 32, 32), llama(256, 1024, 4, 8, 32000)


def model_with(checkpointing: bool, **more: Any) -> sections.Model:
    return sections.Model("", gradient_checkpointing=checkpointing, **more)


@pytest.mark.parametrize(
    ("rank", "checkpointing", "devices", "tokens", "simulated"),
    [
        (16, True, 8, 4096, 7.7),
        (16, False, 8, 4096, 34.1),
        (16, True, 1, 4096, 18.0),
        (None, True, 8, 4096, 27.9),
        (None, False, 8, 4096, 67.3),
    ],
)
def test_the_formula_agrees_with_what_the_simulation_of_8b_found(
    rank: int | None, checkpointing: bool, devices: int, tokens: int, simulated: float
) -> None:
    """The figures are those of docs/benchmarks.md, which take minutes."""
    memory = estimate(LLAMA_8B, model_with(checkpointing), rank=rank, dtype=BF16, devices=devices, row=1024)
    assert memory.total(tokens) / GIB == pytest.approx(simulated, rel=0.15)


@pytest.mark.parametrize(("rank", "checkpointing", "devices"), [(8, True, 4), (None, False, 4), (8, False, 1)])
def test_the_formula_agrees_with_a_simulation(rank: int | None, checkpointing: bool, devices: int) -> None:
    model, lora = model_with(checkpointing), sections.Lora(r=rank) if rank else None
    parts = simulate(SMALL, Step(model, lora, BF16, devices, 4096, 512))
    memory = estimate(SMALL, model, rank=rank, dtype=BF16, devices=devices, row=512)
    assert memory.total(4096) == pytest.approx(sum(parts.values()), rel=0.15)
    assert parts["weights"] == pytest.approx(memory.weights, rel=0.01)
    assert not dist.is_initialized()


def test_few_layers_stand_for_many() -> None:
    step = Step(model_with(True), sections.Lora(r=8, target_modules=["q_proj"]), BF16, 1, 2048, 512)
    whole, few = (simulate(SMALL, step, layers) for layers in (None, (1, 2)))
    assert sum(few.values()) == pytest.approx(sum(whole.values()), rel=0.001)


def test_what_is_held_of_all_weights_by_hand() -> None:
    """Of 8,030,261,248 parameters an eighth each, in float32, with gradients and AdamW's two moments."""
    memory = estimate(LLAMA_8B, model_with(True), rank=None, dtype=BF16, devices=8)
    parts = memory.parts(4096)
    assert memory.trained == 8_030_261_248
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == (4_015_130_624, 4_015_130_624, 8_030_261_248)
    # Embeddings, head and last norm, 1,050,677,248 parameters, and one of 32 layers.
    assert parts["gathered weights"] == 4 * (1_050_677_248 + (8_030_261_248 - 1_050_677_248) / 32)
    packed = estimate(LLAMA_8B, model_with(True, quantize="4bit"), rank=16, dtype=BF16)
    linear, adapters = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 41_943_040
    assert packed.weights == int(2 * (8_030_261_248 - linear) + 4.127 / 8 * linear + 4 * adapters)


def test_auto_takes_the_largest_budget_that_fits() -> None:
    memory = estimate(LLAMA_8B, model_with(True), rank=16, dtype=BF16, devices=8, row=1024)
    found = auto_budget(memory, 1024, torch.device("cpu"), capacity=24e9)
    assert memory.total(found) <= FITS * 24e9 < memory.total(found + 1)
    assert auto_budget(memory, 10**6, torch.device("cpu"), capacity=24e9) == 10**6


def needs_of(folder: Path, stage: str, capacity: float, *overrides: str) -> Needs:
    (folder / "r.yaml").write_text("model: {path: m}\noutput: o\ndata: {train: x.jsonl}\ntrain: {batch_size: 16}\n")
    recipe: Any = load_recipe(stage, folder / "r.yaml", overrides).recipe
    recipe = dataclasses.replace(recipe, lora=None if recipe.lora is None else sections.Lora())
    frozen = {"m": LLAMA_8B, "rm": LLAMA_8B} if stage == "ppo" else {}
    return Needs(recipe, LLAMA_8B, "m", frozen, BF16, 1000, 8, capacity)


ROLLOUT = ("reward=[{function: f.py:a}]", "rollout={max_new_tokens: 100, responses_per_prompt: 4}")


def test_rollouts_take_the_whole_weights_and_a_cache(tmp_path: Path) -> None:
    memory = needs_of(tmp_path, "ppo", 80e9, *ROLLOUT).memory
    drawing, _ = memory.moments[-1]
    assert drawing["gathered weights"] == 2 * 8_030_261_248
    # 8 rows of a prompt of at most 600 tokens and 100 drawn ones; keys and values of 8 heads of 128 in 32 layers.
    assert drawing["K/V cache"] == 16 * 4 / 8 * (1000 - 3 * 100) * 2 * 32 * 8 * 128 * 2
    # One model beside the policy's base, which all roles with adapters share; the value trains an adapter more.
    assert drawing["other models"] == 2 * 8_030_261_248 // 8
    assert memory.trained == 2 * 41_943_040
    full = needs_of(tmp_path, "ppo", 80e9, "lora=null", *ROLLOUT).memory
    assert full.moments[-1][0]["other models"] == 2 * (2 * 8_030_261_248 // 8) + 16 * 41_943_040


def told(needs: Needs, tokens: int) -> str:
    out = io.StringIO()
    check_memory(needs, tokens, Console(out=out, err=out), imagined=True)
    return out.getvalue()


def test_what_would_make_it_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *_: {"weights": 3.0 * GIB})
    lines = told(needs_of(tmp_path, "sft", 80e9), 4096).splitlines()
    assert lines[0] == "peak per device: 30.7 GiB of 74.5 GiB, in passes of 4,096 tokens, by formula"
    shown = {label: value for label, value in (line.strip().split("  ", 1) for line in lines[3:-2])}
    assert {label: value.strip() for label, value in shown.items()} == {
        "model.gradient_checkpointing: true": "7.7 GiB, fits",
        "model.quantize: 4bit": "28.9 GiB, fits",
        "not sharded": "41.3 GiB, fits",
        "sharded over 16 devices": "29.8 GiB, fits",
        "LoRA, checkpointing and 4bit together": "5.9 GiB, fits",
        "largest train.tokens_per_device": "9,353",
    }
    assert lines[-2:] == ["peak per device, simulated: 3.0 GiB", "  weights 3.0"]
    with pytest.raises(UsageError) as error:
        told(needs_of(tmp_path, "sft", 24e9), 4096)
    assert str(error.value) == (
        "the recipe takes about 30.7 GiB of a device's memory, and 19.0 GiB can be planned with (85% of 22.4 GiB). it fits with "
        "model.gradient_checkpointing: true (7.7 GiB), or with LoRA, checkpointing and 4bit together (5.9 GiB), or with "
        "train.tokens_per_device: 2212"
    )


def test_a_gpu_that_is_here_is_refused_when_its_shortest_passes_do_not_fit(tmp_path: Path) -> None:
    console = Console(out=io.StringIO(), err=io.StringIO())
    check_memory(needs_of(tmp_path, "sft", 24e9), 4096, console, imagined=False)  # shorter passes will do
    with pytest.raises(MachineError, match=r"takes about 30\.7 GiB .* fits with model\.gradient_checkpointing: true"):
        check_memory(needs_of(tmp_path, "sft", 10e9), 4096, console, imagined=False)


def test_a_configuration_and_a_tokenizer_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "m")
    (model / "model.safetensors").unlink()
    recipe = write_recipe(tmp_path / "r.yaml", model, write_rows(tmp_path / "x.jsonl", 20), tmp_path / "run")
    assert rlhf("sft", recipe, "--check", "--devices", "2x1GiB", "train.tokens_per_device=512") == 0
    out = capsys.readouterr().out
    assert re.search(r"devices +2 × 1\.0 GiB, sharded\n", out) and re.search(r"dtype +bfloat16\n", out)
    assert "peak per device: 0.0 GiB of 1.0 GiB, in passes of 512 tokens, by formula" in out
    assert "peak per device, simulated: 0.0 GiB" in out
    assert rlhf("sft", recipe, "--check") == 2
    assert "has no *.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["80GB", "0x80GB", "8x80", "8x0GB", "8 x 80GB"])
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write COUNTxMEMORY, as in 8x80GB"):
        Devices.read(text)
    assert Devices.read("8x80GB") == Devices(8, 80e9) and Devices.read("1x1.5GiB").memory == 1.5 * GIB


def test_devices_are_planned_for_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "m", tmp_path / "x.jsonl", tmp_path / "run")
    assert rlhf("sft", recipe, "--devices", "8x80GB") == 2
    assert "give --check too" in capsys.readouterr().err
