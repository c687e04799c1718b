"""PPO side by side with TRL 1.11, the last one that had it: episodes per CPU second and peak memory.

    python scripts/bench_ppo.py HH.jsonl.gz [--model FOLDER] [--iterations 2] [--peer DIR] [--out bench-out]

DIR holds TRL 1.11.0 (`pip install --no-deps --target DIR trl==1.11.0`), which needs a place of its own beside the TRL that
other benchmarks use; without it only our side runs. Both sides draw 32 tokens to the same 16 prompts an iteration (the last
human turns of HH.jsonl.gz, 8 to 64 tokens), ends ignored, and make 2 updates of all 16 episodes, in float32 with AdamW, a KL
penalty, a value and a reward model. TRL trains all weights of two of its four models. Ours is measured so (`all weights` of the
policy; the value is an adapter) and as it comes (`lora`: four roles on one base). Heads are untrained on both sides: what is
measured is work. CPU seconds are those of the iterations; imports and loading are left out. Peak memory is the whole process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.load import Weights, load_config, load_tokenizer
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.placement import Head, Placement
from rlhf_cli.models.policy import load_trained
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.ranks import Ranks
from rlhf_cli.rollout.experience import Sampler
from rlhf_cli.rollout.generate import TransformersEngine
from rlhf_cli.rollout.reward_models import Reader, RewardModelScorer
from rlhf_cli.rollout.source import PolicySource
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise

EPISODES, NEW_TOKENS, EPOCHS, RATE = 16, 32, 2, 1e-5
CPU = torch.device("cpu")


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
        settings, lora, Weights(options.model, None, None), device=CPU, seeds={"policy": 0}, merged=Path(options.out)
    )
    placement = Placement(backbone, settings, base, CPU)
    placement.add("reference", base)
    width = backbone.model.config.hidden_size
    placement.add("reward", base)
    backbone.at("reward").add_head("reward", None, trained=False)
    placement.add_value(base, sections.Lora(), Head(torch.zeros(1, width), 0.0))
    records = [Record(str(n), (), str(n)) for n in range(options.iterations * EPISODES)]
    prompts = read_prompts(tokenizer, options.data, len(records))
    trees = [Tree(np.array(ids, np.int32), np.zeros(len(ids), bool), (), n) for n, ids in enumerate(prompts)]
    source = DatasetSource(flatten(trees, records), (len(trees),), (1.0,), EPISODES, 0, False)
    config = load_config(options.model, None, False)
    memory = estimate(config, sections.Model(path=""), rank=lora and lora.r, dtype=torch.float32)
    budget = auto_budget(memory, 64 + NEW_TOKENS, CPU, values=True)
    term = RewardModelScorer("reward", 1.0, backbone, "reward", 0.0, 1.0, budget, Reader("reward", None, None))
    sampler = Sampler(
        backbone=backbone,
        engine=TransformersEngine(backbone, "policy"),
        tokenizer=tokenizer,
        ends=(),
        settings=sections.PolicySampling(max_new_tokens=NEW_TOKENS),
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
    for step in range(1, options.iterations + 1):
        started = time.process_time()
        made = drawn.collect(step, {})
        between = time.process_time()
        for number, batch in enumerate(objective.updates(made.batches[0], step)):
            rates = {"policy": RATE, "value": RATE}
            update = Update(step, batch, rates, 1.0, seed=0, number=number, memory=made.memory, given=made.given)
            optimise(Passes(backbone, budget, ranks), objective, optimizer, update)
        seconds["rollout and scores"] += between - started
        seconds["update"] += time.process_time() - between
    return _report(sum(seconds.values()), options.iterations) | {"cpu_seconds": seconds, "base_copies": len(backbone.hosts)}


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """The same iterations by TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    prompts = [{"input_ids": ids} for ids in read_prompts(tokenizer, options.data, options.iterations * EPISODES + 4)]

    def model(loader: Any, **more: Any) -> Any:
        return loader.from_pretrained(options.model, dtype=torch.float32, **more)

    arguments = PPOConfig(
        output_dir=str(Path(options.out) / "trl-ppo"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=EPISODES // 4,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=EPISODES * options.iterations,
        response_length=NEW_TOKENS,
        local_rollout_forward_batch_size=EPISODES,
        num_sample_generations=0,
        temperature=1.0,
        learning_rate=RATE,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
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
    started = time.process_time()
    trainer.train()
    return _report(time.process_time() - started, options.iterations)


def _report(seconds: float, iterations: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"cpu_seconds_an_episode": seconds / (iterations * EPISODES), "peak_gib": peak}


def compare(options: argparse.Namespace) -> None:
    """Run the sides one after the other, each in a process of its own; print and keep the figures."""
    results = {f"rlhf, {kind}": _run(options, kind) for kind in ("lora", "all weights")}
    if options.peer:
        results["trl 1.11"] = _run(options, "trl")
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


def _run(options: argparse.Namespace, side: str) -> dict[str, Any]:
    shared = [options.data, "--model", options.model, "--iterations", str(options.iterations), "--out", options.out]
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
