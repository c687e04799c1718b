"""`rlhf sft`: supervised fine-tuning, read from the top as it happens."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import transformers

from rlhf_cli.console import Console
from rlhf_cli.data.batches import total_steps
from rlhf_cli.data.dataset import Dataset, data_report, prepare, question
from rlhf_cli.data.encode import show_example
from rlhf_cli.data.templates import Template, choose_template, end_of_turn
from rlhf_cli.errors import NumberError, Stopped, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import load_config, load_tokenizer, resolve_dtype
from rlhf_cli.models.memory import Memory, auto_budget, estimate
from rlhf_cli.models.policy import load_policy, parent_lora, resolve_lora
from rlhf_cli.models.sampling import continue_greedily, end_ids
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.runs.files import disk_errors, write_json
from rlhf_cli.runs.folder import RunFolder, open_run
from rlhf_cli.runs.manifest import Outcome, build_manifest, write_manifest
from rlhf_cli.runs.parents import Start, base_model, resolve_start
from rlhf_cli.runs.report import write_report
from rlhf_cli.runs.resume import finished_steps, record_inputs, recorded_budget, refuse_other_inputs, reopen
from rlhf_cli.stages.plan import learning_rate_warning, plan
from rlhf_cli.training.loop import Fit, peak_memory
from rlhf_cli.training.ranks import Ranks
from rlhf_cli.training.signals import StopSignals
from rlhf_cli.training.trackers import check_trackers, start_trackers

SHOWN_PROMPTS, SHOWN_TOKENS = 4, 64
"""Samples in samples.jsonl: how many prompts, and how long their greedy continuations may get."""


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on the responses of its data.

    Raises:
        RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    signals = StopSignals()
    signals.install()
    _quiet()
    started = time.monotonic()
    recipe = loaded.recipe
    console = Console(os.environ.get("RANK", "0") == "0")
    output = Path(recipe.output)
    start = resolve_start(recipe.model.path, recipe.model.revision, f"{loaded.where('model.path')}: model.path")
    tokenizer = load_tokenizer(start.tokenizer, start.revision, recipe.model.trust_remote_code)
    template = choose_template(tokenizer, recipe.model.chat_template)
    _check_template(recipe, start, template, loaded)
    dataset = prepare(recipe.data, "sft", tokenizer, template, recipe.seed, loaded.where, "first")
    source = dataset.source(recipe.train, recipe.data, recipe.seed)
    steps = total_steps(recipe.train.epochs, recipe.train.steps, source.steps_per_epoch)
    ranks = Ranks(expected=not check)
    if resume and recipe.train.tokens_per_device == "auto" and (budget := recorded_budget(RunFolder(output))):
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, tokens_per_device=budget))
    settled = _settle(recipe, start, dataset, ranks, loaded)
    console.plan(
        plan(settled.recipe, dataset, source, steps, settled.memory, settled.budget, _facts(settled, start, template, ranks))
    )
    console.example(show_example(source.batch(1)[0], tokenizer))
    for message in _warnings(settled, dataset):
        console.warn(message)
    base = base_model(start) if not check or Path(start.base).exists() else None
    if check or base is None:
        console.say("the recipe and the data are fine; nothing was trained")
        return

    check_trackers(recipe.trackers)
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        inputs = {"base": base.weights_hash, "template": template.hash, "parent": start.parent and start.parent.manifest_hash}
        inputs |= dataset.fingerprints
        if resume:
            refuse_other_inputs(folder, settled.recipe, inputs)
            if finished_steps(folder) >= steps:
                console.say(f"{output} is finished: {folder.manifest}")
                ranks.close()
                return
        ranks.barrier()
        if ranks.main:
            reopen(folder)
            record_inputs(folder, settled.recipe, "sft", inputs)
            write_json(folder.data, data_report(dataset))

        backbone, base_path = load_policy(
            recipe.model, settled.lora, start.base, start.revision, start.adapter, ranks.device, recipe.seed, output / "base"
        )
        console.say(f"attention: {backbone.kernel.name}, {backbone.kernel.layout} rows")
        fit = Fit(
            run=folder,
            backbone=backbone,
            objective=recipe.objective,
            source=source,
            held_out=list(dataset.held_out.trees) if dataset.held_out else [],
            save_model=partial(_save_model, backbone, tokenizer, template),
            sample=partial(_samples, backbone, tokenizer, template, dataset),
            train=settled.recipe.train,
            steps=steps,
            seed=recipe.seed,
            budget=settled.budget,
            ranks=ranks,
            console=console,
            signals=signals,
            trackers=start_trackers(settled.recipe, folder.path, ranks.main),
        )
        fit.resume()
        try:
            status = fit.go()
        except (Stopped, NumberError):  # of all ranks alike: they part in order
            ranks.close()
            raise
        finally:
            fit.trackers.close()

        if ranks.main:
            with disk_errors(folder.model):
                fit.save_model(folder.model)
            if base_path != start.base:
                base = base_model(Start(base_path, None, None, base_path, None, None))
            outcome = Outcome(
                stage="sft",
                seed=recipe.seed,
                base_model=base,
                data=dataset.fingerprints,
                chat_template_hash=template.hash,
                steps=fit.state.step,
                tokens=fit.state.tokens,
                seconds=fit.state.seconds,
                peak_memory=max(fit.state.peak_memory, peak_memory()),
                parents=(start.parent,) if start.parent else (),
                status=status,
                extra={"lora": settled.lora and dataclasses.asdict(settled.lora)},
            )
            manifest = build_manifest(folder, outcome)
            write_report(folder, manifest)
            write_manifest(folder, manifest)
        console.say(f"{status} in {time.monotonic() - started:.0f} s: {folder.report}")
    ranks.close()


@dataclass(frozen=True)
class Settled:
    """The recipe with every `auto` and default replaced by the value in force, and what follows from it."""

    recipe: schema.SftRecipe
    lora: schema.Lora | None
    rate: float
    budget: int
    memory: Memory


def _settle(recipe: schema.SftRecipe, start: Start, dataset: Dataset, ranks: Ranks, loaded: Loaded) -> Settled:
    lora = resolve_lora(
        recipe.lora, parent_lora(start.adapter, start.manifest and start.manifest.get("lora")), loaded.where("lora")
    )
    dtype = resolve_dtype(recipe.model.dtype, ranks.device)
    config = load_config(start.base, start.revision, recipe.model.trust_remote_code)
    memory = estimate(
        config,
        rank=lora.r if lora else None,
        dtype=dtype,
        checkpointing=recipe.model.gradient_checkpointing,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    asked, rate = recipe.train.tokens_per_device, recipe.train.learning_rate
    budget = ranks.min(auto_budget(memory, dataset.longest, ranks.device)) if asked == "auto" else asked
    if rate is None:
        rate = schema.LEARNING_RATE["sft", "lora" if lora else "full"]
    train = dataclasses.replace(recipe.train, tokens_per_device=budget, learning_rate=rate)
    model = dataclasses.replace(recipe.model, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    return Settled(dataclasses.replace(recipe, lora=lora, train=train, model=model), lora, rate, budget, memory)


def _facts(settled: Settled, start: Start, template: Template, ranks: Ranks) -> dict[str, str]:
    recipe = settled.recipe
    return {
        "start": recipe.model.path + (f" (continues the adapter in {start.adapter})" if start.adapter else ""),
        "trains": f"LoRA r {settled.lora.r}" if settled.lora else "all weights",
        "dtype": recipe.model.dtype,
        "chat template": template.source,
        "devices": f"{ranks.size} × {ranks.device.type}",
    }


def _warnings(settled: Settled, dataset: Dataset) -> Iterator[str]:
    yield from dataset.train.notices
    if message := learning_rate_warning(settled.rate, settled.lora, settled.memory):
        yield message
    if settled.lora and settled.lora.dropout:
        yield "with lora.dropout, results depend on tokens_per_device: the masks follow the cut"


def _quiet() -> None:
    """Libraries speak through our lines and errors, not through their own bars and warnings."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check_template(recipe: schema.SftRecipe, start: Start, template: Template, loaded: Loaded) -> None:
    if start.template_hash not in (None, template.hash) and recipe.model.chat_template is None:
        raise UsageError(
            f"{loaded.where('model.path')}: {recipe.model.path} was trained with another chat template than {template.source}. "
            "name the one you want in model.chat_template"
        )


