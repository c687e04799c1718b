"""What an evaluation is before any weights are loaded: its models, its rows, the terms that score, and how it is to run."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf_cli import sections
from rlhf_cli.console import Console, of_rank
from rlhf_cli.data.dataset import check_ids, data_report
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.models import EvaluatedModel, Tokenisation, Tokenisations, find_models, recipe_of
from rlhf_cli.evaluation.rows import SECTIONS, Rows, SectionRows, own_keys, read_rows
from rlhf_cli.evaluation.splits import trained_on, with_holdout_seed
from rlhf_cli.evaluation.votes import right_answers
from rlhf_cli.figures import sampling
from rlhf_cli.files import sha256_file
from rlhf_cli.judges.question import address
from rlhf_cli.models.load import positions_of, quiet_libraries, refuse_on_mps, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.ranks import Ranks, check_precision
from rlhf_cli.recipe import evaluations
from rlhf_cli.recipe.lengths import Lengths, fitted
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.judge_terms import find_judge
from rlhf_cli.rollout.rewards import PolicyText
from rlhf_cli.rollout.terms import RewardTerms, find_terms
from rlhf_cli.rollout.verifiable import COMPARE
from rlhf_cli.runs.ancestry import ancestors
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.resume import recorded_recipe
from rlhf_cli.signals import StopSignals

JUDGE = "winrate.judge"
"""Where a recipe names who compares, for messages."""


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation before any weights are loaded."""

    loaded: Loaded
    recipe: evaluations.EvalRecipe  # every `auto` replaced by the value in force
    models: list[EvaluatedModel]
    terms_of: dict[Tokenisation, RewardTerms]  # as they read responses in this tokenisation
    rows: dict[str, SectionRows]  # by section of the recipe
    tokenisations: Tokenisations
    notes: list[str]  # for the report
    ranks: Ranks
    console: Console
    signals: StopSignals
    started: float

    @property
    def budget(self) -> int:
        return int(self.recipe.tokens_per_device)

    @property
    def reference(self) -> EvaluatedModel | None:
        return next((model for model in self.models if model.name == self.recipe.reference), None)

    @property
    def terms(self) -> RewardTerms:
        """The terms of the reward and of gold, as they read the first policy's responses; no other one gives other scores."""
        return next(iter(self.terms_of.values()))

    def rows_of(self, section: str, model: EvaluatedModel) -> Rows:
        return self.rows[section].by_tokenisation[model.tokenisation]

    def responses_of(self, model: EvaluatedModel) -> int:
        """How many responses to each prompt are drawn from a model."""
        return self.recipe.drawn(of_reference=model is self.reference)

    def shares_tokens(self, model: EvaluatedModel) -> bool:
        """Can the reference's log-probabilities be compared with the model's?"""
        return self.reference is not None and self.reference.tokenisation == model.tokenisation

    def frozen_models(self, *, alone: bool = False) -> FrozenModels:
        """`alone`: whole on this rank, whatever the others do."""
        return frozen_models(self.recipe, self.ranks, alone)

    @property
    def inputs(self) -> dict[str, str]:
        """What a resumed evaluation must have in common with the one before, where it names the same things."""
        found = {f"model {model.name}": json.dumps(model.record) for model in self.models}
        for name, term in self.terms.named.items():
            own = {key: value for key, value in term.identity.items() if key != "reads"}  # which differs by tokenisation
            found[name.replace("/", " ", 1)] = json.dumps(own)
        return found | self.fingerprints

    @property
    def code(self) -> dict[str, str]:
        """What may be mended before an evaluation goes on, but makes a finished one another: functions, the judge's prompt."""
        found = dict(self.terms.code)
        judge = self.recipe.winrate and self.recipe.winrate.judge
        if isinstance(judge, sections.Judge):
            files = {"prompt": judge.prompt, "principles": judge.principles}
            found |= {f"winrate.judge.{key}": sha256_file(Path(path)) for key, path in files.items() if path is not None}
        return found

    @property
    def fingerprints(self) -> dict[str, str]:
        return {path: print for rows in self.rows.values() for path, print in rows.dataset.fingerprints.items()}


