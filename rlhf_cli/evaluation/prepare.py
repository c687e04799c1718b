"""What an evaluation is made of before any weights are loaded: its models, its rows, who judges."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.data.dataset import Dataset, data_report, prepare
from rlhf_cli.data.detect import Purpose
from rlhf_cli.data.formats import ANSWERS, COMPARISONS, PROMPTS, Use
from rlhf_cli.data.sources import RowRequest
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.judge import prepare as prepare_endpoint
from rlhf_cli.evaluation.measure import Rows
from rlhf_cli.evaluation.models import EvaluatedModel, Origin, Tokenisation, Tokenisations, find_models, recipe_of
from rlhf_cli.files import sha256_file
from rlhf_cli.models.load import load_config, quiet_libraries, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.rewards import PolicyText
from rlhf_cli.rollout.terms import RewardTerms, find_terms
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.resume import recorded_recipe
from rlhf_cli.signals import StopSignals

SECTIONS: dict[str, Use] = {"prompts": PROMPTS, "preferences": COMPARISONS, "text": ANSWERS}
"""Section of the recipe → what its rows are read for."""


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation before any weights are loaded."""

    loaded: Loaded
    recipe: recipes.EvalRecipe  # every `auto` replaced by the value in force
    models: list[EvaluatedModel]
    tokenisations: Tokenisations
    terms: dict[str, RewardTerms]  # by the name of the tokenisation of the responses that they score
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
    def reference(self) -> EvaluatedModel | None:
        return next((each for each in self.models if each.name == self.recipe.reference), None)

    @property
    def inputs(self) -> dict[str, str]:
        """What a resumed evaluation must have in common with the one before, where it names the same things."""
        found = {f"model {each.name}": json.dumps(each.record) for each in self.models}
        for name, term in next(iter(self.terms.values())).named.items():
            own = {key: value for key, value in term.identity.items() if key != "reads"}  # which differs by tokenisation
            found[name.replace("/", " ", 1)] = json.dumps(own)
        return found | self.fingerprints

    @property
    def code(self) -> dict[str, str]:
        """What may be mended before an evaluation goes on, but makes a finished one another: functions, the judge's prompt."""
        found = {what: hash_of for term in next(iter(self.terms.values())) for what, hash_of in term.code.items()}
        endpoint = self.recipe.winrate and self.recipe.winrate.judge
        if isinstance(endpoint, sections.Endpoint) and endpoint.prompt is not None:
            found["winrate.judge.prompt"] = sha256_file(Path(endpoint.prompt))
        return found

    @property
    def fingerprints(self) -> dict[str, str]:
        return {path: print for dataset in self.datasets.values() for path, print in dataset.fingerprints.items()}


