"""XPO and SELM: golden values of loss and gradients, and what a run learns from where the reference writes, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_cli.data.batches import StepBatches
from rlhf_cli.data.records import Facts
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.rollout.experience import Rollout, Sampler
from rlhf_cli.rollout.source import PreferenceSource
from tests.objectives.lookup import Lookup, lengths, make_trees, run, table
from tests.tiny import make_base, read_lines, rlhf, split_lines, write_pairs, write_recipe

GOLDEN = json.loads(Path(__file__).with_name("beyond_scores.json").read_text())["exploration"]
"""Inputs and expected values in float64, computed from the formulas without this package."""

SIDES = {
    "xpo": ("on_policy_sample", "on_reference_sample"),
    "selm": ("chosen", "rejected", "on_reference_sample"),
}
GRADIENTS = {"xpo": ("policy sample", "reference sample"), "selm": ("chosen", "rejected", "reference sample")}


def of(kind: str, whose: str) -> list[list[list[float]]]:
    """Prompt → response → a number for each token, the reference's response last."""
    inputs = GOLDEN[kind]["inputs"]
    return [[*row] for row in zip(*(inputs[f"{whose}_{side}"] for side in SIDES[kind]), strict=True)]


def facts(kind: str) -> list[Facts]:
    """xpo: in the order of the drawing, whichever won; selm: the last response has no rank."""
    if kind == "selm":
        return [Facts(ranks=(0.0, 1.0), scores=(1.0, 0.0))] * len(of(kind, "policy"))
    wins = GOLDEN[kind]["inputs"]["policy_sample_wins"]
    return [Facts(ranks=(0.0, 1.0) if won else (1.0, 0.0)) for won in wins]


@pytest.mark.parametrize("budget", [4096, 1])
@pytest.mark.parametrize("kind", SIDES)
def test_golden_losses_and_gradients(kind: str, budget: int) -> None:
    wanted, values = GOLDEN[kind]["expected"], of(kind, "policy")
    policy = table(values).requires_grad_()
    trees, model = make_trees(lengths(values), facts(kind)), Lookup(policy=policy, reference=table(of(kind, "ref")))
    objective = Dpo(beta=0.3)
    alone = [float(run(objective, model, [tree], given={kind: 0.05}).loss.detach()) for tree in trees]
    assert alone == pytest.approx(wanted["per prompt"], abs=1e-10)
    plain = [float(run(objective, model, [tree]).loss.detach()) for tree in trees]
    assert plain == pytest.approx(wanted["dpo"], abs=1e-10)
    result = run(objective, model, trees, budget=budget, given={kind: 0.05})
    assert float(result.loss.detach()) == pytest.approx(wanted["loss"], abs=1e-10)
    (gradient,) = torch.autograd.grad(result.loss, policy)
    of_responses = [each for row in zip(*(wanted[f"gradient {side}"] for side in GRADIENTS[kind]), strict=True) for each in row]
    per_token = np.repeat(of_responses, [len(response) for row in values for response in row])
    assert gradient[1:].tolist() == pytest.approx(per_token.tolist(), abs=1e-10)


