"""Every family of models goes the whole way: packed as alone, sampled as read whole, trained, saved, read by plain libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.heads import classifier_class, save_full_reward
from rlhf_cli.models.load import quiet_libraries
from rlhf_cli.models.merging import merged
from rlhf_cli.models.targets import ROUTER, find_targets
from rlhf_cli.rollout.generate import Request, TransformersEngine
from tests.models.families import COMMON, FAMILIES, make_family
from tests.models.tiny_backbone import draw_trees, make_backbone, packed_logps, passes, plain_logps, sequences

ROOT = Path(__file__).parents[2]
TREES = [*draw_trees(1, branches=2, earlier=True), *draw_trees(1, seed=1, longest=16), *draw_trees(1, seed=2, branches=3)]
IDS = torch.arange(2, 26).reshape(2, 12)
CLOSE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    quiet_libraries()


def rows() -> Iterator[Any]:
    for name in FAMILIES:
        yield pytest.param(name, marks=() if name in COMMON else pytest.mark.slow)


@pytest.mark.parametrize("name", rows())
def test_a_family_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    backbone = Backbone(make_family(name), torch.float32)
    with torch.no_grad(), backbone.plain_attention() as model:
        wanted = plain_logps(model, TREES)
    assert float(wanted.std()) > 0.05, "tokens that are told apart"
    for budget in (1, 4096):
        with torch.no_grad():
            assert largest(packed_logps(backbone, TREES, budget) - wanted) < CLOSE, budget
    samples_are_those_of_generate(backbone)
    heads_read_the_states(backbone)
    if classifier_class(backbone.model.config):
        save_full_reward(backbone.model, make_head(backbone), None, tmp_path / "reward")
        scores_are_a_plain_classifiers(backbone, tmp_path / "reward")
    all_weights_learn(name, tmp_path / "full")
    adapters_learn(name, tmp_path)
    assert f"\n{described(name, backbone)}\n" in (ROOT / "docs/models.md").read_text(), described(name, backbone)


def samples_are_those_of_generate(backbone: Backbone) -> None:
    """Greedy ones; where a model's own cache gives other tokens than whole sequences, plain `generate` has to go without it."""
    prompts, engine = [tree.prompt for tree in TREES], TransformersEngine(backbone, "base")
    drawn = engine.generate(Request(prompts, range(len(prompts)), 1, 6, 0.0, [2], 0))
    with backbone.plain_attention() as model:
        for prompt, ((ids, *_),) in zip(prompts, drawn, strict=True):
            asked = torch.from_numpy(prompt.astype(np.int64))[None]
            stops = {"max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
            cached = engine.decoder.__name__ != "Anew"
            whole = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), use_cache=cached, **stops)
            assert whole[0, len(prompt) :].tolist() == ids.tolist()


def heads_read_the_states(backbone: Backbone) -> None:
    """A reward is read at the last token of each response, a value before each token, from the states of plain transformers."""
    torch.manual_seed(0)
    backbone.add_head("base", None, 0.5)
    head = backbone.heads.pop("base")
    with torch.no_grad(), backbone.plain_attention():
        states = [
            backbone.body(input_ids=ids, use_cache=False).last_hidden_state[0] for tree in TREES for ids, _ in sequences(tree)
        ]
        scores = [float(head(state[-1])) for state in states]
        values = [
            head(state[:-1])[mask, 0] for state, (_, mask) in zip(states, (s for t in TREES for s in sequences(t)), strict=True)
        ]
    backbone.heads["base"] = head
    number = {(t, b): i for i, (t, b) in enumerate((t, b) for t, tree in enumerate(TREES) for b in range(len(tree.responses)))}
    with torch.no_grad():
        for batch, names in passes(backbone, TREES, 40):
            found, before = backbone.scores("base", batch), backbone.values("base", batch)
            for place, name in enumerate(names):
                assert float(found[place]) == pytest.approx(scores[number[name]], abs=1e-4)
                assert largest(before[batch.owner == place] - values[number[name]]) < 1e-4
    del backbone.heads["base"]


def all_weights_learn(name: str, folder: Path) -> None:
    backbone = make_backbone(make_family(name), lora=False)
    gradients_are_those_of_plain_calls(backbone)
    lower(backbone)
    backbone.save("policy", folder)
    with torch.no_grad(), backbone.plain_attention() as model:
        assert largest(load(folder)(IDS, use_cache=False).logits - model(IDS, use_cache=False).logits) < 3e-5


