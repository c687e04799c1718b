"""Every recipe key with its type, default and meaning: the one place for each.

The loader, `--help`, the docs and the resolved recipe read these dataclasses. `key(default, help, …)` attaches what a
type cannot say. A key without a default is required.
"""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlhf_cli.fields import key
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.bco import Bco, UnpairedBco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.odpo import Odpo
from rlhf_cli.objectives.orpo import Orpo
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuce, PlackettLuceReward
from rlhf_cli.objectives.policy_gradient import PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.slic import Slic
from rlhf_cli.objectives.squared import Squared
from rlhf_cli.recipe.rewards import name_of


@dataclass(frozen=True)
class Model:
    path: str = key(help="hub id, transformers folder, or the folder of an earlier run", path=True)
    revision: str | None = key(None, "hub revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of frozen weights and of compute; trained weights are float32"
    )
    attention: Literal["auto", "sdpa", "flex", "flash", "eager"] = key(
        "auto", "attention kernel; auto: one call per tree on a CPU, sdpa on a GPU"
    )
    quantize: Literal["4bit", "8bit"] | None = key(None, "quantised frozen base (extra: quant)")
    gradient_checkpointing: bool = key(False, "recompute activations in backward: less memory, ~30 % more time")
    chat_template: str | None = key(None, "null: the tokenizer's own, else a plain built-in one; a Jinja file; none", path=True)
    trust_remote_code: bool = key(False, "run code from the model folder; only with --set, never from the file")


@dataclass(frozen=True)
class Lora:
    r: int = key(16, "rank", low=1)
    alpha: float = key(32.0, "scale: the update is alpha/r · B·A")
    dropout: float = key(0.0, "on the adapter's input", low=0.0, high=0.99)
    target_modules: str | list[str] = key("all-linear", "module names, or all-linear")
    merge_parent: bool = key(False, "merge the parent's adapter into the base when its settings differ")


@dataclass(frozen=True)
class Source:
    path: str = key(help="hub id, .jsonl[.gz] | .json | .csv | .parquet file, glob or folder", path=True)
    name: str | None = key(None, "hub configuration (data_dir included)")
    split: str = key("train", "hub split")
    format: Literal["auto", "messages", "prompt-completion", "text", "preference", "hh", "ranked", "unpaired", "prompt"] = key(
        "auto", "row format"
    )
    columns: dict[str, str] = key({}, "ours: theirs")
    weight: float = key(1.0, "share of each epoch when there are several sources, whatever their sizes", low=0.0)
    limit: int | None = key(None, "first N rows after a seeded shuffle", low=1)


@dataclass(frozen=True)
class Data:
    """Where rows come from and how they are read."""

    train: list[Source] = key(help="a path, or a list of sources")
    eval: list[Source] | None = key(None, "the same, held out")
    holdout: float = key(0.0, "seeded share of train that is held out, chosen by prompt", low=0.0, high=0.9)
    max_length: int = key(1024, "tokens of prompt + response", low=2)
    overlong: Literal["drop", "error", "truncate-prompt", "truncate-response"] = key("drop", "what happens to longer rows")
    control_tokens: Literal["reject", "keep"] = key("reject", "text that contains the tokenizer's control tokens")
    max_lost: float = key(0.05, "exit 2 if more than this share of rows is dropped or truncated", low=0.0, high=1.0)
    shuffle: bool = key(True, "false: file order")

    @property
    def train_on(self) -> Literal["all", "last"]:
        """Which assistant turns are supervised: comparing responses says nothing about the turns before them."""
        return "last"


@dataclass(frozen=True)
class SftData(Data):
    train_on: Literal["all", "last"] = key("all", "which assistant turns of a conversation are supervised")


@dataclass(frozen=True)
class KeepBest:
    metric: str = key(help="name of an evaluation metric")
    mode: Literal["min", "max"] = key(help="min or max")


@dataclass(frozen=True)
class StopRule:
    above: float | None = key(None, "stop when the metric is above this")
    below: float | None = key(None, "stop when the metric is below this")
    falls: float | None = key(None, "stop when the metric has lost this share of its best", low=0.0, high=1.0)


