"""`rlhf eval`: what models say, what it is worth, and how they compare, read from the top as it happens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from rlhf_cli.console import Console
from rlhf_cli.data.dataset import Dataset, data_report, prepare
from rlhf_cli.errors import MachineError, RunError, UsageError
from rlhf_cli.evaluation.dump import pair_rows, ranked_rows
from rlhf_cli.evaluation.judge import Verdicts, judge_all
from rlhf_cli.evaluation.judge import prepare as prepare_endpoint
from rlhf_cli.evaluation.preference import agreement, score_responses
from rlhf_cli.evaluation.question import Question, prompt_text
from rlhf_cli.evaluation.result import Agreed, Measured, Pair, judged_by_scores, scores_of, summarise
from rlhf_cli.evaluation.samples import Sample, Samples, grouped, read_samples
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.homes import Frozen
from rlhf_cli.models.load import load_config, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate, is_out_of_memory
from rlhf_cli.recipe import schema
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.rollout.experience import together
from rlhf_cli.rollout.rewards import FunctionTerm
from rlhf_cli.runs.evaluated import terminal_table, write_report
from rlhf_cli.runs.files import disk_error, to_json, write_atomic, write_json
from rlhf_cli.runs.folder import MetricsLog, RunFolder, open_run, read_metrics
from rlhf_cli.runs.manifest import git_commit, versions, write_manifest
from rlhf_cli.runs.resume import is_as_before, record_inputs, refuse_other_inputs, reopen
from rlhf_cli.stages.candidates import Candidate, Voice, Voices, find_candidates, recipe_of
from rlhf_cli.stages.drawing import Judges, find_judges
from rlhf_cli.stages.measure import (
    Rows,
    draw,
    function_scores,
    judged,
    place_judges,
    response_logps,
    text_figures,
)
from rlhf_cli.stages.reward_models import FoundRewardModel
from rlhf_cli.stages.training import FINE, quiet
from rlhf_cli.training.loop import peak_memory
from rlhf_cli.training.ranks import Ranks
from rlhf_cli.training.signals import StopSignals

SECTIONS: dict[str, tuple[str, Literal["none", "all", "first"]]] = {
    "prompts": ("ppo", "none"),
    "preferences": ("train-rm", "all"),
    "text": ("sft", "first"),
}
"""Section of the recipe → the stage that takes such rows, and which of their responses are read."""

RESULT, VERDICTS, PAGE = "eval.json", "verdicts.jsonl", "report.html"


@dataclass(frozen=True)
class Job:
    """An evaluation before any weights are loaded."""

    loaded: Loaded
    recipe: schema.EvalRecipe  # every `auto` replaced by the value in force
    candidates: list[Candidate]
    voices: Voices
    judges: dict[str, Judges]  # by the name of the voice that they read
    rows: dict[str, dict[str, Rows]]  # section → name of the voice → its rows; of prompts those that all voices have
    datasets: dict[str, Dataset]  # section → as the first voice reads it
    ranks: Ranks
    console: Console
    signals: StopSignals
    started: float
    notes: list[str]  # for the report

    @property
    def budget(self) -> int:
        return int(self.recipe.tokens_per_device)

    @property
    def reference(self) -> Candidate | None:
        return next((each for each in self.candidates if each.name == self.recipe.reference), None)

    @property
    def inputs(self) -> dict[str, str]:
        """What a resumed evaluation must have in common with the one before, where it names the same things."""
        found = {f"model {each.name}": json.dumps(each.record) for each in self.candidates}
        judges = next(iter(self.judges.values()))
        terms = [("reward", judge) for judge in judges.reward] + [("gold", judge) for judge in judges.gold]
        found |= {f"{what} {name_of(judge.reward)}": json.dumps(judge.identity) for what, judge in terms}
        return found | self.fingerprints

    @property
    def fingerprints(self) -> dict[str, str]:
        return {path: print for dataset in self.datasets.values() for path, print in dataset.fingerprints.items()}


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Evaluate the models of the recipe; nothing is trained.

    Raises:
        RunError: with its exit code; what was drawn and judged so far is kept, and --resume goes on.
    """
    job = prepare_evaluation(loaded, check)
    job.console.plan(_plan(job))
    if check:
        job.console.say(FINE)
        return
    with _opened(job, resume, force) as folder:
        if folder is None:
            return
        with _parting(job):
            measured = _measure(job, folder)
        if job.ranks.main:
            _conclude(job, folder, measured)


