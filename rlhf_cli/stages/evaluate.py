"""`rlhf eval`: what models say, what it is worth, and how they compare, read from the top as it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.data.dataset import data_report
from rlhf_cli.errors import MachineError, RunError, UsageError
from rlhf_cli.evaluation.dump import pair_rows, ranked_rows
from rlhf_cli.evaluation.eval_json import read_result
from rlhf_cli.evaluation.judge import Verdicts, judge_all
from rlhf_cli.evaluation.prepare import EvaluationJob, plan_evaluation, prepare_evaluation
from rlhf_cli.evaluation.question import Question, prompt_text
from rlhf_cli.evaluation.result import Measured, ModelPair, judged_by_scores, scores_of, summarise
from rlhf_cli.evaluation.samples import Samples
from rlhf_cli.evaluation.visits import measure_models, write_samples
from rlhf_cli.files import disk_error, to_json, write_atomic, write_json
from rlhf_cli.models.memory import is_out_of_memory
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.reports.evaluation import write_report
from rlhf_cli.reports.terminal import terminal_table
from rlhf_cli.runs.folder import RunFolder, move_aside, open_run
from rlhf_cli.runs.manifest import git_commit, versions, write_manifest
from rlhf_cli.runs.resume import is_as_before, record_inputs, recorded_recipe, refuse_other_inputs, reopen
from rlhf_cli.stages.training import FINE
from rlhf_cli.training.loop import peak_memory


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Evaluate the models of the recipe; nothing is trained.

    Raises:
        RunError: with its exit code; what was drawn and judged so far is kept, and --resume goes on.
    """
    job = prepare_evaluation(loaded, check=check, resume=resume, force=force)
    job.console.plan(plan_evaluation(job))
    if check:
        job.console.say(FINE)
        return
    with _opened(job, resume, force) as folder:
        if folder is None:
            return
        with _parting(job):
            measured = measure_models(job, folder)
        if job.ranks.main:
            _conclude(job, folder, measured)


@contextlib.contextmanager
def _opened(job: EvaluationJob, resume: bool, force: bool) -> Iterator[RunFolder | None]:
    """The locked folder with the recipe and the inputs recorded in it; None if the evaluation is finished."""
    output, ranks = Path(job.recipe.output), job.ranks
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        done = False
        if resume:
            _refuse_other_stages(job, folder)
            refuse_other_inputs(folder, job.recipe, job.inputs, may_grow=True)
            done = _is_finished(job, folder)
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
                reopen(folder)
                record_inputs(folder, job.recipe, job.loaded.stage, job.inputs | job.code)
                write_json(folder.data, {section: data_report(dataset) for section, dataset in job.datasets.items()})
            yield folder
    ranks.close()


def _refuse_other_stages(job: EvaluationJob, folder: RunFolder) -> None:
    recipe = recorded_recipe(folder.path)
    if recipe and "models" not in recipe:
        raise UsageError(f"--resume: {folder.path} is a run of another command, not of eval. choose another output")


def _is_finished(job: EvaluationJob, folder: RunFolder) -> bool:
    """Is everything written, of the same inputs by the same code?"""
    dump = job.recipe.dump_pairs
    reports = [folder.result, folder.report, folder.page]
    written = [folder.manifest, *reports, *([Path(dump)] if dump is not None else [])]
    return all(path.exists() for path in written) and is_as_before(folder, job.recipe, job.inputs | job.code)


@contextlib.contextmanager
def _parting(job: EvaluationJob) -> Iterator[None]:
    """What ends all ranks alike ends them in order."""
    try:
        yield
    except RunError as error:
        if not error.one_rank:
            job.ranks.close()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"set tokens_per_device below {job.budget}, then --resume"
        raise MachineError(f"out of memory while a model was evaluated; {advice}").on_one_rank() from error


