"""report.md: what a run did, in words, tables and pictures, from nothing but the run's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.figures import NOISE, duration, figure, percent
from rlhf_cli.files import read_json, write_atomic
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.reports.card import model_card
from rlhf_cli.reports.drawn import drawn_verdict, is_drawn
from rlhf_cli.reports.markdown import cell, table
from rlhf_cli.reports.plots import draw_card, draw_plots
from rlhf_cli.reports.verdict import Lines, ends, held_out_verdict, length_verdict, moved, preference_verdict, train_verdict
from rlhf_cli.runs.folder import RunFolder, read_metrics

SHOWN = (
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("token_accuracy", "token accuracy"),
    ("accuracy", "accuracy"),
    ("margin", "margin"),
    ("score_mean", "mean score"),
    ("score_std", "standard deviation of the scores"),
    ("rewards/accuracies", "accuracy of the implicit reward"),
    ("rewards/margins", "margin of the implicit reward"),
    ("rewards/chosen", "implicit reward, chosen"),
    ("rewards/rejected", "implicit reward, rejected"),
    ("rewards/saturated", "saturated pairs"),
    ("rewards/desirable", "implicit reward, desirable"),
    ("rewards/undesirable", "implicit reward, undesirable"),
    ("kl", "KL estimate z0"),
    ("logps/chosen", "log-probability, chosen"),
    ("logps/rejected", "log-probability, rejected"),
    ("logps/desirable", "log-probability, desirable"),
    ("logps/undesirable", "log-probability, undesirable"),
    ("logratio/mean", "mean log-ratio to the reference"),
    ("margin/logratio", "difference of the log-ratios"),
    ("margin/target", "its target"),
)
"""Metrics of the first table in their order, as far as a run has them."""
DRAWN = (
    ("objective/scores", "score"),
    ("objective/rlhf_reward", "score less the KL penalty"),
    ("reward/", "reward"),
    ("gold/", "gold"),
    ("objective/kl", "KL to the reference, nats a response"),
    ("response/length", "length of a response, tokens"),
    ("objective/entropy", "entropy, nats a response"),
    ("response/eos_rate", "responses that end"),
    ("policy/clipfrac", "clipped tokens"),
    ("policy/approxkl", "KL of an update (estimate)"),
    ("value/explained_variance", "explained variance of the value"),
    ("loss/policy", "policy loss"),
    ("loss/value", "value loss"),
    ("loss/ptx", "loss on the supervised rows"),
    ("kl_coef", "κ, the weight of the KL"),
    *((key, name) for key, name in SHOWN if key != "loss"),
)
"""The same for runs on responses of the policy's own; a key that ends in / stands for all metrics that begin with it."""
PROMPT_LENGTH, RESPONSE_LENGTH = 400, 800
"""Characters of a sample that are shown."""


class Story(NamedTuple):
    """Everything the report is written from."""

    run: RunFolder
    manifest: dict[str, Any]
    train: Lines
    held_out: Lines
    samples: Lines
    data: dict[str, Any]
    adapter: dict[str, Any] | None  # adapter_config.json; None after a training of all weights
    plots: list[tuple[str, str]]  # (title, file name)
    card_plots: list[tuple[str, str]]

    @property
    def drawn(self) -> bool:
        """Did the run learn from responses of the policy's own?"""
        return is_drawn(self.train, self.held_out)


