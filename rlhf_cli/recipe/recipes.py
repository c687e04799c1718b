"""The recipe of every command: which sections and objectives it has, and keys of its own."""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlhf_cli.metrics import LOGP_GAP, ZERO_SPREAD
from rlhf_cli.objectives.aot import Aot
from rlhf_cli.objectives.apo import ApoDown, ApoZero, UnpairedApoZero
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.base import Objective, Trained
from rlhf_cli.objectives.bco import Bco, UnpairedBco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.discopop import DiscoPop
from rlhf_cli.objectives.distil import Distil
from rlhf_cli.objectives.dno import Dno
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.exo import Exo
from rlhf_cli.objectives.general import General
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.nca import Nca
from rlhf_cli.objectives.odpo import Odpo
from rlhf_cli.objectives.orpo import Orpo
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuce, PlackettLuceReward
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.slic import Slic
from rlhf_cli.objectives.sppo import Sppo
from rlhf_cli.objectives.squared import Squared
from rlhf_cli.objectives.steps import Steps
from rlhf_cli.objectives.tdpo2 import Tdpo2
from rlhf_cli.objectives.wpo import Wpo
from rlhf_cli.recipe.rewards import term_names
from rlhf_cli.sections import (
    Data,
    Explore,
    Kl,
    Lora,
    Model,
    OnlineSampling,
    PolicyReference,
    PolicySampling,
    Reference,
    Reward,
    SftData,
    Source,
    Tracker,
    Train,
    key,
)

