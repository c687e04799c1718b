"""Side by side with TRL: one model on the same rows, adapter, dtype and steps, stage by stage, in one run.

    python scripts/bench.py HH.jsonl.gz [--stage sft|dpo|train-rm|kto|all] [--model FOLDER] [--steps 4] [--out bench-out]

HH.jsonl.gz holds HH-RLHF transcripts. Prints a table for each stage and writes it with all figures to OUT/STAGE.json. Seconds
are those of the training steps and of the reference's log-probabilities: imports, loading and preparing the rows are left out
on both sides. On a GPU both compute in bfloat16, and MFU is of its seconds. Where a stage has a reference, our side has two
lines: its log-probabilities are computed (the store is empty), or stored, when reading them and checking eight responses count.
Peak memory is the whole process, or what torch took of the GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.flat import Trees, select
from rlhf_cli.data.formats import Purpose
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.data.templates import choose_template
from rlhf_cli.data.trees import Tree, supervised_tokens, tree_length
from rlhf_cli.data.unpaired import unpaired, with_mismatches
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.load import Weights, load_config, load_tokenizer, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.policy import load_trained
from rlhf_cli.objectives.base import Objective
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import ROW_USES, TRAINING_STAGES
from rlhf_cli.training.loop import peak_memory
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.reference import reference_logps
from rlhf_cli.training.step import Update, optimise

RATE = 1e-4
LORA = sections.Lora()
MAX_LENGTH = 512


@dataclass(frozen=True)
class Stage:
    """What differs between the stages: the peer's names for them, and a row as the peer reads it."""

    peers: tuple[str, ...]
    batch_size: int
    row: Callable[[list[int], list[list[int]], Tree], dict[str, Any]]  # (prompt, responses, tree) → a row of ROWS.json

    def rows(self, trees: Sequence[Tree]) -> list[dict[str, Any]]:
        return [self.row(tree.prompt.tolist(), [ids.tolist() for ids in tree.responses], tree) for tree in trees]


STAGES = {
    "sft": Stage(("sft",), 8, lambda p, r, _: {"input_ids": p + r[0], "completion_mask": [0] * len(p) + [1] * len(r[0])}),
    "dpo": Stage(("dpo", "dpo-precomputed"), 4, lambda p, r, _: {"prompt_ids": p, "chosen_ids": r[0], "rejected_ids": r[1]}),
    "train-rm": Stage(("rm",), 4, lambda p, r, _: {"chosen_ids": p + r[0], "rejected_ids": p + r[1]}),
    "kto": Stage(
        ("kto",),
        4,
        lambda p, r, tree: {"prompt_ids": p, "completion_ids": r[0], "KL_completion_ids": r[1], "label": tree.facts.label},
    ),
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def objective_of(stage: str) -> Objective:
    """The stage's default kind."""
    return TRAINING_STAGES[stage].objectives[0]()


def read_trees(stage: str, model: str, data: str, count: int) -> Trees:
    """The first `count` rows of at most MAX_LENGTH tokens, in file order.

    Of a conversation the last response alone is supervised. KTO sees a pair as two rows, and its mismatched responses are
    those of the rows themselves.
    """
    source = sections.Source(path=data, format="hh")
    settings = sections.Data(train=[source], max_length=MAX_LENGTH, shuffle=False, max_lost=1.0)
    tokenizer = load_tokenizer(model, None, False)
    template = choose_template(tokenizer, None)
    request = RowRequest(Purpose(stage, ROW_USES[stage], ROW_USES), seed=0)
    trees = prepare(settings, request, tokenizer, template).train.trees
    first = select(trees, np.arange(count))
    return with_mismatches(select(unpaired(first), np.arange(count)), 0, MAX_LENGTH) if stage == "kto" else first


def load_start(options: argparse.Namespace, adapter: Path | None) -> Backbone:
    """The backbone with the role that the stage trains."""
    role = objective_of(options.stage).role
    model = sections.Model(path=options.model, attention=options.attention)
    return load_trained(
        model, LORA, Weights(options.model, None, adapter), device=device(), seeds={role: 0}, merged=Path(options.out)
    )[0]


def matrix_rate(shape: tuple[int, int, int] = (1024, 576, 1536)) -> float:
    """Matrix-product FLOP per CPU second, or per second of a GPU, in the dtype that models compute in there; the best of five.

    shape: (m, k, n), by default of a feed-forward layer.
    """
    like: Any = {"device": device(), "dtype": resolve_dtype("auto", device())}
    a, b = torch.randn(shape[:2], **like), torch.randn(shape[1:], **like)
    rates = []
    for _ in range(6):
        clock = Clock()
        for _ in range(50):
            a @ b
        rates.append(50 * 2 * math.prod(shape) / clock.read()[busy()])
    return max(rates[1:])


def forward_flops(model: Any, trees: Sequence[Tree], head: bool) -> np.ndarray:
    """(3,) floating-point operations of a forward pass: of frozen matrices, of adapters, and of the visible half of attention.

    The responses of a tree share its prompt; the output head runs on supervised tokens alone.
    """
    output = model.get_output_embeddings()
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not output]
    linear = [m for name, m in named if ".lora_" not in name]
    weights = sum(m.weight.numel() for m in linear)
    adapters = sum(LORA.r * (m.in_features + m.out_features) for m in linear)
    tokens = sum(map(tree_length, trees))
    read = head * sum(map(supervised_tokens, trees)) * output.weight.numel()
    seen = sum(len(t.prompt) ** 2 + sum((2 * len(t.prompt) + len(r)) * len(r) for r in t.responses) for t in trees)
    attention = 2 * seen * model.config.hidden_size * model.config.num_hidden_layers
    return np.array([2 * (tokens * weights + read), 2 * tokens * adapters, attention], float)


