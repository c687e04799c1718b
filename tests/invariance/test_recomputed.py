"""Weights after a few steps, computed once more: plain transformers, a full forward pass for every response, formulas and AdamW
written out here. Of the runs only the batches (which rows, which sampled tokens) and the initial value are taken."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.training import loop
from tests.tiny import make_base, rlhf, write_pairs, write_recipe

pytestmark = pytest.mark.slow

STEPS, RATE, BETAS, DECAY, CLIP_NORM = 3, 3e-4, (0.9, 0.95), 0.01, 0.5
TRAIN = {
    "steps": STEPS,
    "batch_size": 4,
    "learning_rate": RATE,
    "schedule": "cosine",
    "warmup": 2,
    "betas": list(BETAS),
    "weight_decay": DECAY,
    "max_grad_norm": CLIP_NORM,
    "tokens_per_device": 80,
}
BETA, KAPPA, TEMPERATURE, PENALTY, EPSILON = 0.3, 0.1, 0.8, 0.5, 0.2
REWARD = """from math import sin

def wave(prompts, responses):
    return [sin(0.7 * len(text)) for text in responses]
"""
ROLLOUT = {"max_new_tokens": 6, "temperature": TEMPERATURE, "responses_per_prompt": 3, "missing_eos_penalty": PENALTY}
Parameters = dict[str, torch.nn.Parameter]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recomputed")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 12)
    (folder / "wave.py").write_text(REWARD)
    return folder


class Taken:
    """What is taken of a run: the trees of every update, and the weights of roles beside the policy before the first."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.updates: dict[int, list[list[Any]]] = defaultdict(list)
        self.initial: dict[str, torch.Tensor] = {}
        original = loop.optimise

        def taking(passes: Any, objective: Any, optimizer: Any, update: Any) -> Any:
            if not self.updates:
                roles = passes.backbone.trained_roles
                self.initial = {n: p.detach().clone() for role, own in roles.items() if role != "policy" for n, p in own.items()}
            self.updates[update.step].append(update.trees)
            return original(passes, objective, optimizer, update)

        patch.setattr(loop, "optimise", taking)


class AdamW:
    """Loshchilov & Hutter 2019, after clipping the gradients to a total norm."""

    def __init__(self, parameters: Parameters, peak: float) -> None:
        self.parameters, self.peak, self.count = parameters, peak, 0
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def update(self, step: int) -> None:
        warmup = TRAIN["warmup"]
        fallen = (1 + math.cos(math.pi * (step - 1 - warmup) / (STEPS - warmup))) / 2
        rate = self.peak * (step / warmup if step <= warmup else fallen)
        self.count += 1
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self.parameters.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        with torch.no_grad():
            for name, p in self.parameters.items():
                gradient = gradients[name] * min(1.0, CLIP_NORM / norm)
                self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * gradient
                self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * gradient**2
                mean, square = self.first[name] / (1 - BETAS[0] ** self.count), self.second[name] / (1 - BETAS[1] ** self.count)
                p -= rate * (DECAY * p + mean / (square.sqrt() + 1e-8))
                p.grad = None


def logps(model: Any, prompt: Any, response: Any, temperature: float = 1.0) -> torch.Tensor:
    """(T,) float64 log-probabilities of the response's tokens."""
    ids = torch.tensor([*prompt, *response])[None]
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1)[range(len(response)), ids[0, len(prompt) :]]


def trained(home: Path, tmp_path: Path, stage: str, **sections: Any) -> tuple[Taken, Path]:
    """A run of all weights, and what is taken of it."""
    run = tmp_path / "run"
    train = TRAIN | sections.pop("train", {})
    recipe = write_recipe(tmp_path / "x.yaml", home / "base", home / "pairs.jsonl", run, lora=None, train=train, **sections)
    with pytest.MonkeyPatch.context() as patch:
        taken = Taken(patch)
        assert rlhf(stage, recipe) == 0
    return taken, run


def load(home: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32, attn_implementation="eager").eval()


