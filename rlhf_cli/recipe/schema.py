"""Every recipe key with its type, default and meaning: the one place for each.

The loader, `--help`, the docs and the resolved recipe read these dataclasses. `key(default, help, …)` attaches what a
type cannot say. A key without a default is required.
"""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from rlhf_cli.objectives.sft import Sft


def key(
    default: Any = MISSING, help: str = "", *, low: float | None = None, high: float | None = None, path: bool = False
) -> Any:
    """A dataclass field with a one-line help, inclusive bounds, and whether ${ENV} is expanded in it."""
    metadata = {"help": help, "low": low, "high": high, "path": path}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    weight: float = key(1.0, "share of each epoch when there are several sources", low=0.0)
    limit: int | None = key(None, "first N rows after a seeded shuffle", low=1)


@dataclass(frozen=True)
class Data:
    train: list[Source] = key(help="a path, or a list of sources")
    eval: list[Source] | None = key(None, "the same, held out")
    holdout: float = key(0.0, "seeded share of train that is held out, chosen by prompt", low=0.0, high=0.9)
    max_length: int = key(1024, "tokens of prompt + response", low=2)
    overlong: Literal["drop", "error", "truncate-prompt", "truncate-response"] = key("drop", "what happens to longer rows")
    control_tokens: Literal["reject", "keep"] = key("reject", "text that contains the tokenizer's control tokens")
    max_lost: float = key(0.05, "exit 2 if more than this share of rows is dropped or truncated", low=0.0, high=1.0)
    shuffle: bool = key(True, "false: file order")
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
class SftRecipe:
    """`rlhf sft`."""

    model: Model
    data: Data
    output: str = key(help="the run folder", path=True)
    lora: Lora | Literal["auto"] | None = key(
        "auto", "auto: the parent's adapter goes on, else r 16 on all linear layers; null: train all weights"
    )
    train: Train = field(default_factory=Train)
    objective: Sft = field(default_factory=Sft)
    seed: int = key(0, "of everything that is random", low=0, high=2**32 - 1)
    trackers: list[str] = key([], "tensorboard, wandb, mlflow, trackio, …; offline files are always written")


STAGES: dict[str, type[SftRecipe]] = {"sft": SftRecipe}
"""Stage name → its recipe. What a stage's recipe does not name has no effect there and is rejected."""

ELSEWHERE = ("reference", "rollout", "reward", "reward_combine", "kl", "value", "ptx", "gold", "models", "prompts", "preferences")
"""Top-level keys of other stages: their meaning is known, so a stage without them says that they have no effect in it."""

SHORT_FORM: dict[type, str] = {Source: "path"}
"""Where a list of these is expected, one may stand alone, and a plain text stands for one with this key alone."""

METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "token_accuracy", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch"),
}
"""Stage → the metrics that `keep_best` and `stop_if` can watch; the first three are those of held-out lines too."""

LEARNING_RATE = {("sft", "lora"): 2e-4, ("sft", "full"): 2e-5}
"""(stage, lora | full) → default. LoRA wants about 10× the rate of full fine-tuning.

Schulman et al. 2025, "LoRA Without Regret".
"""

SANE_LEARNING_RATE = {"lora": (1e-6, 2e-3), "full": (1e-7, 3e-4)}
"""Outside this range a run warns."""
