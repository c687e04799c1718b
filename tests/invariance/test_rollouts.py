"""Rollouts: at step 0 the policy is its reference, scores stand on last tokens, and no cut into passes or ranks changes a run."""

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
from transformers import AutoModelForCausalLM

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.backbone import BASE, Backbone, lora_config
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.rollout import source
from rlhf_cli.rollout.experience import Rollout, Sampler
from rlhf_cli.rollout.generate import Request, Response
from rlhf_cli.rollout.rewards import Answers
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.signals import Pause
from tests.invariance.agreement import agree, steps_of
from tests.models.tiny_backbone import draw_trees, make, make_backbone
from tests.ranks import two_ranks
from tests.tiny import make_base, read_lines, rlhf, split_lines, write_pairs, write_recipe, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose responses often end, prompts of 1 to 6 words, a policy and a reward model trained on it."""
    folder = tmp_path_factory.mktemp("rollouts")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 14)
    (folder / "even.py").write_text("def even(prompts, responses):\n    return [len(r) % 2 for r in responses]\n")
    write_rows(folder / "eval.jsonl", 3, seed=1)
    train = {"steps": 3, "learning_rate": 0.02, "save_every": None}
    for name, stage in {"sft": "sft", "rm": "train-rm"}.items():
        parts = folder / "base", folder / "pairs.jsonl", folder / name
        assert rlhf(stage, write_recipe(folder / f"{name}.yaml", *parts, lora={"r": 4}, train=train)) == 0
    return folder


def recipe(home: Path, output: Path, start: str = "sft", **sections: Any) -> Path:
    """3 steps of 5 prompts, of which the data have 14: shares and batches that do not come out even."""
    train = {"steps": 3, "batch_size": 5, "save_every": None, "eval_every": 2} | sections.pop("train", {})
    rollout = {"max_new_tokens": 6} | sections.pop("rollout", {})
    reward = sections.pop("reward", [{"model": str(home / "rm")}])
    data = {"eval": str(home / "eval.jsonl"), "max_length": 80}
    parts = home / start, home / "pairs.jsonl", output
    return write_recipe(output.with_suffix(".yaml"), *parts, data=data, train=train, rollout=rollout, reward=reward, **sections)


@pytest.mark.parametrize(
    ("temperature", "lora"),
    [
        (0.7, "auto"),
        (0.7, None),
        pytest.param(1.0, "auto", marks=pytest.mark.slow),
        pytest.param(1.0, None, marks=pytest.mark.slow),
    ],
    ids=["0.7-lora", "0.7-full", "1-lora", "1-full"],
)
def test_at_the_start_the_policy_is_its_reference(temperature: float, lora: Any, home: Path, tmp_path: Path) -> None:
    """It continues the adapter of a run, which differs from the bare base: see the test below."""
    run = tmp_path / "run"
    words = recipe(home, run, lora=lora, train={"steps": 2}, rollout={"temperature": temperature})
    assert rlhf("ppo", words) == 0
    first = read_lines(run / "metrics.jsonl")[0]
    assert (first["step"], first["split"]) == (0, "eval")
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    one, two = split_lines(run, "train")
    assert one["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert one["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert one["objective/rlhf_reward"] == pytest.approx(one["objective/scores"], abs=1e-5)
    assert 0 < one["response/eos_rate"] < 1 < one["response/length"] < 6
    assert two["policy/ratio"] == pytest.approx(1, abs=1e-6), "of the first update, before which the policy is the one that drew"
    assert abs(two["objective/kl"]) > 1e-3


def test_logged_figures_are_those_of_plain_transformers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL at temperature 1; the recorded numbers and the penalty in the reward at the rollout's."""
    rollouts: list[Rollout] = []
    original = source.with_recorded

    def noting(rollout: Rollout, *others: Any) -> list[Tree]:
        rollouts.append(rollout)
        return original(rollout, *others)

    monkeypatch.setattr(source, "with_recorded", noting)
    run = tmp_path / "run"
    settings: dict[str, Any] = {"train": {"steps": 1, "eval_every": None}, "rollout": {"temperature": 0.7}, "kl": {"coef": 0.3}}
    assert rlhf("ppo", recipe(home, run, reference={"model": "base"}, **settings)) == 0
    (line,), (rollout,) = split_lines(run, "train"), rollouts
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    theirs = {t: _logps(base, rollout.trees, t) for t in (0.7, 1.0)}
    policy = PeftModel.from_pretrained(base, home / "sft" / "model")
    mine = {t: _logps(policy, rollout.trees, t) for t in (0.7, 1.0)}
    kl = {t: np.array([float((a - b).sum()) for a, b in zip(mine[t], theirs[t], strict=True)]) for t in mine}
    assert np.abs(kl[1.0]).min() > 1e-3 and abs(kl[1.0].mean() - kl[0.7].mean()) > 1e-3
    assert line["objective/kl"] == pytest.approx(kl[1.0].mean(), abs=1e-5)
    assert line["objective/scores"] - line["objective/rlhf_reward"] == pytest.approx(0.3 * kl[0.7].mean(), abs=1e-5)
    assert line["objective/entropy"] == pytest.approx(np.mean([-float(one.sum()) for one in mine[0.7]]), abs=1e-4)
    assert np.abs(rollout.tokens.old - torch.cat(mine[0.7]).numpy()).max() < 1e-5
    assert np.abs(rollout.tokens.reference - torch.cat(theirs[0.7]).numpy()).max() < 1e-5


