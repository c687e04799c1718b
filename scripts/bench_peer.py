"""CPU seconds, peak memory and losses of TRL 1.16 on given token ids: the other side of `scripts/bench.py`.

    python scripts/bench_peer.py STAGE MODEL ROWS.json --adapter DIR --steps N --batch-size B [--learning-rate X]

STAGE is a key of STAGES, and ROWS.json a list of rows with its columns, all of them token ids but for SFT's mask (0 for the
prompt, 1 for the response) and KTO's label; step k sees rows (k−1)·B+1 … k·B of it. Training starts from the PEFT adapter DIR,
in float32 (bfloat16 on a GPU) without dropout, by AdamW without weight decay, at a constant rate, gradients clipped to norm 1,
without gradient checkpointing; everything else is TRL's default, but that on a GPU with flash-attn that is its attention, and
SFT has no padding there. Prints one JSON object. Its seconds are those of the steps after the first `--warm` ones: imports,
loading and preparing the rows are left out, and the reference's log-probabilities of dpo-precomputed are counted apart. A loss
is that of a step before its update. Needs the extra `bench`.

What TRL would do otherwise with the same data, and why the rows come as token ids:
- It renders a whole conversation for the response, so that one ends in what its template puts after the end-of-turn (a
  newline for ChatML). SFT and the reward model take token ids; for DPO and KTO the step that makes them is replaced.
- KTO's mismatched response of a row is the response of the row before it in the batch. Here a row brings its own
  (KL_completion_ids), which is the same work: one more forward pass of the policy and one of the reference a row.
- KTO's default order is the file's, all others shuffle; here it is the file's for all.
- The reward model reads its score at the last token that is not padding, and SmolLM2's padding is the end-of-turn with which
  these rows end: padding is another special token here, one that is in no row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.utils import is_flash_attn_2_available
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

ON_GPU = torch.cuda.is_available()
FLASH = ON_GPU and is_flash_attn_2_available()


def now() -> tuple[float, float]:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> dict[str, float]:
    return {name: b - a for name, a, b in zip(("cpu_seconds", "wall_seconds"), start, now(), strict=True)}


class FromStep(TrainerCallback):  # type: ignore[misc]
    """When the first step begins that is timed."""

    def __init__(self, warm: int) -> None:
        self.warm, self.start = warm, (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.warm:
            self.start = now()


class GivenDPO(DPOTrainer):
    """DPO on token ids, with the time that the reference takes before training."""

    reference_took: dict[str, float] | None = None

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        start = now()
        done = super()._precompute_ref_logps(*args)
        self.reference_took = since(start)
        return done


class GivenKTO(KTOTrainer):
    """KTO on token ids, each row with its own mismatched response."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


@dataclass(frozen=True)
class Stage:
    """How TRL spells a stage."""

    trainer: type[Trainer]
    config: type[Any]
    columns: tuple[str, ...]
    options: dict[str, Any]
    model: Any = AutoModelForCausalLM


PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")
STAGES = {
    # Without completion_only_loss the mask of rows that come as token ids is ignored.
    "sft": Stage(SFTTrainer, SFTConfig, ("input_ids", "completion_mask"), {"completion_only_loss": True}),
    "dpo": Stage(GivenDPO, DPOConfig, PAIR, {}),
    "dpo-precomputed": Stage(GivenDPO, DPOConfig, PAIR, {"precompute_ref_log_probs": True}),
    "kto": Stage(GivenKTO, KTOConfig, ("prompt_ids", "completion_ids", "KL_completion_ids", "label"), {}),
    # chosen_ids and rejected_ids hold the prompt, too.
    "rm": Stage(RewardTrainer, RewardConfig, ("chosen_ids", "rejected_ids"), {}, AutoModelForSequenceClassification),
}


def unused_token(tokenizer: Any, rows: list[dict[str, Any]]) -> str:
    """A special token that is in no row."""
    used = {token for row in rows for ids in row.values() if isinstance(ids, list) for token in ids}
    added = tokenizer.added_tokens_decoder
    return next(str(added[index]) for index in sorted(added) if added[index].special and index not in used)


def settings(stage: Stage, options: argparse.Namespace, folder: str) -> Any:
    """The file's order, one forward pass a step, nothing saved."""
    return stage.config(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        train_sampling_strategy="sequential",
        max_length=None,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=ON_GPU,
        gradient_checkpointing=False,
        use_cpu=not ON_GPU,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        seed=0,
        **stage.options,
        **({"padding_free": True} if FLASH and stage.trainer is SFTTrainer else {}),
    )


def build_trainer(stage: Stage, options: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> Trainer:
    """The trainer with the weights of the adapter.

    TRL makes the adapter itself and the weights are put into it afterwards: given a model with an adapter, DPO and KTO would
    run their reference through a frozen copy of it, which takes longer than the bare base. The two are the same because B is 0.
    """
    extra = {"num_labels": 1} if stage.model is AutoModelForSequenceClassification else {}
    extra |= {"attn_implementation": "flash_attention_2"} if FLASH else {}
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    config = PeftConfig.from_pretrained(str(options.adapter))
    config.inference_mode = False
    weights = load_peft_weights(str(options.adapter), device="cpu")
    if any(value.any() for name, value in weights.items() if "lora_B" in name):
        raise SystemExit(f"{options.adapter}: an adapter whose B is not 0 is not its own base")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = unused_token(tokenizer, rows)
    trainer = stage.trainer(
        model=stage.model.from_pretrained(options.model, dtype=dtype, **extra),
        args=settings(stage, options, folder),
        train_dataset=Dataset.from_list([{name: row[name] for name in stage.columns} for row in rows]),
        processing_class=tokenizer,
        peft_config=config,
    )
    model = trainer.model
    assert isinstance(model, PeftModel)
    if different := get_peft_model_state_dict(model).keys() ^ weights.keys():
        raise SystemExit(f"{options.adapter}: {len(different)} tensors do not fit, the first is {min(different)}")
    set_peft_model_state_dict(model, weights)
    trainer.remove_callback(PrinterCallback)  # stdout is for the JSON object
    return trainer


def main() -> None:
    """Parse the command line, train, print what it took."""
    parser = argparse.ArgumentParser(description="A trainer of TRL's on given token ids.")
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT folder to start from")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warm", type=int, default=0, help="steps before those that are timed")
    options = parser.parse_args()
    wanted = options.steps * options.batch_size
    rows = json.loads(options.rows.read_text())[:wanted]
    if len(rows) < wanted:
        parser.error(f"{options.rows} has {len(rows)} rows; {options.steps} steps of {options.batch_size} need {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(STAGES[options.stage], options, rows, folder)
        begun = FromStep(options.warm)
        trainer.add_callback(begun)
        trainer.train()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else resident
        report = {
            "rows": wanted,
            "steps": since(begun.start),
            "reference": {},
            "peak_gib": peak,
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        }
    if isinstance(trainer, GivenDPO) and trainer.reference_took:
        report["reference"] = {"computed": trainer.reference_took, "stored": {}}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
