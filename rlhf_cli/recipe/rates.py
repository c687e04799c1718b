"""Learning rates: the default of every stage, kind, and LoRA or all weights, and which ones make a run warn."""

from __future__ import annotations

from typing import Literal

from rlhf_cli.recipe.recipes import TrainingRecipe


def learning_rate_of(recipe: TrainingRecipe) -> float:
    """The learning rate in force: the recipe's own, else the default of its stage, kind, and LoRA or all weights."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate
    return default_learning_rate(recipe.stage, recipe.objective.kind, _trained(recipe))


def sane_learning_rate(recipe: TrainingRecipe) -> tuple[float, float]:
    """The lowest and highest rate at which a run of this recipe does not warn."""
    return SANE_LEARNING_RATE[recipe.stage, _trained(recipe)]


def default_learning_rate(stage: str, kind: str, trained: Trained) -> float:
    """The default of one kind of a stage."""
    return KIND_LEARNING_RATE.get((stage, kind, trained), LEARNING_RATE[stage, trained])


def _trained(recipe: TrainingRecipe) -> Trained:
    return "full" if recipe.lora is None else "lora"


Trained = Literal["lora", "full"]

LEARNING_RATE: dict[tuple[str, Trained], float] = {
    ("sft", "lora"): 2e-4,
    ("sft", "full"): 2e-5,
    ("train-rm", "lora"): 1e-4,
    ("train-rm", "full"): 1e-5,
    ("dpo", "lora"): 1e-5,
    ("dpo", "full"): 1e-6,
    ("ipo", "lora"): 1e-5,
    ("ipo", "full"): 1e-6,
    ("kto", "lora"): 1e-5,
    ("kto", "full"): 1e-6,
    ("ppo", "lora"): 3e-5,
    ("ppo", "full"): 3e-6,
}
"""(stage, lora | full) → default.

LoRA wants about 10× the rate of full fine-tuning: Schulman et al. 2025, "LoRA Without Regret". Full fine-tuning: train-rm as
Touvron et al. 2023, §3.2.2; dpo as Rafailov et al. 2023, app. B (later work went down to 5e-7: Tunstall et al. 2023, Lambert et
al. 2024); ipo as dpo, since Azar et al. 2023 train no language model; kto inside Ethayarajh et al. 2024's 5e-7 … 5e-6; ppo as
Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
"""

KIND_LEARNING_RATE: dict[tuple[str, str, Trained], float] = {
    ("dpo", "simpo", "lora"): 5e-6,
    ("dpo", "simpo", "full"): 5e-7,
    ("dpo", "orpo", "lora"): 8e-5,
    ("dpo", "orpo", "full"): 8e-6,
}
"""(stage, kind, lora | full) → default, where a kind wants another than its stage.

simpo: Meng et al. 2024 searched 3e-7 … 1e-6. orpo: Hong et al. 2024; it is supervised fine-tuning as well.
"""

SANE_LEARNING_RATE: dict[tuple[str, Trained], tuple[float, float]] = {
    ("sft", "lora"): (1e-6, 2e-3),
    ("sft", "full"): (1e-7, 3e-4),
    ("train-rm", "lora"): (1e-6, 1e-3),
    ("train-rm", "full"): (1e-7, 1e-4),
    **{(stage, "lora"): (5e-7, 5e-4) for stage in ("dpo", "ipo", "kto")},
    **{(stage, "full"): (5e-8, 5e-5) for stage in ("dpo", "ipo", "kto")},
    ("ppo", "lora"): (5e-7, 5e-4),
    ("ppo", "full"): (5e-8, 5e-5),
}
"""(stage, lora | full) → outside this range a run warns. Other objectives diverge, or forget, at rates that suit SFT."""
