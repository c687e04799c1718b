"""A training run before its weights are loaded: its data read, every value known, its plan shown."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_cli import sections
from rlhf_cli.console import Console, of_rank
from rlhf_cli.data.batches import DatasetSource, total_steps
from rlhf_cli.data.dataset import Dataset, prepare
from rlhf_cli.data.encode import show_example
from rlhf_cli.data.formats import PROMPTS, Purpose
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.data.templates import Template, choose_template
from rlhf_cli.errors import UsageError
from rlhf_cli.judges.endpoint import connect
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import load_config, load_tokenizer, positions_of, quiet_libraries, refuse_on_mps, resolve_dtype
from rlhf_cli.models.memory import Memory, auto_budget
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.policy import parent_lora, resolve_lora
from rlhf_cli.models.targets import ALL_LINEAR
from rlhf_cli.models.tokens import token_ids
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.steps import Steps
from rlhf_cli.ranks import Ranks, check_precision
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.lengths import Lengths, fitted
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.stages import ROW_USES, TRAINING_STAGES, resolved
from rlhf_cli.rollout.terms import columns_read
from rlhf_cli.runs.ancestry import Split, ancestors, unknown
from rlhf_cli.runs.manifest import BaseModel
from rlhf_cli.runs.parents import Start, base_if_here, resolve_start
from rlhf_cli.runs.resume import recorded_recipe
from rlhf_cli.signals import StopSignals
from rlhf_cli.stages.devices import Needs, check_memory, find_needs
from rlhf_cli.stages.plan import learning_rate_warning, plan


@dataclass(frozen=True)
class TrainingJob:
    """A run before its weights are loaded: its data, and the recipe with every `auto` replaced by the value in force."""

    loaded: Loaded
    recipe: recipes.TrainingRecipe
    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    tokenizer: Any
    template: Template
    dataset: Dataset
    source: DatasetSource
    steps: int
    ranks: Ranks
    console: Console
    signals: StopSignals
    started: float
    inputs: dict[str, str] = field(default_factory=dict)  # what else a resumed run must have in common
    code: dict[str, str] = field(default_factory=dict)  # hashes of what may be mended before it goes on

    @property
    def objective(self) -> Objective:
        return self.recipe.objective

    @property
    def lora(self) -> sections.Lora | None:
        assert not isinstance(self.recipe.lora, str)
        return self.recipe.lora

    @property
    def budget(self) -> int:
        return int(self.recipe.train.tokens_per_device)

    def passes(self, backbone: Backbone) -> Passes:
        return Passes(backbone, self.budget, self.ranks)


def prepare_job(
    loaded: Loaded,
    *,
    check: bool,
    resume: bool,
    shape: Callable[[Dataset, recipes.TrainingRecipe], tuple[Dataset, Objective]] | None = None,
) -> TrainingJob:
    """Read and tokenise the data, find every value, and show the plan.

    Where responses are drawn from the policy, the trees are prompts alone. `shape`: gives the trees another form, and the
    objective what it has to know of them.

    UsageError: the recipe, the data or what `model.path` names is wrong.
    """
    signals = StopSignals()
    signals.install()
    quiet_libraries()
    started = time.monotonic()
    recipe = loaded.recipe
    assert isinstance(recipe, recipes.TrainingRecipe)
    console, stage = of_rank(), TRAINING_STAGES[loaded.stage]
    start = resolve_start(recipe.model.path, recipe.model.revision, loaded.named("model.path"), stage.parents)
    tokenizer = load_tokenizer(start.tokenizer, start.revision, recipe.model.trust_remote_code)
    template = choose_template(tokenizer, recipe.model.chat_template, recipe.model.template_options)
    asked = recipe.model.chat_template is not None or recipe.model.template_options
    if start.template_hash not in (None, template.hash) and not asked:
        raise UsageError(
            f"{loaded.where('model.path')}: {recipe.model.path} was trained with another chat template than {template.source}. "
            "name the one you want in model.chat_template"
        )
    config = load_config(start.base, start.revision, recipe.model.trust_remote_code)
    recipe, shrunk = _fitted(recipe, config, loaded)
    objective = recipe.objective
    for said in shrunk:
        console.say(said)
    request = dataclasses.replace(row_request(recipe, loaded.where), progress=console.count, columns=columns_read(loaded))
    dataset, recipe = prepare(recipe.data, request, tokenizer, template), _with_token_ids(recipe, tokenizer)
    dataset.check_ids(config.get_text_config().vocab_size, tokenizer, recipe.model.path)
    if shape is not None:
        dataset, objective = shape(dataset, recipe)
    elif recipe.draws:
        objective = objective.with_class_counts(1, 1)  # of every prompt one desirable response and one undesirable
    source = dataset.source(recipe.train, recipe.data, recipe.seed)
    steps = total_steps(recipe.train.epochs, recipe.train.steps, source.steps_per_epoch)
    ranks = Ranks(expected=not check)
    if resume and (before := recorded_recipe(Path(recipe.output))):
        recipe = _as_resolved_before(recipe, before)
    recipe, needs = _resolve(dataclasses.replace(recipe, objective=objective), start, config, dataset, steps, ranks, loaded)
    memory, base = needs.memory, base_if_here(start, check, loaded.devices is not None)
    known = loaded, recipe, start, base, tokenizer, template, dataset, source, steps
    job = TrainingJob(*known, ranks, console, signals, started)
    console.plan(plan(recipe, dataset, source, steps, memory, job.budget, _facts(job)))
    console.example(show_example(source.batch(1)[0], tokenizer), _example_words(recipe))
    if not job.lora or (job.lora.target_modules == ALL_LINEAR and (start.adapter is None or job.lora.merge_parent)):
        for said in memory.notices:
            console.say(said)
    for message in _warnings(job, memory):
        console.warn(message)
    check_memory(needs, job.budget, console, imagined=loaded.devices is not None)
    return job


def _with_token_ids(recipe: recipes.TrainingRecipe, tokenizer: Any) -> recipes.TrainingRecipe:
    """The recipe with the tokens that are to be trained as ids."""
    if not isinstance(recipe.lora, sections.Lora):
        return recipe
    tokens = token_ids(tokenizer, recipe.lora.train_tokens)
    return dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, train_tokens=tokens))


def row_request(recipe: recipes.TrainingRecipe, where: Callable[[str], str]) -> RowRequest:
    """What the run asks of its rows: all that its objective needs or, where responses are drawn, prompts."""
    objective, draws = recipe.objective, recipe.draws
    if draws:
        return RowRequest(Purpose(recipe.stage, PROMPTS, ROW_USES), recipe.seed, where, reserve=draws.max_new_tokens)
    check = objective.check_tree if type(objective).check_tree is not Objective.check_tree else None
    use = objective.rows if objective.soft_labels else dataclasses.replace(objective.rows, better=frozenset({1}))
    purpose = Purpose(recipe.stage, use, ROW_USES)
    separator = objective.separator if isinstance(objective, Steps) else None
    return RowRequest(purpose, recipe.seed, where, margin_column=objective.margin_from, check=check, separator=separator)


def _as_resolved_before(recipe: recipes.TrainingRecipe, before: dict[str, Any]) -> recipes.TrainingRecipe:
    """With what the run in this folder took for values that follow from the machine or from how long it was to be."""
    budget, horizon = (_of(before, *keys) for keys in (("train", "tokens_per_device"), ("kl", "horizon")))
    if recipe.train.tokens_per_device == "auto" and isinstance(budget, int):
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, tokens_per_device=budget))
    if isinstance(recipe, recipes.PpoRecipe) and recipe.kl.target is not None and recipe.kl.horizon is None:
        recipe = dataclasses.replace(recipe, kl=dataclasses.replace(recipe.kl, horizon=horizon))
    return recipe


def _of(recorded: Any, *keys: str) -> Any:
    """A value of a recorded recipe; None where it, or a section on the way, is not there."""
    for key in keys:
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    return recorded


def _fitted(recipe: recipes.TrainingRecipe, config: Any, loaded: Loaded) -> tuple[recipes.TrainingRecipe, list[str]]:
    """The recipe with lengths that the model can take, and what to say of those that it had left at their defaults."""
    asked = Lengths(recipe.data.max_length, recipe.draws.max_new_tokens if recipe.draws else None)
    lengths, said = fitted(loaded, "data.max_length", asked, positions_of(config), recipe.model.path)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_length=lengths.whole))
    if lengths.drawn is not None and recipe.draws:
        rollout = dataclasses.replace(recipe.draws, max_new_tokens=lengths.drawn)
        recipe = dataclasses.replace(cast(Any, recipe), rollout=rollout)
    return recipe, said


def _resolve(
    recipe: recipes.TrainingRecipe, start: Start, config: Any, dataset: Dataset, steps: int, ranks: Ranks, loaded: Loaded
) -> tuple[recipes.TrainingRecipe, Needs]:
    """The recipe with the values in force where it says auto, and what a step's memory follows from."""
    lora = resolve_lora(
        recipe.lora, parent_lora(start.adapter, start.manifest and start.manifest.get("lora")), loaded.where("lora")
    )
    imagined, setting = loaded.devices, recipe.model.dtype
    if imagined is None:
        own = {"model.attention": recipe.model.attention, "model.quantize": recipe.model.quantize}
        refuse_on_mps(ranks.device, **own, **{"train.optimizer": recipe.train.optimizer})
    # GPUs that are not here are new ones.
    dtype = torch.bfloat16 if imagined and setting == "auto" else resolve_dtype(setting, ranks.device)
    check_precision(dtype, loaded.where("model.dtype"))
    recipe = resolved(dataclasses.replace(recipe, lora=lora), steps)
    asked = recipe.train.tokens_per_device
    longest = dataset.longest + (recipe.draws.responses_per_prompt * recipe.draws.max_new_tokens if recipe.draws else 0)
    needs, budget = find_needs(recipe, start, config, dtype, longest, loaded, ranks), asked
    if needs.shards > 1 and recipe.model.quantize == "8bit":
        raise UsageError(f"{loaded.where('model.quantize')}: weights of 8 bits cannot be shared out in shards; those of 4bit can")
    engine, place = recipe.draws and recipe.draws.engine, loaded.named("rollout.engine")
    if isinstance(engine, sections.VllmServer):
        connect(engine.endpoint, "", 0.0, place)
        if engine.folder is not None and not Path(engine.folder).is_dir():
            raise UsageError(f"{place}.folder: there is no folder {engine.folder}; make it, where the server sees it too")
    elif engine == "vllm" and ranks.size > 1:
        raise UsageError(f"{place}: vllm draws on one device, and there are {ranks.size}; use transformers, or {{endpoint: URL}}")
    if needs.shards > 1 and lora is None and recipe.train.optimizer == "adamw_8bit":
        raise UsageError(f"{loaded.where('train.optimizer')}: adamw_8bit takes no weights in shards; use adamw, or lora")
    if budget == "auto":
        capacity, values = imagined.memory if imagined else None, recipe.objective.values
        budget = ranks.min(auto_budget(needs.memory, longest, ranks.device, values=values, capacity=capacity))
    train = dataclasses.replace(recipe.train, tokens_per_device=budget)
    model = dataclasses.replace(recipe.model, dtype=cast(Any, str(dtype).removeprefix("torch.")))
    return dataclasses.replace(recipe, train=train, model=model), needs


