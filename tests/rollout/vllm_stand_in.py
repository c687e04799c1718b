"""What stands for vLLM where it is not installed: plain transformers, in its library's place and behind its server's API."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.judges.server import Behaviour, Model, Reply, error

Completions = list[tuple[list[int], list[float]]]


@torch.no_grad()
def complete(model: Any, prompt: list[int], asked: dict[str, Any], *, raw: bool) -> Completions:
    """`n` continuations with the log-probability of each token: at the temperature or, `raw`, at 1."""
    random = torch.Generator().manual_seed(asked["seed"])
    found: Completions = []
    for _ in range(asked["n"]):
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].double()
            warm = (logits / asked["temperature"]).log_softmax(-1)
            ids.append(int(torch.multinomial(warm.exp(), 1, generator=random)))
            logps.append(float((logits.log_softmax(-1) if raw else warm)[ids[-1]]))
        found.append((ids, logps))
    return found


LOADING = threading.Lock()
"""transformers ties no weights while it loads, and of two threads that load at once the second one would leave it so."""


def load(folder: str, base: str | Path | None = None) -> Any:
    """A model, or an adapter on its base."""
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(base or folder)
    return PeftModel.from_pretrained(model, folder).eval() if base else model.eval()


def install(monkeypatch: pytest.MonkeyPatch, *, reloads: bool = True) -> list[str]:
    """Puts a library of that name before imports; what was called, in order. `reloads` False: it keeps its first weights."""
    called: list[str] = []

    class LLM:
        def __init__(self, model: str, logprobs_mode: str, **_: Any) -> None:
            called.append("LLM")
            self.base, self.raw = model, logprobs_mode == "raw_logprobs"
            self.weights = load(model)

        def generate(self, prompts: Any, params: Any, *, use_tqdm: bool, lora_request: Any = None) -> Any:
            called.append("generate")
            model = load(lora_request[2], self.base) if lora_request else self.weights

            def output(ids: list[int], logps: list[float]) -> Any:
                told = [{token: SimpleNamespace(logprob=own)} for token, own in zip(ids, logps, strict=True)]
                return SimpleNamespace(token_ids=ids, logprobs=told)

            drawn = [
                complete(model, prompt["prompt_token_ids"], own, raw=self.raw)
                for prompt, own in zip(prompts, params, strict=True)
            ]
            return [SimpleNamespace(outputs=[output(*one) for one in several]) for several in drawn]

        def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
            called.append(method)
            if reloads:
                self.weights = load(kwargs["weights_path"])

        def apply_model(self, function: Callable[[Any], None]) -> None:
            function(self.weights)

        def reset_prefix_cache(self) -> None:
            called.append("reset_prefix_cache")

    library, lora, requests = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(library).update(LLM=LLM, SamplingParams=dict, TokensPrompt=dict)
    vars(requests)["LoRARequest"] = lambda *given: given
    for module in (library, lora, requests):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


def server(base: Path) -> Behaviour:
    """How `vllm serve BASE --enable-lora` answers, where adapters may be loaded."""
    loaded: dict[str, Any] = {}

    def on_load(body: dict[str, Any]) -> Reply:
        loaded[body["lora_name"]] = load(body["lora_path"], base)
        return 200, {}, b"Success"

    def on_unload(body: dict[str, Any]) -> Reply:
        return (200, {}, b"Success") if loaded.pop(body["lora_name"], None) else error(404, "no such adapter")

    def on_completions(body: dict[str, Any]) -> Reply:
        if body["model"] not in loaded:
            return error(404, "no such model")
        drawn = complete(loaded[body["model"]], body["prompt"], body, raw=True)
        choices = [{"token_ids": ids, "logprobs": {"token_logprobs": logps}} for ids, logps in drawn]
        return 200, {}, json.dumps({"choices": choices}).encode()

    answers: dict[str, Callable[[dict[str, Any]], Reply]]
    answers = {"load_lora_adapter": on_load, "unload_lora_adapter": on_unload, "completions": on_completions}

    def behave(model: Model, message: str) -> Reply:
        path, body = json.loads(message)
        return answers[path.removeprefix("/v1/")](body)

    return behave