def prepare_evaluation(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> EvaluationJob:
    """Find every model, read and tokenise the rows, settle every value.

    Raises:
        UsageError: the recipe, the data or what it names is wrong.
    """
    signals = StopSignals()
    signals.install()
    quiet_libraries()
    started, recipe = time.monotonic(), recipe_of(loaded)
    signals.say("before the first model; nothing was drawn")
    console, ranks = Console(os.environ.get("RANK", "0") == "0"), Ranks(expected=not check)
    tokenisations = Tokenisations()
    models = find_models(loaded, tokenisations, check)
    _check_roles(loaded, models)
    if recipe.winrate is not None and not isinstance(recipe.winrate.judge, str):
        prepare_endpoint(recipe.winrate.judge)
    _check_dump(loaded, resume, force)
    writers = list(dict.fromkeys(each.tokenisation for each in models if not each.scores)) or [models[0].tokenisation]
    terms = {
        each.name: find_terms(loaded, PolicyText(each.tokenizer, each.template, recipe.trust_remote_code, check))
        for each in writers
    }
    readers = list(
        dict.fromkeys(
            [
                *writers,
                *(each.tokenisation for each in models),
                *(tokenisations.of(*term.text_form) for own in terms.values() for term in own if term.text_form),
            ]
        )
    )
    notes: list[str] = []
    rows: dict[str, dict[str, Rows]] = {}
    datasets: dict[str, Dataset] = {}
    for section in SECTIONS:
        if vars(recipe)[section] is not None:
            read = {
                tokenisation.name: _read(loaded, section, tokenisation)
                for tokenisation in (readers if section == "preferences" else writers)
            }
            datasets[section] = next(iter(read.values()))
            rows[section] = {name: _rows(dataset) for name, dataset in read.items()}
    if "prompts" in rows:
        rows["prompts"] = _in_common(rows["prompts"], notes)
    for section, own in rows.items():
        if section != "preferences" and min(len(each.trees) for each in own.values()) < 2:
            raise UsageError(f"{loaded.named(section)}: fewer than 2 rows are left, which is too few for any interval")
    recipe = _resolved(recipe, models, datasets, ranks)
    notes += _notes(recipe, models)
    seen = list(_trained_on(recipe, models))
    for note in seen:
        console.warn(note)
    notes += seen
    return EvaluationJob(loaded, recipe, models, tokenisations, terms, rows, datasets, ranks, console, signals, started, notes)


def _check_roles(loaded: Loaded, models: Sequence[EvaluatedModel]) -> None:
    recipe = recipe_of(loaded)
    scoring = {each.name for each in models if each.scores}
    roles = {"reference": recipe.reference, "winrate.baseline": recipe.winrate and recipe.winrate.baseline}
    for key, name in roles.items():
        if name in scoring:
            raise UsageError(f"{loaded.named(key)}: {name} is a reward model, and writes nothing; name a policy")
    if recipe.prompts is not None and len(scoring) == len(models):
        raise UsageError(f"{loaded.named('prompts')}: all models are reward models, which answer no prompts. remove prompts")
    for name in scoring:
        if recipe.preferences is None:
            raise UsageError(f"{loaded.named('models')}: {name} is a reward model: name preferences to measure it on")


def _check_dump(loaded: Loaded, resume: bool, force: bool) -> None:
    """The file to write is no folder, nothing that is read, by --resume either, and nobody else's."""
    recipe = recipe_of(loaded)
    if recipe.dump_pairs is None:
        return
    path, place = Path(recipe.dump_pairs), loaded.named("dump_pairs")
    if path.is_dir():
        raise UsageError(f"{place}: {path} is a folder. name a file")
    folder = RunFolder(Path(recipe.output))
    read = (*map(Path, recipe.paths), folder.samples, folder.verdicts)
    if path.resolve() in {each.resolve() for each in read}:
        raise UsageError(f"{place}: {path} is read by this evaluation, and would be overwritten. name another file")
    own = resume and recipe.dump_pairs == recorded_recipe(Path(recipe.output)).get("dump_pairs")
    if path.exists() and not (force or own):
        raise UsageError(f"{place}: {path} exists already. name another file, or --force to move it to {path}.old-<n>")


def _read(loaded: Loaded, section: str, tokenisation: Tokenisation) -> Dataset:
    """The rows of a section in a voice's tokens."""
    recipe = recipe_of(loaded)
    sources: list[sections.EvalSource] = vars(recipe)[section]
    data = sections.SftData(
        train=[sections.Source(**{k: v for k, v in vars(source).items() if k != "holdout"}) for source in sources],
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
    request = RowRequest(Purpose(section, SECTIONS[section], SECTIONS), recipe.seed, where, reserve=reserve)
    try:
        return prepare(data, request, tokenisation.tokenizer, tokenisation.template)
    except UsageError as error:
        raise UsageError(_own_keys(str(error))) from error


def _own_keys(text: str) -> str:
    """The reader names the keys of stages that train, where these stand in `data`."""
    return re.sub(r"\bdata\.(?=(max_lost|max_length|overlong|control_tokens)\b)", "", text)


def _rows(dataset: Dataset) -> Rows:
    if dataset.held_out is None:
        return Rows(list(dataset.train.trees), dataset.reading.train, [])
    return Rows(list(dataset.held_out.trees), dataset.reading.held_out, list(dataset.train.trees))


def _in_common(rows: dict[str, Rows], notes: list[str]) -> dict[str, Rows]:
    """The prompts that every voice has: others do not fit into the tokens of some model."""
    known = [{tree.row for tree in own.trees} for own in rows.values()]
    shared = known[0].intersection(*known)
    lost = len(known[0].union(*known)) - len(shared)
    if lost:
        notes.append(f"{lost} prompts do not fit the tokens of some model, and are left out for all.")
    return {
        name: dataclasses.replace(own, trees=[tree for tree in own.trees if tree.row in shared]) for name, own in rows.items()
    }


def _resolved(
    recipe: recipes.EvalRecipe, models: Sequence[EvaluatedModel], datasets: Mapping[str, Dataset], ranks: Ranks
) -> recipes.EvalRecipe:
    """The recipe with the dtype and the budget in force: that of the model which takes the most memory."""
    dtype = resolve_dtype(recipe.dtype, ranks.device)
    budget = recipe.tokens_per_device
    if budget == "auto":
        trust = recipe.trust_remote_code
        drawn = max(recipe.rollout.responses_per_prompt, *recipe.best_of_n, 1) * recipe.rollout.max_new_tokens
        longest = max(dataset.longest + drawn * (section == "prompts") for section, dataset in datasets.items())
        fitting = []
        for base, revision in dict.fromkeys((each.start.base, each.start.revision) for each in models):
            config = load_config(base, revision, trust)
            memory = estimate(config, rank=1, dtype=dtype, checkpointing=False, trust_remote_code=trust)
            fitting.append(auto_budget(memory, longest, ranks.device))
        budget = ranks.min(min(fitting))
    return dataclasses.replace(recipe, tokens_per_device=budget, dtype=cast(Any, str(dtype).removeprefix("torch.")))


def _notes(recipe: recipes.EvalRecipe, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """What a reader of the report must know and cannot see in it."""
    if recipe.prompts is not None and recipe.rollout.temperature != 1:
        yield (
            f"Responses were drawn at temperature {recipe.rollout.temperature:g}, and log-probabilities are those at 1: the "
            "KL is that of what was drawn, not of the policies."
        )
    reference = next((each for each in models if each.name == recipe.reference), None)
    if reference is not None:
        others = [each.name for each in models if not each.scores and each.tokenisation != reference.tokenisation]
        if others:
            yield (
                f"{', '.join(others)}: other tokens or another chat template than {reference.name}: no KL can be measured, and "
                "their lengths and perplexities are not comparable."
            )
        strangers = {each.series for each in models if each.series and each.origin not in (None, _origin(reference))}
        if strangers:
            yield (
                f"{', '.join(sorted(strangers))}: that run did not start from {reference.name}, so the point at KL 0 is where "
                "distances are measured from, not where the run began."
            )


def _trained_on(recipe: recipes.EvalRecipe, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """Which models were trained on rows that they are measured on, as far as their runs record it."""
    for section in SECTIONS:
        for source in vars(recipe)[section] or ():
            names = [each.name for each in models if _saw(each, source, recipe.seed)]
            if names:
                yield (
                    f"{', '.join(names)} may have been trained on rows of {source.path}, {section} here: another holdout or seed "
                    "than that of the training keeps other rows."
                )


def _saw(each: EvaluatedModel, source: sections.EvalSource, seed: int) -> bool:
    """Did its run train on this source, and hold out other rows than these?"""
    place = Path(each.path)
    trained = next((found for path in (place, place.parent, place.parent.parent) if (found := recorded_recipe(path))), {})
    sources = trained.get("data", {}).get("train", [])
    same = any(isinstance(other, dict) and other.get("path") == source.path for other in sources)
    return same and (trained["data"].get("holdout"), trained.get("seed")) != (source.holdout, seed)


def _origin(each: EvaluatedModel) -> Origin:
    """What a run would have recorded that starts from this model."""
    base, parent = each.base, each.start.parent
    return base.weights_hash if base else None, parent.manifest_hash if parent else None


def plan_evaluation(job: EvaluationJob) -> list[tuple[str, list[tuple[str, object]]]]:
    recipe = job.recipe
    models: list[tuple[str, object]] = [
        (each.name, each.path + (" (a reward model)" if each.scores else "")) for each in job.models
    ]
    rows: list[tuple[str, object]] = []
    for section, own in job.rows.items():
        count = len(next(iter(own.values())).trees)
        report = data_report(job.datasets[section])["train"]
        lost = "; ".join(f"{number} {_own_keys(reason)}" for reason, number in Counter(report["dropped"]).items())
        rows.append((section, f"{count:,} rows" + (f" (dropped: {lost})" if lost else "")))
    settings: list[tuple[str, object]] = [
        ("dtype", recipe.dtype),
        ("forward passes", f"of at most {job.budget:,} tokens (tokens_per_device)"),
        ("devices", f"{job.ranks.size} × {job.ranks.device.type}"),
    ]
    if recipe.prompts is not None:
        drawn = f"{recipe.rollout.responses_per_prompt} to each prompt, of up to {recipe.rollout.max_new_tokens} tokens, at "
        drawn += f"temperature {recipe.rollout.temperature:g}"
        most = max(recipe.best_of_n, default=0)
        more = f"; {most} of {recipe.reference}, for best of n" if most > recipe.rollout.responses_per_prompt else ""
        settings.insert(0, ("responses", drawn + more))
    if recipe.winrate is not None:
        judge = recipe.winrate.judge
        asked = judge if isinstance(judge, str) else f"{judge.model} at {judge.endpoint}"
        settings.append(("judge", f"{asked}, against {recipe.winrate.baseline}"))
    words: list[tuple[str, object]] = [("terms", text) for text in next(iter(job.terms.values())).words]
    return [("models", models), ("rows", rows), ("evaluation", [*settings, *words])]