def prepare_evaluation(loaded: Loaded, check: bool) -> Job:
    """Find every model, read and tokenise the rows, settle every value.

    Raises:
        UsageError: the recipe, the data or what it names is wrong.
    """
    signals = StopSignals()
    signals.install()
    quiet()
    started, recipe = time.monotonic(), recipe_of(loaded)
    console, ranks = Console(os.environ.get("RANK", "0") == "0"), Ranks(expected=not check)
    voices = Voices()
    candidates = find_candidates(loaded, voices, check)
    _check_roles(loaded, candidates)
    if recipe.winrate is not None and not isinstance(recipe.winrate.judge, str):
        prepare_endpoint(recipe.winrate.judge)
    writers = list(dict.fromkeys(each.voice for each in candidates if not each.scores)) or [candidates[0].voice]
    judges = {
        voice.name: find_judges(loaded, voice.tokenizer, voice.template, recipe.trust_remote_code, check) for voice in writers
    }
    readers = list(
        dict.fromkeys(
            [*writers, *(each.voice for each in candidates), *(_voice_of(found, voices) for found in _reward_models(judges))]
        )
    )
    notes: list[str] = []
    rows: dict[str, dict[str, Rows]] = {}
    datasets: dict[str, Dataset] = {}
    for section in SECTIONS:
        if vars(recipe)[section] is not None:
            read = {voice.name: _read(loaded, section, voice) for voice in (readers if section == "preferences" else writers)}
            datasets[section] = next(iter(read.values()))
            rows[section] = {name: _rows(dataset) for name, dataset in read.items()}
    if "prompts" in rows:
        rows["prompts"] = _in_common(rows["prompts"], notes)
        if len(next(iter(rows["prompts"].values())).trees) < 2:
            raise UsageError(f"{loaded.named('prompts')}: fewer than 2 prompts are left, which is too few for any interval")
    recipe = _settled(recipe, candidates, datasets, ranks)
    notes += _notes(recipe, candidates)
    return Job(loaded, recipe, candidates, voices, judges, rows, datasets, ranks, console, signals, started, notes)


def _check_roles(loaded: Loaded, candidates: Sequence[Candidate]) -> None:
    recipe = recipe_of(loaded)
    scoring = {each.name for each in candidates if each.scores}
    roles = {"reference": recipe.reference, "winrate.baseline": recipe.winrate and recipe.winrate.baseline}
    for key, name in roles.items():
        if name in scoring:
            raise UsageError(f"{loaded.named(key)}: {name} is a reward model, and writes nothing; name a policy")
    if recipe.prompts is not None and len(scoring) == len(candidates):
        raise UsageError(f"{loaded.named('prompts')}: all models are reward models, which answer no prompts. remove prompts")
    for name in scoring:
        if recipe.preferences is None:
            raise UsageError(f"{loaded.named('models')}: {name} is a reward model: name preferences to measure it on")


def _reward_models(judges: Mapping[str, Judges]) -> Iterator[FoundRewardModel]:
    for own in judges.values():
        yield from (judge.found for judge in own.reward + own.gold if isinstance(judge.found, FoundRewardModel))


def _voice_of(found: FoundRewardModel, voices: Voices) -> Voice:
    return voices.of(found.tokenizer, found.template)


def _read(loaded: Loaded, section: str, voice: Voice) -> Dataset:
    """The rows of a section in a voice's tokens."""
    recipe = recipe_of(loaded)
    sources: list[schema.EvalSource] = vars(recipe)[section]
    stage, responses = SECTIONS[section]
    data = schema.SftData(
        train=[schema.Source(**{k: v for k, v in vars(source).items() if k != "holdout"}) for source in sources],
        holdout=sources[0].holdout,
        max_length=recipe.max_length,
        overlong=recipe.overlong,
        control_tokens=recipe.control_tokens,
        max_lost=recipe.max_lost,
        train_on="all" if section == "text" else "last",
    )

    def where(key: str) -> str:
        return loaded.named(key.replace("data.train", section, 1).removeprefix("data."))

    reserve = recipe.rollout.max_new_tokens if section == "prompts" else 0
    return prepare(data, stage, voice.tokenizer, voice.template, recipe.seed, where, responses, reserve=reserve)


