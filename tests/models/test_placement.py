"""Where the roles of a run of ppo live: one base where they share it, each with the weights that its recipe names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import NumberError
from rlhf_cli.models import placement, policy
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.passes import score_responses
from rlhf_cli.rollout.reward_models import RewardModelScorer
from rlhf_cli.rollout.rewards import Answers
from rlhf_cli.stages import ppo
from tests.models.tiny_backbone import draw_trees, packed_logps, plain_logps
from tests.tiny import make_model, rlhf, write_pairs, write_recipe

TREES = draw_trees(5, branches=2)
LAYERS = 2 * 7
"""Linear layers of the tiny model, all of which adapters are on."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases with one tokenizer, policies `sft` and `again` and reward models `rm`, `rm-other` and `rm-full` on them."""
    folder = tmp_path_factory.mktemp("homes")
    make_model(folder / "base", initializer_range=0.2, num_hidden_layers=2)
    make_model(folder / "other", seed=1, initializer_range=0.2, num_hidden_layers=2)
    write_pairs(folder / "pairs.jsonl", 12)
    runs: dict[str, tuple[str, str, Any]] = {
        "sft": ("sft", "base", {"r": 4}),
        "again": ("sft", "sft", "auto"),
        "rm": ("train-rm", "base", {"r": 4}),
        "rm-other": ("train-rm", "other", {"r": 4}),
        "rm-full": ("train-rm", "base", None),
    }
    for name, (command, start, lora) in runs.items():
        train = {"steps": 2, "save_every": None, "learning_rate": 0.02 if lora else 0.002}
        parts = folder / start, folder / "pairs.jsonl", folder / name
        assert rlhf(command, write_recipe(folder / f"{name}.yaml", *parts, lora=lora, train=train)) == 0
    return folder


@dataclass(frozen=True)
class Ready:
    """What a run of ppo has loaded before its first step."""

    backbone: Backbone
    terms: list[RewardModelScorer]
    loads: list[str]  # the folders whose models were loaded, in that order


Start = Callable[..., Ready]