def adapters_learn(name: str, folder: Path) -> None:
    """Packed as alone, folded as apart; plain PEFT reads the same model, merges it and reads that again; the base stays."""
    base = make_family(name)
    base.save_pretrained(folder / "base")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    backbone = make_backbone(base)
    gradients = gradients_are_those_of_plain_calls(backbone)
    assert gradients.keys() == backbone.trained_parameters().keys()
    assert [n for n, gradient in gradients.items() if float(gradient.abs().max()) == 0] == []
    lower(backbone)
    after = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(after[n], before[n]) for n in before), "the base stays as it is"
    backbone.save("policy", folder / "adapter")
    if classifier_class(base.config):
        backbone.add_head("policy", make_head(backbone))
        backbone.save("policy", folder / "reward_adapter")
        scores_are_a_plain_classifiers(backbone, folder / "reward_adapter", folder / "base")
    with torch.no_grad():
        with backbone.plain_attention() as model:
            wanted = model(IDS, use_cache=False).logits
        with merged(backbone, "policy"), backbone.plain_attention() as model:
            assert largest(model(IDS, use_cache=False).logits - wanted) < 1e-4
        whole = load(folder / "base")
        assert largest(whole(IDS, use_cache=False).logits - wanted) > 1e-3
        adapted = PeftModel.from_pretrained(whole, str(folder / "adapter")).eval()
        assert largest(adapted(IDS, use_cache=False).logits - wanted) < 3e-5
        adapted.merge_and_unload().save_pretrained(folder / "merged")
        assert largest(load(folder / "merged")(IDS, use_cache=False).logits - wanted) < 1e-4


def make_head(backbone: Backbone) -> torch.Tensor:
    width = backbone.model.get_output_embeddings().weight.shape[1]
    return torch.randn(1, width, generator=torch.Generator().manual_seed(0))


def scores_are_a_plain_classifiers(backbone: Backbone, folder: Path, base: Path | None = None) -> None:
    """All weights or (with a `base`) an adapter, saved with a head: transformers' classifier, and PEFT on it, give the scores."""
    plain = AutoModelForSequenceClassification.from_pretrained(base or folder, num_labels=1, dtype=torch.float32)
    plain = (PeftModel.from_pretrained(plain, str(folder)) if base else plain).eval()
    with torch.no_grad(), backbone.plain_attention():
        for ids in IDS:
            states = backbone.body(input_ids=ids[None], use_cache=False).last_hidden_state
            assert largest(states[:, -1] @ make_head(backbone).T - plain(input_ids=ids[None]).logits) < 1e-4


def gradients_are_those_of_plain_calls(backbone: Backbone) -> dict[str, torch.Tensor]:
    found = []
    for packed in (True, False):
        backbone.model.zero_grad()
        backbone.activate("policy")
        if packed:
            (-packed_logps(backbone, TREES, 40).mean()).backward()
        else:
            with backbone.plain_attention() as model:
                (-plain_logps(model, TREES).mean()).backward()
        found.append({n: p.grad.clone() for n, p in backbone.trained_parameters().items() if p.grad is not None})
    packed_ones, plain_ones = found
    assert packed_ones.keys() == plain_ones.keys()
    size = max(largest(gradient) for gradient in plain_ones.values())
    assert max(largest(packed_ones[n] - plain_ones[n]) for n in plain_ones) < 1e-4 * size
    return packed_ones


def lower(backbone: Backbone) -> None:
    """A small step along the gradients that are there makes the loss lower, by about their squared norm times the rate."""
    parameters = [p for p in backbone.trained_parameters().values() if p.grad is not None]
    norm = float(sum((p.grad**2).sum() for p in parameters))
    rate = min(1e-2, 1e-3 / norm)
    with torch.no_grad():
        before = float(packed_logps(backbone, TREES, 4096).double().mean())
        for parameter in parameters:
            parameter -= rate * parameter.grad
        gained = float(packed_logps(backbone, TREES, 4096).double().mean()) - before
    assert gained == pytest.approx(rate * norm, rel=0.3)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


SAMPLED = {"Aligned": "together", "Alike": "by length", "Anew": "anew"}


def described(name: str, backbone: Backbone) -> str:
    """The family's line in docs/models.md."""
    rule, targets = backbone.rule, find_targets(backbone.model)
    logits = "capped" if rule.cap else "scaled" if rule.scale != 1 else ""
    left_out = [] if ROUTER not in targets.left_out else ["routers"]
    left_out += sorted({n.rpartition(".")[2] for why, names in targets.left_out.items() if why != ROUTER for n in names})
    cells = (
        f"`{name}`",
        "alone" if backbone.kernel.layout == "alone" else "packed",
        SAMPLED[TransformersEngine(backbone, "base").decoder.__name__],
        logits,
        ", ".join(left_out),
        "yes" if classifier_class(backbone.model.config) else "",
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def test_the_table_has_these_families_alone() -> None:
    lines = (ROOT / "docs/models.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == sorted(FAMILIES)
    assert FAMILIES.keys() <= set(CONFIG_MAPPING)
