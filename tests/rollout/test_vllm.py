"""What vLLM is asked for and what is made of its answers, on stand-ins for its library and for its server."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.judges import asking
from rlhf_cli.objectives.advantages import truncated_weights
from rlhf_cli.objectives.policy_loss import PolicyLoss
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.generate import Engine, Request
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.rollout.vllm import ServerEngine, VllmEngine
from rlhf_cli.sections import Kl, PolicySampling, VllmServer, Warping
from tests.judges.server import Behaviour, Serve, error, serve
from tests.ranks import SHARDED, launch
from tests.rollout import vllm_stand_in
from tests.tiny import make_base, rlhf, split_lines, write_recipe, write_rows

PROMPTS = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was called, in order. Sample k of a prompt is its first id, k and, for even k, the first end."""
    found: list[tuple[str, dict[str, Any]]] = []

    class LLM:
        def __init__(self, **given: Any) -> None:
            found.append(("LLM", given))

        def generate(self, prompts: Any, params: Any, **more: Any) -> Any:
            adapter = more.get("lora_request")
            files = sorted(path.name for path in Path(adapter[2]).iterdir()) if adapter else []
            found.append(("generate", more | {"params": params, "files": files}))
            return [
                SimpleNamespace(
                    outputs=[
                        drawn(prompt["prompt_token_ids"][0], k, *(own["stop_token_ids"][:1] * (k % 2 == 0)))
                        for k in range(own["n"])
                    ]
                )
                for prompt, own in zip(prompts, params, strict=True)
            ]

        def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
            found.append((method, kwargs | {"files": [path.name for path in Path(kwargs["weights_path"]).iterdir()]}))

        def apply_model(self, function: Callable[[Any], None]) -> None:
            head, other = type("ParallelLMHead", (), {})(), SimpleNamespace()
            head.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: found.append(("pack", {"of": layer})))
            function(SimpleNamespace(modules=lambda: [other, head]))
            assert found[-1] == ("pack", {"of": head})

        def __getattr__(self, name: str) -> Any:
            return lambda: found.append((name, {}))

    def drawn(*ids: int) -> Any:
        """Every token with the log-probability −id/10, beside that of another token."""
        return SimpleNamespace(
            token_ids=ids,
            logprobs=[{own: SimpleNamespace(logprob=-own / 10), -1: SimpleNamespace(logprob=0.0)} for own in ids],
        )

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


def vllm(save: Callable[[Path], None], **start: Any) -> VllmEngine:
    return VllmEngine(save, **({"model": "base", "revision": None, "dtype": "float32"} | start))


def draw(engine: Engine, **changes: Any) -> Any:
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
    engine = vllm(save_adapter, model="org/base", revision="abc", dtype="bfloat16", max_model_len=40)
    wanted = [[([5, 0, 2], True), ([5, 1], False)], [([8, 0, 2], True), ([8, 1], False)]]
    assert draw(engine) == wanted
    assert draw(engine, seed=2) == wanted
    assert [name for name, _ in calls] == ["LLM", "generate", "generate"]
    start = calls[0][1]
    assert (start["model"], start["revision"], start["dtype"]) == ("org/base", "abc", "bfloat16")
    assert (start["enable_lora"], start["max_lora_rank"], start["skip_tokenizer_init"]) == (True, 16, True)
    assert (start["max_model_len"], start["enforce_eager"], start["kv_cache_memory_bytes"]) == (40, True, 2**31)
    assert [more["lora_request"][:2] for _, more in calls[1:]] == [("draw-1", 1), ("draw-2", 2)]
    assert calls[2][1]["files"] == ["adapter_config.json"]
    assert not Path(calls[2][1]["lora_request"][2]).exists()


@pytest.mark.parametrize("key", ["target_parameters", "trainable_token_indices"])
def test_an_adapter_of_experts_or_tokens_is_refused(key: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    def save(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, key: ["x"]}))

    with pytest.raises(UsageError, match=r"rollout.engine: vllm reads no adapters of experts or of tokens"):
        draw(vllm(save))
    assert calls == []