def _rows(dataset: Dataset) -> Rows:
    if dataset.held_out is None:
        return Rows(list(dataset.train.trees), dataset.reading.train, [])
    return Rows(list(dataset.held_out.trees), dataset.reading.held_out, list(dataset.train.trees))


def _in_common(rows: dict[str, Rows], notes: list[str]) -> dict[str, Rows]:
    """The prompts that every voice has: others do not fit into the tokens of some model."""
    shared = set.intersection(*({tree.row for tree in own.trees} for own in rows.values()))
    most = max(len(own.trees) for own in rows.values())
    if len(shared) < most:
        notes.append(f"{most - len(shared)} prompts are too long in the tokens of some model, and left out for all.")
    return {
        name: dataclasses.replace(own, trees=[tree for tree in own.trees if tree.row in shared]) for name, own in rows.items()
    }


def _settled(
    recipe: schema.EvalRecipe, candidates: Sequence[Candidate], datasets: Mapping[str, Dataset], ranks: Ranks
) -> schema.EvalRecipe:
    """The recipe with the dtype and the budget in force: that of the model which takes the most memory."""
    dtype = resolve_dtype(recipe.dtype, ranks.device)
    budget = recipe.tokens_per_device
    if budget == "auto":
        trust = recipe.trust_remote_code
        drawn = max(recipe.rollout.responses_per_prompt, *recipe.best_of_n, 1) * recipe.rollout.max_new_tokens
        longest = max(dataset.longest + drawn * (section == "prompts") for section, dataset in datasets.items())
        fitting = []
        for base, revision in dict.fromkeys((each.start.base, each.start.revision) for each in candidates):
            config = load_config(base, revision, trust)
            memory = estimate(config, rank=1, dtype=dtype, checkpointing=False, trust_remote_code=trust)
            fitting.append(auto_budget(memory, longest, ranks.device))
        budget = ranks.min(min(fitting))
    return dataclasses.replace(recipe, tokens_per_device=budget, dtype=cast(Any, str(dtype).removeprefix("torch.")))


def _notes(recipe: schema.EvalRecipe, candidates: Sequence[Candidate]) -> Iterator[str]:
    """What a reader of the report must know and cannot see in it."""
    if recipe.prompts is not None and recipe.rollout.temperature != 1:
        yield (
            f"Responses were drawn at temperature {recipe.rollout.temperature:g}, and log-probabilities are those at 1: the "
            "KL is that of what was drawn, not of the policies."
        )
    reference = next((each for each in candidates if each.name == recipe.reference), None)
    if reference is not None:
        others = [each.name for each in candidates if not each.scores and each.voice != reference.voice]
        if others:
            yield f"{', '.join(others)}: other tokens or another chat template than {reference.name}, so no KL can be measured."


def _plan(job: Job) -> list[tuple[str, list[tuple[str, object]]]]:
    recipe = job.recipe
    models: list[tuple[str, object]] = [
        (each.name, each.path + (" (a reward model)" if each.scores else "")) for each in job.candidates
    ]
    rows: list[tuple[str, object]] = []
    for section, own in job.rows.items():
        count = len(next(iter(own.values())).trees)
        report = data_report(job.datasets[section])["train"]
        lost = "; ".join(f"{number} {reason}" for reason, number in Counter(report["dropped"]).items())
        rows.append((section, f"{count:,} rows" + (f" (dropped: {lost})" if lost else "")))
    settings: list[tuple[str, object]] = [
        ("dtype", recipe.dtype),
        ("forward passes", f"of at most {job.budget:,} tokens (tokens_per_device)"),
        ("devices", f"{job.ranks.size} × {job.ranks.device.type}"),
    ]
    if recipe.prompts is not None:
        drawn = f"{recipe.rollout.responses_per_prompt} to each prompt, of up to {recipe.rollout.max_new_tokens} tokens"
        most = max(recipe.best_of_n, default=0)
        more = f"; {most} of {recipe.reference}, for best of n" if most > recipe.rollout.responses_per_prompt else ""
        settings.insert(0, ("responses", drawn + more))
    judges = next(iter(job.judges.values()))
    words: list[tuple[str, object]] = [("", text) for text in judges.words()]
    return [("models", models), ("rows", rows), ("evaluation", [*settings, *words])]