def write_report(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Write report.md and plots/*.png. Can be repeated at any time with the manifest of a finished run."""
    lines = read_metrics(run.metrics)
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    config = run.model / "adapter_config.json"
    story = Story(
        run=run,
        manifest=manifest,
        train=train,
        held_out=held_out,
        samples=read_metrics(run.samples),
        data=read_json(run.data),
        adapter=read_json(config) if config.exists() else None,
        plots=draw_plots(run.plots, train, held_out),
        card_plots=draw_card(run.plots, manifest["reward_model"]) if "reward_model" in manifest else [],
    )
    parts = (section(story) for section in SECTIONS)
    write_atomic(run.report, "\n\n".join(part for part in parts if part) + "\n")


def _head(story: Story) -> str:
    manifest, data = story.manifest, story.data["train"]
    stage = TRAINING_STAGES[manifest["stage"]].title
    if story.drawn and manifest["stage"] != "ppo":
        stage = f"online {stage}"
    start = f"`{manifest['base_model']['path']}`"
    judges = {Path(record["model"]).parent for _, record in _judges(manifest) if "model" in record}
    runs = [parent["path"] for parent in manifest["parents"] if Path(parent["path"]) not in judges]
    if runs:
        start = f"`{runs[0]}` (on the base model {start})"
    what = f"a LoRA adapter of rank {story.adapter['r']}" if story.adapter else "all weights"
    rows = f"{data['kept']:,} {'prompts' if story.drawn else 'rows'}"
    steps = f"{manifest['steps']:,} step{'' if manifest['steps'] == 1 else 's'}"
    return (
        f"# {story.run.path.resolve().name}: {stage}, {manifest['status']}\n\n"
        f"Started from {start} and trained {what} on {rows} of {_sources(data)}: "
        f"{steps}, {manifest['tokens']:,} tokens, {duration(manifest['seconds'])}.{_settings(manifest)}"
    )


def _judges(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(reward | gold, its record) of everybody who judged the responses of the run."""
    return [(name, record) for name in ("reward", "gold") for record in manifest.get(name, [])]


def _settings(manifest: dict[str, Any]) -> str:
    """What was minimised, and how fast."""
    if "objective" not in manifest:
        return ""
    kind, *keys = manifest["objective"].items()
    values = ", ".join(f"{name} {json.dumps(value)}" for name, value in keys)
    named = f"`{kind[1]}`" + (f" ({values})" if values else "")
    return f" Objective {named}, learning rate {manifest['learning_rate']:g}, batches of {manifest['batch_size']}."


def _sources(split: dict[str, Any]) -> str:
    paths = [f"`{source['path']}`" for source in split["sources"]]
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _learned(story: Story) -> str:
    return _of_drawn(story) if story.drawn else _of_rows(story)


def _of_drawn(story: Story) -> str:
    """A run on the policy's own responses: its loss says nothing of progress, since they change with the policy."""
    train, held_out = story.train, story.held_out
    names = sorted({name for line in (*train, *held_out) for name in line})
    rows = []
    for key, said in DRAWN:
        for name in (name for name in names if (name.startswith(key) if key.endswith("/") else name == key)):
            label = f"{said} {cell(name.removeprefix(key), PROMPT_LENGTH)}".strip()
            both = [moved(train, [], name), moved([], held_out, name)]
            if any(both):
                rows.append((label, *(text for ends in both for text in (map(figure, ends) if ends else ("", "")))))
    words = drawn_verdict(train, held_out)
    pictures = [f"![{title}](plots/{name})" for title, name in story.plots]
    head = ("", "training, start", "end", "held-out, start", "end")
    return "\n\n".join(["## Did it learn?", *words, table(head, rows), *pictures])


def _of_rows(story: Story) -> str:
    train, held_out = story.train, story.held_out
    rows = [_moved("training loss", *ends([line["loss"] for line in train]))] if train else []
    where = "held-out" if held_out else "training"
    for key, name in SHOWN:
        if (held_out or key != "loss") and (figures := moved(train, held_out, key)):
            rows.append(_moved(f"{where} {name}", *figures))
    kept = story.data["eval"]["kept"] if story.data["eval"] else 0
    words = [*train_verdict(train), *held_out_verdict(train, held_out), *preference_verdict(train, held_out, kept)]
    pictures = [f"![{title}](plots/{name})" for title, name in story.plots]
    return "\n\n".join(["## Did it learn?", *words, table(("", "start", "end", "change"), rows), *pictures])


def _moved(name: str, first: float, last: float) -> tuple[str, str, str, str]:
    # Of a quantity that may be 0 or negative, a share says nothing.
    shares = name.endswith(("loss", "perplexity")) and first > NOISE and last > 0
    change = percent((last - first) / first, "+") if shares else figure(last - first, "+")
    return name, figure(first), figure(last), change


def _samples(story: Story) -> str:
    by_prompt: dict[tuple[str, str], Lines] = {}
    for line in story.samples:
        by_prompt.setdefault((line["where"], line["prompt"]), []).append(line)
    if not by_prompt:
        return ""
    columns = _shown_steps(sorted({line["step"] for line in story.samples}), story.drawn)
    rows = [
        (cell(prompt, PROMPT_LENGTH), *(_response(lines, step) for step in columns)) for (_, prompt), lines in by_prompt.items()
    ]
    words = ["The same prompts before and after. All of them over time: `samples.jsonl`.", length_verdict(story.samples)]
    over_time = table(("prompt", *(f"{when} (step {step})" for step, when in columns.items())), rows)
    return "\n\n".join(["## Samples", *(said for said in words if said), over_time])


def _shown_steps(steps: list[int], halfway: bool) -> dict[int, str]:
    """The steps whose samples are shown, and when that was: the first, the last and, if asked, the one nearest half the way."""
    first, last = steps[0], steps[-1]
    between = steps[1:-1] if halfway else []
    middle = [min(between, key=lambda step: abs(2 * step - first - last))] if between else []
    return {first: "before", **dict.fromkeys(middle, "halfway"), last: "after"}


def _card(story: Story) -> str:
    card = story.manifest.get("reward_model")
    return model_card(card, story.card_plots) if card else ""


def _response(lines: Lines, step: int) -> str:
    shown = [
        cell(line["response"], RESPONSE_LENGTH) + ("" if line["ended"] else " _(did not end)_")
        for line in lines
        if line["step"] == step
    ]
    return shown[-1] if shown else ""


def _data(story: Story) -> str:
    splits = [(name, story.data[key]) for key, name in (("train", "training"), ("eval", "held out")) if story.data.get(key)]
    parts = [split for _, split in splits]
    rows = [_counts("rows read", parts, "read"), _counts("rows kept", parts, "kept")]
    if held_out := story.data["train"].get("held_out"):
        rows.append(("held out", f"{held_out:,}", "")[: len(parts) + 1])
    for reason in sorted({reason for part in parts for reason in part["dropped"]}):
        rows.append((f"dropped: {reason}", *(f"{part['dropped'].get(reason, 0):,}" for part in parts)))
    rows.append(_counts("truncated", parts, "truncated"))
    if any(part["eos_share"] is not None for part in parts):
        rows.append(("responses that end (EOS)", *(percent(part["eos_share"]) for part in parts)))
    for kind in (kind for kind in ("prompt", "response", "total") if any(kind in part["lengths"] for part in parts)):
        rows.append((f"tokens, {kind}: median / 90 % / 99 % / longest", *(_lengths(part["lengths"].get(kind)) for part in parts)))
    words = [_source(name, source) for name, part in splits for source in part["sources"]]
    eos = story.data["train"]["eos_share"]
    if eos is not None and eos < 1:
        words.append(f"\n**{percent(1 - eos)} of the training responses have no end**: they do not teach the model to stop.")
    return "\n\n".join(["## Data", table(("", *(name for name, _ in splits)), rows), "\n".join(words)])


def _counts(label: str, parts: list[dict[str, Any]], key: str) -> tuple[str, ...]:
    return (label, *(f"{part[key]:,}" for part in parts))


def _source(split: str, source: dict[str, Any]) -> str:
    counts = {**source["unused"], **source["bad"]}
    bad = "".join(f", {count:,} {reason}" for reason, count in counts.items())
    return f"- {split}: `{source['path']}` ({source['format']}), {source['kept']:,} of {source['read']:,} rows kept{bad}"


def _lengths(stats: dict[str, float] | None) -> str:
    return " / ".join(f"{stats[key]:,.0f}" for key in ("p50", "p90", "p99", "max")) if stats else "n/a"


def _cost(story: Story) -> str:
    manifest = story.manifest
    speed = f"{manifest['tokens']:,} tokens ({manifest['tokens_per_second']:,.0f} a second)"
    said = f"{duration(manifest['seconds'])} for {speed}; at most {manifest['peak_memory']:.1f} GiB of memory."
    return "\n\n".join(["## Cost", said, *_shares(story.train)])


def _shares(train: Lines) -> list[str]:
    """Where the time of the steps went, for runs that sample."""
    spent = {
        words: sum(line.get(f"time/{name}", 0.0) for line in train)
        for name, words in (("rollout", "drawing responses"), ("score", "scoring them"), ("update", "updates"))
    }
    whole = sum(spent.values())
    return [f"Of a step's time: {', '.join(f'{percent(x / whole)} {words}' for words, x in spent.items())}."] if whole else []


def _load(story: Story) -> str:
    lines = story.manifest.get("load") or _policy_lines(story)
    code = "\n".join(["```python", *lines, "```"])
    run = story.run.path.as_posix()
    onward = f"In the recipe of the next stage: `model: {{path: {run}}}`."
    if "reward_model" in story.manifest:
        onward += (
            " It scores a text as it was trained on: rendered by the chat template, tokenised without further special tokens, "
            "and ending in the end-of-turn token with nothing behind it, where the score is read."
        )
    else:
        onward += f" As one plain folder: `rlhf export {run} <folder> --merge`."
    best, last = story.manifest.get("best_step"), story.manifest["steps"]
    where = f"It is in `{story.run.model.as_posix()}`."
    if best not in (None, last):
        path = (story.run.checkpoints / f"step-{best:08d}").as_posix()
        where += f" It is that of step {last}, the last one. The best by held-out figures is `{path}`: a stage can start from it."
    return f"## The model\n\n{where} To load it:\n\n{code}\n\n{onward}"


def _policy_lines(story: Story) -> list[str]:
    """The code that loads a policy."""
    base, model = story.manifest["base_model"], json.dumps(story.run.model.as_posix())
    revision = f", revision={json.dumps(base['revision'])}" if base["revision"] else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if story.adapter:
        lines = [
            "from peft import PeftModel",
            *lines,
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base['path'])}{revision})",
            f"model = PeftModel.from_pretrained(base, {model})",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({model})")
    return [*lines, f"tokenizer = AutoTokenizer.from_pretrained({model})"]


def _lineage(story: Story) -> str:
    manifest, base = story.manifest, story.manifest["base_model"]
    revision = f", revision {base['revision']}" if base["revision"] else ""
    lines = [f"- base model `{base['path']}`{revision}, weights {base['weights_hash']}"]
    lines += [f"- earlier run `{parent['path']}`, manifest {parent['manifest_hash']}" for parent in manifest["parents"]]
    if reference := manifest.get("reference"):
        lines.append(f"- reference `{reference['model']}`, weights {reference['adapter'] or reference['base']}")
    for name, record in _judges(manifest):
        what = record.get("model") or record["function"]
        lines.append(f"- {name} `{what}`, {record.get('adapter') or record.get('base') or record['hash']}")
    lines.append(f"- seed {manifest['seed']}" + (f", git commit {manifest['git_commit']}" if manifest["git_commit"] else ""))
    lines.append("- " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()))
    again = f"To repeat the run: `rlhf {manifest['stage']} {story.run.recipe.as_posix()} --output <another folder>`."
    return "\n\n".join(["## Where it comes from", "\n".join(lines), again])


SECTIONS: tuple[Callable[[Story], str], ...] = (_head, _learned, _card, _samples, _data, _cost, _load, _lineage)