def test_each_prompt_has_its_own_seed_and_our_ends_alone(calls: list[tuple[str, dict[str, Any]]]) -> None:
    engine = vllm(save_adapter)
    draw(engine)
    draw(engine, numbers=[9, 4])
    draw(engine, seed=2)
    first, swapped, other = (more["params"] for name, more in calls if name == "generate")
    seeds = [params.pop("seed") for params in first]
    assert [params["seed"] for params in swapped] == seeds[::-1]
    assert len({*seeds, *(params["seed"] for params in other)}) == 4
    asked = {"n": 2, "temperature": 0.7, "max_tokens": 20, "stop_token_ids": [2, 3], "ignore_eos": True, "logprobs": 0}
    unwarped = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert first == [asked | unwarped | {"detokenize": False, "skip_special_tokens": False}] * 2


def test_what_warps_the_distribution_is_passed_on(calls: list[tuple[str, dict[str, Any]]]) -> None:
    warping = Warping(top_p=0.9, top_k=40, min_p=0.0, repetition_penalty=1.1)
    draw(vllm(save_adapter), warping=warping)
    params = calls[1][1]["params"][0]
    assert {name: params.get(name) for name in vars(warping)} == {
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
    }


def test_greedy_samples_are_one_response_each(calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert draw(vllm(save_adapter), temperature=0.0)[1] == [([8, 0, 2], True)] * 2
    assert calls[1][1]["params"][0]["n"] == 1


def test_all_weights_are_reloaded_for_every_draw_without_a_restart(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """What was computed with the weights before, for prompts that come again, is forgotten."""
    engine = vllm(save_model, revision="abc")
    draw(engine)
    draw(engine)
    assert [name for name, _ in calls] == ["LLM", "generate", "reload_weights", "pack", "reset_prefix_cache", "generate"]
    assert calls[0][1]["revision"] is None
    assert "enable_lora" not in calls[0][1]
    assert calls[2][1]["files"] == ["config.json"]
    assert calls[5][1]["lora_request"] is None


def test_on_a_gpu_it_sleeps_between_draws(calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    engine = vllm(save_model)
    draw(engine)
    draw(engine)
    order = ["LLM", "generate", "sleep", "wake_up", "reload_weights", "reset_prefix_cache", "generate", "sleep"]
    assert [name for name, _ in calls] == order
    assert calls[0][1].items() >= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.4}.items()


def test_the_log_probability_of_each_token_is_told(calls: list[tuple[str, dict[str, Any]]]) -> None:
    (drawn, _), _ = vllm(save_adapter).generate(Request(PROMPTS, [0, 1], 2, 20, 1.0, [2], 0))
    assert drawn.logps is not None
    assert drawn.logps.tolist() == [-0.5, 0.0, -0.2]


def test_what_does_not_start_is_told(calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ValueError("max_model_len is too large")

    engine = vllm(save_adapter)
    monkeypatch.setattr(engine.vllm, "LLM", fail)
    with pytest.raises(MachineError, match=r"vllm does not start \(max_model_len is too large\); mend that, or use transformers"):
        draw(engine)


@pytest.mark.parametrize("save", [save_adapter, save_model])
def test_what_cannot_be_drawn_is_refused(
    save: Callable[[Path], None], calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="an empty prompt"):
        vllm(save).generate(Request([np.empty(0, np.int32)], [0], 1, 4, 1.0, [2], 0))
    assert calls == []
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MachineError, match=r"vllm cannot be imported .*; pip install 'rlhf-cli\[vllm\]'"):
        vllm(save)


__all__ = ["serve"]


def at(url: str, save: Callable[[Path], None] = save_adapter, **more: Any) -> ServerEngine:
    return ServerEngine(VllmServer(url, **more), "recipe.yaml:3: rollout.engine", save)


def told(message: str) -> tuple[int, dict[str, str], bytes]:
    """The ids and log-probabilities that the library's stand-in gives."""
    path, body = json.loads(message)
    if path != "/v1/completions":
        assert path == "/v1/unload_lora_adapter" or sorted(p.name for p in Path(body["lora_path"]).iterdir())
        return 200, {}, b"Success"
    own = [[body["prompt"][0], k, *(body["stop_token_ids"][:1] * (k % 2 == 0))] for k in range(body["n"])]
    choices = [{"token_ids": ids, "logprobs": {"token_logprobs": [-token / 10 for token in ids]}} for ids in own]
    return 200, {}, json.dumps({"choices": choices}).encode()


def test_a_server_loads_the_adapter_of_every_draw_and_lets_go_of_it(serve: Serve, tmp_path: Path) -> None:
    model = serve(lambda model, message: told(message))
    engine = at(model.url, folder=str(tmp_path))
    wanted = [[([5, 0, 2], True), ([5, 1], False)], [([8, 0, 2], True), ([8, 1], False)]]
    assert draw(engine) == wanted
    assert draw(engine, temperature=0.0, samples=3)[1] == [([8, 0, 2], True)] * 3
    paths, bodies = model.paths, model.bodies
    assert [path.removeprefix("/v1/") for path in paths] == [
        "load_lora_adapter",
        "completions",
        "completions",
        "unload_lora_adapter",
    ] * 2
    first, second = bodies[0], bodies[4]
    assert first["lora_name"] == bodies[3]["lora_name"] == bodies[1]["model"] != second["lora_name"]
    assert Path(first["lora_path"]).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    body, other = sorted(bodies[1:3], key=lambda body: body["prompt"])
    assert body.pop("seed") != other.pop("seed")
    assert body == {
        "model": first["lora_name"],
        "prompt": [5, 6, 7],
        "return_token_ids": True,
        "n": 2,
        "temperature": 0.7,
        "max_tokens": 20,
        "stop_token_ids": [2, 3],
        "ignore_eos": True,
        "logprobs": 0,
        "skip_special_tokens": False,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


REFUSALS: dict[str, tuple[Behaviour, str]] = {
    "no adapters": (
        lambda model, message: error(404, "Not Found"),
        r"load_lora_adapter: HTTP 404: Not Found\n  mend the cause, then continue with --resume\n  a server that takes adapters: "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 12$",
    ),
    "no model": (
        lambda model, message: error(404, "no such sk-12345") if "completions" in message else told(message),
        r"completions: HTTP 404: no such \*\*\*\n  mend the cause",
    ),
    "another interface": (
        lambda model, message: (200, {}, b'{"choices": [{"text": "Hi"}]}') if "completions" in message else told(message),
        "completions: no token ids with log-probabilities in its answer; is it `vllm serve`?",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_a_server_does_not_do_ends_the_draw(kind: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the key nor the query of the address is shown, and the adapter is let go of."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345")
    behave, message = REFUSALS[kind]
    model = serve(behave)
    with pytest.raises(MachineError, match=message) as caught:
        draw(at(f"{model.url}?token=hidden"))
    assert str(caught.value).startswith(f"recipe.yaml:3: rollout.engine: {model.url}/")
    assert "hidden" not in str(caught.value)
    assert {headers["Authorization"] for headers in model.headers} == {"Bearer sk-12345"}
    assert (model.paths[-1] == "/v1/unload_lora_adapter?token=hidden") == (kind != "no adapters")


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "BACKOFF", 0.0)
    with pytest.raises(MachineError, match=r"http://127.0.0.1:9/v1/load_lora_adapter: Connection refused \(asked 5 times\)"):
        draw(at("http://127.0.0.1:9/v1"))


def test_importance_weights_are_truncated() -> None:
    """By hand: engine and policy gave 0.5 and 0.25, 0.25 and 0.375, 0.1 and 0.3, 1e-9 and 1."""
    gaps = np.log([0.25 / 0.5, 0.375 / 0.25, 0.3 / 0.1, 1e9])
    assert truncated_weights(gaps) == pytest.approx([0.5, 1.5, 2, 2])
    assert truncated_weights(np.array([1e4, math.log(2)])).tolist() == [2, pytest.approx(2)]


@pytest.mark.parametrize("rule", [PolicyLoss(0.2, 0.3), PolicyLoss(0.2, 0.3, cispo=True)], ids=["clip", "cispo"])
def test_losses_are_proportional_to_advantages(rule: PolicyLoss) -> None:
    """So that a weight of a token's policy gradient may stand in its advantage: also where it is clipped."""
    logps, ratio = torch.randn(2, 40, dtype=torch.float64).requires_grad_(), torch.linspace(0.5, 2, 40).double()
    advantage, weight = torch.linspace(-1, 1, 40).double().roll(7), torch.linspace(0, 2, 40).double().roll(3)

    def gradient(own: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        losses, _ = rule.of_tokens(logps[0], ratio * (logps[1] - logps[1].detach()).exp(), own)
        return torch.autograd.grad((factor * losses).sum(), logps)[0]

    assert torch.allclose(gradient(weight * advantage, 1.0), gradient(advantage, weight), rtol=1e-12)


@pytest.mark.parametrize("truncate", [False, True])
def test_a_rollout_s_advantages_are_weighed(truncate: bool) -> None:
    """Two prompts of two responses, of 1, 2, 1 and 2 tokens; rloo's advantages are ±1."""
    prompt, ones = np.zeros(1, np.int32), np.zeros(6)
    trees = [Tree(prompt, np.zeros(1, bool), (prompt, np.zeros(2, np.int32)), row) for row in range(2)]
    gap = np.log([0.5, 1.5, 3, 2.5, 1, 0.1])
    rollout = Rollout(trees, np.ones(4, bool), {}, np.arange(4.0), TokenFigures(*[ones] * 6, gap), {})
    stub: Any = SimpleNamespace(
        settings=PolicySampling(),
        records=(),
        rollout=lambda *_, **__: rollout,
        batch=lambda step: [],
        locations=lambda step: ["rows.jsonl:1", "rows.jsonl:2"],
    )
    found = PolicySource(stub, stub, Rloo(), Kl(), None, 0.0, 0, truncate).collect(1, {})
    known = [own.advantage for tree in found.batches[0] for own in tree.recorded or ()]
    weights = [0.5, 1.5, 2, 2, 1, 0.1] if truncate else [1] * 6
    assert np.concatenate(known) == pytest.approx(np.array([-1, 1, 1, -1, 1, 1]) * weights)
    assert found.metrics.get("rollout/truncated_weights") == (pytest.approx(2 / 6) if truncate else None)
    assert found.metrics["rollout/logp_gap"] == pytest.approx(np.abs(gap).mean())
    assert found.metrics["rollout/logp_gap_max"] == pytest.approx(math.log(10))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    make_base(folder / "base")
    write_rows(folder / "rows.jsonl", 8)
    (folder / "even.py").write_text("def even(prompts, responses):\n    return [len(r) % 2 for r in responses]\n")
    return folder


def words(home: Path, output: Path, engine: Any, **sections: Any) -> Path:
    """A recipe of 3 steps at a rate that moves the policy far."""
    rollout = {"max_new_tokens": 5, "engine": engine, "responses_per_prompt": 2} | sections.pop("rollout", {})
    train = {"steps": 3, "learning_rate": 0.05, "save_every": None} | sections.pop("train", {})
    given = {"reward": [{"function": f"{home}/even.py:even"}], "rollout": rollout, "train": train} | sections
    return write_recipe(output.with_suffix(".yaml"), home / "base", home / "rows.jsonl", output, **given)


def run(home: Path, stage: str, output: Path, engine: Any, **sections: Any) -> list[dict[str, Any]]:
    """Its training lines."""
    assert rlhf(stage, words(home, output, engine, **sections)) == 0
    return split_lines(output, "train")


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "all-weights"])
@pytest.mark.parametrize(
    ("stage", "rollout"),
    [("ppo", {"temperature": 0.7, "correction": "truncate"}), ("dpo", {"temperature": 0.7, "top_p": 0.9})],
    ids=["ppo", "dpo"],
)
def test_every_draw_is_from_the_weights_of_its_step(
    stage: str, rollout: dict[str, Any], lora: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's log-probabilities are plain transformers', of what was saved; warped draws are compared at temperature 1."""
    called = vllm_stand_in.install(monkeypatch)
    lines = run(home, stage, tmp_path / "run", "vllm", lora=lora, rollout=rollout)
    assert all(line["rollout/logp_gap"] <= line["rollout/logp_gap_max"] < 1e-5 for line in lines)
    assert called.count("LLM") == 1
    assert called.count("reload_weights") == (0 if lora else called.count("generate") - 1)
    assert {line.get("rollout/truncated_weights") for line in lines} == ({0.0} if stage == "ppo" else {None})


def test_an_engine_with_other_weights_is_told_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm_stand_in.install(monkeypatch, reloads=False)
    first, second, third = run(home, "ppo", tmp_path / "run", "vllm", lora=None, rollout={"correction": "truncate"})
    assert first["rollout/logp_gap_max"] < 1e-5
    assert second["rollout/logp_gap"] > 0.05
    assert third["rollout/truncated_weights"] > 0
    assert "".join(capsys.readouterr()).count("more than 0.05: rollout.engine draws from another policy than this one") == 1


def test_a_run_draws_with_a_server(home: Path, tmp_path: Path, serve: Serve) -> None:
    model = serve(vllm_stand_in.server(home / "base"))
    lines = run(home, "ppo", tmp_path / "run", {"endpoint": model.url}, lora={"r": 4}, rollout={"correction": "truncate"})
    assert all(0 <= line["rollout/logp_gap"] < 1e-5 for line in lines)
    assert len({body["model"] for body in model.bodies if "model" in body}) == len(lines) + 1  # and for the start's check


@pytest.mark.slow
def test_several_processes_share_a_server(home: Path, tmp_path: Path, serve: Serve) -> None:
    """Each loads its adapter under a name of its own; also where the base lies in shards."""
    model = serve(vllm_stand_in.server(home / "base"))
    recipe = words(home, tmp_path / "run", {"endpoint": model.url}, lora={"r": 4}, train={"steps": 1})
    code, errors = launch("ppo", recipe, ranks=2, settings=SHARDED).wait()
    assert code == 0, errors
    lines = split_lines(tmp_path / "run", "train")
    assert all(0 <= line["rollout/logp_gap"] < 1e-5 for line in lines)
    assert len({body["model"] for body in model.bodies if "model" in body}) == 2 * (len(lines) + 1)


def test_in_this_process_it_draws_for_one_alone(home: Path, tmp_path: Path) -> None:
    code, errors = launch("ppo", words(home, tmp_path / "run", "vllm"), ranks=2).wait()
    assert code == 2
    assert "rollout.engine: vllm draws on one device, and there are 2; use transformers, or {endpoint: URL}" in errors


def test_an_address_is_looked_at_before_weights_are_loaded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = words(home, tmp_path / "run", {"endpoint": "http://me:secret@localhost/v1"}, lora={"r": 4})
    assert rlhf("ppo", recipe, "--check") == 2
    said = "".join(capsys.readouterr())
    assert "rollout.engine.endpoint: expected a URL such as http://localhost:8000/v1, without a user or a password" in said
    assert "secret" not in said
    recipe = words(home, tmp_path / "run", {"endpoint": "http://localhost/v1", "folder": str(tmp_path / "gone")}, lora={"r": 4})
    assert rlhf("ppo", recipe, "--check") == 2
    assert f"rollout.engine.folder: there is no folder {tmp_path}/gone; make it" in "".join(capsys.readouterr())
