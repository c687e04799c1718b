"""`rlhf sft`: supervised fine-tuning, read from the top as it happens."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from rlhf_cli.console import Console
from rlhf_cli.data.batches import total_steps
from rlhf_cli.data.dataset import Dataset, data_report, prepare, question
from rlhf_cli.data.encode import show_example
from rlhf_cli.data.templates import Template, choose_template, end_of_turn
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import load_config, load_tokenizer, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.policy import load_policy, parent_lora, resolve_lora
from rlhf_cli.models.sampling import continue_greedily, end_ids
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.runs.files import write_json
from rlhf_cli.runs.folder import RunFolder, open_run, refuse_occupied
from rlhf_cli.runs.manifest import Outcome, build_manifest, write_manifest
from rlhf_cli.runs.parents import Start, base_model, resolve_start
from rlhf_cli.runs.report import write_report
from rlhf_cli.runs.resume import finished_steps, record_inputs, refuse_other_inputs
from rlhf_cli.stages.plan import learning_rate_warning, plan
from rlhf_cli.training.loop import Fit, peak_memory
from rlhf_cli.training.ranks import Ranks
from rlhf_cli.training.signals import StopSignals
from rlhf_cli.training.trackers import start_trackers

SHOWN_PROMPTS, SHOWN_TOKENS = 4, 64
"""Samples in samples.jsonl: how many prompts, and how long their greedy continuations may get."""


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on the responses of its data.

    Raises:
        RunError: with the exit code of the contract; nothing was trained with exit code 2.
    """
    signals = StopSignals()
    signals.install()
    _quiet()
    started = time.monotonic()
    recipe: schema.SftRecipe = loaded.recipe
    console = Console(os.environ.get("RANK", "0") == "0")
    output = Path(recipe.output)
    if not check and not force and console.enabled:
        refuse_occupied(output, resume)

    start = resolve_start(recipe.model.path, recipe.model.revision, loaded.where("model.path"))
    tokenizer = load_tokenizer(start.tokenizer, start.revision, recipe.model.trust_remote_code)
    template = choose_template(tokenizer, recipe.model.chat_template)
    _check_template(recipe, start, template, loaded)
    dataset = prepare(recipe.data, "sft", tokenizer, template, recipe.seed, loaded.where, "first")
    source = dataset.source(recipe.train, recipe.data, recipe.seed)
    steps = total_steps(recipe.train.epochs, recipe.train.steps, source.steps_per_epoch)

    ranks = Ranks(expected=not check)
    recipe, memory, budget = _resolve(recipe, start, dataset, ranks, loaded)
    facts = {
        "start": recipe.model.path + (f" (continues the adapter in {start.adapter})" if start.adapter else ""),
        "trains": "all weights" if recipe.lora is None else f"LoRA r {recipe.lora.r}",
        "dtype": recipe.model.dtype,
        "chat template": template.source,
        "devices": f"{ranks.size} × {ranks.device.type}",
    }
    console.plan(plan(recipe, dataset, source, steps, memory, budget, facts))
    console.example(show_example(source.batch(1)[0], tokenizer))
    for message in (
        *dataset.train.notices,
        learning_rate_warning(recipe.train.learning_rate, recipe.lora, memory),
        "with lora.dropout, results depend on tokens_per_device: the masks follow the cut" if recipe.lora and recipe.lora.dropout else None,
    ):
        if message:
            console.warn(message)
    if check:
        console.say("the recipe and the data are fine; nothing was trained")
        return

    folder = open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output)
    ranks.barrier()
    with folder:
        base = base_model(start)
        inputs = {"base": base.weights_hash, "template": template.hash, "parent": start.parent and start.parent.manifest_hash} | dataset.fingerprints
        if resume:
            refuse_other_inputs(folder, recipe, inputs)
            if finished_steps(folder) >= steps:
                console.say(f"{output} is finished: {folder.manifest}")
                return
        if ranks.main:
            record_inputs(folder, recipe, "sft", inputs)
            write_json(folder.data, data_report(dataset))

        backbone, base_path = load_policy(
            recipe.model, recipe.lora, start.base, start.revision, start.adapter, ranks.device, recipe.seed, output / "base"
        )
        console.say(f"attention: {backbone.kernel.name}, {backbone.kernel.layout} rows")
        fit = Fit(
            run=folder,
            backbone=backbone,
            objective=recipe.objective,
            source=source,
            held_out=list(dataset.held_out.trees) if dataset.held_out else [],
            sample=partial(_samples, backbone, tokenizer, template, dataset),
            train=recipe.train,
            steps=steps,
            seed=recipe.seed,
            budget=budget,
            ranks=ranks,
            console=console,
            signals=signals,
            track=start_trackers(recipe, folder.path, ranks.main),
        )
        fit.resume()
        status = fit.go()

        if ranks.main:
            backbone.save("policy", folder.model)
            tokenizer.chat_template = template.text
            tokenizer.save_pretrained(str(folder.model))
            outcome = Outcome(
                stage="sft",
                seed=recipe.seed,
                base_model=dataclasses.replace(base, path=base_path) if base_path == start.base else base_model(Start(base_path, None, None, "", None, None)),
                data=dataset.fingerprints,
                chat_template_hash=template.hash,
                steps=fit.state.step,
                tokens=fit.state.tokens,
                seconds=fit.state.seconds,
                peak_memory=peak_memory(),
                parents=(start.parent,) if start.parent else (),
                status=status,
                extra={"lora": recipe.lora and dataclasses.asdict(recipe.lora)},
            )
            manifest = build_manifest(folder, outcome)
            write_report(folder, manifest)
            write_manifest(folder, manifest)
        console.say(f"{status} in {time.monotonic() - started:.0f} s: {folder.report}")
    ranks.close()


