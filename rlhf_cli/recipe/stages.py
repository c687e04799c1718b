"""The commands that take a recipe: one row for each, with all that is known of it outside of its own files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.data.formats import STEPS, Use
from rlhf_cli.objectives.base import Objective, Trained
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.recipe.checks import DIRECT, KTO, PPO, SFT, TRAINING, Check
from rlhf_cli.recipe.eval_checks import EVALUATION
from rlhf_cli.recipe.evaluations import EvalRecipe
from rlhf_cli.recipe.keys import keys_of, sections_in
from rlhf_cli.recipe.label_checks import LABELS
from rlhf_cli.recipe.labels import LabelRecipe
from rlhf_cli.recipe.recipes import (
    DirectRecipe,
    DpoRecipe,
    IpoRecipe,
    KtoRecipe,
    PpoRecipe,
    Recipe,
    SftRecipe,
    TrainingRecipe,
    TrainRmRecipe,
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command with a recipe."""

    recipe: type[Recipe]  # its keys, and its name
    module: str  # imported when it runs; has run(loaded, *, check, resume, force)
    help: str
    checks: tuple[Check, ...]  # what its keys must agree on


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage):
    """A command that trains. Its metrics are those of its objectives."""

    recipe: type[TrainingRecipe]
    title: str  # what its reports call it
    then: str  # what comes next, said of a {run}
    learning_rate: Mapping[Trained, float]  # the default; a kind may have its own
    sane: Mapping[Trained, tuple[float, float]]  # outside this range a run warns

    @property
    def objectives(self) -> tuple[type[Objective], ...]:
        """The kinds that the annotation of its recipe's objective names, the default first."""
        recipe: type = self.recipe
        return sections_in(keys_of(recipe)["objective"].kind)

    @property
    def role(self) -> Literal["policy", "reward"]:
        """What it trains."""
        return self.objectives[0].role

    @property
    def rows(self) -> Use:
        """The rows that it learns from."""
        return self.objectives[0].rows

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages whose runs it may start from: a policy starts from policies, a reward model from either."""
        return tuple(name for name, stage in TRAINING_STAGES.items() if stage.role in ("policy", self.role))

    def default_learning_rate(self, objective: type[Objective] | Objective, trained: Trained) -> float:
        """The default of one of its kinds."""
        return objective.learning_rate.get(trained, self.learning_rate[trained])


_COMPARE = "`rlhf eval` compares it with where it began: `models: {{before: PATH, after: {run}}}`."
_DIRECT_RATE: Mapping[Trained, float] = {"lora": 1e-5, "full": 1e-6}
"""Full: Rafailov et al. 2023, app. B (later work went down to 5e-7: Tunstall et al. 2023, Lambert et al. 2024), inside the
5e-7 … 5e-6 of Ethayarajh et al. 2024; Azar et al. 2023 train no language model."""

_SANE: Mapping[Trained, tuple[float, float]] = {"lora": (5e-7, 5e-4), "full": (5e-8, 5e-5)}
"""Other objectives than SFT's diverge, or forget, at rates that suit it."""

# LoRA wants about 10× the rate of full fine-tuning: Schulman et al. 2025, "LoRA Without Regret".
_TRAINING = (
    TrainingStage(
        recipe=SftRecipe,
        module="rlhf_cli.stages.sft",
        help="Supervised fine-tuning on given responses, or distillation.",
        title="supervised fine-tuning",
        then="`rlhf train-rm`, `rlhf dpo` and `rlhf ppo` go on from it: `model.path: {run}`.",
        learning_rate={"lora": 2e-4, "full": 2e-5},
        sane={"lora": (1e-6, 2e-3), "full": (1e-7, 3e-4)},
        checks=SFT,
    ),
    TrainingStage(
        recipe=TrainRmRecipe,
        module="rlhf_cli.stages.train_rm",
        help="A reward model from comparisons of responses.",
        title="reward model",
        then="`rlhf ppo`, and `rlhf dpo` with a `rollout`, take it as their reward: `reward: [{{model: {run}}}]`.",
        learning_rate={"lora": 1e-4, "full": 1e-5},  # full: Touvron et al. 2023, §3.2.2
        sane={"lora": (1e-6, 1e-3), "full": (1e-7, 1e-4)},
        checks=TRAINING,
    ),
    TrainingStage(
        recipe=DpoRecipe,
        module="rlhf_cli.stages.direct",
        help="Direct preference optimisation, and other losses on pairs or rankings.",
        title="direct preference optimisation",
        then=_COMPARE,
        learning_rate=_DIRECT_RATE,
        sane=_SANE,
        checks=DIRECT,
    ),
    TrainingStage(
        recipe=IpoRecipe,
        module="rlhf_cli.stages.direct",
        help="Identity preference optimisation: pairs, with a target for the margin.",
        title="identity preference optimisation",
        then=_COMPARE,
        learning_rate=_DIRECT_RATE,
        sane=_SANE,
        checks=DIRECT,
    ),
    TrainingStage(
        recipe=KtoRecipe,
        module="rlhf_cli.stages.direct",
        help="Kahneman-Tversky optimisation: single responses marked good or bad.",
        title="Kahneman–Tversky optimisation",
        then=_COMPARE,
        learning_rate=_DIRECT_RATE,
        sane=_SANE,
        checks=KTO,
    ),
    TrainingStage(
        recipe=PpoRecipe,
        module="rlhf_cli.stages.ppo",
        help="Proximal policy optimisation, and other methods on responses of the policy's own.",
        title="policy optimisation with a reward",
        then=_COMPARE,
        learning_rate={"lora": 3e-5, "full": 3e-6},  # full: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"
        sane=_SANE,
        checks=PPO,
    ),
)

