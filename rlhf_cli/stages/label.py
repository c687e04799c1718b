"""`rlhf label`: rows to judge, somebody who judges them, and preferences with a report; read from the top as it happens.

What draws from models is imported where there are some: people need not wait for torch.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.formats import PROMPTS, Purpose, Use
from rlhf_cli.data.records import Record, plain_prompt
from rlhf_cli.data.requests import Lent, RowRequest
from rlhf_cli.data.sources import Reading, read_data
from rlhf_cli.errors import Stopped, UsageError
from rlhf_cli.evaluation.samples import Sample
from rlhf_cli.figures import count
from rlhf_cli.files import sha256_file, to_json, write_atomic, write_json
from rlhf_cli.labels.figures import measure, preferences
from rlhf_cli.labels.questions import MOST, Row, compared, of_records, of_samples, queues
from rlhf_cli.labels.server import serving
from rlhf_cli.labels.terminal import judge_in_terminal
from rlhf_cli.labels.verdicts import Judging
from rlhf_cli.recipe import evaluations
from rlhf_cli.recipe.labels import LabelRecipe
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import KINDS
from rlhf_cli.reports.labels import write_report
from rlhf_cli.runs.folder import RunFolder, read_metrics
from rlhf_cli.runs.manifest import build_manifest
from rlhf_cli.runs.resume import opened
from rlhf_cli.signals import StopSignals

if TYPE_CHECKING:
    from rlhf_cli.evaluation.job import EvaluationJob
    from rlhf_cli.stages.label_models import Models

SEVERAL = Use(frozenset({"pair", "ranking"}), "all")


@dataclass
class Job:
    """What is to be judged; the rows of models are there once these have responded."""

    recipe: LabelRecipe
    rows: list[Row]
    gold: list[Row]
    labelled: list[Row]  # which are not to be chosen again
    inputs: dict[str, str]  # what a resumed run must have in common with the one before
    drawing: EvaluationJob | None
    models: Models | None  # that judge, or choose what is judged
    console: Console = field(default_factory=Console)
    started: float = field(default_factory=time.monotonic)

    @property
    def annotators(self) -> list[str]:
        """Who judges."""
        judge = self.recipe.judge
        if judge.asks_people:
            return judge.people.annotators
        kind = "model" if judge.function is None else "function"
        return [judge.model or KINDS[kind].default_name(judge.path or judge.function)]


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool, terminal: bool, port: int) -> None:
    """Ask people, or a model, which responses are better; or let a model revise its own.

    Stopped: what was judged is kept, and --resume goes on. Other RunErrors: with their exit code.
    """
    signals = StopSignals()
    signals.install()
    signals.say("before the first question")
    recipe = loaded.recipe
    assert isinstance(recipe, LabelRecipe)
    if (terminal or port) and not (recipe.judge.asks_people and recipe.revise is None):
        raise UsageError("--terminal and --port are for people who judge, and this recipe asks nobody. leave them out")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("rlhf label runs in one process. start it without a launcher")
    if recipe.revise is not None:
        from rlhf_cli.stages.label_models import revise_prompts

        signals.say("; what was written is kept, continue with --resume")
        inputs = dict[str, str]()
        records = _prompts(loaded, recipe.prompts or [], inputs)
        return revise_prompts(loaded, recipe, recipe.revise, records, inputs, check=check, resume=resume, force=force)
    job = _prepare(loaded, recipe, check=check, resume=resume, force=force)
    if check:
        return job.console.say("the recipe and the rows are fine; nobody was asked")
    with opened(recipe, loaded.stage, job.inputs, resume=resume, force=force) as folder:
        if job.drawing is not None:
            from rlhf_cli.evaluation.measure import measure_models

            measured = measure_models(job.drawing, folder).samples
            signals.install()
            samples = [each for own in measured.values() for row in own.own for each in row]
            job.rows = _rows_of(samples, job.console, loaded.named("models"))
        if recipe.select is not None and job.models is not None:
            job.rows = job.models.selected(job.rows, job.labelled, recipe.select, folder, job.console)
        who, they = ("people", "they") if recipe.judge.asks_people else (job.annotators[0], "it")
        signals.say(f"while {who} judged; what {they} said is kept, continue with --resume")
        people = recipe.judge.people
        asked = queues(job.rows, job.gold, job.annotators, people.overlap, people.ranking, recipe.seed)
        judging, early = Judging(asked, folder.verdicts), None
        if not recipe.judge.asks_people and job.models is not None:
            job.models.judge(judging, job.annotators[0], folder, job.console)
        else:
            early = _judged_by_people(judging, job.console, terminal, port)
        _conclude(job, folder, judging, early)
    return None


def _judged_by_people(judging: Judging, console: Console, terminal: bool, port: int) -> Stopped | None:
    """Ask until all is judged; what ended it earlier, if anything did."""
    try:
        if terminal:
            judge_in_terminal(judging, console)
        elif any(map(judging.left, judging.queues)):
            with serving(judging, port) as site:
                console.plan([("open in a browser of this machine; Ctrl-C stops", list(site.links.items()))])
                site.ended.wait()
                if site.fault is not None:
                    raise site.fault
    except Stopped as stopped:
        return stopped
    finally:
        judging.close()
    return None


def _conclude(job: Job, folder: RunFolder, judging: Judging, early: Stopped | None) -> None:
    """Write what there is; the manifest last of all, once everything is judged."""
    verdicts, ranking = judging.standing(), job.recipe.judge.people.ranking
    left = sum(len(judging.left(name)) for name in judging.queues)
    kept = preferences(job.rows, verdicts, ranking)
    write_atomic(folder.preferences, b"".join(to_json(row) + b"\n" for row in kept))
    figures = measure(job.rows, job.gold, verdicts, job.annotators, job.recipe.seed)
    write_json(folder.labels, figures)
    write_report(folder, figures, left)
    said = f"{count(len(kept), 'row')} of {count(len(verdicts), 'verdict')}"
    job.console.say(f"{folder.preferences}: {said}; report: {folder.page}")
    if not left:
        own: dict[str, Any] = {"verdicts": len(verdicts), "seconds": round(time.monotonic() - job.started, 3)}
        own["parents"] = [dataclasses.asdict(parent) for parent in job.models.parents] if job.models else []
        write_json(folder.manifest, build_manifest(folder, "label", "finished", job.recipe.seed, own))
    elif early is not None:
        raise early
    else:
        job.console.say(f"{count(left, 'question')} left: continue with --resume")


def _prepare(loaded: Loaded, recipe: LabelRecipe, *, check: bool, resume: bool, force: bool) -> Job:
    """Read what is to be judged and show the plan. UsageError: the recipe or the rows are wrong."""
    console, people, inputs, models = Console(), recipe.judge.people, dict[str, str](), None
    if not recipe.judge.asks_people or recipe.select is not None:
        from rlhf_cli.stages.label_models import find_models

        models = find_models(loaded, recipe, inputs, check)
    gold = _read(loaded, "judge.people.gold", people.gold, inputs, {}, gold=True) if people.gold else []
    known = recipe.select and recipe.select.labelled
    labelled = _read(loaded, "select.labelled", known, inputs, {}) if known else []
    rows, drawing = list[Row](), None
    if recipe.rows:
        rows = _read(loaded, "rows", recipe.rows, inputs, models.columns if models else {})
    elif recipe.samples is not None:
        path = Path(recipe.samples)
        if not path.is_file():
            raise UsageError(f"{loaded.named('samples')}: {path}: no such file. name the samples.jsonl of an evaluation")
        try:
            rows = _rows_of([Sample(**line) for line in read_metrics(path)], console, loaded.named("samples"))
        except TypeError as error:
            raise UsageError(f"{loaded.named('samples')}: {path}: a line is no response of an evaluation ({error})") from error
        inputs[recipe.samples] = sha256_file(path)
    else:
        from rlhf_cli.evaluation.job import plan_evaluation, prepare_evaluation

        names = {own.name for own in dataclasses.fields(evaluations.EvalRecipe)} & vars(recipe).keys()
        drawn = evaluations.EvalRecipe(**{name: vars(recipe)[name] for name in names})
        drawing = prepare_evaluation(dataclasses.replace(loaded, recipe=drawn), check=check, resume=resume, force=force)
        console.plan(plan_evaluation(drawing))
        inputs |= drawing.inputs
    for row in (*rows, *gold):
        if people.ranking == "all" and len(row.responses) > MOST:
            raise UsageError(
                f"{loaded.named('judge.people.ranking')}: row {row.number} has {len(row.responses)} responses. at most "
                f"{MOST} are put in order at once. set it to pairs"
            )
    job = Job(recipe, rows, gold, labelled, inputs, drawing, models, console)
    shared = 1.0 if len(job.annotators) == 1 else people.overlap
    questions = sum(len(compared(row, people.ranking)) for row in rows)
    shown: list[tuple[str, object]] = [("annotators", ", ".join(job.annotators))]
    shown += [("rows", f"{len(rows):,}, which make {count(questions, 'question')}")] if rows else []
    shown += [("asked", f"{recipe.select.n:,} of them, by {recipe.select.by}")] if recipe.select is not None else []
    shown += [("judged by all", f"{shared:.0%} of the rows")] if len(job.annotators) > 1 else []
    shown += [("gold", f"{count(len(gold), 'row')} with known answers, for each annotator")] if gold else []
    console.plan([("labels", shown)])
    return job


def _rows_of(samples: Sequence[Sample], console: Console, place: str) -> list[Row]:
    """The rows of samples; what is left out is told. UsageError: nothing is left."""
    rows = of_samples(samples)
    if lost := len({sample.row for sample in samples}) - len(rows):
        console.say(f"{count(lost, 'prompt')} left out: fewer than two different responses to it that end and say something")
    if not rows:
        raise UsageError(f"{place}: no prompt has two different responses that end. draw longer ones, or more of them")
    return rows


def _read(
    loaded: Loaded, key: str, sources: Sequence[sections.Rows], inputs: dict[str, str], columns: Lent, *, gold: bool = False
) -> list[Row]:
    """The rows of a section, of any format that has several responses to a prompt."""
    reading = _reading(loaded, key, sources, inputs, SEVERAL, columns)
    unordered = any(report.format == "ranked" for report in reading.reports)
    rows = of_records(reading.train, gold=gold, labelled=not unordered)
    if not rows:
        raise UsageError(f"{loaded.named(key)}: no row has two different responses. give each prompt several")
    return rows


def _prompts(loaded: Loaded, sources: Sequence[sections.EvalSource], inputs: dict[str, str]) -> list[Record]:
    """Each prompt once. UsageError: there is none."""
    reading = _reading(loaded, "prompts", sources, inputs, PROMPTS, {})
    records = reading.held_out if sources[0].holdout else reading.train
    found = list({to_json([plain_prompt(own.prompt), own.given]): own for own in records}.values())
    if not found:
        raise UsageError(f"{loaded.named('prompts')}: there is no prompt. name rows that have some")
    if len(found) < len(records):
        Console().say(f"{count(len(records) - len(found), 'row')} with the prompt of another one left out")
    return found


def _reading(
    loaded: Loaded, key: str, sources: Sequence[sections.Rows], inputs: dict[str, str], use: Use, columns: Lent
) -> Reading:
    """The rows of a section; what is left out is told."""
    own = [{name: value for name, value in vars(source).items() if not name.startswith("holdout")} for source in sources]
    data, first = sections.Data([sections.Source(**each) for each in own]), sources[0]
    if isinstance(first, sections.EvalSource):
        data = dataclasses.replace(data, holdout=first.holdout, holdout_seed=first.holdout_seed or 0)
    purpose = Purpose("rlhf label", use, {"rlhf label (revise:)": PROMPTS, "rlhf label (rows:)": SEVERAL})
    request = RowRequest(
        purpose, loaded.recipe.seed, lambda named: loaded.named(named.replace("data.train", key, 1)), columns=columns
    )
    reading = read_data(data, request)
    for report in reading.reports:
        inputs[report.path] = report.fingerprint
        for reason, lost in (report.bad | report.unused).items():
            Console().say(f"{report.path}: {count(lost, 'row')} left out: {reason}")
    return reading