@dataclass(frozen=True)
class Train:
    epochs: float = key(1.0, "passes over the data", low=0.0)
    steps: int | None = key(None, "overrides epochs", low=1)
    batch_size: int = key(32, "prompts (with all their responses) per optimiser step, over all devices", low=1)
    tokens_per_device: int | Literal["auto"] = key("auto", "packing budget of one forward pass; never changes the result", low=1)
    learning_rate: float | None = key(None, "default per stage and per LoRA or full", low=0.0)
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "after the warm-up")
    warmup: float = key(0.03, "share of steps if below 1, else a number of steps", low=0.0)
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = key("adamw", "update rule")
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's", low=0.0, high=0.99999)
    weight_decay: float = key(0.0, "decoupled", low=0.0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", low=0.0)
    log_every: int = key(1, "steps between two printed lines", low=1)
    eval_every: float | None = key(0.25, "below 1: share of the run; else steps; null: at the end alone", low=0.0)
    save_every: float | None = key(0.25, "the same, for checkpoints", low=0.0)
    keep_checkpoints: int = key(2, "the newest N are kept", low=1)
    keep_best: KeepBest | None = key(None, "also keep the best checkpoint by an evaluation metric")
    stop_if: dict[str, StopRule] = key({}, "metric: {above | below | falls: x} ends the run cleanly")


@dataclass(frozen=True)
class PolicyReference:
    model: str = key("start", "start: the weights that this stage starts from; base: the bare base model; a path", path=True)


@dataclass(frozen=True)
class Reference(PolicyReference):
    cache: bool = key(True, "compute its log-probabilities once and keep them; false: again in every step")


@dataclass(frozen=True)
class Rollout:
    """How responses are drawn from the policy."""

    max_new_tokens: int = key(128, "tokens of a response at most; longer ones are cut off", low=1)
    temperature: float = key(1.0, "of sampling; the log-probabilities of the ppo kinds are taken at it too", low=1e-2, high=100.0)
    responses_per_prompt: int = key(1, "rloo and grpo need 2 or more", low=1)
    missing_eos_penalty: float = key(0.0, "taken off the score of a response that did not end", low=0.0)
    engine: Literal["transformers", "vllm"] = key("transformers", "what samples (vllm: an extra)")


@dataclass(frozen=True)
class OnlineRollout(Rollout):
    responses_per_prompt: int = key(2, "they are ranked by the reward; 2: one pair", low=2)
    refresh: int = key(1, "steps between two draws from the policy; 1: online, more: iterative", low=1)


@dataclass(frozen=True)
class Reward:
    """One term of the reward: a reward model or a Python function."""

    model: str | None = key(
        None, "reward model: the folder of a train-rm run, or a sequence classifier with one label", path=True
    )
    revision: str | None = key(None, "hub revision of the model")
    function: str | None = key(
        None, "file.py:name, called with lists of prompts and responses, returns a list of numbers", path=True
    )
    name: str | None = key(None, "under which it is logged; default: the model's folder or the function's name")
    weight: float = key(1.0, "factor of this term in the score")
    normalize: bool | None = key(None, "scores less their mean, over their deviation, as the train-rm run recorded; its default")


@dataclass(frozen=True)
class Kl:
    coef: float = key(0.05, "κ: weight of the log-ratio to the reference", low=0.0)
    target: float | None = key(None, "nats a response: κ is adapted to reach this KL", low=1e-9)
    horizon: int = key(10000, "responses over which an adapted κ changes by a factor", low=1)
    estimator: Literal["k1", "k2", "k3"] = key("k1", "k1: in the reward; k2, k3: as a loss term")


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
class Recipe:
    """The keys of every stage."""

    stage: ClassVar[str]

    model: Model
    lora: Lora | Literal["auto"] | None = key(
        "auto", "auto: the parent's adapter goes on, else r 16 on all linear layers; null: train all weights"
    )
    data: Data
    train: Train = field(default_factory=Train)
    objective: Objective
    seed: int = key(0, "of everything that is random", low=0, high=2**32 - 1, last=True)
    output: str = key(help="the run folder", path=True, last=True)
    trackers: list[str] = key([], "tensorboard, wandb, mlflow, trackio, …; offline files are always written", last=True)

    @property
    def draws(self) -> Rollout | None:
        """How responses are drawn from the policy; None where it learns from those of its data."""
        return None

    @property
    def judges(self) -> tuple[list[Reward], list[Reward]]:
        """The terms of the reward and the gold ones, for the responses that are drawn."""
        return [], []

    @property
    def paths(self) -> list[str]:
        """What it reads: local paths or hub ids of models and data."""
        models = [term.model for terms in self.judges for term in terms if term.model is not None]
        return [self.model.path, *models, *(source.path for source in (*self.data.train, *(self.data.eval or ())))]


@dataclass(frozen=True, kw_only=True)
class SftRecipe(Recipe):
    """`rlhf sft`."""

    stage: ClassVar[str] = "sft"

    data: SftData
    objective: Sft = field(default_factory=Sft)


@dataclass(frozen=True, kw_only=True)
class TrainRmRecipe(Recipe):
    """`rlhf train-rm`."""

    stage: ClassVar[str] = "train-rm"

    objective: BradleyTerry | PlackettLuceReward | AllPairs = field(default_factory=BradleyTerry)


@dataclass(frozen=True, kw_only=True)
class DirectRecipe(Recipe):
    """The keys of every stage that compares the policy with a reference."""

    reference: Reference = field(default_factory=Reference)
    rollout: OnlineRollout | None = key(None, "draw the responses from the policy while it trains, and rank them by `reward`")
    reward: list[Reward] | None = key(None, "with rollout: what ranks the responses; {model: …} or {function: …} each")
    reward_combine: Literal["sum", "min", "mean_minus_std"] = key("sum", "how the weighted terms make one score")
    gold: list[Reward] | None = key(None, "with rollout: like reward; only measured, never trained on")

    @property
    def draws(self) -> Rollout | None:
        return self.rollout

    @property
    def judges(self) -> tuple[list[Reward], list[Reward]]:
        return self.reward or [], self.gold or []


@dataclass(frozen=True, kw_only=True)
class DpoRecipe(DirectRecipe):
    """`rlhf dpo`."""

    stage: ClassVar[str] = "dpo"

    objective: Dpo | Robust | Hinge | Squared | Slic | Simpo | Orpo | Odpo | CalDpo | Rebel | Bco | PlackettLuce = field(
        default_factory=Dpo
    )


@dataclass(frozen=True, kw_only=True)
class IpoRecipe(DirectRecipe):
    """`rlhf ipo`."""

    stage: ClassVar[str] = "ipo"

    objective: Ipo = field(default_factory=Ipo)


@dataclass(frozen=True, kw_only=True)
class KtoRecipe(DirectRecipe):
    """`rlhf kto`."""

    stage: ClassVar[str] = "kto"

    objective: Kto | UnpairedBco = field(default_factory=Kto)


@dataclass(frozen=True, kw_only=True)
class PpoRecipe(Recipe):
    """`rlhf ppo`."""

    stage: ClassVar[str] = "ppo"

    objective: Ppo | Reinforce | Rloo | Grpo | Bandit = field(default_factory=Ppo)
    reference: PolicyReference = field(default_factory=PolicyReference)
    rollout: Rollout = field(default_factory=Rollout)
    reward: list[Reward] = key(help="a list of terms: {model: …} or {function: file.py:name}")
    reward_combine: Literal["sum", "min", "mean_minus_std"] = key("sum", "how the weighted terms make one score")
    kl: Kl = field(default_factory=Kl)
    value: Value = field(default_factory=Value)
    ptx: Ptx | None = key(None, "supervised rows to learn beside the reward")
    gold: list[Reward] | None = key(None, "like reward; only measured, never trained on")

    @property
    def draws(self) -> Rollout:
        return self.rollout

    @property
    def judges(self) -> tuple[list[Reward], list[Reward]]:
        return self.reward, self.gold or []

    @property
    def paths(self) -> list[str]:
        return [*super().paths, *(source.path for source in (self.ptx.data if self.ptx else ()))]


STAGES: dict[str, type[Recipe]] = {
    recipe.stage: recipe for recipe in (SftRecipe, TrainRmRecipe, DpoRecipe, IpoRecipe, KtoRecipe, PpoRecipe)
}
"""Stage name → its recipe. What a stage's recipe does not name has no effect there and is rejected."""

ELSEWHERE = ("models", "prompts", "preferences")
"""Top-level keys that none of these stages has but others do: they too are said to have no effect."""

SHORT_FORM: dict[type, str] = {Source: "path"}
"""Where a list of these is expected, one may stand alone, and a plain text stands for one with this key alone."""

_PAIRS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/saturated",
    "logps/chosen",
    "logps/rejected",
    "logratio/mean",
)

