"""The report of a training run, report.md and report.html, from nothing but the run's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.figures import NOISE, count, duration, percent, short
from rlhf_cli.files import from_anywhere
from rlhf_cli.metrics import in_order
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.reports.card import model_card
from rlhf_cli.reports.document import Block, Code, Column, Example, Examples, Finding, Items, Paragraph, Response, Section, Table
from rlhf_cli.reports.findings_online import online_findings
from rlhf_cli.reports.findings_training import length_findings, training_findings
from rlhf_cli.reports.plots_training import draw_training
from rlhf_cli.reports.run_result import Ends, History, RunResult, SplitCounts, TrainingSample, ends, read_run
from rlhf_cli.reports.write import write
from rlhf_cli.runs.card import load_lines
from rlhf_cli.runs.folder import RunFolder


def write_report(run: RunFolder, manifest: Mapping[str, Any]) -> None:
    """Write the report, the most important first; what a run does not have is left out."""
    result = read_run(run, manifest)
    pictures = draw_training(result)
    stage = TRAINING_STAGES[result.manifest.stage].title
    if result.history.online and result.manifest.stage != "ppo":
        stage = f"online {stage}"
    learned, card = tuple(_learned(result)), [model_card(result.card, pictures["card"])] if result.card else []
    found = [block for block in (*learned, *(own for section in card for own in section.blocks)) if isinstance(block, Finding)]
    sections = (
        Section("learned", "Did it learn?", (*learned, *pictures["learned"])),
        *card,
        Section("samples", "Samples", tuple(_samples(result))),
        Section("data", "Data", tuple(_data(result))),
        Section("cost", "Cost", tuple(_cost(result))),
        Section("model", "The model", tuple(_model(result))),
        Section("lineage", "Where it comes from", tuple(_lineage(result))),
    )
    then = [TRAINING_STAGES[result.manifest.stage].then.format(run=run.path.as_posix())]
    write(run, f"{stage}, {result.manifest.status}", _lead(result), found, then, sections)


def _lead(result: RunResult) -> str:
    manifest, data = result.manifest, result.train
    start = f"`{manifest.base_model.path}`"
    used = {Path(each.what).parent for each in result.used if each.is_model and each.role != "reference"}
    runs = [parent.path for parent in manifest.parents if Path(parent.path) not in used]
    if runs:
        start = f"`{runs[0]}` (on the base model {start})"
    what = f"a LoRA adapter of rank {result.lora_rank}" if result.lora_rank else "all weights"
    paths = [f"`{source.path}`" for source in data.sources]
    sources = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    cost = f"{count(manifest.steps, 'step')}, {manifest.tokens:,} tokens, {duration(manifest.seconds)}"
    fields = ", ".join(f"{name} {json.dumps(value)}" for name, value in manifest.objective.items() if name != "kind")
    rows = f"{count(data.kept, 'prompt' if result.history.online else 'row')} of {sources}"
    objective = f"`{manifest.objective['kind']}`" + (f" ({fields})" if fields else "")
    return (
        f"Started from {start} and trained {what} on {rows}: {cost}. "
        f"Objective {objective}, learning rate {manifest.learning_rate:g}, batches of {manifest.batch_size}."
    )


def _learned(result: RunResult) -> Iterator[Block]:
    history = result.history
    if history.online:
        yield from online_findings(history)
        heads, rows = ["metric", "training, start", "training, end", "held-out, start", "held-out, end"], _online_rows(history)
    else:
        yield from training_findings(history, result.held_out.kept if result.held_out else 0)
        heads, rows = ["metric", "start", "end", "change"], _rows(history)
    if rows:
        yield Table("From the first steps to the last", tuple(map(Column, heads)), tuple(rows))


def _online_rows(history: History) -> list[tuple[str, ...]]:
    """The loss is left out: it says nothing of progress, since the responses change with the policy."""
    rows = []
    for row, name in in_order(history.names - {"loss"}):
        both = history.in_training(name), history.on_held_out(name)
        if row.label and any(both):
            rows.append((row.labelled(name), *(text for own in both for text in (map(short, own) if own else ("", "")))))
    return rows


def _rows(history: History) -> list[tuple[str, ...]]:
    rows = [_change("training loss", ends([line["loss"] for line in history.train]))] if history.train else []
    where = "held-out" if history.held_out else "training"
    for row, name in in_order(history.names - (set() if history.held_out else {"loss"})):
        if row.label and (own := history.moved(name)):
            rows.append(_change(f"{where} {row.labelled(name)}", own))
    return rows


def _change(name: str, own: Ends) -> tuple[str, ...]:
    first, last = own
    # Of a quantity that may be 0 or negative, a share says nothing.
    shares = name.endswith(("loss", "perplexity")) and first > NOISE and last > 0
    change = percent((last - first) / first, "+") if shares else short(last - first, "+")
    return name, short(first), short(last), change


def _samples(result: RunResult) -> Iterator[Block]:
    by_prompt: dict[tuple[str, str], dict[int, TrainingSample]] = {}
    for sample in result.samples:
        by_prompt.setdefault((sample.where, sample.prompt), {})[sample.step] = sample
    if not by_prompt:
        return
    yield Paragraph("The same prompts before and after. All of them over time: `samples.jsonl`.")
    yield from length_findings(result.samples)
    shown = _shown_steps(sorted({sample.step for sample in result.samples}), result.history.online)
    examples = (
        Example(prompt, tuple(_response(f"{when} (step {step})", own.get(step)) for step, when in shown.items()))
        for (_, prompt), own in by_prompt.items()
    )
    yield Examples("", tuple(examples))


def _shown_steps(steps: list[int], halfway: bool) -> dict[int, str]:
    """The steps whose samples are shown, and when that was: the first, the last and, if asked, the one nearest half the way."""
    first, last = steps[0], steps[-1]
    between = steps[1:-1] if halfway else []
    middle = [min(between, key=lambda step: abs(2 * step - first - last))] if between else []
    return {first: "before", **dict.fromkeys(middle, "halfway"), last: "after"}


def _response(when: str, sample: TrainingSample | None) -> Response:
    if sample is None:
        return Response(when, "", "not sampled")
    return Response(when, sample.response, "" if sample.ended else "did not end")


def _data(result: RunResult) -> Iterator[Block]:
    splits = {"training": result.train} | ({"held out": result.held_out} if result.held_out else {})
    parts = list(splits.values())
    rows = [_counts("rows read", [part.read for part in parts]), _counts("rows kept", [part.kept for part in parts])]
    if result.train.held_out:
        rows.append(("held out", f"{result.train.held_out:,}", "")[: len(parts) + 1])
    for reason in sorted({reason for part in parts for reason in part.dropped}):
        rows.append(_counts(f"dropped: {reason}", [part.dropped.get(reason, 0) for part in parts]))
    rows.append(_counts("truncated", [part.truncated for part in parts]))
    if any(part.eos_share is not None for part in parts):
        rows.append(("responses that end (EOS)", *(percent(part.eos_share) for part in parts)))
    for kind in (kind for kind in ("prompt", "response", "total") if any(kind in part.lengths for part in parts)):
        rows.append((f"tokens, {kind}: median / 90 % / 99 % / longest", *(_lengths(part, kind) for part in parts)))
    yield Table("Rows and their lengths", (Column("quantity"), *map(Column, splits)), tuple(rows))
    sources = []
    for split, source in ((split, source) for split, part in splits.items() for source in part.sources):
        left_out = "".join(f", {number:,} {reason}" for reason, number in {**source.unused, **source.bad}.items())
        sources.append(f"{split}: `{source.path}` ({source.format}), {source.kept:,} of {source.read:,} rows kept{left_out}")
    yield Items(tuple(sources))
    eos = result.train.eos_share
    if eos is not None and eos < 1:
        head = f"{percent(1 - eos)} of the training responses have no end:"
        yield Finding("warning", head, "they do not teach the model to stop.")


def _counts(label: str, counts: list[int]) -> tuple[str, ...]:
    return (label, *(f"{number:,}" for number in counts))


def _lengths(part: SplitCounts, kind: str) -> str:
    own = part.lengths.get(kind)
    return " / ".join(f"{own[key]:,.0f}" for key in ("p50", "p90", "p99", "max")) if own else "n/a"


def _cost(result: RunResult) -> Iterator[Block]:
    cost = result.manifest
    speed = f"{cost.tokens:,} tokens ({cost.tokens_per_second:,.0f} a second)"
    yield Paragraph(f"{duration(cost.seconds)} for {speed}; at most {cost.peak_memory:.1f} GiB of memory.")
    parts = {"rollout": "drawing responses", "score": "scoring them", "update": "updates"}
    spent = {words: sum(line.get(f"time/{name}", 0.0) for line in result.history.train) for name, words in parts.items()}
    if whole := sum(spent.values()):
        yield Paragraph(f"Of a step's time: {', '.join(f'{percent(x / whole)} {words}' for words, x in spent.items())}.")


def _model(result: RunResult) -> Iterator[Block]:
    run, steps, best = result.run, result.manifest.steps, result.manifest.best_step
    where = f"It is in `{run.model.as_posix()}`."
    if best not in (None, steps):
        path = (run.checkpoints / f"step-{best:08d}").as_posix()
        where += f" It is that of step {steps}, the last one. The best by held-out figures is `{path}`: "
        where += "a stage can start from it."
    yield Paragraph(f"{where} To load it:")
    yield Code(result.load or tuple(_policy_lines(result)))
    onward = f"In the recipe of the next stage: `model: {{path: {run.path.as_posix()}}}`."
    if result.card:
        end = "the end-of-turn token" if result.card.unit == "pair" else "the last token of a step"
        onward += (
            " It scores a text as it was trained on: rendered by the chat template, tokenised without further special tokens, "
            f"and ending in {end} with nothing behind it, where the score is read."
        )
    else:
        onward += f" As one plain folder: `rlhf export {run.path.as_posix()} <folder> --merge`."
    yield Paragraph(onward)


def _policy_lines(result: RunResult) -> list[str]:
    base = result.manifest.base_model
    below, revision = (from_anywhere(base.path), base.revision) if result.lora_rank else (None, None)
    return load_lines(result.run.model.resolve().as_posix(), below, revision, None)


def _lineage(result: RunResult) -> Iterator[Block]:
    manifest, base = result.manifest, result.manifest.base_model
    revision = f", revision {base.revision}" if base.revision else ""
    lines = [f"base model `{base.path}`{revision}, weights {base.weights_hash}"]
    lines += [f"earlier run `{parent.path}`, manifest {parent.manifest_hash}" for parent in manifest.parents]
    for each in result.used:
        identity = f", {'weights ' if each.role in ('reference', 'teacher') else ''}{each.identity}" if each.identity else ""
        lines.append(f"{each.role} `{each.what}`{identity}")
    lines.append(f"seed {manifest.seed}" + (f", git commit {manifest.git_commit}" if manifest.git_commit else ""))
    lines.append(", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    yield Items(tuple(lines))
    yield Paragraph(f"To repeat the run: `rlhf {manifest.stage} {result.run.recipe.as_posix()} --output <another folder>`.")
