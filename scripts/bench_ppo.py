"""PPO side by side with TRL 1.11, the last one that had it: episodes per CPU second and peak memory.

    python scripts/bench_ppo.py HH.jsonl.gz [--model FOLDER] [--iterations 2] [--peer DIR] [--out bench-out]

DIR holds TRL 1.11.0 (`pip install --no-deps --target DIR trl==1.11.0`), which needs a place of its own beside the TRL that
other benchmarks use; without it only our side runs. Both sides draw 32 tokens to the same 16 prompts an iteration (the last
human turns of HH.jsonl.gz, 8 to 64 tokens), ends ignored, and make 2 updates of all 16 episodes, in float32 (on a GPU bfloat16)
with AdamW, a KL penalty, a value and a reward model. TRL trains all weights of two of its four models. Ours is measured so
(`all weights` of the policy; the value is an adapter) and as it comes (`lora`: four roles on one base). Heads are untrained on
both sides: what is measured is work. CPU seconds are those of the iterations; imports and loading are left out. Peak memory is
the whole process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Clock, busy, device
from transformers import TrainerCallback

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import choose_template, read_chat_format
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.load import Weights, load_config, load_tokenizer, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.placement import Head, Placement
from rlhf_cli.models.policy import load_trained
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.ranks import Ranks
from rlhf_cli.rollout.ensembles import AS_THEY_ARE
from rlhf_cli.rollout.experience import Sampler
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.reward_models import Reader, RewardModelScorer
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.training.loop import peak_memory
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise

EPOCHS, RATE = 2, 1e-5


def read_prompts(tokenizer: Any, path: str, count: int) -> list[list[int]]:
    """The last human turn of the first dialogues, cut to 64 tokens; those under 8 are left out."""
    found: list[list[int]] = []
    with gzip.open(path, "rt") if path.endswith(".gz") else Path(path).open() as lines:
        for line in lines:
            turns = re.findall(r"\n\nHuman: (.*?)\n\nAssistant:", json.loads(line)["chosen"], flags=re.S)
            ids = tokenizer(turns[-1])["input_ids"][:64] if turns else []
            if len(ids) >= 8:
                found.append(ids)
            if len(found) == count:
                return found
    raise SystemExit(f"{path}: only {len(found)} prompts of 8 tokens or more, {count} are needed")


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Iterations of `rlhf ppo`, timed by phase."""
    torch.manual_seed(0)
    lora = sections.Lora() if options.ours == "lora" else None
    settings, tokenizer, ranks = (
        sections.Model(path=options.model),
        load_tokenizer(options.model, None, False),
        Ranks(expected=False),
    )
    backbone, base = load_trained(
        settings, lora, Weights(options.model, None, None), device=device(), seeds={"policy": 0}, merged=Path(options.out)
    )
    placement = Placement(backbone, settings, base, device())
    placement.add("reference", base)
    width = backbone.model.config.hidden_size
    placement.add("reward", base)
    backbone.at("reward").add_head("reward", None, trained=False)
    placement.add_value(base, sections.Lora(), Head(torch.zeros(1, width), 0.0))
    records = [Record(str(n), (), str(n)) for n in range(options.iterations * options.episodes)]
    prompts = read_prompts(tokenizer, options.data, len(records))
    trees = [Tree(np.array(ids, np.int32), np.zeros(len(ids), bool), (), n) for n, ids in enumerate(prompts)]
    source = DatasetSource(flatten(trees, records), (len(trees),), (1.0,), options.episodes, 0, False)
    config = load_config(options.model, None, False)
    memory = estimate(config, sections.Model(path=""), rank=lora and lora.r, dtype=resolve_dtype("auto", device()))
    budget = auto_budget(memory, 64 + options.new_tokens, device(), values=True)
    reader = Reader("reward", None, read_chat_format(tokenizer, choose_template(tokenizer, None)), same=True)
    term = RewardModelScorer("reward", 1.0, backbone, ("reward",), (AS_THEY_ARE,), "mean", budget, reader)
    sampler = Sampler(
        backbone=backbone,
        engine=TransformersEngine(backbone, "policy"),
        tokenizer=tokenizer,
        ends=(),
        settings=sections.PolicySampling(max_new_tokens=options.new_tokens),
        records=records,
        terms=[term],
        gold=[],
        combine="sum",
        budget=budget,
        ranks=ranks,
    )
    objective = Ppo(epochs=EPOCHS)
    drawn = PolicySource(sampler, source, objective, sections.Kl(), None, 0.0, 0)
    optimizer = build_optimizer(backbone.trained_roles, sections.Train(learning_rate=RATE))
    seconds = {"rollout and scores": 0.0, "update": 0.0}
    loaded, total = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None, Clock()
    for step in range(1, options.iterations + 1):
        if step == options.warm + 1:
            seconds, total = dict.fromkeys(seconds, 0.0), Clock()
        clock = Clock()
        made = drawn.collect(step, {})
        seconds["rollout and scores"] += clock.read()[busy()]
        clock = Clock()
        for number, batch in enumerate(objective.updates(made.batches[0], step)):
            rates = {"policy": RATE, "value": RATE}
            update = Update(step, batch, rates, 1.0, seed=0, number=number, memory=made.memory, given=made.given)
            optimise(Passes(backbone, budget, ranks), objective, optimizer, update)
        seconds["update"] += clock.read()[busy()]
    held = {"base_copies": len(backbone.hosts), "loaded_gib": loaded}
    return _report(total, options) | held | {"seconds": seconds}


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """The same iterations by TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    prompts = [{"input_ids": ids} for ids in read_prompts(tokenizer, options.data, options.iterations * options.episodes + 4)]

    def model(loader: Any, **more: Any) -> Any:
        return loader.from_pretrained(options.model, dtype=resolve_dtype("auto", device()), **more)

    on_gpu = torch.cuda.is_available()
    arguments = PPOConfig(
        output_dir=str(Path(options.out) / "trl-ppo"),
        per_device_train_batch_size=options.episodes if on_gpu else 4,
        gradient_accumulation_steps=1 if on_gpu else options.episodes // 4,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=options.episodes * options.iterations,
        response_length=options.new_tokens,
        local_rollout_forward_batch_size=options.episodes,
        num_sample_generations=0,
        temperature=1.0,
        learning_rate=RATE,
        report_to=[],
        save_strategy="no",
        bf16=on_gpu,
        use_cpu=not on_gpu,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=model(AutoModelForCausalLM),
        ref_model=model(AutoModelForCausalLM),
        reward_model=model(AutoModelForSequenceClassification, num_labels=1),
        value_model=model(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=Dataset.from_list(prompts[:-4]),
        eval_dataset=Dataset.from_list(prompts[-4:]),
    )
    begun = _FromIteration(options.warm)
    trainer.add_callback(begun)
    trainer.train()
    return _report(begun.clock, options)


class _FromIteration(TrainerCallback):  # type: ignore[misc]
    """TRL's trainer tells of the end of every iteration; the clock begins after the first `warm` ones."""

    def __init__(self, warm: int) -> None:
        self.left, self.clock = warm, Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.clock = Clock()