def _example_words(recipe: recipes.TrainingRecipe) -> str:
    objective = recipe.objective
    if recipe.draws:
        return "is learned: that is a prompt, and its responses are drawn from the policy"
    if objective.frozen:
        return "is where the model learns what its teacher would write"
    if objective.rows.responses == "first":
        return "is what the model learns to write"
    if objective.mismatches:
        return "is a judged response and, after it, another prompt's: the policy's drift is measured on those"
    return "is a response, whose steps are judged" if isinstance(objective, Steps) else "is a response, the best one first"


def _facts(job: TrainingJob) -> dict[str, str]:
    recipe, start, several = job.recipe, job.start, len(job.objective.roles)
    members = f", {several} times: each member has a bootstrap sample of the prompts" if several > 1 else ""
    return {
        "start": recipe.model.path + (f" (continues the adapter in {start.adapter})" if start.adapter else ""),
        "trains": (f"LoRA r {job.lora.r}" if job.lora else "all weights") + members,
        "objective": job.objective.kind,
        "dtype": recipe.model.dtype,
        "chat template": job.template.source,
        "devices": job.loaded.devices.words if job.loaded.devices else job.ranks.words,
    }


def _warnings(job: TrainingJob, memory: Memory) -> Iterator[str]:
    yield from job.dataset.train.notices
    yield from _overlaps(job)
    if (asked := job.recipe.train.batch_size) > (rows := len(job.source.trees)):
        yield f"train.batch_size {asked:,} is more than the {rows:,} rows there are: every step sees all of them"
    if message := learning_rate_warning(job.recipe, memory):
        yield message
    if not job.objective.soft_labels and any(facts.soft_label != 1 for facts in job.dataset.train.trees.facts):
        kind = job.objective.kind
        yield f"the probability of a pair has no effect with kind {kind}: every chosen response counts as better"
    if job.lora and job.lora.dropout:
        yield "with lora.dropout, results depend on tokens_per_device: the masks follow the cut"


def _overlaps(job: TrainingJob) -> Iterator[str]:
    """Rows that one run holds out, and that this run or one that it comes from is trained on."""
    data, reading = job.recipe.data, job.dataset.reading
    own, apart = ({report.fingerprint: report.path for report in reports} for reports in (reading.reports, reading.eval_reports))
    for path in (apart[fingerprint] for fingerprint in own.keys() & apart.keys()):
        yield f"data.eval: {path} has the very rows of data.train: what is held out is trained on"
    split = Split(data.holdout, data.holdout_seed)
    runs = list(ancestors(job.recipe.model.path))
    yield from unknown(runs)
    for ancestor in runs:
        for path in (apart[fingerprint] for fingerprint in ancestor.trained_on & apart.keys()):
            yield f"data.eval: {ancestor.path} was trained on the rows of {path}"
        held_out = ancestor.split is not None and ancestor.split.holdout
        if ancestor.trained_on & own.keys() and ancestor.split != split and (split.holdout or held_out):
            yield (
                f"data.holdout: {ancestor.path} held out {ancestor.split}, this run holds out {split}: rows that one of "
                "them keeps the other learns from. give both the same"
            )