def prepare_evaluation(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> EvaluationJob:
    """Find every model, read and tokenise the rows, settle every value. UsageError: the recipe, the data or a model is wrong."""
    signals = StopSignals()
    signals.install()
    quiet_libraries()
    started, recipe = time.monotonic(), recipe_of(loaded)
    signals.say("before the first model; nothing was drawn")
    console, ranks = of_rank(), Ranks(expected=not check)
    check_precision(resolve_dtype(recipe.dtype, ranks.device), loaded.where("dtype"))
    tokenisations = Tokenisations()
    models = find_models(loaded, tokenisations, check)
    _check_roles(loaded, models)
    loaded, shrunk = _fitted(loaded, models)
    for said in shrunk:
        console.say(said)
    origins = {model.path: list(ancestors(model.path)) for model in models}
    loaded = dataclasses.replace(loaded, recipe=with_holdout_seed(recipe_of(loaded), origins))
    recipe = recipe_of(loaded)
    if recipe.winrate is not None and not isinstance(recipe.winrate.judge, str):
        find_judge(recipe.winrate.judge, "pairwise", JUDGE, trust_remote_code=recipe.trust_remote_code, check=check)
    _check_dump(loaded, resume, force)
    if recipe.vote is not None:
        COMPARE[recipe.vote.match.compare]("1", "1")  # MachineError: what compares is not installed
    policies = [model for model in models if not model.is_reward_model]
    writing = list(dict.fromkeys(model.tokenisation for model in policies or models[:1]))
    terms_of = {
        each: find_terms(loaded, PolicyText(each.tokenizer, each.template, recipe.trust_remote_code, check)) for each in writing
    }
    for terms in terms_of.values() if recipe.prompts is not None else ():
        terms.check_samples(recipe.rollout.responses_per_prompt)
    own = [tokenisations.of(*term.text_form) for terms in terms_of.values() for term in terms if term.text_form]
    reading = list(dict.fromkeys([*writing, *(model.tokenisation for model in models), *own]))
    rows = {
        section: read_rows(loaded, section, reading if section == "preferences" else writing)
        for section in SECTIONS
        if vars(recipe)[section] is not None
    }
    for model in models:
        for read in (own.by_tokenisation.get(model.tokenisation) for own in rows.values()):
            if read is not None:
                size = model.config.get_text_config().vocab_size
                check_ids(read.trees, read.records, size, model.tokenisation.tokenizer, model.name)
    recipe = _resolved(recipe, models, rows, ranks)
    left_out, seen = list(_left_out(loaded, rows)), list(trained_on(recipe, models, rows, origins))
    for note in seen:
        console.warn(note)
    return EvaluationJob(
        loaded=loaded,
        recipe=recipe,
        models=models,
        terms_of=terms_of,
        rows=rows,
        tokenisations=tokenisations,
        notes=[*left_out, *_comparability(recipe, models), *seen],
        ranks=ranks,
        console=console,
        signals=signals,
        started=started,
    )


def _left_out(loaded: Loaded, rows: Mapping[str, SectionRows]) -> Iterator[str]:
    """Which rows have no part in the figures, or in some. UsageError: those of votes have no answers."""
    if lost := sum(own.left_out for own in rows.values()):
        yield f"{lost} prompts do not fit the tokens of some model, and are left out for all."
    if repeated := sum(own.repeated for own in rows.values()):
        yield f"{repeated} rows have the prompt of another row: each prompt is asked once."
    if (vote := recipe_of(loaded).vote) is not None:
        asked = next(iter(rows["prompts"].by_tokenisation.values()))
        own = right_answers(vote.match, [asked.records[tree.row] for tree in asked.trees], loaded.named("vote.match"))
        if lacking := own.count(None):
            yield f"{lacking} prompts have no answer in the column '{vote.match.column}', and no part in the votes."


def _fitted(loaded: Loaded, models: Sequence[EvaluatedModel]) -> tuple[Loaded, list[str]]:
    """The recipe with lengths that every model can take, and what to say of those that it had left at their defaults."""
    recipe, said = recipe_of(loaded), list[str]()
    for model in models:
        asked = Lengths(recipe.max_length, recipe.rollout.max_new_tokens)
        lengths, own = fitted(loaded, "max_length", asked, positions_of(model.config), model.name)
        assert lengths.drawn is not None
        rollout = dataclasses.replace(recipe.rollout, max_new_tokens=lengths.drawn)
        recipe, said = dataclasses.replace(recipe, max_length=lengths.whole, rollout=rollout), said + own
    return dataclasses.replace(loaded, recipe=recipe), said


def _check_roles(loaded: Loaded, models: Sequence[EvaluatedModel]) -> None:
    recipe = recipe_of(loaded)
    scoring = {each.name for each in models if each.is_reward_model}
    roles = {"reference": recipe.reference, "winrate.baseline": recipe.winrate and recipe.winrate.baseline}
    for key, name in roles.items():
        if name in scoring:
            raise UsageError(f"{loaded.named(key)}: {name} is a reward model, and writes nothing; name a policy")
    if recipe.prompts is not None and len(scoring) == len(models):
        raise UsageError(f"{loaded.named('prompts')}: all models are reward models, which answer no prompts. remove prompts")
    for name in scoring:
        if recipe.preferences is None:
            raise UsageError(f"{loaded.named('models')}: {name} is a reward model: name preferences to measure it on")
    start = next((each for each in models if each.name == recipe.reference), models[0])
    for key, names in vars(recipe.compare_at_kl).items() if recipe.compare_at_kl else ():
        for model in (each for each in models if (each.series or each.name) in names):
            other = f"has other tokens or another chat template than {start.name}" * (model.tokenisation != start.tokenisation)
            if why := "is a reward model" if model.is_reward_model else other:
                raise UsageError(f"{loaded.named(f'compare_at_kl.{key}')}: {model.name} {why}: it has no KL. remove it")


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


def _resolved(
    recipe: evaluations.EvalRecipe, models: Sequence[EvaluatedModel], rows: Mapping[str, SectionRows], ranks: Ranks
) -> evaluations.EvalRecipe:
    """The recipe with the dtype and the budget in force: that of the model which takes the most memory."""
    refuse_on_mps(ranks.device, attention=recipe.attention)
    dtype = resolve_dtype(recipe.dtype, ranks.device)
    budget = recipe.tokens_per_device
    if budget == "auto":
        trust = recipe.trust_remote_code
        drawn = recipe.drawn(of_reference=True) * recipe.rollout.max_new_tokens
        longest = max(own.dataset.longest + drawn * (section == "prompts") for section, own in rows.items())
        fitting = []
        configs = {(model.start.base, model.start.revision): model.config for model in models}
        for config in configs.values():
            memory = estimate(config, sections.Model("", trust_remote_code=trust), rank=1, dtype=dtype)
            fitting.append(auto_budget(memory, longest, ranks.device))
        budget = ranks.min(min(fitting))
    return dataclasses.replace(recipe, tokens_per_device=budget, dtype=cast(Any, str(dtype).removeprefix("torch.")))


def _comparability(recipe: evaluations.EvalRecipe, models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """Between which models what is not comparable."""
    drawn = recipe.rollout
    if recipe.prompts is not None and (drawn.temperature != 1 or drawn.warps):
        best = " That of best of n is its distance from the reference as it was drawn from, not from the reference itself."
        yield (
            f"Responses were drawn at {sampling(drawn.temperature, drawn.warps)}, and log-probabilities are those of the whole "
            f"policies at temperature 1: the KL is that of what was drawn, not of the policies.{best if recipe.best_of_n else ''}"
        )
    reference = next((each for each in models if each.name == recipe.reference), None)
    if reference is not None:
        others = [each.name for each in models if not each.is_reward_model and each.tokenisation != reference.tokenisation]
        if others:
            yield (
                f"{', '.join(others)}: other tokens or another chat template than {reference.name}: no KL can be measured, and "
                "their lengths and perplexities are not comparable."
            )
        strangers = {each.series for each in models if each.series and each.origin not in (None, reference.as_origin)}
        if strangers:
            yield (
                f"{', '.join(sorted(strangers))}: that run did not start from {reference.name}, so the point at KL 0 is where "
                "distances are measured from, not where the run began."
            )


def frozen_models(recipe: evaluations.Reading, ranks: Ranks, alone: bool = False) -> FrozenModels:
    """Models as the recipe wants them; none is loaded yet."""
    own = sections.Model(path="", dtype=recipe.dtype, attention=recipe.attention, trust_remote_code=recipe.trust_remote_code)
    return FrozenModels(own, resolve_dtype(recipe.dtype, ranks.device), ranks.device, None if alone else ranks.sharding)


Titled = list[tuple[str, object]]


def plan_evaluation(job: EvaluationJob) -> list[tuple[str, Titled]]:
    """What is shown before anything is loaded."""
    recipe = job.recipe
    models: Titled = [(model.name, model.path + (" (a reward model)" if model.is_reward_model else "")) for model in job.models]
    rows: Titled = []
    for section, own in job.rows.items():
        count = len(next(iter(own.by_tokenisation.values())).trees)
        report = data_report(own.dataset)["train"]
        lost = "; ".join(f"{number} {own_keys(reason)}" for reason, number in Counter(report["dropped"]).items())
        rows.append((section, f"{count:,} rows" + (f" (dropped: {lost})" if lost else "")))
    settings: Titled = [
        ("dtype", recipe.dtype),
        ("forward passes", f"of at most {job.budget:,} tokens (tokens_per_device)"),
        ("devices", job.ranks.words),
    ]
    if recipe.prompts is not None:
        every, most = recipe.drawn(of_reference=False), recipe.drawn(of_reference=True)
        drawn = f"{every} to each prompt, of up to {recipe.rollout.max_new_tokens} tokens, at "
        drawn += sampling(recipe.rollout.temperature, recipe.rollout.warps)
        more = f"; {most} of {recipe.reference}, for best of n" if most > every else ""
        settings.insert(0, ("responses", drawn + more))
    if recipe.winrate is not None:
        judge = recipe.winrate.judge
        asked = judge if isinstance(judge, str) else judge.path or f"{judge.model} at {address(judge)}"
        settings.append(("judge", f"{asked}, against {recipe.winrate.baseline}"))
    settings += [("terms", text) for text in job.terms.words]
    return [("models", models), ("rows", rows), ("evaluation", settings)]
