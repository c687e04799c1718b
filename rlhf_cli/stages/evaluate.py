"""`rlhf eval`: what models say, what it is worth, and how they compare, read from the top as it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.data.dataset import data_report
from rlhf_cli.errors import RunError, UsageError
from rlhf_cli.evaluation.compare import compare_models, deciding
from rlhf_cli.evaluation.dump import dump_pairs
from rlhf_cli.evaluation.eval_json import read_result
from rlhf_cli.evaluation.job import EvaluationJob, plan_evaluation, prepare_evaluation
from rlhf_cli.evaluation.measure import measure_models
from rlhf_cli.evaluation.responses import write_samples
from rlhf_cli.evaluation.result import Measured, summarise
from rlhf_cli.files import write_json
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.reports.evaluation import write_report
from rlhf_cli.reports.terminal import terminal_table
from rlhf_cli.runs.folder import RunFolder, move_aside, open_run
from rlhf_cli.runs.manifest import build_manifest
from rlhf_cli.runs.resume import is_as_before, record_inputs, recorded_recipe, refuse_other_inputs
from rlhf_cli.stages.training import FINE, ending_together, refuse_apart
from rlhf_cli.training.loop import peak_memory


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Evaluate the models of the recipe; nothing is trained.

    RunError: with its exit code; what was drawn and judged so far is kept, and --resume goes on.
    """
    job = prepare_evaluation(loaded, check=check, resume=resume, force=force)
    deciding(job)
    job.console.plan(plan_evaluation(job))
    if check:
        job.console.say(FINE)
        return
    with _open(job, resume, force) as folder:
        if folder is None:
            return
        advice = f"while a model was evaluated; set tokens_per_device below {job.budget}, then --resume"
        with ending_together(job.ranks, (RunError,), advice):
            measured = measure_models(job, folder)
        if job.ranks.main:
            _conclude(job, folder, measured)


@contextlib.contextmanager
def _open(job: EvaluationJob, resume: bool, force: bool) -> Iterator[RunFolder | None]:
    """The locked folder with the recipe and the inputs recorded in it; None if the evaluation is finished."""
    output, ranks = Path(job.recipe.output), job.ranks
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        refuse_apart(ranks, output, job.inputs)
        done = False
        if resume:
            recipe = recorded_recipe(output)
            if recipe and "models" not in recipe:
                raise UsageError(f"--resume: {output} is a run of another command, not of eval. choose another output")
            refuse_other_inputs(folder, job.recipe, job.inputs, may_grow=True)
            dump = job.recipe.dump_pairs
            written = [folder.manifest, folder.result, folder.report, folder.page, *([Path(dump)] if dump is not None else [])]
            done = all(path.exists() for path in written) and is_as_before(folder, job.recipe, job.inputs | job.code)
        ranks.barrier()
        if done:
            job.console.say(terminal_table(read_result(folder.result)))
            job.console.say(f"{output} is finished: {folder.page}")
            yield None
        else:
            job.signals.say("before the first model; continue with --resume")
            if ranks.main:
                if force and job.recipe.dump_pairs is not None and Path(job.recipe.dump_pairs).exists():
                    move_aside(Path(job.recipe.dump_pairs))
                folder.manifest.unlink(missing_ok=True)  # of a finished run that goes on it would be untrue
                record_inputs(folder, job.recipe, job.loaded.stage, job.inputs | job.code)
                write_json(folder.data, {section: data_report(rows.dataset) for section, rows in job.rows.items()})
            yield folder
    ranks.close()


def _conclude(job: EvaluationJob, folder: RunFolder, measured: Measured) -> None:
    """Compare, and write everything down; the manifest last of all."""
    recipe = job.recipe
    write_samples(folder.samples, [sample for own in measured.samples.values() for row in own.own for sample in row])
    equal = {name: own.first(recipe.rollout.responses_per_prompt) for name, own in measured.samples.items()}
    outcomes, by_terms, notes = compare_models(job, equal, folder.verdicts)
    result = summarise(job, measured, outcomes, by_terms, notes)
    job.signals.obey_at_once("while the report was written; continue with --resume")
    if recipe.dump_pairs is not None:
        dump_pairs(job, Path(recipe.dump_pairs), equal, outcomes)
    write_json(folder.result, result.to_json())
    write_report(folder, result, equal)
    write_json(folder.manifest, _manifest(job, folder))  # the last write: the run is finished
    job.console.say(terminal_table(result))
    job.console.say(f"finished in {time.monotonic() - job.started:.0f} s: {folder.page}")


def _manifest(job: EvaluationJob, folder: RunFolder) -> dict[str, Any]:
    parents = {model.start.parent for model in job.models if model.start.parent} | set(job.terms.parents)
    own = {
        "models": {model.name: {"path": model.path, **model.record} for model in job.models},
        "parents": [dataclasses.asdict(parent) for parent in sorted(parents, key=lambda parent: parent.path)],
        "data": job.fingerprints,
        **job.terms.record,
        "seconds": round(time.monotonic() - job.started, 3),
        "peak_memory": round(peak_memory(), 3),
    }
    return build_manifest(folder, job.loaded.stage, "finished", job.recipe.seed, own)