def _report(clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    episodes, took = (options.iterations - options.warm) * options.episodes, clock.read()
    return {f"{name}_an_episode": value / episodes for name, value in took.items()} | {"peak_gib": peak_memory()}


def compare(options: argparse.Namespace) -> None:
    """Run the sides one after the other, each in a process of its own; print and keep the figures."""
    results = {f"rlhf, {kind}": run_side(options, kind) for kind in ("lora", "all weights")}
    if options.peer:
        results["trl 1.11"] = run_side(options, "trl")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ppo.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'ppo':20} CPU s/episode  peak GiB")
    for name, result in results.items():
        print(f"{name:20} {result['cpu_seconds_an_episode']:13.2f} {result['peak_gib']:9.2f}")
    peer = results.get("trl 1.11")
    for name, result in results.items() if peer else ():
        if result is not peer and peer:
            faster = peer["cpu_seconds_an_episode"] / result["cpu_seconds_an_episode"]
            print(f"{name}: {faster:.2f} × the episodes per CPU second, {result['peak_gib'] / peer['peak_gib']:.2f} × the memory")


def run_side(options: argparse.Namespace, side: str) -> dict[str, Any]:
    named = ("model", "iterations", "episodes", "new_tokens", "warm", "out")
    shared = [options.data, *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in named)]
    own = ["--theirs"] if side == "trl" else ["--ours", side]
    # Each side as its users run it: `rlhf` makes idle threads sleep soon (see cli.py).
    own_environment = (
        {"PYTHONPATH": options.peer, "TRL_EXPERIMENTAL_SILENCE": "1"} if side == "trl" else {"GOMP_SPINCOUNT": "1000"}
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | own_environment
    command = [sys.executable, str(Path(__file__)), *shared, *own]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="PPO side by side with TRL 1.11.")
    parser.add_argument("data", help="HH-RLHF transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=16, help="of an iteration")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--warm", type=int, default=0, help="iterations before those that are timed")
    parser.add_argument("--peer", default="", help="the folder that holds TRL 1.11.0")
    parser.add_argument("--out", default="bench-out")
    parser.add_argument("--ours", choices=["lora", "all weights"], help=argparse.SUPPRESS)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours or options.theirs:
        print(json.dumps(ours(options) if options.ours else theirs(options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
