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

from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import NumberError
from rlhf_cli.models import homes, policy
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.scoring import score_trees
from rlhf_cli.recipe import schema
from rlhf_cli.rollout.rewards import Answers, ModelTerm
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
    make_model(folder / "base", initializer_range=0.2)
    make_model(folder / "other", seed=1, initializer_range=0.2)
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
    terms: list[ModelTerm]
    loads: list[str]  # the folders whose models were loaded, in that order


Start = Callable[..., Ready]


@pytest.fixture
def start(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs `rlhf ppo` up to its first step; keys as of `write_recipe`, models by their names in `home`."""
    loads: list[str] = []
    found: list[Any] = []

    def noting(module: Any) -> None:
        original = module.load_model

        def load(settings: Any, path: str, *others: Any) -> Any:
            loads.append(Path(path).name)
            return original(settings, path, *others)

        monkeypatch.setattr(module, "load_model", load)

    def capture(job: Any, folder: Any, backbone: Backbone, *, way: Any, **others: Any) -> None:
        found.extend((backbone, way.source.sampler.terms))
        raise NumberError("as far as this test goes")

    noting(homes), noting(policy)
    monkeypatch.setattr(ppo, "train_job", capture)

    def run(model: str = "sft", reward: str = "rm", **sections: Any) -> Ready:
        sections = {"reward": [{"model": str(home / reward)}], "rollout": {"max_new_tokens": 4}} | sections
        words = write_recipe(tmp_path / "x.yaml", home / model, home / "pairs.jsonl", tmp_path / "run", **sections)
        assert rlhf("ppo", words) == 3
        return Ready(found[0], found[1], loads)

    return run


def adapter(backbone: Backbone, role: str) -> dict[str, torch.Tensor]:
    """The role's adapter as PEFT names it in a file."""
    named = dict(backbone.model.named_parameters())
    return {f"base_model.model.{n.replace(f'.{role}.', '.')}": p for n, p in named.items() if f".lora_A.{role}." in n or f".lora_B.{role}." in n}


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
    found = score_trees(backbone.at("value"), "value", TREES, 4096)
    return np.concatenate([found[n] for n in range(len(TREES))])


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
    ("reward", "lora", "weight", "normalize"),
    [
        ("rm", "auto", 1.0, None),
        pytest.param("rm", None, 0.5, None, marks=pytest.mark.slow),
        ("rm-other", "auto", -2.0, None),
        pytest.param("rm-full", "auto", 1.0, None, marks=pytest.mark.slow),
        ("rm-full", None, 3.0, False),
    ],
)
def test_the_value_starts_as_the_reward_models_term(
    reward: str, lora: Any, weight: float, normalize: bool | None, home: Path, start: Start
) -> None:
    """weight · (r − mean)/std, read at the last token as the reward is."""
    term = {"model": str(home / reward), "weight": weight, "normalize": normalize}
    ready = start(reward=reward, lora=lora) if False else start(lora=lora, **{"reward": reward}, value={"init": "reward"}) if False else start(lora=lora, rewards=None) if False else _with(start, lora, term)
    card = json.loads((home / reward / "manifest.json").read_text())["reward_model"]
    mean, std = (0.0, 1.0) if normalize is False else (card["score_mean"], card["score_std"])
    assert (ready.terms[0].mean, ready.terms[0].std) == (mean, std)
    assert value_off(ready) < 1e-5
    head = ready.backbone.at("value").heads["value"]
    assert float(head.bias) == pytest.approx(-weight * mean / std, rel=1e-6)