@contextlib.contextmanager
def _opened(job: Job, resume: bool, force: bool) -> Iterator[RunFolder | None]:
    """The locked folder with the recipe and the inputs recorded in it; None if the evaluation is finished."""
    output, ranks = Path(job.recipe.output), job.ranks
    with open_run(output, resume=resume, force=force) if ranks.main else RunFolder(output) as folder:
        ranks.barrier()
        done = False
        if resume:
            refuse_other_inputs(folder, job.recipe, job.inputs, may_grow=True)
            done = folder.manifest.exists() and is_as_before(folder, job.recipe, job.inputs)
        ranks.barrier()
        if done:
            job.console.say(terminal_table(json.loads((folder.path / RESULT).read_bytes())))
            job.console.say(f"{output} is finished: {folder.path / PAGE}")
            yield None
        else:
            job.signals.say("before the first model; continue with --resume")
            if ranks.main:
                reopen(folder)
                record_inputs(folder, job.recipe, job.loaded.stage, job.inputs)
                write_json(folder.data, {section: data_report(dataset) for section, dataset in job.datasets.items()})
            yield folder
    ranks.close()


@contextlib.contextmanager
def _parting(job: Job) -> Iterator[None]:
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


def _measure(job: Job, folder: RunFolder) -> Measured:
    """Visit every model once: its responses, its view of the preferences, its perplexity."""
    kept, log = _kept(job, folder)
    frozen = _load_frozen(job)
    series = {each.name: (each.series, each.step) for each in job.candidates if each.series and each.step is not None}
    measured = Measured({}, {}, {}, series)
    theirs = _reference_logps(job, frozen)
    for each in job.candidates:
        samples = kept.get(each.name)
        draws = "prompts" in job.rows and not each.scores and samples is None
        if draws or _agrees(job, each) or _reads(job, each):
            job.signals.say(f"while {each.name} was evaluated; the responses of those before it are kept, continue with --resume")
            since = time.monotonic()
            drawn = _visit(job, each, frozen, measured, theirs, draws, log)
            samples = drawn if draws else samples
            job.console.say(f"{each.name}: {time.monotonic() - since:.0f} s")
        if samples is not None:
            full = together(job.ranks, partial(_judged, job, each, samples))
            measured.samples[each.name] = grouped(full)
    if "preferences" in job.rows:
        measured.agreed.update(together(job.ranks, partial(dict, _agreed_functions(job))))
        measured.agreed.update(_agreed_models(job, frozen))
    return measured


def _visit(
    job: Job,
    each: Candidate,
    frozen: Frozen,
    measured: Measured,
    theirs: Sequence[np.ndarray],
    draws: bool,
    log: MetricsLog | None,
) -> list[Sample]:
    """All that needs the weights of one model: its responses if it `draws`, and the rest into `measured`."""
    start, role = each.start, "reward" if each.scores else "policy"
    with frozen.visit(role, start.base, start.revision, start.adapter, head=each.scores) as backbone:
        samples = _drawn(job, each, backbone, frozen, log) if draws else []
        if _agrees(job, each):
            measured.agreed[each.name] = _agreed(job, each, backbone, theirs)
        if _reads(job, each):
            trees = job.rows["text"][each.voice.name].trees
            measured.text[each.name] = text_figures(backbone, role, trees, job.budget, job.ranks)
    return samples


