"""`rlhf label` with `revise`: answers that a model criticises and writes anew, read from the top as it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.records import Record
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.job import frozen_models
from rlhf_cli.figures import count
from rlhf_cli.files import sha256_file, to_json, write_atomic, write_json
from rlhf_cli.judges.endpoint import connect
from rlhf_cli.judges.question import read_principles
from rlhf_cli.labels.revise import (
    EndpointWriter,
    LocalWriter,
    Step,
    Steps,
    Writer,
    drift,
    for_sft,
    pair_row,
    principles_of,
    revise,
    sft_row,
)
from rlhf_cli.models.load import quiet_libraries
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.labels import LabelRecipe, Revise
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import KINDS
from rlhf_cli.reports.labels import write_revisions
from rlhf_cli.rollout.judge_terms import LocalModel
from rlhf_cli.runs.folder import RunFolder, open_run
from rlhf_cli.runs.manifest import build_manifest
from rlhf_cli.runs.resume import record_inputs, refuse_other_inputs
from rlhf_cli.stages.training import FINE


def revise_prompts(
    loaded: Loaded,
    recipe: LabelRecipe,
    settings: Revise,
    records: Sequence[Record],
    inputs: dict[str, str],
    **options: bool,
) -> None:
    """Answer the prompts, criticise, write anew; `options`: check, resume, force.

    RunError: with its exit code; every text is kept, and --resume goes on.
    """
    quiet_libraries()
    console, place, started = Console(), loaded.named("revise"), time.monotonic()
    principles = read_principles(Path(settings.principles), f"{place}.principles")
    inputs["revise.principles"] = sha256_file(Path(settings.principles))
    writer: Writer | None = None
    local: LocalModel | None = None
    if settings.endpoint is None:
        judge, trust = sections.Judge(path=settings.model), recipe.trust_remote_code
        local = LocalModel.find(judge, f"{place}.model", trust_remote_code=trust, check=options["check"])
        inputs["revise.model"] = local.identity
    else:
        writer = _endpoint(loaded, recipe, settings, records)
    name = KINDS["model"].default_name(settings.model) if local else settings.model or "endpoint"
    sft = {row for row, record in enumerate(records) if for_sft(record.prompt, recipe.seed, settings.split)}
    plan: list[tuple[str, object]] = [
        ("writes", name),
        ("prompts", f"{len(records):,}: {len(sft):,} for sft, {len(records) - len(sft):,} for pairs"),
        ("principles", f"{len(principles)}; one for each of {count(settings.rounds, 'round')}"),
    ]
    console.plan([("revision", plan)])
    if options["check"]:
        console.say(FINE)
        return
    with open_run(Path(recipe.output), resume=options["resume"], force=options["force"]) as folder:
        if options["resume"]:
            refuse_other_inputs(folder, recipe, inputs)
        folder.manifest.unlink(missing_ok=True)
        record_inputs(folder, recipe, loaded.stage, inputs)
        drawn = [principles_of(record, principles, settings.rounds, recipe.seed) for record in records]
        with contextlib.closing(Steps(folder.revisions, records)) as steps:
            if local is not None:
                models = frozen_models(recipe, Ranks(expected=False))
                models.add("writer", local.start)
                writer = LocalWriter(local, models.hosts["writer"], recipe.rollout)
            assert writer is not None
            chains = revise(records, drawn, recipe.seed, writer, steps, console.say)
        _write(folder, records, chains, sft, name, recipe.seed)
        console.say(f"{folder.supervised}, {folder.pairs}; report: {folder.page}")
        own: dict[str, Any] = {"prompts": len(records), "seconds": round(time.monotonic() - started, 3)}
        own["parents"] = [asdict(parent)] if local is not None and (parent := local.start.parent) is not None else []
        write_json(folder.manifest, build_manifest(folder, "label", "finished", recipe.seed, own))


def _endpoint(loaded: Loaded, recipe: LabelRecipe, settings: Revise, records: Sequence[Record]) -> EndpointWriter:
    """UsageError: the endpoint is none, or cannot be told all of a prompt."""
    if any(record.given for record in records):
        what = "prompts with tools or options of a chat template are answered by a local model alone"
        raise UsageError(f"{loaded.named('prompts')}: {what}. name one in revise.model, or leave them out")
    judge = sections.Judge(endpoint=settings.endpoint, model=settings.model or "default", timeout=settings.timeout)
    place = loaded.named("revise")
    return EndpointWriter(connect(judge, place), settings.retries, settings.parallel, recipe.rollout, place)


def _write(
    folder: RunFolder, records: Sequence[Record], chains: dict[int, list[Step]], sft: set[int], name: str, seed: int
) -> None:
    """Rows, figures and report; a pair of equal texts is none."""
    changed = {row for row, own in chains.items() if own[-1].text.strip() != own[0].text.strip()}
    supervised = [sft_row(records[row], own) for row, own in chains.items() if row in sft]
    pairs = [pair_row(records[row], chains[row], name) for row in sorted(changed - sft)]
    for path, rows in ((folder.supervised, supervised), (folder.pairs, pairs)):
        write_atomic(path, b"".join(to_json(row) + b"\n" for row in rows))
    counts = {"prompts": len(records), "lost": len(records) - len(chains), "sft": len(supervised), "pairs": len(pairs)}
    figures = {**counts, "unchanged": len(chains.keys() - sft - changed), "rounds": drift([*chains.values()], seed)}
    write_json(folder.labels, figures)
    write_revisions(folder, figures)
