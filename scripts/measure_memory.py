"""The memory of training steps: the closed formula beside the simulation, and beside what a process takes.

    python scripts/measure_memory.py simulate [NAME …]       models of the sizes of Llama 8B and 70B, on 8 devices
    python scripts/measure_memory.py measure MODEL           peaks of processes that train this model here, on a CPU

The second counts the resident memory that comes on top of the libraries': a process reads its own after the imports, and the
highest since then. Each figure is of a process of its own, whose C library gives freed blocks of 64 KiB and more back at once:
else its heap keeps holes, which are no part of what a step needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from rlhf_cli import sections
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.load import Weights, load_config, quiet_libraries
from rlhf_cli.models.logps import ON_CUDA
from rlhf_cli.models.memory import estimate
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.policy import load_trained
from rlhf_cli.models.simulate import Step, simulate
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise

GIB, TOKENS, ROW = 2**30, 4096, 1024
SIZES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}  # hidden, intermediate, layers, heads
CASES = {  # size, LoRA rank, checkpointing, devices, tokens of a pass, layers simulated (None: all)
    "8B LoRA": ("8B", 16, True, 8, TOKENS, (4, 8)),
    "8B LoRA, all layers simulated": ("8B", 16, True, 8, TOKENS, None),
    "8B LoRA, 16,384 tokens": ("8B", 16, True, 8, 4 * TOKENS, (4, 8)),
    "8B LoRA, no checkpointing": ("8B", 16, False, 8, TOKENS, (4, 8)),
    "8B LoRA, one device": ("8B", 16, True, 1, TOKENS, (4, 8)),
    "8B all weights": ("8B", None, True, 8, TOKENS, (4, 8)),
    "8B all weights, no checkpointing": ("8B", None, False, 8, TOKENS, (4, 8)),
    "70B LoRA": ("70B", 16, True, 8, TOKENS, (4, 8)),
    "70B all weights": ("70B", None, True, 8, TOKENS, (4, 8)),
}
MEASURED = ((16, False, 512), (16, False, 1024), (16, True, 512), (None, False, 512))  # LoRA rank, checkpointing, tokens


def simulated(name: str) -> str:
    size, rank, checkpointing, devices, tokens, few = CASES[name]
    hidden, intermediate, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=128256,
        tie_word_embeddings=False,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    model = sections.Model("", gradient_checkpointing=checkpointing)
    begun, dtype = time.process_time(), torch.bfloat16
    formula = estimate(config, model, rank=rank, dtype=dtype, devices=devices, row=ROW).total(tokens)
    quick, begun = time.process_time() - begun, time.process_time()
    parts = simulate(config, Step(model, sections.Lora(rank) if rank else None, dtype, devices, tokens, ROW), few)
    total, slow = sum(parts.values()), time.process_time() - begun
    words = ", ".join(f"{part} {value / GIB:.1f}" for part, value in parts.items() if value >= GIB / 20)
    ratio = f"{formula / GIB:.1f} ({formula / total - 1:+.0%}, {quick:.1f} s)"
    return f"| {name} | {total / GIB:.1f} | {slow:.0f} | {ratio} | {words} |"


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def measured(path: str, rank: int | None, checkpointing: bool, tokens: int) -> str:
    """Two steps of two passes of so many tokens each, in rows of 256, a quarter of them a prompt."""
    model = sections.Model(path, gradient_checkpointing=checkpointing)
    lora, ranks, dtype = sections.Lora(rank) if rank else None, Ranks(expected=False), torch.float32
    memory = estimate(load_config(path, None, False), model, rank=rank, dtype=dtype)
    formula = dataclasses.replace(memory, most={"logits": memory.most["logits"] / ON_CUDA}).total(tokens)
    random = np.random.default_rng(0)
    ids = random.integers(100, 40000, (2 * tokens // 256, 256)).astype(np.int32)
    trees = [Tree(row[:64], np.zeros(64, bool), (row[64:],), number) for number, row in enumerate(ids)]
    before = resident("VmRSS")
    backbone, _ = load_trained(
        model, lora, Weights(path, None, None), device=ranks.device, seeds={"policy": 0}, merged=Path("none")
    )
    optimizer = build_optimizer(backbone.trained_roles, sections.Train(learning_rate=1e-5))
    for step in (1, 2):
        optimise(Passes(backbone, tokens, ranks), Sft(), optimizer, Update(step, trees, {"policy": 1e-5}, 1.0, 0))
    took = resident("VmHWM") - before
    kind = f"LoRA r {rank}" if rank else "all weights"
    words = f"{kind}{', checkpointing' * checkpointing}, {tokens:,} tokens"
    return f"| {words} | {took / GIB:.2f} | {formula / GIB:.2f} ({formula / took - 1:+.0%}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulate", "measure", "one"))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    quiet_libraries()
    if options.what == "simulate":
        print("| 8 devices, bfloat16 | simulated, GiB | CPU s | formula, GiB | parts |\n|---|---|---|---|---|")
        for name in options.names or CASES:
            print(simulated(name), flush=True)
    elif options.what == "measure":
        print("| on a CPU, float32 | measured, GiB | formula, GiB |\n|---|---|---|", flush=True)
        for number in range(len(MEASURED)):
            settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            subprocess.run([sys.executable, __file__, "one", options.names[0], str(number)], check=True, env=settings)
    else:
        print(measured(options.names[0], *MEASURED[int(options.names[1])]), flush=True)


if __name__ == "__main__":
    main()