def model_flops(model: Any, trees: list[Tree], objective: Objective) -> dict[str, float]:
    """Operations that LoRA's steps and the reference need.

    Backward takes as much again of a frozen matrix, twice as much of an adapter and of attention.
    """
    head = objective.role == "policy"
    measured, (learned,) = objective.phases(trees)
    frozen, adapters, attention = forward_flops(model, learned, head)
    steps = 2 * frozen + 3 * adapters + 3 * attention + forward_flops(model, measured, head).sum()
    frozen, _, attention = forward_flops(model, trees, head)
    return {"steps": float(steps), "reference": float(frozen + attention) * objective.reference}


def busy() -> str:
    """Which of a clock's seconds the device works in."""
    return "cpu_seconds" if device().type == "cpu" else "wall_seconds"


class Clock:
    """CPU and wall seconds since it was made, a GPU's work of that time included."""

    def __init__(self) -> None:
        self.settle()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    @staticmethod
    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def read(self) -> dict[str, float]:
        self.settle()
        return {"cpu_seconds": time.process_time() - self.cpu, "wall_seconds": time.perf_counter() - self.wall}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The training steps of `rlhf STAGE` but for the first `warm` ones, and what comes before them, timed."""
    objective = objective_of(options.stage)
    rows = read_trees(options.stage, options.model, options.data, options.steps * options.batch_size)
    config = load_config(options.model, None, False)
    memory = estimate(config, sections.Model(path=""), rank=LORA.r, dtype=resolve_dtype("auto", device()))
    budget = options.tokens or auto_budget(memory, int(rows.lengths.max()), device())
    backbone, losses, reference = load_start(options, Path(options.adapter)), [], {}
    passes = Passes(backbone, budget, Ranks(expected=False))
    if objective.reference:
        # The adapter is fresh, so that the bare base is the start.
        with tempfile.TemporaryDirectory() as store:
            for state in ("computed", "stored"):
                clock = Clock()
                (known,) = reference_logps(
                    passes,
                    BASE,
                    [rows],
                    reached=[np.ones(len(rows), bool)],
                    key="bench",
                    console=Console(False),
                    folder=Path(store),
                )
                reference[state] = clock.read()
        rows = known
    optimizer = build_optimizer(backbone.trained_roles, sections.Train(learning_rate=RATE))
    rates, clock = {objective.role: RATE}, Clock()
    for step in range(1, options.steps + 1):
        if step == options.warm + 1:
            clock = Clock()
        batch = rows[(step - 1) * options.batch_size : step * options.batch_size]
        result = optimise(passes, objective, optimizer, Update(step, batch, rates, max_grad_norm=1.0, seed=0))
        losses.append(result.metrics["loss"])
    return {
        "rows": len(rows),
        "steps": clock.read(),
        "reference": reference,
        "tokens": int(rows.lengths[options.warm * options.batch_size :].sum()),
        "peak_gib": peak_memory(),
        "losses": losses,
        "tokens_per_device": budget,
        "attention": backbone.kernel.name,
    }


@dataclass(frozen=True)
class Side:
    """A line of the table: totals over all rows.

    `reference`: computed before the steps and counted, stored (only what it takes to load counts), or neither.
    """

    reference: Literal["computed", "stored", ""]
    cpu: float
    wall: float
    peak: float
    flops: float


def sides(name: str, report: dict[str, Any], flops: dict[str, float], in_steps: bool) -> dict[str, Side]:
    """The lines of a report: one, or one for every state of the reference. `in_steps`: the steps compute the reference."""

    def side(state: Any, took: dict[str, float]) -> Side:
        cpu, wall = (report["steps"][key] + took.get(key, 0.0) for key in ("cpu_seconds", "wall_seconds"))
        counted = state == "computed" or (state == "" and in_steps)
        return Side(state, cpu, wall, report["peak_gib"], flops["steps"] + counted * flops["reference"])

    if not report["reference"]:
        return {name: side("", {})}
    return {f"{name}, {state}": side(state, took) for state, took in report["reference"].items()}


def prepare_sides(options: argparse.Namespace) -> dict[str, float]:
    """Write the rows and the adapter that both sides start from; the operations of the steps that are timed."""
    stage, objective = STAGES[options.stage], objective_of(options.stage)
    out = Path(options.out) / options.stage
    out.mkdir(parents=True, exist_ok=True)
    trees = list(read_trees(options.stage, options.model, options.data, options.steps * options.batch_size))
    backbone = load_start(options, None)
    backbone.save(objective.role, out / "adapter")
    (out / "rows.json").write_text(json.dumps(stage.rows(trees)))
    return model_flops(backbone.model, trees[options.warm * options.batch_size :], objective)


def compare(options: argparse.Namespace) -> None:
    """Run both sides on the same start, each in a process of its own; print and keep the figures."""
    stage, out = STAGES[options.stage], Path(options.out) / options.stage
    options.batch_size = options.batch_size or stage.batch_size
    flops = prepare_sides(options)
    shared = ["--adapter", out / "adapter", "--steps", options.steps, "--batch-size", options.batch_size]
    own = ["--ours", "--stage", options.stage, "--model", options.model, "--out", options.out, "--tokens", options.tokens]
    own += ["--attention", options.attention]
    results = {"rlhf": run_side(Path(__file__), options.data, *own, *shared)}
    lines = sides("rlhf", results["rlhf"], flops, in_steps=False)
    peer = Path(__file__).with_name("bench_peer.py")
    for name in stage.peers:
        result = run_side(peer, name, options.model, out / "rows.json", *shared, "--learning-rate", RATE)
        lines |= sides(f"trl {name}", result, flops, in_steps=True)
        results[f"trl {name}"] = result
    rate, rows = matrix_rate(), results["rlhf"]["rows"]
    summary = {
        name: {
            "cpu_seconds_a_row": line.cpu / rows,
            "wall_seconds_a_row": line.wall / rows,
            "peak_gib": line.peak,
            "model_flop_utilisation": line.flops / (line.cpu if busy() == "cpu_seconds" else line.wall) / rate,
            "against": {
                n: {"cpu": o.cpu / line.cpu, "peak": line.peak / o.peak}
                for n, o in lines.items()
                if name[:4] == "rlhf" and n[:3] == "trl" and o.reference in ("", line.reference)
            },
        }
        for name, line in lines.items()
    }
    pairs = [(a, b) for n in results for a, b in zip(results["rlhf"]["losses"], results[n]["losses"], strict=True)]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    written = {
        "sides": results,
        "summary": summary,
        "model_flops": flops,
        "matrix_rate": rate,
        "largest_relative_loss_difference": difference,
    }
    out.with_suffix(".json").write_text(json.dumps(written, indent=2) + "\n")
    _print(options.stage, summary, difference)


def _print(stage: str, summary: dict[str, dict[str, Any]], difference: float) -> None:
    print(f"{stage:28} CPU s/row  wall s/row  peak GiB    MFU")
    for name, line in summary.items():
        values = f"{line['cpu_seconds_a_row']:9.2f} {line['wall_seconds_a_row']:11.2f} {line['peak_gib']:9.2f}"
        print(f"{name:28} {values} {line['model_flop_utilisation']:6.1%}")
    for name, line in summary.items():
        for other, ratio in line["against"].items():
            print(f"{name} against {other}: {ratio['cpu']:.2f} × the rows per CPU second, {ratio['peak']:.2f} × the memory")
    print(f"largest relative difference of a loss: {difference:.1e}\n", flush=True)


def run_side(script: Path, *arguments: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, script, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Training stages side by side with TRL.")
    parser.add_argument("data", help="HH-RLHF transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=0, help="0: 8 for sft, else 4")
    parser.add_argument("--tokens", type=int, default=0, help="tokens_per_device; 0: auto")
    parser.add_argument("--out", default="bench-out")
    parser.add_argument("--attention", default="auto", help="as in a recipe")
    parser.add_argument("--warm", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options)))
        return
    for stage in STAGES if options.stage == "all" else (options.stage,):
        compare(argparse.Namespace(**vars(options) | {"stage": stage}))


if __name__ == "__main__":
    main()
