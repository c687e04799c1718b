"""TRL's preference losses and its reward model, on the same token ids, adapter, head and rate, take the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli import sections
from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.base import Objective
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise
from tests.invariance.test_peer import plain_settings
from tests.models.tiny_backbone import draw_trees, plain_logps, sequences
from tests.tiny import make_model

STEPS, ROWS, RATE = 10, 4, 0.01
TREES = draw_trees(STEPS * ROWS, branches=2)

LOSSES = {
    ("dpo", "dpo"): ({"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    ("dpo", "robust"): ({"beta": 0.3, "label_smoothing": 0.2}, {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2}),
    ("dpo", "hinge"): ({"beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}),
    ("ipo", "ipo"): ({"beta": 0.3, "normalize": "token_mean"}, {"loss_type": "ipo", "beta": 0.3}),
}
"""(Stage, kind) → our settings and TRL's."""


def make_objective(stage: str, kind: str, **settings: Any) -> Objective:
    return next(made for made in TRAINING_STAGES[stage].objectives if made().kind == kind)(**settings)


def make_start(folder: Path, role: str) -> Backbone:
    """A base whose trained role has an adapter that does something; the adapter, with its head, is also in `folder`."""
    make_model(folder / "base", initializer_range=0.2)
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), torch.float32)
    torch.manual_seed(1)
    if role == "reward":
        backbone.add_head("reward", torch.randn(1, 32) / 32**0.5)
    backbone.add_lora(role, lora_config(sections.Lora(r=4, alpha=8), "", None), None, trained=True)
    with torch.no_grad():
        for name, parameter in backbone.trained_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    backbone.save(role, folder / "adapter")
    return backbone


def with_reference(backbone: Backbone, trees: list[Tree]) -> list[Tree]:
    """The trees with the log-probabilities of the start, from the logits of one sequence at a time."""
    with backbone.plain_attention() as model, torch.no_grad():
        logps = iter(plain_logps(model, trees).numpy())
    take = lambda count: np.array([next(logps) for _ in range(count)], np.float32)  # noqa: E731
    return [tree._replace(reference=tuple(take(len(response)) for response in tree.responses)) for tree in trees]


def our_steps(backbone: Backbone, objective: Objective, trees: list[Tree]) -> list[dict[str, float]]:
    optimizer = build_optimizer(backbone.trained_roles, sections.Train())
    passes = Passes(backbone, 60, Ranks(expected=False))
    batches = [trees[start : start + ROWS] for start in range(0, len(trees), ROWS)]
    updates = [Update(step, batch, {"policy": RATE}, 1.0, seed=0) for step, batch in enumerate(batches, 1)]
    return [optimise(passes, objective, optimizer, update).metrics for update in updates]


def their_steps(trainer: Any) -> list[dict[str, float]]:
    """What TRL logs, a line a step, after a look at the tokens that it will see."""
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == STEPS
    for number, batch in enumerate(batches):
        trees = TREES[number * ROWS : (number + 1) * ROWS]
        assert rows_of(batch) == [sequences(tree)[branch][0][0].tolist() for branch in (0, 1) for tree in trees]
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The first responses of a batch after their prompts, then the second ones, without padding."""
    return [
        ids[mask.bool()].tolist()
        for prefix in ("", "KL_")
        if f"{prefix}input_ids" in batch
        for ids, mask in zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], strict=True)
    ]


def build_dpo(folder: Path, **settings: Any) -> Any:
    """TRL's trainer, with the given token ids in place of those it would make of text; its reference is a copy of the adapter."""
    from datasets import Dataset
    from peft import PeftModel
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Given(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    parts = [[ids.tolist() for ids in (tree.prompt, *tree.responses)] for tree in TREES]
    return Given(
        model=load_adapted(PeftModel, AutoModelForCausalLM, folder),
        args=DPOConfig(**plain_settings(folder, STEPS, ROWS, RATE), **settings),
        train_dataset=Dataset.from_list([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), p, strict=True)) for p in parts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )


def build_kto(folder: Path, trees: list[Tree]) -> Any:
    """TRL's trainer with the trees' mismatched responses in place of those it would take from the row before."""
    from datasets import Dataset
    from peft import PeftModel
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    class Given(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = []
    for tree in trees:
        prompt, own, mismatched = (ids.tolist() for ids in (tree.prompt, *tree.responses))
        rows.append({"prompt_ids": prompt, "completion_ids": own, "KL_completion_ids": mismatched, "label": tree.facts.label})
    return Given(
        model=load_adapted(PeftModel, AutoModelForCausalLM, folder),
        args=KTOConfig(**plain_settings(folder, STEPS, ROWS, RATE), beta=0.3, desirable_weight=1.5),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )


def load_adapted(peft: Any, kind: Any, folder: Path, **options: Any) -> Any:
    """The base with the adapter of the start, trainable."""
    base = kind.from_pretrained(folder / "base", dtype=torch.float32, **options)
    return peft.from_pretrained(base, folder / "adapter", is_trainable=True)


def build_reward(folder: Path) -> Any:
    from datasets import Dataset
    from peft import PeftModel
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [[ids[0].tolist() for ids, _ in sequences(tree)] for tree in TREES]
    # TRL's score is that of the last token that is not the padding token, so the rows must not have it.
    assert all(tokenizer.pad_token_id not in ids for row in rows for ids in row)
    return RewardTrainer(
        model=load_adapted(PeftModel, AutoModelForSequenceClassification, folder, num_labels=1),
        args=RewardConfig(**plain_settings(folder, STEPS, ROWS, RATE)),
        train_dataset=Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in rows]),
        processing_class=tokenizer,
    )


def check(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: dict[str, str]) -> None:
    """Losses to 1e-3; the metrics `names` (ours → theirs) as well; and there was something to follow."""
    assert len(ours) == STEPS
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-3)
    assert [m["grad_norm"] for m in ours] == pytest.approx([m["grad_norm"] for m in theirs], rel=1e-2)
    for mine, other in names.items():
        assert [m[mine] for m in ours] == pytest.approx([m[other] for m in theirs], rel=1e-3, abs=1e-5)
    losses = [m["loss"] for m in ours]
    assert max(losses) - min(losses) > 0.05 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), LOSSES)
def test_preference_losses_of_trl(stage: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    mine, other = LOSSES[stage, kind]
    backbone = make_start(tmp_path, "policy")
    ours = our_steps(backbone, make_objective(stage, kind, **mine), with_reference(backbone, TREES))
    names = {"logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}
    check(ours, their_steps(build_dpo(tmp_path, **other)), names)


@pytest.mark.slow
def test_kto_of_trl(tmp_path: Path) -> None:
    """With the same mismatched responses, z0 included. The second class comes first in some batches and alone in one."""
    pytest.importorskip("trl")
    labels = [True, False, True, True, False, True, False, False, *[False] * ROWS] * 4
    trees = [tree._replace(facts=Facts(label=label)) for tree, label in zip(TREES, labels, strict=False)]
    backbone = make_start(tmp_path, "policy")
    ours = our_steps(backbone, make_objective("kto", "kto", beta=0.3, lambda_d=1.5), with_reference(backbone, trees))
    theirs = their_steps(build_kto(tmp_path, trees))
    check(ours, theirs, {"kl": "kl"})
    assert max(line["kl"] for line in theirs) > 0.1


@pytest.mark.slow
def test_reward_model_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    backbone = make_start(tmp_path, "reward")
    ours = our_steps(backbone, make_objective("train-rm", "bradley_terry"), TREES)
    check(ours, their_steps(build_reward(tmp_path)), {"accuracy": "accuracy", "margin": "margin"})