_DRAWN = ("objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate")

METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "token_accuracy"),
    "train-rm": ("loss", "accuracy", "margin", "score_mean", "score_std"),
    "dpo": _PAIRS,
    "ipo": (*_PAIRS, "margin/target", "margin/logratio"),
    "kto": (
        "loss",
        "rewards/desirable",
        "rewards/undesirable",
        "rewards/margins",
        "logps/desirable",
        "logps/undesirable",
        "logratio/mean",
        "kl",
    ),
    "ppo": (
        "loss",
        "loss/policy",
        "loss/value",
        "loss/ptx",
        "kl_coef",
        "policy/clipfrac",
        "policy/approxkl",
        "policy/ratio",
        "value/explained_variance",
        "grad_norm/value",
        "learning_rate/value",
    ),
}
"""Stage → the metrics of its training lines; those of its held-out lines too where it learns from the responses of its data."""

LACKS: dict[str, Callable[[Recipe], bool]] = {
    "logratio/mean": lambda recipe: not recipe.objective.reference,
    "rewards/saturated": lambda recipe: not recipe.objective.saturates,
    "kl": lambda recipe: not recipe.objective.mismatches,
    "loss/value": lambda recipe: not learns_values(recipe.objective),
    "value/explained_variance": lambda recipe: not learns_values(recipe.objective),
    "learning_rate/value": lambda recipe: not learns_values(recipe.objective),
    "grad_norm/value": lambda recipe: not learns_values(recipe.objective),
    "loss/ptx": lambda recipe: not (isinstance(recipe, PpoRecipe) and recipe.ptx is not None),
}
"""Metric → does a recipe of its stages not have it?"""