def assert_weights(model: Any, run: Path, home: Path) -> None:
    """To 2e-5, which is a hundredth of the way that they have come."""
    start, found = load_file(home / "base" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    own = dict(model.named_parameters())
    assert found.keys() <= own.keys()
    moved = max(float((found[name] - start[name]).abs().max()) for name in found)
    difference = max(float((found[name] - own[name]).abs().max()) for name in found)
    assert moved > 5e-4 and difference < 2e-5, (moved, difference)


def direct(home: Path, taken: Taken, loss_of: Callable[[Any, Any, list[Any]], torch.Tensor]) -> Any:
    """A policy that has learned from the batches that the run had; `loss_of` a batch, with the policy and the reference."""
    policy, reference = load(home), load(home)
    optimizer = AdamW(dict(policy.named_parameters()), RATE)
    for step in range(1, STEPS + 1):
        (trees,) = taken.updates[step]
        loss_of(policy, reference, trees).backward()
        optimizer.update(step)
    return policy


def ratios(policy: Any, reference: Any, tree: Any) -> list[torch.Tensor]:
    """ρ of every response of a tree."""
    with torch.no_grad():
        known = [logps(reference, tree.prompt, response).sum() for response in tree.responses]
    return [logps(policy, tree.prompt, own).sum() - other for own, other in zip(tree.responses, known, strict=True)]


def test_dpo(home: Path, tmp_path: Path) -> None:
    taken, run = trained(home, tmp_path, "dpo", objective={"beta": BETA, "label_smoothing": 0.1})

    def loss_of(policy: Any, reference: Any, trees: list[Any]) -> torch.Tensor:
        losses = []
        for tree in trees:
            chosen, rejected = ratios(policy, reference, tree)
            margin = BETA * (chosen - rejected)
            losses.append(-0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin))
        return torch.stack(losses).mean()

    assert_weights(direct(home, taken, loss_of), run, home)


def test_ipo(home: Path, tmp_path: Path) -> None:
    taken, run = trained(home, tmp_path, "ipo", objective={"beta": BETA})

    def loss_of(policy: Any, reference: Any, trees: list[Any]) -> torch.Tensor:
        pairs = [ratios(policy, reference, tree) for tree in trees]
        return torch.stack([(chosen - rejected - 1 / (2 * BETA)) ** 2 for chosen, rejected in pairs]).mean()

    assert_weights(direct(home, taken, loss_of), run, home)


def test_bco(home: Path, tmp_path: Path) -> None:
    """δ is that of the batches before."""
    taken, run = trained(home, tmp_path, "dpo", objective={"kind": "bco", "beta": BETA, "decay": 0.5})
    running = {"chosen": 0.0, "rejected": 0.0}

    def loss_of(policy: Any, reference: Any, trees: list[Any]) -> torch.Tensor:
        pairs = torch.stack([BETA * torch.stack(ratios(policy, reference, tree)) for tree in trees])
        middle = sum(running.values()) / 2
        for name, mean in zip(running, pairs.detach().mean(0).tolist(), strict=True):
            running[name] = 0.5 * running[name] + 0.5 * mean
        return -(logsigmoid(pairs[:, 0] - middle) + logsigmoid(middle - pairs[:, 1])).mean()

    assert_weights(direct(home, taken, loss_of), run, home)
    assert abs(running["chosen"] - running["rejected"]) > 1e-3


def test_kto(home: Path, tmp_path: Path) -> None:
    """A tree's second response was written for another prompt, and z0 is the mean log-ratio of those."""
    sections = {"objective": {"beta": BETA, "lambda_u": 1.5}, "train": {"batch_size": 8}}
    taken, run = trained(home, tmp_path, "kto", **sections)

    def loss_of(policy: Any, reference: Any, trees: list[Any]) -> torch.Tensor:
        found = [ratios(policy, reference, tree) for tree in trees]
        z0 = max(0.0, sum(float(mismatched) for _, mismatched in found) / len(found))
        losses = [
            1.0 * (1 - (BETA * (own - z0)).sigmoid()) if tree.facts.label else 1.5 * (1 - (BETA * (z0 - own)).sigmoid())
            for tree, (own, _) in zip(trees, found, strict=True)
        ]
        return torch.stack(losses).mean()

    assert_weights(direct(home, taken, loss_of), run, home)