def _save_model(backbone: Backbone, tokenizer: Any, template: Template, folder: Path) -> None:
    """The policy with its tokenizer and the template it was trained with."""
    backbone.save("policy", folder)
    tokenizer.chat_template = template.text
    tokenizer.save_pretrained(str(folder))


def _samples(backbone: Backbone, tokenizer: Any, template: Template, dataset: Dataset) -> Iterator[dict[str, Any] | None]:
    """Greedy responses to the first held-out prompts, or to the first that are trained on."""
    encoded, records = dataset.train, dataset.reading.train
    if dataset.held_out is not None:
        encoded, records = dataset.held_out, dataset.reading.held_out
    trees = [tree for tree in encoded.trees[:SHOWN_PROMPTS] if len(tree.prompt)]
    if not trees:
        return
    yield None
    ends = end_ids(backbone.model, *end_of_turn(tokenizer, template)[-1:], tokenizer.eos_token_id)
    responses = continue_greedily(backbone, "policy", [tree.prompt for tree in trees], ends, SHOWN_TOKENS)
    lines = []
    for tree, (ids, ended) in zip(trees, responses, strict=True):
        record = records[tree.row]
        response = tokenizer.decode(ids, skip_special_tokens=True)
        lines.append({"prompt": question(record), "response": response, "ended": ended, "where": record.where})
    yield {"lines": lines}