_TIMES = ("time/rollout", "time/score", "time/update")

TRAINING_METRICS = ("grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch")
"""What training lines of every stage have beside them; `stop_if` can watch all."""


def learns_values(objective: Objective) -> bool:
    """Does it learn a value beside the policy?"""
    return isinstance(objective, PolicyGradient) and objective.values


def metrics_of(recipe: Recipe) -> tuple[str, ...]:
    """The metrics of a recipe's held-out lines, what `keep_best` can watch; those that its kind does not have left out."""
    return _drawn_metrics(recipe) if recipe.draws else _own_metrics(recipe)


def training_metrics_of(recipe: Recipe) -> tuple[str, ...]:
    """The metrics of a recipe's training lines, what `stop_if` can watch. Those of drawn responses stand where some are drawn."""
    drawn = (*_drawn_metrics(recipe), *_TIMES) if recipe.draws else ()
    return (*_own_metrics(recipe), *drawn, *TRAINING_METRICS)


def _own_metrics(recipe: Recipe) -> tuple[str, ...]:
    return tuple(name for name in METRICS[recipe.stage] if name not in LACKS or not LACKS[name](recipe))


def _drawn_metrics(recipe: Recipe) -> tuple[str, ...]:
    """What is measured of the responses that are drawn from the policy."""
    rewards, golds = recipe.judges
    penalised = ("objective/rlhf_reward",) if recipe.stage == "ppo" else ()
    return (*_DRAWN, *penalised, *(f"reward/{name_of(term)}" for term in rewards), *(f"gold/{name_of(term)}" for term in golds))


def learning_rate_of(recipe: Recipe) -> float:
    """The learning rate in force: the recipe's own, else the default of its stage, kind, and LoRA or all weights."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate
    return default_learning_rate(recipe.stage, recipe.objective.kind, _trained(recipe))


def sane_learning_rate(recipe: Recipe) -> tuple[float, float]:
    """The lowest and highest rate at which a run of this recipe does not warn."""
    return SANE_LEARNING_RATE[recipe.stage, _trained(recipe)]


def default_learning_rate(stage: str, kind: str, trained: Trained) -> float:
    """The default of one kind of a stage."""
    return KIND_LEARNING_RATE.get((stage, kind, trained), LEARNING_RATE[stage, trained])


def _trained(recipe: Recipe) -> Trained:
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