@torch.no_grad()
def _logps(model: Any, trees: list[Tree], temperature: float) -> list[torch.Tensor]:
    """Of each response, one sequence at a time, from the model's own logits."""
    found = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.from_numpy(np.concatenate((tree.prompt, response)).astype(np.int64))
            logits = model.eval()(input_ids=ids[None], use_cache=False).logits[0, len(tree.prompt) - 1 : -1]
            logps = (logits.double() / temperature).log_softmax(-1)
            found.append(logps.gather(-1, ids[len(tree.prompt) :, None])[:, 0])
    return found


@dataclass(frozen=True)
class FixedEngine:
    """Draws what it is told to, whatever is asked for."""

    drawn: list[list[Response]]
    kept: float | None = None

    def generate(self, request: Request, pause: Pause) -> list[list[Response]]:
        return [self.drawn[number] for number in request.numbers]


@dataclass(frozen=True)
class Lengths:
    """A term of the reward: ten and the number of a response's letters."""

    name: str = "lengths"
    weight: float = 2.0
    needs_weights: bool = False
    beside: tuple[str, ...] = ()

    def score(self, answers: Answers) -> np.ndarray:
        return np.array([10.0 + len(text) for _, text in answers.pairs])


class Letters:
    """One letter a token."""

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        return "x" * len(ids)


class Alone:
    rank, size, main, sharding = 0, 1, True, None

    def gather(self, value: Any) -> list[Any]:
        return [value]