TRAINING_STAGES: dict[str, TrainingStage] = {stage.recipe.stage: stage for stage in _TRAINING}

STAGES: dict[str, Stage] = TRAINING_STAGES | {
    EvalRecipe.stage: Stage(
        recipe=EvalRecipe,
        module="rlhf_cli.stages.evaluate",
        help="What models say, what it is worth, and how they compare; trains nothing.",
        checks=EVALUATION,
    ),
    LabelRecipe.stage: Stage(
        recipe=LabelRecipe,
        module="rlhf_cli.stages.label",
        help="Which responses are better, by people or a model: preferences to train on, and how far they agree.",
        checks=LABELS,
    ),
}
"""The name of each command that takes a recipe, and its row."""

ROW_USES = {name: stage.rows for name, stage in TRAINING_STAGES.items()} | {"train-rm objective.kind=steps": STEPS}
"""What each stage reads rows for, and the kind of one that reads others."""

POLICY_STAGES = tuple(name for name, stage in TRAINING_STAGES.items() if stage.role == "policy")
REWARD_STAGES = tuple(name for name, stage in TRAINING_STAGES.items() if stage.role == "reward")


def learning_rate_of(recipe: TrainingRecipe) -> float:
    """The learning rate in force: the recipe's own, else the default of its stage, kind, and LoRA or all weights."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate
    return TRAINING_STAGES[recipe.stage].default_learning_rate(recipe.objective, recipe.trained)


HORIZONS = 50
"""An adapted κ may change by a fifth so many times in a run, e^10 in all, but once a step at most."""


def resolved(recipe: TrainingRecipe, steps: int) -> TrainingRecipe:
    """The recipe with the values that follow from its stage, kind, `steps` and other keys, where it leaves them open."""
    asked, train = recipe.train.learning_rate, dataclasses.replace(recipe.train, learning_rate=learning_rate_of(recipe))
    if isinstance(recipe, PpoRecipe):
        objective, kl, value = recipe.objective, recipe.kl, recipe.value
        if kl.estimator == "auto" and kl.coef:
            kl = dataclasses.replace(kl, estimator="k2" if objective.kl_in_loss else "k1")
        if kl.target is not None and kl.horizon is None:
            responses = recipe.train.batch_size * recipe.rollout.responses_per_prompt
            kl = dataclasses.replace(kl, horizon=max(responses, responses * steps // HORIZONS))
        if objective.values and value.learning_rate is None:
            # The policy's or, beside a policy that trains all weights, what an adapter wants by default.
            default = TRAINING_STAGES[recipe.stage].default_learning_rate(objective, "lora")
            value = dataclasses.replace(value, learning_rate=default if asked is None else asked)
        if isinstance(objective, Grpo):
            objective = dataclasses.replace(objective, mean_over=objective.meant_over)
        recipe = dataclasses.replace(recipe, kl=kl, value=value, objective=objective)
    if isinstance(recipe, DirectRecipe) and recipe.reference.model == "auto":
        model = "previous" if recipe.objective.iterated and recipe.rollout else "start"
        recipe = dataclasses.replace(recipe, reference=dataclasses.replace(recipe.reference, model=model))
    return dataclasses.replace(recipe, train=train)


def sane_learning_rate(recipe: TrainingRecipe) -> tuple[float, float]:
    """The lowest and highest rate at which a run of this recipe does not warn."""
    return TRAINING_STAGES[recipe.stage].sane[recipe.trained]