class Sampled:
    """A response of a rollout, with what is known of it before any update."""

    def __init__(self, prompt: Any, response: Any, end: int, text: str) -> None:
        self.prompt, self.response = prompt, response
        self.score = math.sin(0.7 * len(text)) - (0.0 if response[-1] == end else PENALTY)
        self.old = self.reference = self.value = torch.zeros(0)
        self.advantage = self.target = torch.zeros(0)


Groups = list[list[Sampled]]


def rollout(home: Path, updates: Sequence[list[Any]]) -> tuple[list[Groups], Groups]:
    """The responses of a step, update by update and prompt by prompt, and all its groups."""
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    ends = json.loads((home / "base" / "generation_config.json").read_text())["eos_token_id"]
    by_update = []
    for trees in updates:
        groups = []
        for tree in trees:
            group = []
            for ids in tree.responses:
                ended = int(ids[-1]) in {*ends, tokenizer.eos_token_id}
                text = tokenizer.decode(ids[: len(ids) - ended].tolist(), skip_special_tokens=True)
                group.append(Sampled(tree.prompt, ids, int(ids[-1]) if ended else -1, text))
            groups.append(group)
        by_update.append(groups)
    return by_update, [group for groups in by_update for group in groups]


def policy_loss(policy: Any, groups: Groups, k2: float = 0.0, responses: bool = False) -> torch.Tensor:
    """A mean over the tokens of an update, or over those of each response and then over the responses."""
    terms = []
    for one in (each for group in groups for each in group):
        new = logps(policy, one.prompt, one.response, TEMPERATURE)
        ratio = (new - one.old).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        terms.append(torch.maximum(-one.advantage * ratio, -one.advantage * clipped) + k2 * (new - one.reference) ** 2 / 2)
    return torch.stack([term.mean() for term in terms]).mean() if responses else torch.cat(terms).mean()


def steps(home: Path, taken: Taken, policy: Any, reference: Any) -> Iterator[tuple[int, list[Groups], Groups]]:
    """Every step's responses, with the log-probabilities that they had when they were drawn."""
    for step in range(1, STEPS + 1):
        by_update, groups = rollout(home, taken.updates[step])
        with torch.no_grad():
            for one in (each for group in groups for each in group):
                one.old = logps(policy, one.prompt, one.response, TEMPERATURE)
                one.reference = logps(reference, one.prompt, one.response, TEMPERATURE)
        yield step, by_update, groups


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups(kind: str, home: Path, tmp_path: Path) -> None:
    """rloo has the KL in the return (k1); grpo scales the scores, and the KL is a loss (k2), of responses that count alike."""
    sections = {
        "objective": {"kind": kind, "epochs": 1, "minibatches": 2},
        "rollout": ROLLOUT,
        "reward": [{"function": f"{home / 'wave.py'}:wave"}],
        "kl": {"coef": KAPPA},
    }
    taken, run = trained(home, tmp_path, "ppo", **sections)
    policy, reference = load(home), load(home)
    optimizer = AdamW(dict(policy.named_parameters()), RATE)
    for step, by_update, groups in steps(home, taken, policy, reference):
        for group in groups:
            returns = [one.score - KAPPA * float((one.old - one.reference).sum()) for one in group]
            scores = [one.score for one in group]
            mean = sum(scores) / len(scores)
            deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
            for k, one in enumerate(group):
                others = [own for j, own in enumerate(returns) if j != k]
                known = {
                    "rloo": returns[k] - sum(others) / len(others),
                    "grpo": 0.0 if len(set(scores)) == 1 else (scores[k] - mean) / (deviation + 1e-4),
                }
                one.advantage = torch.full((len(one.response),), known[kind], dtype=torch.float64)
        for own in by_update:
            policy_loss(policy, own, KAPPA if kind == "grpo" else 0.0, responses=kind == "grpo").backward()
            optimizer.update(step)
    assert_weights(policy, run, home)


