"""Where a stage's CPU seconds go, and which share of the rate of matrix products it reaches.

    python scripts/profile_cpu.py HH.jsonl.gz [--stage sft|dpo|train-rm|kto|ppo] [--steps 4] [--repeat 1]
        [--model FOLDER] [--out bench-out]

Steps of scripts/bench.py, or iterations of scripts/bench_ppo.py, with LoRA: first as they are, the fastest of so many repeats,
then under torch's profiler. A first step is left out. Without the model's folder one of SmolLM2-135M's shape with random
weights is made in OUT.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path

import bench
import bench_ppo
import bench_rollout
import torch
from quickstart_model import train_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "mkldnn_linear"),
    "concatenations": ("cat",),
    "copies and fills": ("copy_", "fill_", "zero_", "clone"),
    "products, elementwise": ("mul", "mul_", "addcmul", "addcmul_", "div", "div_"),
    "sums": ("add", "add_", "sub", "sub_", "sum"),
}
"""Kind → operations; attention has names of its own."""


def random_model(out: Path, data: str) -> Path:
    """A model with a tokenizer learned from the rows."""
    folder = out / "random"
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(data, "rt") if data.endswith(".gz") else Path(data).open() as file:
            texts = [json.loads(line)["chosen"] for line in file][:3000]
        (folder / "sft.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = train_tokenizer(folder, 16000)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**bench_rollout.SMOLLM2, **ends)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def run(options: argparse.Namespace, episodes: int = 16) -> tuple[float, float]:
    """(CPU seconds of the steps but for the first, operations of the model or 0)."""
    if options.stage == "ppo":
        given = {"iterations": options.steps, "warm": 1, "episodes": episodes, "new_tokens": 32, "ours": "lora"}
        found = bench_ppo.ours(argparse.Namespace(**vars(options) | given))
        return found["cpu_seconds_an_episode"] * episodes * (options.steps - 1), 0.0
    more = {"batch_size": bench.STAGES[options.stage].batch_size, "tokens": 0, "attention": "auto", "warm": 1}
    adapter = str(Path(options.out) / options.stage / "adapter")
    steps = argparse.Namespace(**vars(options) | more | {"adapter": adapter})
    flops = bench.prepare_sides(steps)["steps"]
    return bench.ours(steps)["steps"]["cpu_seconds"], flops


def kind_of(operation: str) -> str:
    name = operation.split("::")[-1]
    if name.startswith("_scaled_dot"):
        return "attention"
    return next((kind for kind, names in KINDS.items() if name in names), "other")


def main() -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="HH-RLHF transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--stage", choices=[*bench.STAGES, "ppo"], default="dpo")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--out", default="bench-out")
    options = parser.parse_args()
    if not Path(options.model).exists():
        options.model = str(random_model(Path(options.out), options.data))
    rate = bench.matrix_rate()
    took, flops = min(run(options) for _ in range(options.repeat))
    rate = max(rate, bench.matrix_rate())
    print(f"{options.stage}: {took:.2f} CPU s, matrix products alone {rate / 1e9:.0f} GFLOP a CPU s", end="")
    print(f", share of that {flops / took / rate:.1%}" if flops else "")
    # What comes before the steps is in it, too: of the kinds the shares are what to look at. Torch takes its time to sum up.
    options.steps = 2
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run(options, episodes=4)
    kinds: Counter[str] = Counter()
    for event in recorded.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    whole = sum(kinds.values())
    for kind, seconds in kinds.most_common():
        print(f"  {kind:24} {seconds:7.2f} s {seconds / whole:6.1%}")


if __name__ == "__main__":
    main()
