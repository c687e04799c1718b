"""What vLLM is asked for and what is made of its answer, on a stand-in for the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.rollout.generate import Request
from rlhf_cli.rollout.vllm import VllmEngine
from rlhf_cli.sections import Warping

PROMPTS = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was called, in order. Sample k of a prompt is its first id, k and, for even k, the first end."""
    found: list[tuple[str, dict[str, Any]]] = []

    class LLM:
        def __init__(self, **given: Any) -> None:
            found.append(("LLM", given))

        def generate(self, prompts: Any, params: Any, **more: Any) -> Any:
            adapter = more["lora_request"]
            folder = Path(adapter[2]) if adapter else Path(found[-1][1]["model"])
            found.append(("generate", more | {"params": params, "files": sorted(path.name for path in folder.iterdir())}))
            return [
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(token_ids=(prompt["prompt_token_ids"][0], k, *(own["stop_token_ids"][:1] * (k % 2 == 0))))
                        for k in range(own["n"])
                    ]
                )
                for prompt, own in zip(prompts, params, strict=True)
            ]

    library, lora, requests = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(library).update(LLM=LLM, SamplingParams=dict, TokensPrompt=dict)
    vars(requests)["LoRARequest"] = lambda *given: given
    for module in (library, lora, requests):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def save_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 12}))


def save_model(folder: Path) -> None:
    (folder / "config.json").touch()


def draw(engine: VllmEngine, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "numbers": [4, 9],
        "samples": 2,
        "max_new_tokens": 20,
        "temperature": 0.7,
        "seed": 1,
    }
    drawn = engine.generate(Request(PROMPTS, ends=(2, 3), **(settings | changes)))
    return [[(one.ids.tolist(), one.ended) for one in row] for row in drawn]


def test_an_adapter_is_saved_and_named_anew_for_every_draw(calls: list[tuple[str, dict[str, Any]]]) -> None:
    engine = VllmEngine("org/base", "abc", "bfloat16", save_adapter)
    wanted = [[([5, 0, 2], True), ([5, 1], False)], [([8, 0, 2], True), ([8, 1], False)]]
    assert draw(engine) == wanted
    assert draw(engine, seed=2) == wanted
    assert [name for name, _ in calls] == ["LLM", "generate", "generate"]
    start = calls[0][1]
    assert (start["model"], start["revision"], start["dtype"]) == ("org/base", "abc", "bfloat16")
    assert (start["enable_lora"], start["max_lora_rank"], start["skip_tokenizer_init"]) == (True, 16, True)
    assert [more["lora_request"][:2] for _, more in calls[1:]] == [("draw-1", 1), ("draw-2", 2)]
    assert calls[2][1]["files"] == ["adapter_config.json"]
    assert not Path(calls[2][1]["lora_request"][2]).exists()


@pytest.mark.parametrize("key", ["target_parameters", "trainable_token_indices"])
def test_an_adapter_of_experts_or_tokens_is_refused(key: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    def save(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, key: ["x"]}))

    with pytest.raises(UsageError, match=r"rollout.engine: vllm reads no adapters of experts or of tokens"):
        draw(VllmEngine("base", None, "float32", save))
    assert calls == []


def test_each_prompt_has_its_own_seed_and_our_ends_alone(calls: list[tuple[str, dict[str, Any]]]) -> None:
    engine = VllmEngine("base", None, "float32", save_adapter)
    draw(engine)
    draw(engine, numbers=[9, 4])
    draw(engine, seed=2)
    first, swapped, other = (more["params"] for name, more in calls if name == "generate")
    seeds = [params.pop("seed") for params in first]
    assert [params["seed"] for params in swapped] == seeds[::-1]
    assert len({*seeds, *(params["seed"] for params in other)}) == 4
    asked = {"n": 2, "temperature": 0.7, "max_tokens": 20, "stop_token_ids": [2, 3], "ignore_eos": True}
    assert first == [asked | {"detokenize": False, "skip_special_tokens": False}] * 2


def test_what_warps_the_distribution_is_passed_on(calls: list[tuple[str, dict[str, Any]]]) -> None:
    warping = Warping(top_p=0.9, top_k=40, min_p=0.0, repetition_penalty=1.1)
    draw(VllmEngine("base", None, "float32", save_adapter), warping=warping)
    params = calls[1][1]["params"][0]
    assert {name: params.get(name) for name in vars(warping)} == {
        "top_p": 0.9,
        "top_k": 40,
        "min_p": None,
        "repetition_penalty": 1.1,
    }


def test_greedy_samples_are_one_response_each(calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert draw(VllmEngine("base", None, "float32", save_adapter), temperature=0.0)[1] == [([8, 0, 2], True)] * 2
    assert calls[1][1]["params"][0]["n"] == 1


def test_all_weights_are_loaded_anew_for_every_draw(calls: list[tuple[str, dict[str, Any]]]) -> None:
    engine = VllmEngine("base", "abc", "float32", save_model)
    draw(engine)
    draw(engine)
    assert [name for name, _ in calls] == ["LLM", "generate"] * 2
    assert calls[0][1]["revision"] is None
    assert "enable_lora" not in calls[0][1]
    assert calls[3][1]["files"] == ["config.json"]
    assert calls[3][1]["lora_request"] is None


@pytest.mark.parametrize("save", [save_adapter, save_model])
def test_what_cannot_be_drawn_is_refused(
    save: Callable[[Path], None], calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="an empty prompt"):
        VllmEngine("base", None, "float32", save).generate(Request([np.empty(0, np.int32)], [0], 1, 4, 1.0, [2], 0))
    assert calls == []
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MachineError, match=r"vllm cannot be imported .*; pip install 'rlhf-cli\[vllm\]'"):
        VllmEngine("base", None, "float32", save)
