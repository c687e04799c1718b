"""What a training run left behind, read once from its files: the typed result that its report is written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_cli.data.requests import SourceReport
from rlhf_cli.evaluation.agreement import Card
from rlhf_cli.figures import from_plain
from rlhf_cli.files import read_json
from rlhf_cli.recipe.rewards import KINDS
from rlhf_cli.runs.folder import RunFolder, read_metrics
from rlhf_cli.runs.manifest import BaseModel, Parent

Line = Mapping[str, float]  # the step, and the metrics by their names
Ends = tuple[float, float]  # a metric at the start and at the end


def window(count: int) -> int:
    """How many steps one mean is over: a tenth of them, at most 10; single steps are noise."""
    return max(1, min(10, count // 10))


def ends(values: list[float]) -> Ends:
    """Mean of the first and of the last `window` values."""
    size = window(len(values))
    return sum(values[:size]) / size, sum(values[-size:]) / size


@dataclass(frozen=True)
class History:
    """The lines of metrics.jsonl."""

    train: list[Line]
    held_out: list[Line]

    @property
    def online(self) -> bool:
        """Did the run learn from responses of the policy's own?"""
        return any("objective/scores" in line for line in (*self.train, *self.held_out))

    @cached_property
    def names(self) -> set[str]:
        """All that was measured."""
        return {name for line in (*self.train, *self.held_out) for name in line}

    def in_training(self, name: str) -> Ends | None:
        """A metric's `ends` over the training's steps; None without two measurements."""
        values = [line[name] for line in self.train if name in line]
        return ends(values) if len(values) > 1 else None

    def on_held_out(self, name: str) -> Ends | None:
        """A metric's first and last measurement on held-out rows; None without two."""
        values = [line[name] for line in self.held_out if name in line]
        return (values[0], values[-1]) if len(values) > 1 else None

    def moved(self, name: str) -> Ends | None:
        """On held-out rows if it was measured there, else in the training."""
        on_held_out = any(name in line for line in self.held_out)
        return self.on_held_out(name) if on_held_out else self.in_training(name)


@dataclass(frozen=True)
class TrainingSample:
    """What the policy said to one of a few prompts after some steps."""

    step: int
    where: str  # file and line of the prompt
    prompt: str
    response: str
    ended: bool
    tokens: int | None = None  # that were sampled


@dataclass(frozen=True)
class SplitCounts:
    """The rows that were trained on, or those that were held out."""

    read: int
    kept: int
    dropped: dict[str, int]  # reason → rows
    truncated: int
    eos_share: float | None  # of the responses
    lengths: dict[str, dict[str, float]]  # prompt, response, total → percentiles in tokens
    sources: tuple[SourceReport, ...]
    held_out: int = 0  # of the rows read


@dataclass(frozen=True)
class Used:
    """A reference, a teacher, or a term of the reward or of gold, that the run did not start from."""

    role: str  # reference, teacher, reward or gold
    what: str  # a model, a function
    identity: str  # hash of its weights, or of its code; empty where it is all in its name
    is_model: bool


@dataclass(frozen=True)
class Manifest:
    """What every manifest.json says."""

    stage: str
    status: str
    objective: dict[str, Any]  # its kind and its keys
    learning_rate: float
    batch_size: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: float  # GiB
    base_model: BaseModel
    parents: tuple[Parent, ...]
    seed: int
    git_commit: str | None
    versions: dict[str, str | None]
    best_step: int | None = None


@dataclass(frozen=True)
class RunResult:
    """A finished training run."""

    run: RunFolder
    manifest: Manifest
    lora_rank: int | None  # None: all weights were trained
    history: History
    samples: list[TrainingSample]
    train: SplitCounts
    held_out: SplitCounts | None
    used: tuple[Used, ...]
    card: Card | None  # of a reward model
    load: tuple[str, ...]  # the code that loads a reward model


def read_run(run: RunFolder, manifest: Mapping[str, Any]) -> RunResult:
    """The result of a run whose files are all there but, perhaps, the manifest itself."""
    data = read_json(run.data)
    config = run.model / "adapter_config.json"
    lines = read_metrics(run.metrics)
    return RunResult(
        run=run,
        manifest=from_plain(Manifest, manifest),
        lora_rank=read_json(config)["r"] if config.exists() else None,
        history=History(
            train=[line for line in lines if line["split"] == "train"],
            held_out=[line for line in lines if line["split"] == "eval"],
        ),
        samples=[TrainingSample(**line) for line in read_metrics(run.samples)],
        train=from_plain(SplitCounts, data["train"]),
        held_out=from_plain(SplitCounts | None, data["eval"]),
        used=tuple(_used(manifest)),
        card=Card.from_json(manifest["reward_model"]) if "reward_model" in manifest else None,
        load=tuple(manifest.get("load", ())),
    )


def _used(manifest: Mapping[str, Any]) -> Iterator[Used]:
    if reference := manifest.get("reference"):
        alone = " (of the KL alone: the loss compares with the policy at the last refresh)" if reference.get("previous") else ""
        yield Used("reference", reference["model"], (reference["adapter"] or reference["base"]) + alone, True)
    if teacher := manifest.get("teacher"):
        yield Used("teacher", teacher["model"], teacher["adapter"] or teacher["base"], True)
    for role in ("reward", "gold"):
        for term in manifest.get(role, ()):
            what = next(term[kind] for kind in KINDS if kind in term)
            yield Used(role, what, term.get("adapter") or term.get("base") or term.get("hash") or "", "model" in term)