@pytest.fixture
def start(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs `rlhf ppo` up to its first step; keys as of `write_recipe`, models by their names in `home`."""
    loads: list[str] = []
    found: list[tuple[Backbone, list[RewardModelScorer]]] = []

    def noting(module: Any) -> None:
        original = module.load_model

        def load(settings: Any, path: str, *others: Any) -> Any:
            loads.append(Path(path).name)
            return original(settings, path, *others)

        monkeypatch.setattr(module, "load_model", load)

    def capture(job: Any, folder: Any, backbone: Backbone, *, on_policy: Any, **others: Any) -> None:
        found.append((backbone, on_policy.source.sampler.terms))
        raise NumberError("as far as this test goes")

    for module in (placement, policy):
        noting(module)
    monkeypatch.setattr(ppo, "train_job", capture)

    def run(judge: str = "rm", *, weight: float = 1.0, normalize: bool | None = None, **sections: Any) -> Ready:
        reward = {"model": str(home / judge), "weight": weight, "normalize": normalize}
        sections = {"reward": [reward], "rollout": {"max_new_tokens": 4}} | sections
        output = tmp_path / f"run-{len(found)}"
        words = write_recipe(tmp_path / "x.yaml", home / "sft", home / "pairs.jsonl", output, **sections)
        assert rlhf("ppo", words) == 3
        return Ready(*found[-1], loads)

    return run


def adapter(backbone: Backbone, role: str) -> dict[str, torch.Tensor]:
    """The role's adapter as PEFT names it in a file."""
    named = dict(backbone.model.named_parameters())
    return {
        f"base_model.model.{n.replace(f'.{role}.', '.')}": p
        for n, p in named.items()
        if f".lora_A.{role}." in n or f".lora_B.{role}." in n
    }


def saved(run: Path) -> dict[str, torch.Tensor]:
    """The adapter in a run's folder, without a head."""
    state = load_file(run / "model" / "adapter_model.safetensors")
    return {name: value for name, value in state.items() if ".score." not in name}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def policy_of(home: Path, base: str, run: str | None) -> Any:
    """A policy as plain PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(home / base)
    return (model if run is None else PeftModel.from_pretrained(model, home / run / "model")).eval()


def far(backbone: Backbone, role: str, model: Any) -> float:
    """The largest difference between a role's log-probabilities and those of a plain model."""
    with torch.no_grad():
        found = packed_logps(backbone.at(role), TREES, 4096, role)
        return float((found - plain_logps(model, TREES)).abs().max())


def value_off(ready: Ready) -> float:
    """The largest difference between the value at the last token of a response and the reward model's term of the score."""
    records = [Record("", (), f"rows.jsonl:{tree.row}") for tree in TREES]
    texts = [["", ""] for _ in TREES]
    (term,) = ready.terms
    wanted = term.weight * term.score(Answers(TREES, records, texts, [[True, False] for _ in TREES]))
    assert wanted.std() > 0.05
    return float(np.abs(values_at_the_end(ready.backbone) - wanted).max())


def values_at_the_end(backbone: Backbone) -> np.ndarray:
    return np.concatenate(score_responses(backbone.at("value"), "value", TREES, 4096, None))


def values_before(backbone: Backbone, trees: list[Tree]) -> torch.Tensor:
    host = backbone.at("value")
    with torch.no_grad():
        return torch.cat([host.values("value", batch) for batch in host.batches(trees, 4096)])


def test_four_roles_share_one_base(home: Path, start: Start) -> None:
    ready = start()
    backbone = ready.backbone
    assert ready.loads == ["base"] and backbone.elsewhere == {} and backbone.alias == {}
    named = dict(backbone.model.named_parameters(remove_duplicate=False))
    base = load_file(home / "base" / "model.safetensors")
    own = {name.replace(".base_layer", ""): p for name, p in named.items() if ".lora_" not in name}
    assert same(own, base)
    adapters = [name for name in named if ".lora_" in name]
    assert len(adapters) == 4 * 2 * LAYERS and len(named) == len(base) + len(adapters)
    assert len({p.untyped_storage().data_ptr() for p in named.values()}) == len(named)
    assert set(backbone.heads) == {"reward", "value"}
    for role, run in {"policy": "sft", "reference": "sft", "reward": "rm", "value": "rm"}.items():
        assert same(adapter(backbone, role), saved(home / run)), role
    assert {role: len(p) for role, p in backbone.trained_roles.items()} == {"policy": 2 * LAYERS, "value": 2 * LAYERS + 2}
    assert far(backbone, "policy", policy_of(home, "base", "sft")) < 1e-5
    assert far(backbone, "reference", policy_of(home, "base", "sft")) < 1e-5
    assert far(backbone, "reference", policy_of(home, "base", None)) > 1e-2


@pytest.mark.parametrize(
    ("judge", "lora", "weight", "normalize"),
    [
        ("rm", "auto", 1.0, None),
        pytest.param("rm", None, 0.5, None, marks=pytest.mark.slow),
        ("rm-other", "auto", -2.0, None),
        pytest.param("rm-full", "auto", 1.0, None, marks=pytest.mark.slow),
        ("rm-full", None, 3.0, False),
    ],
)
def test_the_value_starts_as_the_reward_models_term(
    judge: str, lora: Any, weight: float, normalize: bool | None, home: Path, start: Start
) -> None:
    """weight · (r − mean)/std, read at the last token as the reward is."""
    ready = start(judge=judge, weight=weight, normalize=normalize, lora=lora)
    card = json.loads((home / judge / "manifest.json").read_text())["reward_model"]
    mean, std = (0.0, 1.0) if normalize is False else (card["score_mean"], card["score_std"])
    assert ready.terms[0].scales == ((mean, std),)
    assert value_off(ready) < 1e-5
    assert float(ready.backbone.at("value").heads["value"].bias) == pytest.approx(-weight * mean / std, rel=1e-6, abs=1e-9)
    bases = ["base", *(["base"] if lora is None else []), *{"rm": [], "rm-other": ["other"], "rm-full": ["model"]}[judge]]
    assert ready.loads == bases


def test_a_reward_model_on_another_base_is_one_model_with_the_value(home: Path, start: Start) -> None:
    ready = start(judge="rm-other")
    backbone = ready.backbone
    assert ready.loads == ["base", "other"]
    assert backbone.elsewhere.keys() == {"reward", "value"}
    host = backbone.at("reward")
    assert host is backbone.at("value") and backbone.hosts == (backbone, host)
    own = {n.replace(".base_layer", ""): p for n, p in host.model.named_parameters() if ".lora_" not in n}
    assert same(own, load_file(home / "other" / "model.safetensors"))
    assert same(adapter(host, "value"), saved(home / "rm-other")) and same(adapter(backbone, "reference"), saved(home / "sft"))
    assert set(host.heads) == {"reward", "value"} and backbone.heads == {}
    assert backbone.trained_roles.keys() == {"policy", "value"}


@pytest.mark.parametrize("lora", ["auto", None])
def test_from_the_policy_the_value_starts_as_0(lora: Any, home: Path, start: Start) -> None:
    """On the adapter that the policy starts from, with a head that is 0 and can learn."""
    ready = start(judge="rm-other", lora=lora, value={"init": "policy"})
    backbone, host = ready.backbone, ready.backbone.at("value")
    assert ready.loads == (["base", "other"] if lora else ["base", "base", "other"])
    assert (host is backbone) == (lora == "auto") and host is backbone.at("reference")
    assert same(adapter(host, "value"), saved(home / "sft"))
    assert float(values_before(backbone, TREES).abs().max()) == 0.0
    assert set(backbone.trained_roles["value"]) >= {"value.score.weight", "value.score.bias"}


@pytest.mark.parametrize("name", ["text", "function"])
def test_where_no_reward_model_reads_its_tokens_the_value_starts_as_0(
    name: str, home: Path, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text("def own(prompts, responses):\n    return [1.0 for _ in responses]\n")
    sections: dict[str, dict[str, Any]] = {
        "text": {"model": {"path": str(home / "sft"), "chat_template": "none"}},
        "function": {"reward": [{"function": f"{tmp_path / 'own.py'}:own"}]},
    }
    backbone = start(**sections[name]).backbone
    assert "value: starts as 0, on the policy's weights: no reward model reads its tokens" in capsys.readouterr().out
    assert float(values_before(backbone, TREES).abs().max()) == 0.0


def test_a_policy_that_trains_all_weights_shares_none(home: Path, start: Start) -> None:
    """It is the parent's adapter merged into the base; the other three roles share one frozen copy of the base."""
    ready = start(lora=None)
    backbone, host = ready.backbone, ready.backbone.at("reference")
    assert ready.loads == ["base", "base"] and backbone.peft is None
    assert backbone.elsewhere == {"reference": host, "reward": host, "value": host} and host is not backbone
    base, state = load_file(home / "base" / "model.safetensors"), saved(home / "sft")
    scale = 32 / 4  # lora.alpha over lora.r
    own = dict(backbone.model.named_parameters())
    for name, weight in base.items():
        a, b = (state.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
        wanted = weight if a is None or b is None else weight + scale * b @ a
        assert float((own[name] - wanted).abs().max()) < 1e-6, name
    for role, run in {"reference": "sft", "reward": "rm", "value": "rm"}.items():
        assert same(adapter(host, role), saved(home / run)), role
    shared = {p.untyped_storage().data_ptr() for p in host.model.parameters()}
    assert shared.isdisjoint(p.untyped_storage().data_ptr() for p in backbone.model.parameters())
    assert {role: len(p) for role, p in backbone.trained_roles.items()} == {"policy": len(base), "value": 2 * LAYERS + 2}
    assert far(backbone, "policy", policy_of(home, "base", "sft")) < 1e-5
    assert far(backbone, "reference", policy_of(home, "base", "sft")) < 1e-5


def test_a_merged_parent_is_the_reference(home: Path, start: Start, tmp_path: Path) -> None:
    """The policy's adapter is new, on a base of the run's own; reward and value stay on theirs."""
    ready = start(lora={"r": 2, "merge_parent": True})
    backbone = ready.backbone
    assert ready.loads == ["base", "base"]  # what became of it, merged in its files, and the reward model's
    assert (tmp_path / "run-0" / "base" / "model.safetensors").exists()
    assert backbone.alias == {"reference": "base"} and backbone.elsewhere.keys() == {"reward", "value"}
    for role in ("policy", "reference"):
        assert far(backbone, role, policy_of(home, "base", "sft")) < 1e-4
    assert value_off(ready) < 1e-5


@pytest.mark.parametrize("lora", ["auto", pytest.param(None, marks=pytest.mark.slow)])
def test_references_by_name(lora: Any, home: Path, start: Start) -> None:
    """`start`, an earlier run and a path on the same base cost adapters; the bare base costs nothing."""
    wanted = {"base": ("base", None), str(home / "again"): ("base", "again"), str(home / "other"): ("other", None)}
    for reference, (base, run) in wanted.items():
        ready = start(lora=lora, reference={"model": reference}, value={"init": "policy"})
        backbone = ready.backbone
        assert far(backbone, "reference", policy_of(home, base, run)) < 1e-5
        assert far(backbone, "policy", policy_of(home, "base", "sft")) < 1e-5
        assert far(backbone, "reference", policy_of(home, "base", "sft")) > 1e-2
        assert (backbone.at("reference") is backbone) == (lora == "auto" and base == "base")
        assert sorted(ready.loads) == sorted({"base", base} if lora else ["base", "base", *({base} - {"base"})])
        ready.loads.clear()


def test_a_role_owns_its_adapter_alone() -> None:
    """RWKV has linear layers that are called value."""
    settings = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(intermediate_size=32, context_length=64, rescale_every=0, **settings)).eval()
    backbone = Backbone(model, torch.float32)
    for role in ("policy", "value"):
        backbone.add_lora(role, lora_config(sections.Lora(r=2), "", None), None, trained=True)
    policy, value = (set(backbone.trained_roles[role]) for role in ("policy", "value"))
    assert policy.isdisjoint(value) and len(policy) == len(value)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == policy | value