DRAWN_METRICS = ("objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys of every command."""

    stage: ClassVar[str]

    seed: int = key(0, "of everything that is random", low=0, high=2**32 - 1, last=True)
    output: str = key(help="the run folder", path=True, last=True)
    env: dict[str, bool | int | float | str] = key(
        {}, "environment variables, set before any library is loaded; no place for a secret", last=True
    )

    @property
    def terms(self) -> tuple[list[Reward], list[Reward]]:
        """The terms of the reward and the gold ones, for the responses that are drawn."""
        return [], []

    @property
    def paths(self) -> list[str]:
        """What it reads: local paths or hub ids of models and data."""
        terms = [term for own in self.terms for term in own]
        judges = [term.judge.path for term in terms if term.judge is not None]
        return [path for path in (*(term.model for term in terms), *judges) if path is not None]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe(Recipe):
    """The keys of every stage that trains."""

    model: Model
    lora: Lora | Literal["auto"] | None = key(
        "auto", "auto: the parent's adapter goes on, else r 16 on all linear layers; null: train all weights"
    )
    data: Data
    train: Train = field(default_factory=Train)
    objective: Objective
    trackers: list[str] | dict[str, Tracker] = key(
        [], "[tensorboard, wandb, mlflow, trackio, …], or {NAME: {project, name}}; offline files are always written", last=True
    )

    @property
    def trained(self) -> Trained:
        return "full" if self.lora is None else "lora"

    @property
    def draws(self) -> PolicySampling | None:
        """How responses are drawn from the policy; None where it learns from those of its data."""
        return None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of its own updates: those of its objective, and of what it learns beside it."""
        return self.objective.metric_names

    @property
    def drawn_metrics(self) -> tuple[str, ...]:
        """What is measured of the responses that are drawn from the policy; empty where none are."""
        if self.draws is None:
            return ()
        rewards, golds = map(term_names, self.terms)
        named = DRAWN_METRICS if self.draws.engine == "transformers" else (*DRAWN_METRICS, LOGP_GAP)
        return (*named, *(f"reward/{name}" for name in rewards), *(f"gold/{name}" for name in golds))

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        """The metrics of held-out lines, what `keep_best` can watch."""
        return self.drawn_metrics or self.metric_names

    @property
    def training_metrics(self) -> tuple[str, ...]:
        """The metrics of training lines, what `stop_if` can watch. Those of drawn responses stand where some are drawn."""
        drawn = (*self.drawn_metrics, "time/rollout", "time/update") if self.draws else ()
        if self.draws and any(self.terms):
            drawn = (*drawn[:-1], "time/score", drawn[-1], *((ZERO_SPREAD,) if self.draws.responses_per_prompt > 1 else ()))
        return (*self.metric_names, *drawn, "grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch")

    @property
    def paths(self) -> list[str]:
        models = self.model.path, *self.objective.frozen.values()
        return [*models, *super().paths, *(source.path for source in (*self.data.train, *(self.data.eval or ())))]


@dataclass(frozen=True, kw_only=True)
class SftRecipe(TrainingRecipe):
    """`rlhf sft`."""

    stage: ClassVar[str] = "sft"

    data: SftData
    objective: Sft | Distil = field(default_factory=Sft)
    rollout: PolicySampling | None = key(None, "with kind: distil, draw the responses from the policy while it trains")

    @property
    def draws(self) -> PolicySampling | None:
        return self.rollout

    @property
    def drawn_metrics(self) -> tuple[str, ...]:
        return ("response/length", "response/eos_rate") if self.rollout else ()

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        return (*self.metric_names, *self.drawn_metrics)


@dataclass(frozen=True, kw_only=True)
class TrainRmRecipe(TrainingRecipe):
    """`rlhf train-rm`."""

    stage: ClassVar[str] = "train-rm"

    objective: BradleyTerry | PlackettLuceReward | AllPairs | General | Steps = field(default_factory=BradleyTerry)


@dataclass(frozen=True, kw_only=True)
class ReferenceRecipe(TrainingRecipe):
    """The keys of every stage that compares the policy with a reference."""

    reference: PolicyReference = field(default_factory=PolicyReference)


@dataclass(frozen=True, kw_only=True)
class DirectRecipe(ReferenceRecipe):
    """The keys of every stage that learns from preferences, of its data or of a reward."""

    reference: Reference = field(default_factory=Reference)
    rollout: OnlineSampling | None = key(None, "draw the responses from the policy while it trains, and rank them by `reward`")
    reward: list[Reward] | None = key(None, "with rollout: what ranks the responses; {model: …} or {function: …} each")
    reward_combine: Literal["sum", "min", "mean_minus_std"] = key("sum", "how the weighted terms make one score")
    gold: list[Reward] | None = key(None, "with rollout: like reward; only measured, never trained on")

    @property
    def draws(self) -> PolicySampling | None:
        return self.rollout

    @property
    def terms(self) -> tuple[list[Reward], list[Reward]]:
        return self.reward or [], self.gold or []


DpoLoss = Dpo | Robust | Hinge | Squared | Slic | Simpo | Orpo | Odpo | CalDpo | Rebel | Bco | PlackettLuce
DpoLoss |= ApoZero | ApoDown | Nca | Exo | DiscoPop | Wpo | Tdpo2 | Aot


@dataclass(frozen=True, kw_only=True)
class DpoRecipe(DirectRecipe):
    """`rlhf dpo`."""

    stage: ClassVar[str] = "dpo"

    objective: DpoLoss | Sppo | Dno = field(default_factory=Dpo)
    explore: Explore | None = key(None, "with rollout and kind: dpo: an optimistic term in the loss")


@dataclass(frozen=True, kw_only=True)
class IpoRecipe(DirectRecipe):
    """`rlhf ipo`."""

    stage: ClassVar[str] = "ipo"

    objective: Ipo = field(default_factory=Ipo)


@dataclass(frozen=True, kw_only=True)
class KtoRecipe(DirectRecipe):
    """`rlhf kto`."""

    stage: ClassVar[str] = "kto"

    objective: Kto | UnpairedBco | UnpairedApoZero = field(default_factory=Kto)


@dataclass(frozen=True)
class PpoSampling(PolicySampling):
    correction: Literal["none", "truncate"] = key("none", "truncate: policy gradients are weighed by π/π_engine, at most 2")


@dataclass(frozen=True)
class Value:
    init: Literal["reward", "policy"] = key("reward", "weights that the value starts from: the first reward model, or the policy")
    learning_rate: float | None = key(None, "null: train.learning_rate, else LoRA's default: the value is an adapter", low=0.0)


@dataclass(frozen=True)
class Ptx:
    """Supervised rows that are learned beside the reward (Ouyang et al. 2022: PPO-ptx)."""

    data: list[Source] = key(help="a path, or a list of sources")
    coef: float = key(27.8, "γ: weight of their mean negative log-likelihood", low=0.0)


@dataclass(frozen=True, kw_only=True)
class PpoRecipe(ReferenceRecipe):
    """`rlhf ppo`."""

    stage: ClassVar[str] = "ppo"

    objective: Ppo | Reinforce | Rloo | Grpo | Bandit = field(default_factory=Ppo)
    rollout: PpoSampling = field(default_factory=PpoSampling)
    reward: list[Reward] = key(
        help="a list of terms, each one of model, function, match, format, length and judge: [{model: runs/rm}]"
    )
    reward_combine: Literal["sum", "min", "mean_minus_std"] = key("sum", "how the weighted terms make one score")
    kl: Kl = field(default_factory=Kl)
    value: Value = field(default_factory=Value)
    ptx: Ptx | None = key(None, "supervised rows to learn beside the reward")
    gold: list[Reward] | None = key(None, "like reward; only measured, never trained on")

    @property
    def draws(self) -> PpoSampling:
        return self.rollout

    @property
    def terms(self) -> tuple[list[Reward], list[Reward]]:
        return self.reward, self.gold or []

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "kl_coef", *(("loss/ptx",) if self.ptx else ()))

    @property
    def drawn_metrics(self) -> tuple[str, ...]:
        return ("objective/rlhf_reward", *super().drawn_metrics)

    @property
    def paths(self) -> list[str]:
        return [*super().paths, *(source.path for source in (self.ptx.data if self.ptx else ()))]