def _conclude(job: EvaluationJob, folder: RunFolder, measured: Measured) -> None:
    """Compare, and write everything down; the manifest last of all."""
    recipe, notes = job.recipe, list(job.notes)
    write_samples(folder.samples, [sample for own in measured.samples.values() for row in own.own for sample in row])
    equal = {name: own.first(recipe.rollout.responses_per_prompt) for name, own in measured.samples.items()}
    judged = _compare(job, folder, equal, notes)
    result = summarise(recipe, measured, judged, notes)
    job.signals.obey_at_once("while the report was written; continue with --resume")
    if recipe.dump_pairs is not None:
        _dump(job, Path(recipe.dump_pairs), equal, judged)
    write_json(folder.result, result.to_json())
    write_report(folder, result, [sample for own in equal.values() for row in own.own for sample in row])
    write_manifest(folder, _manifest(job))
    job.console.say(terminal_table(result))
    job.console.say(f"finished in {time.monotonic() - job.started:.0f} s: {folder.page}")


def _compare(
    job: EvaluationJob, folder: RunFolder, samples: Mapping[str, Samples], notes: list[str]
) -> dict[ModelPair, np.ndarray]:
    """Outcomes of all pairs of models, or by an endpoint of each against the baseline, which is dear enough."""
    winrate = job.recipe.winrate
    if winrate is None:
        return {}
    if isinstance(winrate.judge, str):
        return judged_by_scores(samples, winrate.judge, job.recipe)
    names = [name for name in samples if name != winrate.baseline]
    base = samples[winrate.baseline]
    questions = [
        Question(prompt_text(mine.prompt), mine.response, other.response)
        for name in names
        for own, others in zip(samples[name].own, base.own, strict=True)
        for mine, other in zip(own, others, strict=True)
    ]

    def say(done: int, total: int) -> None:
        job.console.say(f"the judge has answered {done:,} of {total:,} questions")

    job.signals.say("while the judge was asked; its verdicts are kept, continue with --resume")
    with Verdicts(folder.verdicts) as verdicts:
        found = judge_all(winrate.judge, questions, verdicts, say)
    notes.append(
        f"The judge contradicted itself in {found.contradicting:,} of {found.asked:,} comparisons when the responses changed "
        "places; those count as ties."
    )
    tables = found.outcomes.reshape(len(names), *base.shape)
    return {(name, winrate.baseline): table for name, table in zip(names, tables, strict=True)}


def _dump(job: EvaluationJob, path: Path, samples: Mapping[str, Samples], judged: Mapping[ModelPair, np.ndarray]) -> None:
    """The responses as preference data."""
    judge = job.recipe.winrate.judge if job.recipe.winrate else "reward"
    if isinstance(judge, str):
        tables = {name: scores_of(own, judge, job.recipe) for name, own in samples.items()}
        rows = ranked_rows(samples, {name: table for name, table in tables.items() if table is not None})
    else:
        rows = pair_rows(samples, judged)
    if not rows:
        job.console.warn(f"{path}: not written, since the judge sees no difference between any two responses to a prompt")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    write_atomic(path, b"".join(to_json(row) + b"\n" for row in rows))
    if isinstance(judge, str):
        job.console.say(f"{path}: the responses of {', '.join(samples)} to {len(rows):,} prompts, ranked by {judge}")
    else:
        job.console.say(f"{path}: {len(rows):,} pairs of responses of {', '.join(samples)}")


def _manifest(job: EvaluationJob) -> dict[str, Any]:
    terms = next(iter(job.terms.values()))
    parents = {each.start.parent for each in job.models if each.start.parent} | set(terms.parents)
    return {
        "stage": job.loaded.stage,
        "status": "finished",
        "versions": versions(),
        "git_commit": git_commit(),
        "seed": job.recipe.seed,
        "models": {each.name: {"path": each.path, **each.record} for each in job.models},
        "parents": [dataclasses.asdict(parent) for parent in sorted(parents, key=lambda parent: parent.path)],
        "data": job.fingerprints,
        **terms.record,
        "seconds": round(time.monotonic() - job.started, 3),
        "peak_memory": round(peak_memory(), 3),
        "model_files": {},
    }