def _actor_critic() -> Backbone:
    """A policy that has moved from its base, and a value that is 0 everywhere."""
    backbone = make_backbone(make())
    backbone.alias["reference"] = BASE
    backbone.add_lora("value", lora_config(sections.Lora(r=2), "", None), None, trained=True)
    backbone.add_head("value", torch.zeros(1, 16), 0.0)
    return backbone


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_score_stands_on_the_last_token_of_its_response(budget: int) -> None:
    """With λ = γ = 1 and values of 0 a token's advantage is the sum of its own and all later rewards: their differences tell.

    Of two responses to each ragged prompt one ended and one was cut off; texts are without the end.
    """
    prompts = [tree._replace(responses=()) for tree in draw_trees(4)]
    answers = draw_trees(4, seed=5, branches=2)
    drawn = [[Response(ids, ended) for ids, ended in zip(tree.responses, (True, False), strict=True)] for tree in answers]
    settings = sections.PolicySampling(max_new_tokens=9, responses_per_prompt=2, missing_eos_penalty=3.0, temperature=0.8)
    records = [Record("", (), f"rows.jsonl:{n}") for n in range(4)]
    sampler = Sampler(
        _actor_critic(), FixedEngine(drawn), Letters(), (3,), settings, records, [Lengths()], [], "sum", budget, Alone()
    )
    data = DatasetSource(flatten(prompts, records), (4,), (1.0,), 4, 0, False)
    objective = Ppo(lam=1.0, gamma=1.0, whiten=False)
    draw = PolicySource(sampler, data, objective, sections.Kl(coef=0.4), None, 0.0, 0).collect(1, {})
    ragged, penalties = set(), []
    for tree, own in zip(draw.batches[0], drawn, strict=True):
        for (ids, ended, _), known in zip(own, tree.recorded or (), strict=True):
            old, reference, advantage, value, target = (torch.from_numpy(values).double() for values in known)
            score = 2 * (10 + len(ids) - ended) - 3 * (not ended)
            penalty = -0.4 * (old - reference)
            rewards = advantage - torch.cat((advantage[1:], torch.zeros(1, dtype=torch.float64)))
            assert rewards[:-1].tolist() == pytest.approx(penalty[:-1].tolist(), abs=1e-5)
            assert float(rewards[-1]) == pytest.approx(score + float(penalty[-1]), abs=1e-5)
            assert value.tolist() == [0.0] * len(ids)
            assert torch.equal(target, advantage)
            ragged.add((len(tree.prompt), len(ids)))
            penalties += penalty.abs().tolist()
    assert len(ragged) > 6 and max(penalties) > 0.1
    assert draw.metrics["response/eos_rate"] == 0.5


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"objective": {"epochs": 2, "minibatches": 2}, "kl": {"target": 0.5, "horizon": 20}}),
    "ppo full": ("ppo", {"lora": None, "objective": {"epochs": 2}}),
    "ppo ptx": ("ppo", {"objective": {"epochs": 1, "minibatches": 2}, "ptx": {"data": "PAIRS", "coef": 1.0}}),
    "bandit": ("ppo", {"objective": {"kind": "bandit", "epochs": 2}}),
    "rloo": ("ppo", {"objective": {"kind": "rloo", "epochs": 2, "minibatches": 2}, "rollout": {"responses_per_prompt": 3}}),
    "grpo k3": (
        "ppo",
        {
            "objective": {"kind": "grpo", "epochs": 2},
            "rollout": {"responses_per_prompt": 3, "temperature": 0.7},
            "kl": {"estimator": "k3"},
        },
    ),
    "DAPO": (
        "ppo",
        {
            "objective": {"kind": "grpo", "epochs": 2, "mean_over": "tokens", "clip_high": 0.28, "ties": "redraw", "overlong": 2},
            "reward": [{"function": "FILE:even"}],
            "rollout": {"responses_per_prompt": 2},
        },
    ),
    "GSPO": ("ppo", {"objective": {"kind": "grpo", "ratio": "sequence", "clip": 0.02}, "rollout": {"responses_per_prompt": 3}}),
    "online dpo": ("dpo", {"rollout": {"refresh": 2}}),
    "online dpo K": ("dpo", {"objective": {"kind": "plackett_luce"}, "rollout": {"responses_per_prompt": 3}}),
    "xpo": ("dpo", {"explore": {"alpha": 0.1}, "rollout": {"responses_per_prompt": 3}, "reference": {"model": "base"}}),
    "selm": ("dpo", {"explore": {"kind": "selm", "alpha": 0.1}, "rollout": {"refresh": 2}, "lora": None}),
    "sppo": (
        "dpo",
        {
            "objective": {"kind": "sppo", "eta": 10.0},
            "rollout": {"refresh": 2, "responses_per_prompt": 3},
            "reward": [{"function": "FILE:even", "compares": True}],
        },
    ),
    "dno": (
        "dpo",
        {
            "objective": {"kind": "dno"},
            "rollout": {"responses_per_prompt": 4},
            "reward": [{"function": "FILE:even", "compares": True}],
        },
    ),
    "online kto": ("kto", {"rollout": {"refresh": 2}, "reference": {"model": "previous"}}),
}
"""Name → command, and what its recipe says beside the common keys."""


def command(home: Path, name: str, output: Path, **train: Any) -> list[str | Path]:
    stage, sections = RUNS[name]
    known = {"lora": "auto"} | json.loads(
        json.dumps(sections).replace("PAIRS", str(home / "pairs.jsonl")).replace("FILE", str(home / "even.py"))
    )
    return [stage, recipe(home, output, train=train, **known)]


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of a name in one process with the largest budget, made once."""
    folder = tmp_path_factory.mktemp("whole")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            assert rlhf(*command(home, name, folder / name, tokens_per_device=4096)) == 0
        return folder / name

    return find


def same(a: Path, b: Path) -> None:
    """A margin of 0 up to rounding has either sign, and so has its accuracy."""
    agree(a, b, steps_of(3, 2), rounding=("rewards/accuracies",), figures=1e-5, weights=1e-5)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("ppo", 1), ("online dpo K", 1), pytest.param("ppo", 120, marks=pytest.mark.slow)],
)
def test_tokens_per_device_changes_nothing(name: str, budget: int, home: Path, whole: Whole, tmp_path: Path) -> None:
    """Neither one tree a pass nor a few."""
    assert rlhf(*command(home, name, tmp_path / "cut", tokens_per_device=budget)) == 0
    same(whole(name), tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(name: str, home: Path, whole: Whole, tmp_path: Path) -> None:
    """And each with one tree a pass: neither of the two cuts changes a run, nor both together."""
    two_ranks(*command(home, name, tmp_path / "two", tokens_per_device=1))
    same(whole(name), tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo full", "online dpo"])
def test_a_rank_without_a_prompt_takes_part(name: str, home: Path, tmp_path: Path) -> None:
    """In training, and in an evaluation of three prompts the shares are two and one."""
    assert rlhf(*command(home, name, tmp_path / "one", batch_size=1)) == 0
    two_ranks(*command(home, name, tmp_path / "two", batch_size=1))
    same(tmp_path / "one", tmp_path / "two")
