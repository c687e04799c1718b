"""CPU seconds, peak memory and losses of TRL 1.16's SFT on given token ids: the other side of `scripts/bench.py`.

    python scripts/bench_peer_sft.py MODEL ROWS.json --steps N --batch-size B [--adapter DIR] [--learning-rate X]

ROWS.json is a list of {"input_ids": […], "completion_mask": [0 for the prompt, 1 for the response, …]}; step k sees rows
(k-1)·B+1 … k·B of it. LoRA r 16, alpha 32 on all linear layers (or what --adapter starts from), float32, AdamW without weight
decay, a constant rate, gradients clipped to norm 1. Prints one JSON object; imports, loading and preparing the rows are left
out of its seconds. A loss is the mean over the supervised tokens of a step, before its update. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


def load_model(path: Path, adapter: Path | None) -> torch.nn.Module:
    """The base with a fresh adapter, or with a copy of the given one."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def settings(options: argparse.Namespace, folder: str) -> SFTConfig:
    """The file's order, one forward pass a step, nothing saved."""
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        train_sampling_strategy="sequential",
        completion_only_loss=True,  # without it the mask is ignored for rows that come as token ids
        max_length=None,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )


def main() -> None:
    """Parse the command line, train, print what it took."""
    parser = argparse.ArgumentParser(description="TRL's SFT on given token ids.")
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--adapter", type=Path, help="a PEFT folder to start from")
    options = parser.parse_args()
    wanted = options.steps * options.batch_size
    rows = json.loads(options.rows.read_text())[:wanted]
    if len(rows) < wanted:
        parser.error(f"{options.rows} has {len(rows)} rows; {options.steps} steps of {options.batch_size} need {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_model(options.model, options.adapter),
            args=settings(options, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.model),
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for the JSON object
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        report = {
            "rows": wanted,
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