@pytest.mark.parametrize("kind", SIDES)
def test_the_bonus_is_a_mean_over_prompts_of_any_number_of_responses(kind: str) -> None:
    """Of three ranked responses all pairs; the optimistic term is that of the last one, and counts once a prompt."""
    values = [[[-1.0], [-2.0, -1.0], [-0.5]], [[-0.2], [-0.4]]]
    ranks = [(2.0, 0.0, 1.0), (0.0, 1.0)]
    trees = make_trees(lengths(values), [Facts(ranks=own) for own in ranks])
    model = Lookup(policy=table(values), reference=torch.full((7,), -0.25, dtype=torch.float64))
    bonus = run(Dpo(beta=0.3), model, trees, given={kind: 1.0}).means["loss"] - run(Dpo(beta=0.3), model, trees).means["loss"]
    assert bonus == pytest.approx((-0.5 - 0.4) / 2 if kind == "xpo" else 0.3 * (-0.25 - 0.15) / 2, abs=1e-12)
    nll = run(Dpo(beta=0.3, sft_weight=1.0), model, trees).means["loss"] - run(Dpo(beta=0.3), model, trees).means["loss"]
    assert nll == pytest.approx((3.0 + 0.2) / 3, abs=1e-12), "of the best responses, wherever they stand"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 9)
    (folder / "rewards.py").write_text("def long(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
    return folder


def recipe(home: Path, output: Path, explore: dict[str, Any], **sections: Any) -> Path:
    known: dict[str, Any] = {
        "lora": {"r": 4},
        "reward": [{"function": f"{home / 'rewards.py'}:long"}],
        "rollout": {"max_new_tokens": 6, "responses_per_prompt": 3},
        "data": {"max_length": 80},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.02},
    }
    return write_recipe(
        output.with_suffix(".yaml"), home / "base", home / "pairs.jsonl", output, explore=explore, **known | sections
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The batches and the rollouts of the runs that follow."""
    found: list[Any] = []
    collect, rollout = PreferenceSource.collect, Sampler.rollout

    def noting(self: Any, *others: Any) -> StepBatches:
        found.append(collect(self, *others))
        return found[-1]

    def drawn(self: Any, *others: Any, **named: Any) -> Rollout:
        found.append(rollout(self, *others, **named))
        return found[-1]

    monkeypatch.setattr(PreferenceSource, "collect", noting)
    monkeypatch.setattr(Sampler, "rollout", drawn)
    yield found


@torch.no_grad()
def logps(model: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate((prompt, response)).astype(np.int64))
    each = model.eval()(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return each.gather(-1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("kind", SIDES)
def test_the_last_response_is_the_references(kind: str, home: Path, tmp_path: Path, seen: list[Any]) -> None:
    """A policy that moves and one that stays: in step 2 the former writes other responses, and the reference the same ones.

    Its log-probabilities are the start's, the figures are of the policy's own responses, and the loss of step 1 has the bonus.
    """
    start, lasts, others = AutoModelForCausalLM.from_pretrained(home / "base"), [], []
    for rate in (0.02, 1e-12):
        run = tmp_path / f"run-{rate}"
        train = {"steps": 2, "batch_size": 4, "learning_rate": rate, "save_every": None}
        assert rlhf("dpo", recipe(home, run, {"kind": kind, "alpha": 0.5}, train=train)) == 0
        rollouts, steps, lines = seen[::2], seen[1::2], split_lines(run, "train")
        for rollout, batches, line in zip(rollouts, steps, lines, strict=True):
            assert batches.given == {kind: 0.5}
            own = np.ones(len(rollout.ended), bool) if kind == "selm" else np.tile([True, True, False], len(rollout.trees))
            assert line["objective/scores"] == pytest.approx(rollout.scores[own].mean())
            for tree in batches.batches[0]:
                assert len(tree.responses) == (4 if kind == "selm" else 3) and len(tree.facts.ranks) == 3
                for response, known in zip(tree.responses, tree.reference, strict=True):
                    assert float((torch.from_numpy(known) - logps(start, tree.prompt, response)).abs().max()) < 2e-5
        first = [float(tree.reference[-1].sum()) for tree in steps[0].batches[0]]
        # At the start all log-ratios are 0: the loss of the pairs is ln 2.
        assert lines[0]["loss"] == pytest.approx(np.log(2) + (0.5 * np.mean(first) if kind == "xpo" else 0.0), abs=1e-4)
        known = {tree.prompt.tobytes(): [tuple(ids.tolist()) for ids in tree.responses] for tree in rollouts[1].trees}
        more = {tree.prompt.tobytes(): tuple(tree.responses[-1].tolist()) for tree in steps[1].batches[0]}
        lasts.append(more)
        others.append({prompt: responses if kind == "selm" else responses[:2] for prompt, responses in known.items()})
        assert any(more[prompt] not in others[-1][prompt] for prompt in more), "from random numbers of its own"
        seen.clear()
    assert others[0] != others[1]
    assert {prompt: lasts[1][prompt] for prompt in lasts[0] if prompt in lasts[1]} == {
        prompt: last for prompt, last in lasts[0].items() if prompt in lasts[1]
    }
    assert lasts[0].keys() & lasts[1].keys()


def test_a_resumed_run_goes_on_to_the_byte(home: Path, tmp_path: Path) -> None:
    """Between two draws: the reference's responses are kept with the others."""
    run, again = tmp_path / "run", tmp_path / "again"
    words = recipe(home, run, {"kind": "selm"}, rollout={"max_new_tokens": 6, "refresh": 3})
    assert rlhf("dpo", words) == 0
    shutil.copytree(run, again)
    (again / "manifest.json").unlink()
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    assert rlhf("dpo", words, "--output", again, "--resume") == 0
    assert read_lines(again / "metrics.jsonl") == read_lines(run / "metrics.jsonl")
    one, two = (folder / "model" / "adapter_model.safetensors" for folder in (run, again))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({"reference": {"model": "previous"}}, "a reference that stays (start, base or a path)"),
        ({"objective": {"kind": "hinge"}}, "objective.kind: dpo"),
        ({"rollout": None, "reward": None}, "rollout:"),
    ],
    ids=["previous", "hinge", "offline"],
)
def test_refused(sections: dict[str, Any], needed: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("dpo", recipe(home, tmp_path / "run", {"alpha": 0.1}, **sections), "--check") == 2
    assert f"explore: needs {needed}. give it that, or remove explore" in capsys.readouterr().err