def test_ppo(home: Path, tmp_path: Path) -> None:
    """The value is an adapter with a head that starts at 0, on weights of its own; both are clipped and learn apart."""
    sections = {
        "objective": {"epochs": 1, "minibatches": 2, "lam": 0.9, "gamma": 0.97, "value_clip": 0.05, "value_coef": 0.7},
        "rollout": ROLLOUT | {"responses_per_prompt": 2},
        "reward": [{"function": f"{home / 'wave.py'}:wave"}],
        "kl": {"coef": KAPPA},
        "value": {"init": "policy", "learning_rate": 1e-3},
    }
    taken, run = trained(home, tmp_path, "ppo", **sections)
    policy, reference = load(home), load(home)
    value, learned, head = value_of(home, taken.initial)
    optimizers = AdamW(dict(policy.named_parameters()), RATE), AdamW(learned, 1e-3)

    def values(one: Sampled) -> torch.Tensor:
        """V at the state before every token of the response."""
        ids = torch.tensor([*one.prompt, *one.response])[None]
        states = value(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        return head(states[len(one.prompt) - 1 : -1])[:, 0].double()

    for step, by_update, groups in steps(home, taken, policy, reference):
        drawn = [one for group in groups for one in group]
        for one in drawn:
            with torch.no_grad():
                one.value = values(one)
            one.target, one.advantage = torch.zeros(len(one.response)).double(), torch.zeros(len(one.response)).double()
            after = carried = 0.0
            for t in reversed(range(len(one.response))):
                reward = -KAPPA * float(one.old[t] - one.reference[t]) + (one.score if t == len(one.response) - 1 else 0.0)
                carried = reward + 0.97 * after - float(one.value[t]) + 0.97 * 0.9 * carried
                after = float(one.value[t])
                one.advantage[t], one.target[t] = carried, carried + after
        every = torch.cat([one.advantage for one in drawn])
        for one in drawn:
            one.advantage = (one.advantage - every.mean()) / math.sqrt(float(every.var(correction=0)) + 1e-8)
        for own in by_update:
            errors = []
            for one in (each for group in own for each in group):
                now = values(one)
                near = one.value + (now - one.value).clamp(-0.05, 0.05)
                errors.append(torch.maximum((now - one.target) ** 2, (near - one.target) ** 2) / 2)
            (policy_loss(policy, own) + 0.7 * torch.cat(errors).mean()).backward()
            for optimizer in optimizers:
                optimizer.update(step)
    assert_weights(policy, run, home)
    saved = load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "roles.safetensors")
    assert saved.keys() == learned.keys()
    moved = max(float((saved[name] - taken.initial[name]).abs().max()) for name in saved)
    difference = max(float((saved[name] - p).abs().max()) for name, p in learned.items())
    assert moved > 1e-3 and difference < 2e-5, (moved, difference)


def value_of(home: Path, initial: dict[str, torch.Tensor]) -> tuple[Any, Parameters, torch.nn.Linear]:
    """A model of its own with the value's adapter and head, as the run began with them; what learns, by the run's names."""
    lora = {name: tensor for name, tensor in initial.items() if ".lora_" in name}
    rank = next(len(tensor) for name, tensor in lora.items() if "lora_A" in name)
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in lora})
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=modules)
    model = get_peft_model(load(home), config, adapter_name="value")
    head = torch.nn.Linear(32, 1)
    own = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    own |= {f"value.score.{name}": p for name, p in head.named_parameters()}
    with torch.no_grad():
        for name, tensor in initial.items():
            own[name].copy_(tensor)
    return model.eval(), {name: own[name] for name in initial}, head
