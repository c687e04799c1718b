"""What one GPU makes of `rlhf`, part by part: every stage in bfloat16 at 0.1B and at 1B, with random weights that are made here.

    python scripts/gpu.py [--out bench-out/gpu] [--minutes 10] [--only PART …] [--plan] [--tiny]

Each part is a process with a time limit. It writes OUT/PART.json row by row, and after it OUT/tables.md, Markdown, is written
anew. A second call skips the parts that ended well and goes on: what is cheap and tells most comes first, and no part begins
that is expected to end after --minutes. --plan prints the parts without doing them. --tiny runs them on this machine's CPU,
on models of a few thousand weights: a test of this script, whose figures mean nothing.

Parts: `machine` (the rate of matrix products, which MFU is a share of), `runs` (each stage by the command line), `steps` (what
a warm step takes), `decode` (against transformers' generate), `ppo` (an iteration, and the memory of its four roles),
`attention` (the kernels, on the steps of dpo), `trl` (steps and ppo by TRL, where it is installed). The rows are random
words in the form of HH-RLHF. Exit 4: there is no GPU; 1: a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench
import bench_ppo
import bench_rollout
import numpy as np
import torch
import yaml
from bench_data import WORDS
from quickstart_model import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.cli import main as rlhf
from rlhf_cli.errors import MachineError
from rlhf_cli.files import write_json
from rlhf_cli.models.attention import CANDIDATES
from rlhf_cli.models.load import resolve_dtype

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
STAGES = ("sft", "train-rm", "dpo", "kto")
PEERS = {"sft": "sft", "train-rm": "rm", "dpo": "dpo-precomputed", "kto": "kto"}  # of bench_peer.py, TRL's fastest
STEPS, PPO = "Steps: model | stage | side", "PPO: model | side"
PPO_PEER = Path(".venv/trl-ppo")
PRELOAD = ["gpu"]
CANDIDATES |= {"varlen": ("varlen",), "trees": ("trees",)}  # no settings of a recipe, but measured


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much work its parts are given."""

    shape: Row
    batch: int  # rows of a step
    steps: int
    warm: int  # steps before those that are timed
    episodes: int
    new_tokens: int
    words: int  # of a turn, at most
    matrices: int = 8192  # width of those whose products are timed
    kernels: tuple[str, ...] = ("varlen", "trees", "sdpa", "eager", "flash", "flex")  # flex comes last: it compiles


def shape(*numbers: int) -> Row:
    """Those of SMOLLM2, in its order."""
    return dict(zip(bench_rollout.SMOLLM2, (*numbers, True), strict=True))


SIZES = {
    "0.1B": Size(bench_rollout.SMOLLM2, 32, 12, 4, 64, 128, 150),
    "1B": Size(shape(2048, 8192, 16, 32, 8, 128256), 16, 8, 3, 64, 128, 150),
}
"""The shapes of SmolLM2-135M and of Llama 3.2 1B."""
TINY = {"tiny": Size(shape(16, 32, 1, 2, 1, 1280), 4, 2, 1, 4, 4, 12, 64, ("trees", "sdpa"))}