def _quiet() -> None:
    """Libraries speak through our lines and errors, not through their own bars and warnings."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check_template(recipe: schema.SftRecipe, start: Start, template: Template, loaded: Loaded) -> None:
    if start.template_hash is not None and start.template_hash != template.hash and recipe.model.chat_template is None:
        raise UsageError(
            f"{loaded.where('model.path')}: {start.parent and start.parent.path} was trained with another chat template than {template.source}. "
            "name the one you want in model.chat_template"
        )


def _resolve(
    recipe: schema.SftRecipe, start: Start, dataset: Dataset, ranks: Ranks, loaded: Loaded
) -> tuple[schema.SftRecipe, Any, int]:
    """The recipe with every `auto` and default replaced by the value in force, the memory estimate and the packing budget."""
    lora = resolve_lora(recipe.lora, parent_lora(start.adapter, start.manifest and start.manifest.get("lora")), loaded.where("lora"))
    dtype = resolve_dtype(recipe.model.dtype, ranks.device)
    config = load_config(start.base, start.revision, recipe.model.trust_remote_code)
    memory = estimate(config, rank=lora and lora.r, dtype=dtype, checkpointing=recipe.model.gradient_checkpointing)
    asked = recipe.train.tokens_per_device
    budget = ranks.min(auto_budget(memory, dataset.longest, ranks.device)) if asked == "auto" else int(asked)
    rate = recipe.train.learning_rate
    train = dataclasses.replace(
        recipe.train,
        tokens_per_device=budget,
        learning_rate=schema.LEARNING_RATE["sft", "lora" if lora else "full"] if rate is None else rate,
    )
    model = dataclasses.replace(recipe.model, dtype=str(dtype).removeprefix("torch."))
    return dataclasses.replace(recipe, lora=lora, train=train, model=model), memory, budget


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
    lines = []
    for tree, (ids, ended) in zip(
        trees, continue_greedily(backbone, "policy", [t.prompt for t in trees], ends, SHOWN_TOKENS), strict=True
    ):
        record = records[tree.row]
        response = tokenizer.decode(ids, skip_special_tokens=True)
        lines.append({"prompt": question(record), "response": response, "ended": ended, "where": record.where})
    yield {"lines": lines}
