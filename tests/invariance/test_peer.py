"""TRL's SFT, on the same token ids, adapter and rate, loses the same at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli import sections
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise
from tests.models.tiny_backbone import draw_trees, make_backbone
from tests.tiny import make_model

STEPS, ROWS, RATE = 8, 4, 0.01
TREES = draw_trees(STEPS * ROWS)


def plain_settings(folder: Path, steps: int, rows: int, rate: float) -> dict[str, Any]:
    """TRL's settings for the file's order, a constant rate and nothing beside."""
    return {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
    }


def _ours(folder: Path) -> tuple[list[float], list[float]]:
    backbone = make_backbone(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32))
    backbone.save("policy", folder / "adapter")
    optimizer = build_optimizer(backbone.trained_roles, sections.Train())
    results = []
    for step in range(1, STEPS + 1):
        update = Update(step, TREES[(step - 1) * ROWS : step * ROWS], {"policy": RATE}, 1.0, seed=0)
        results.append(optimise(Passes(backbone, 60, Ranks(expected=False)), Sft(), optimizer, update).metrics)
    return [m["loss"] for m in results], [m["grad_norm"] for m in results]


def _theirs(folder: Path) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from peft import PeftModel
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    rows = [
        {
            "input_ids": [*tree.prompt.tolist(), *tree.responses[0].tolist()],
            "completion_mask": [0] * len(tree.prompt) + [1] * len(tree.responses[0]),
        }
        for tree in TREES
    ]
    settings = SFTConfig(completion_only_loss=True, **plain_settings(folder, STEPS, ROWS, RATE))
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


@pytest.mark.slow
def test_losses_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    make_model(tmp_path / "base", initializer_range=0.2)
    losses, norms = _ours(tmp_path)
    their_losses, their_norms = _theirs(tmp_path)
    assert len(losses) == STEPS
    assert losses == pytest.approx(their_losses, rel=1e-3)
    assert norms == pytest.approx(their_norms, rel=1e-2)
    assert abs(losses[-1] - losses[0]) > 0.1