class Work:
    """What the parts of one size do; each gives rows of a table, (first cells, figures)."""

    def __init__(self, out: Path, label: str, size: Size) -> None:
        self.out, self.label, self.size, self.folder = out, label, size, out / label
        self.model, self.data = self.folder / "model", self.folder / "rows.jsonl.gz"

    def make(self) -> None:
        """The model and its rows, where they are not there yet; the rows come last."""
        if self.data.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)

        def say() -> str:
            return " ".join(random.choice(WORDS, random.integers(self.size.words // 2, self.size.words)))

        (self.folder / "sft.jsonl").write_text("".join(json.dumps({"text": say()}) + "\n" for _ in range(200)))
        tokenizer = train_tokenizer(self.folder, 1024)
        config = LlamaConfig(**self.size.shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        torch.manual_seed(0)
        with bench.device():
            LlamaForCausalLM(config).to(resolve_dtype("auto", bench.device())).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        part = self.data.with_suffix(".part")
        with gzip.open(part, "wt") as file:
            for number in range(max(self.size.steps * self.size.batch, 3 * self.size.episodes) + 8):
                asked = f"\n\nHuman: {number} {say()}\n\nAssistant: "
                file.write(json.dumps({"chosen": asked + say(), "rejected": asked + say()}) + "\n")
        part.rename(self.data)

    def options(self, stage: str, **more: Any) -> argparse.Namespace:
        """What the scripts of the other benchmarks take; nothing that an earlier model of this process had is held."""
        self.make()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        size, steps = self.size, self.folder / "steps"
        common = {"data": str(self.data), "model": str(self.model), "out": str(steps), "adapter": str(steps / stage / "adapter")}
        sizes = {"steps": size.steps, "batch_size": size.batch, "warm": size.warm, "new_tokens": size.new_tokens}
        return argparse.Namespace(**common | sizes | {"stage": stage, "tokens": 0, "attention": "auto"} | more)

    def runs(self) -> Rows:
        """Each stage by the command line, a few steps of it."""
        self.make()
        codes = []
        for stage in (*STAGES, "ppo"):
            run = self.folder / "runs" / stage
            run.parent.mkdir(exist_ok=True)
            data = {"train": [{"path": str(self.data), "format": "hh"}], "max_length": 2 * bench.MAX_LENGTH}
            train = {"steps": self.size.steps, "batch_size": self.size.batch, "save_every": None}
            recipe: Row = {"model": {"path": str(self.model)}, "data": data, "train": train, "output": str(run)}
            if stage == "ppo":
                recipe["reward"] = [{"model": str(run.with_name("train-rm"))}]
                recipe["rollout"] = {"max_new_tokens": self.size.new_tokens}
            run.with_suffix(".yaml").write_text(yaml.safe_dump(recipe))
            clock = bench.Clock()
            codes.append(rlhf([stage, str(run.with_suffix(".yaml")), "--force"]))
            row: Row = {"exit code": codes[-1], "s of the command": clock.read()["wall_seconds"]}
            if not codes[-1]:
                lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                *_, last = (line for line in lines if line["split"] == "train")
                row |= {"tokens/s, last step": last["tokens_per_second"], "loss": last["loss"]}
            yield f"{self.label} | {stage}", row
        if any(codes):
            raise SystemExit("a command failed")

    def steps(self, stage: str, attention: str = "auto") -> Rows:
        """Warm steps of a stage, and its reference's log-probabilities beside them."""
        options = self.options(stage, attention=attention)
        flops = bench.prepare_sides(options)["steps"]
        found = bench.ours(self.options(stage, attention=attention))
        row, took, rate = self.timed(found), found["steps"][bench.busy()], known(self.out, "machine").get("TFLOP/s")
        row |= {"tokens/s": found["tokens"] / took, "MFU, %": rate and flops / took / rate / 1e10}
        what = stage if attention == "auto" else f"{stage}, {attention}"
        yield f"{self.label} | {what} | rlhf, {found['attention']}", row | {"tokens a pass": found["tokens_per_device"]}

    def timed(self, found: Row) -> Row:
        """Of a report of steps."""
        reference = found["reference"].get("computed", {}).get(bench.busy(), 0.0) / self.size.steps
        took = found["steps"][bench.busy()] / (self.size.steps - self.size.warm)
        times = {"s a step": took, "and of the reference": reference}
        return times | {"peak GiB": found["peak_gib"], "loss": found["losses"][-1]}

    def attention(self) -> Rows:
        for kernel in self.size.kernels:
            try:
                yield from self.steps("dpo", kernel)
            except Exception as error:  # one that is not here must not hide the others
                yield f"{self.label} | dpo, {kernel} | {str(error).splitlines()[0][:80]}", {}

    def decode(self) -> Rows:
        for batch in (self.size.episodes // 4, self.size.episodes):
            found = bench_rollout.measure(self.options("decode", batch=batch, end_every=0, repeats=2))
            for side in (name for name, figures in found.items() if isinstance(figures, dict)):
                speed = 1 / found[side]["wall_seconds_a_token"]
                row = {"tokens/s": speed, "steps/s": speed / batch, "mean length": found[side]["mean_length"]}
                yield f"{self.label} | {side} | {batch}", row

    def ppo(self, side: str) -> Rows:
        """An iteration: draw, score, two updates."""
        options = self.options("ppo", iterations=3, warm=1, episodes=self.size.episodes, peer=str(PPO_PEER), ours=side)
        found = bench_ppo.run_side(options, side) if side == "trl" else bench_ppo.ours(options)
        weights = sum(file.stat().st_size for file in self.model.glob("*.safetensors")) / 2**30
        row = {"episodes/s": 1 / found[f"{bench.busy()}_an_episode"], "peak GiB": found["peak_gib"]}
        row |= {"GiB when loaded": found.get("loaded_gib"), "GiB of four copies": 4 * weights}
        yield f"{self.label} | {'TRL 1.11' if side == 'trl' else f'rlhf, {side}'}", row

    def trl(self, stage: str) -> Rows:
        """TRL's side of `steps`, on the same rows and adapter."""
        options, peer = self.options(stage), Path(__file__).with_name("bench_peer.py")
        shared = ["--adapter", options.adapter, "--steps", options.steps, "--batch-size", options.batch_size]
        rows = Path(options.adapter).with_name("rows.json")
        row = self.timed(bench.run_side(peer, PEERS[stage], options.model, rows, *shared, "--warm", options.warm))
        if own := known(self.out, f"steps-{self.label}-{stage}"):
            theirs, ours = ((each["s a step"] + each["and of the reference"]) for each in (row, own))
            row |= {"times rlhf's": theirs / ours}
        yield f"{self.label} | {stage} | TRL", row


def known(out: Path, part: str) -> Row:
    """The first row of another part, {} where it has none."""
    rows = read(out, part)["rows"]
    return rows[0][1] if rows else {}


def read(out: Path, part: str) -> Row:
    """What a part has left so far."""
    path = out / f"{part}.json"
    found: Row = json.loads(path.read_text()) if path.exists() else {"done": False, "rows": []}
    return found


def machine(width: int) -> Rows:
    on_gpu = bench.device().type == "cuda"
    name, dtype = torch.cuda.get_device_name() if on_gpu else "CPU", str(resolve_dtype("auto", bench.device()))
    row = {"TFLOP/s": bench.matrix_rate((width, width, width)) / 1e12}
    yield f"{name} | {torch.__version__} | {dtype}", row | ({"GiB": torch.cuda.mem_get_info()[1] / 2**30} if on_gpu else {})


@dataclass(frozen=True)
class Part:
    """One process, whose rows become rows of a table."""

    name: str
    title: str  # of its table, and its first columns
    expected: int  # seconds, guessed
    limit: int  # seconds after which it is ended
    rows: Callable[[], Rows]
    lacking: str = ""  # why it cannot run here


def parts(out: Path, tiny: bool) -> list[Part]:
    """In the order in which they run."""
    works = [Work(out, label, size) for label, size in (TINY if tiny else SIZES).items()]
    found = [Part("machine", "Machine: card | torch | dtype", 15, 60, partial(machine, works[0].size.matrices))]
    for slow, work in enumerate(works, 1):
        found += [Part(f"runs-{work.label}", "Commands: model | stage", 45 * slow, 240, work.runs)]
        found += [Part(f"steps-{work.label}-{s}", STEPS, 10 * slow, 90, partial(work.steps, s)) for s in STAGES]
        found += [Part(f"decode-{work.label}", "Drawing: model | engine | rows", 35, 150, work.decode)]
        sides = {"lora": "lora", "all": "all weights"}
        found += [Part(f"ppo-{work.label}-{name}", PPO, 20, 120, partial(work.ppo, side)) for name, side in sides.items()]
    found += [Part(f"attention-{work.label}", STEPS.replace("Steps", "Attention"), 50, 240, work.attention) for work in works]
    lacking = "" if importlib.util.find_spec("trl") else "trl is not installed: make .venv/.installed-bench"
    last = works[-1]
    found += [Part(f"trl-{last.label}-{s}", STEPS, 15, 120, partial(last.trl, s), lacking) for s in STAGES]
    lacking = "" if PPO_PEER.exists() else f"{PPO_PEER} is not there: make {PPO_PEER}/trl/__init__.py"
    return [*found, Part(f"trl-{last.label}-ppo", PPO, 15, 120, partial(last.ppo, "trl"), lacking)]


def live(out: Path, tiny: bool, name: str) -> None:
    """A part, in a process of its own: its rows are kept one by one, so that one that is ended leaves those that it had."""
    os.setsid()  # what it starts ends with it
    with (out / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    (part,) = [part for part in parts(out, tiny) if part.name == name]
    rows: list[Any] = []
    for row in part.rows():
        rows.append(row)
        write_json(out / f"{name}.json", {"done": False, "rows": rows})
    write_json(out / f"{name}.json", {"done": True, "rows": rows})


def run(part: Part, out: Path, tiny: bool) -> str:
    """What came of a part."""
    # A GPU cannot be used in a fork of a process that knows it; on a CPU forks spare the imports.
    context = multiprocessing.get_context("forkserver" if tiny else "spawn")
    context.set_forkserver_preload(PRELOAD)
    process: Any = context.Process(target=live, args=(out, tiny, part.name))
    started = time.monotonic()
    process.start()
    try:
        process.join(part.limit)
    finally:
        late = process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # where it has no group of its own yet
        process.join()
    if late:
        return f"ended at its limit of {part.limit} s, with {len(read(out, part.name)['rows'])} rows"
    took = f"{time.monotonic() - started:.0f} s"
    return f"done in {took}" if process.exitcode == 0 else f"failed after {took}: {out / part.name}.log tells why"


def cell(value: Any) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def tables(out: Path, every: list[Part]) -> str:
    """Markdown of all that is known: a table for each title."""
    text = ""
    for title in dict.fromkeys(part.title for part in every):
        rows = [row for part in every if part.title == title for row in read(out, part.name)["rows"]]
        heads = list(dict.fromkeys(name for _, row in rows for name in row))
        name, _, first = title.partition(": ")
        lines = [f"{said} | {' | '.join(cell(row.get(head)) for head in heads)}" for said, row in rows]
        lines = [" | ".join((first, *heads)), " | ".join(["---"] * (first.count("|") + 1 + len(heads))), *lines]
        text += f"## {name}\n\n" + "".join(f"| {line} |\n" for line in lines) + "\n" if rows else ""
    return text


def main() -> int:
    """Parse the command line, do what is left; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out/gpu"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="how the names of parts begin")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    every = parts(options.out, options.tiny)
    these = [part for part in every if part.name.startswith(tuple(options.only))]
    if options.plan:
        print("| part | expected s | at most s | |\n|---|---|---|---|")
        for part in these:
            state = "done" if read(options.out, part.name)["done"] else part.lacking
            print(f"| {part.name} | {part.expected} | {part.limit} | {state} |")
        print(f"expected, by a guess: {sum(part.expected for part in these) / 60:.1f} minutes on one card")
        return 0
    if not options.tiny and not torch.cuda.is_available():
        say = "--plan tells what would run on one, --tiny tries the parts on this CPU"
        print(f"error: torch {torch.__version__} finds no NVIDIA GPU on this machine; {say}", file=sys.stderr)
        return MachineError.exit_code
    options.out.mkdir(parents=True, exist_ok=True)
    started, failed, left = time.monotonic(), 0, 0
    for part in these:
        said = "done before" if read(options.out, part.name)["done"] else part.lacking
        if not said and time.monotonic() - started + part.expected > 60 * options.minutes:
            said, left = f"left for another call: it is expected to take {part.expected} s", left + 1
        elif not said:
            said = run(part, options.out, options.tiny)
            failed += not said.startswith("done")
            (options.out / "tables.md").write_text(tables(options.out, every))
        print(f"{part.name}: {said}", flush=True)
    print(f"tables: {options.out / 'tables.md'}" + f"; {left} parts are left, call again" * (left > 0))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