def _kept(job: Job, folder: RunFolder) -> tuple[dict[str, list[Sample]], MetricsLog | None]:
    """The responses that an earlier start drew, of models that are complete; and the file that holds them and takes more."""
    kept: dict[str, list[Sample]] = {}
    log = None
    if job.ranks.main and "prompts" in job.rows:
        found = read_samples(read_metrics(folder.samples))
        for each in job.candidates:
            if each.scores:
                continue
            rows, count = job.rows["prompts"][each.voice.name].trees, _responses(job, each)
            own = [sample for sample in found if sample.model == each.name and sample.number < count]
            if Counter(sample.row for sample in own) == dict.fromkeys((tree.row for tree in rows), count):
                kept[each.name] = own
        _write_samples(folder.samples, [sample for own in kept.values() for sample in own])
        log = MetricsLog(folder.samples)
        if kept:
            job.console.say(f"the responses of {', '.join(kept)} are there already")
    return job.ranks.gather(kept)[0], log


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    write_atomic(path, b"".join(to_json(sample.line()) + b"\n" for sample in samples))


def _responses(job: Job, each: Candidate) -> int:
    """How many responses to each prompt are drawn from a model."""
    most = max(job.recipe.best_of_n, default=1) if each is job.reference else 1
    return max(job.recipe.rollout.responses_per_prompt, most)


def _load_frozen(job: Job) -> Frozen:
    """The frozen models beside the one that is visited: the reference and the reward models."""
    recipe, reference = job.recipe, job.reference
    settings = schema.Model(path="", dtype=recipe.dtype, attention=recipe.attention, trust_remote_code=recipe.trust_remote_code)
    frozen = Frozen(settings, resolve_dtype(recipe.dtype, job.ranks.device), job.ranks.device)
    if reference is not None:
        frozen.add("reference", reference.start.base, reference.start.revision, reference.start.adapter)
    place_judges(next(iter(job.judges.values())), frozen)
    return frozen


def _agrees(job: Job, each: Candidate) -> bool:
    """Has it a view of the preferences? A policy has one against a reference with the same tokens that is another one."""
    reference = job.reference
    compared = reference is not None and each is not reference and each.voice == reference.voice
    return "preferences" in job.rows and (each.scores or compared)


def _reads(job: Job, each: Candidate) -> bool:
    return "text" in job.rows and not each.scores


def _reference_logps(job: Job, frozen: Frozen) -> list[np.ndarray]:
    """Σ log π_ref of the preferences' responses; empty where nothing is compared with them."""
    reference = job.reference
    if reference is None or not any(_agrees(job, each) and not each.scores for each in job.candidates):
        return []
    trees = job.rows["preferences"][reference.voice.name].trees
    return response_logps(frozen.places["reference"], "reference", trees, job.budget, job.ranks)


def _drawn(job: Job, each: Candidate, backbone: Backbone, frozen: Frozen, log: MetricsLog | None) -> list[Sample]:
    """The model's responses, also written to the log."""
    samples = draw(
        each,
        backbone,
        frozen,
        job.judges[each.voice.name],
        job.rows["prompts"][each.voice.name],
        job.recipe,
        samples=_responses(job, each),
        compared=job.reference is not None and each.voice == job.reference.voice,
        budget=job.budget,
        ranks=job.ranks,
    )
    if log is not None:
        job.signals.defer()  # a model's lines are there all or not at all, but for a kill
        for sample in samples:
            log.append(sample.line())
        job.signals.obey_at_once(f"after {each.name}; what was drawn is kept, continue with --resume")
    return samples


def _judged(job: Job, each: Candidate, samples: list[Sample]) -> list[Sample]:
    """With what Python functions make of them; rank 0 alone asks those, and the others' samples stay as they are."""
    if not job.ranks.main:
        return samples
    rows = job.rows["prompts"][each.voice.name]
    return judged(samples, job.judges[each.voice.name], rows.records, job.recipe)


def _agreed(job: Job, each: Candidate, backbone: Backbone, theirs: Sequence[np.ndarray]) -> Agreed:
    """How a reward model's scores, or a policy's implicit rewards β (log π − log π_ref), agree with the preferences."""
    rows = job.rows["preferences"][each.voice.name]
    if each.scores:
        scores = score_responses(backbone, "reward", rows.trees, job.budget, job.ranks)
        return Agreed("reward model", agreement(scores, rows.trees, rows.training))
    own = response_logps(backbone, "policy", rows.trees, job.budget, job.ranks)
    scores = [each.beta * (mine - other) for mine, other in zip(own, theirs, strict=True)]
    return Agreed("policy", agreement(scores, rows.trees, rows.training), each.beta)


