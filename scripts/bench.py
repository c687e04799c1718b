"""Side by side with TRL: SFT of one model on the same rows, adapter, dtype and steps, in one run.

    python scripts/bench.py HH.jsonl.gz [--model FOLDER] [--steps 4] [--batch-size 8] [--out bench-out]

HH.jsonl.gz holds HH-RLHF transcripts. Prints a table and writes it with all figures to OUT/sft.json. CPU seconds are those of
the training steps alone: imports, loading and preparing the rows are left out on both sides. Peak memory is the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.templates import choose_template
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.load import load_config, load_tokenizer
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.policy import load_policy
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.recipe import schema
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.ranks import Ranks
from rlhf_cli.training.step import optimise

RATE = 1e-4
LORA = schema.Lora()
CPU = torch.device("cpu")


def trees(model: str, data: str, count: int) -> list[Tree]:
    """The first `count` rows of at most 512 tokens, in file order; the last response alone is supervised."""
    settings = schema.Data(
        train=[schema.Source(path=data, format="hh")], max_length=512, shuffle=False, train_on="last", max_lost=1.0
    )
    tokenizer = load_tokenizer(model, None, False)
    return prepare(settings, "sft", tokenizer, choose_template(tokenizer, None), 0, str, "first").train.trees[:count]


def matrix_rate() -> float:
    """Matrix-product FLOP per CPU second in float32, at the shape of a feed-forward layer; the best of five."""
    a, b = torch.randn(1024, 576), torch.randn(576, 1536)
    rates = []
    for _ in range(6):
        start = time.process_time()
        for _ in range(50):
            a @ b
        rates.append(50 * 2 * 1024 * 576 * 1536 / (time.process_time() - start))
    return max(rates[1:])


def model_flops(model: Any, rows: list[Tree], rank: int) -> float:
    """Floating-point operations that a LoRA step needs: a frozen matrix costs 2 per weight and token forward and 2 backward,
    an adapter's 2 and 4; attention the visible half, forward and twice backward; the head on supervised tokens alone.
    """
    config = model.config
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    weights = sum(m.weight.numel() for m in linear)
    adapters = sum(rank * (m.in_features + m.out_features) for m in linear)
    total = 0.0
    for tree in rows:
        tokens, supervised = len(tree.prompt) + len(tree.responses[0]), len(tree.responses[0])
        total += tokens * (4 * weights + 6 * adapters) + supervised * 4 * head.weight.numel()
        total += 3 * 2 * tokens * tokens * config.hidden_size * config.num_hidden_layers
    return total


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The training steps of `rlhf sft`, timed."""
    settings = schema.Model(path=options.model)
    rows = trees(options.model, options.data, options.steps * options.batch_size)
    config = load_config(options.model, None, False)
    memory = estimate(config, rank=LORA.r, dtype=torch.float32, checkpointing=False, trust_remote_code=False)
    budget = options.tokens or auto_budget(memory, max(len(t.prompt) + len(t.responses[0]) for t in rows), CPU)
    backbone, _ = load_policy(settings, LORA, options.model, None, Path(options.adapter), CPU, 0, Path(options.out))
    train = schema.Train(learning_rate=RATE)
    optimizer = build_optimizer(backbone.trained_parameters(), train)
    ranks, losses = Ranks(expected=False), []
    cpu, wall = time.process_time(), time.perf_counter()
    for step in range(1, options.steps + 1):
        batch = rows[(step - 1) * options.batch_size : step * options.batch_size]
        result = optimise(
            backbone, Sft(), optimizer, batch, step=step, seed=0, rate=RATE, max_grad_norm=1.0, budget=budget, ranks=ranks
        )
        losses.append(result.metrics["loss"])
    return {
        "rows": len(rows),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": losses,
        "tokens_per_device": budget,
        "matrix_flop_per_cpu_second": matrix_rate(),
    }


def compare(options: argparse.Namespace) -> None:
    """Make the rows and the adapter both sides start from, run each in a process of its own, print and keep the figures."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = trees(options.model, options.data, options.steps * options.batch_size)
    backbone, _ = load_policy(schema.Model(path=options.model), LORA, options.model, None, None, CPU, 0, out)
    backbone.save("policy", out / "adapter")
    flops = model_flops(backbone.model, rows, LORA.r)
    given = [
        {
            "input_ids": [*t.prompt.tolist(), *t.responses[0].tolist()],
            "completion_mask": [0] * len(t.prompt) + [1] * len(t.responses[0]),
        }
        for t in rows
    ]
    (out / "rows.json").write_text(json.dumps(given))
    del backbone
    own = [sys.executable, __file__, options.data, "--ours", "--adapter", str(out / "adapter"), "--model", options.model]
    own += [
        "--steps",
        str(options.steps),
        "--batch-size",
        str(options.batch_size),
        "--out",
        str(out),
        "--tokens",
        str(options.tokens),
    ]
    peer = [sys.executable, str(Path(__file__).with_name("bench_peer_sft.py")), options.model, str(out / "rows.json")]
    peer += ["--steps", str(options.steps), "--batch-size", str(options.batch_size), "--adapter", str(out / "adapter")]
    peer += ["--learning-rate", str(RATE)]
    results = {"rlhf": _run(own), "trl": _run(peer)}
    mine, theirs = results["rlhf"], results["trl"]
    rate = mine["matrix_flop_per_cpu_second"]
    summary = {
        "rows_per_cpu_second_ratio": theirs["cpu_seconds"] / mine["cpu_seconds"],
        "peak_memory_ratio": mine["peak_gib"] / theirs["peak_gib"],
        "largest_relative_loss_difference": max(
            abs(a - b) / abs(b) for a, b in zip(mine["losses"], theirs["losses"], strict=True)
        ),
        "model_flop_utilisation": {name: flops / side["cpu_seconds"] / rate for name, side in results.items()},
        "model_flops_a_row": flops / len(rows),
    }
    (out / "sft.json").write_text(json.dumps({"sides": results, "summary": summary}, indent=2) + "\n")
    print("side  CPU s/row  wall s/row  peak GiB  MFU")
    for name, side in results.items():
        n, used = side["rows"], summary["model_flop_utilisation"][name]
        print(f"{name:5} {side['cpu_seconds'] / n:9.2f} {side['wall_seconds'] / n:11.2f} {side['peak_gib']:9.2f} {used:5.1%}")
    print(json.dumps(summary, indent=2))


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="SFT side by side with TRL.")
    parser.add_argument("data", help="HH-RLHF transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=0, help="tokens_per_device; 0: auto")
    parser.add_argument("--out", default="bench-out")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