def _agreed_models(job: Job, frozen: Frozen) -> dict[str, Agreed]:
    """How the reward models among the terms agree with the preferences, by raw scores."""
    found = {}
    for role, name, term in _terms(job):
        if isinstance(term, FoundRewardModel):
            rows = job.rows["preferences"][_voice_of(term, job.voices).name]
            scores = score_responses(frozen.places[role], role, rows.trees, job.budget, job.ranks)
            found[name] = Agreed("reward model", agreement(scores, rows.trees, rows.training))
    return found


def _agreed_functions(job: Job) -> Iterator[tuple[str, Agreed]]:
    """How the Python functions among the terms agree with the preferences."""
    rows = next(iter(job.rows["preferences"].values()))
    for _, name, term in _terms(job):
        if isinstance(term, FunctionTerm) and job.ranks.main:
            yield name, Agreed("term", agreement(function_scores(term, rows), rows.trees, rows.training))


def _terms(job: Job) -> Iterator[tuple[str, str, FoundRewardModel | FunctionTerm]]:
    """(role, name in eval.json, what it is) of every term of the reward and of gold."""
    judges = next(iter(job.judges.values()))
    for what, own in (("reward", judges.reward), ("gold", judges.gold)):
        for number, judge in enumerate(own):
            yield f"{what}{number}", f"{what}/{name_of(judge.reward)}", judge.found


def _conclude(job: Job, folder: RunFolder, measured: Measured) -> None:
    """Compare, and write everything down; the manifest last of all."""
    recipe, notes = job.recipe, list(job.notes)
    _write_samples(folder.samples, [sample for own in measured.samples.values() for row in own.own for sample in row])
    equal = {name: own.first(recipe.rollout.responses_per_prompt) for name, own in measured.samples.items()}
    judged = _compare(job, folder, equal, notes)
    result = summarise(recipe, measured, judged, notes)
    job.signals.obey_at_once("while the report was written; continue with --resume")
    if recipe.dump_pairs is not None:
        _dump(job, Path(recipe.dump_pairs), equal, judged)
    write_json(folder.path / RESULT, result)
    lines = [sample.line() for own in equal.values() for row in own.own for sample in row]
    write_report(folder.path, result, lines)
    write_manifest(folder, _manifest(job))
    job.console.say(terminal_table(result))
    job.console.say(f"finished in {time.monotonic() - job.started:.0f} s: {folder.path / PAGE}")


def _compare(job: Job, folder: RunFolder, samples: Mapping[str, Samples], notes: list[str]) -> dict[Pair, np.ndarray]:
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
    with Verdicts(folder.path / VERDICTS) as verdicts:
        found = judge_all(winrate.judge, questions, verdicts, say)
    notes.append(
        f"The judge contradicted itself in {found.contradicting:,} of {found.asked:,} comparisons when the responses changed "
        "places; those count as ties."
    )
    tables = found.outcomes.reshape(len(names), *base.shape)
    return {(name, winrate.baseline): table for name, table in zip(names, tables, strict=True)}


def _dump(job: Job, path: Path, samples: Mapping[str, Samples], judged: Mapping[Pair, np.ndarray]) -> None:
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
    job.console.say(
        f"{path}: {len(rows):,} prompts with ranked responses" if isinstance(judge, str) else f"{path}: {len(rows):,} pairs"
    )


def _manifest(job: Job) -> dict[str, Any]:
    judges = next(iter(job.judges.values()))
    parents = {each.start.parent for each in job.candidates if each.start.parent} | set(judges.parents())
    return {
        "stage": job.loaded.stage,
        "status": "finished",
        "versions": versions(),
        "git_commit": git_commit(),
        "seed": job.recipe.seed,
        "models": {each.name: each.record for each in job.candidates},
        "parents": [dataclasses.asdict(parent) for parent in sorted(parents, key=lambda parent: parent.path)],
        "data": job.fingerprints,
        **judges.record,
        "seconds": round(time.monotonic() - job.started, 3),
        "peak_memory": round(peak_memory(), 3),
        "model_files": {},
    }
