"""The models of an evaluation: what each name stands for and how it reads text, before any weights are loaded."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.data.templates import Template, choose_template
from rlhf_cli.errors import UsageError
from rlhf_cli.files import read_json
from rlhf_cli.models.load import is_reward_model, load_config, load_tokenizer
from rlhf_cli.recipe import evaluations
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.rollout.reward_models import serialised
from rlhf_cli.runs.manifest import BaseModel
from rlhf_cli.runs.parents import Start, base_model, recorded_template, resolve_start
from rlhf_cli.runs.resume import INPUTS

STEP = re.compile(r"step-(\d+)(-\d+)?")  # name of a checkpoint; the second number is of updates, in the middle of a step
BETA = 0.1  # of the implicit rewards of a policy whose training had none


@dataclass(frozen=True)
class Tokenisation:
    """How a model reads and writes text: its tokens and its chat template. Equal ones make equal tokens of every text."""

    name: str  # the same for equal ones
    tokenizer: Any = field(compare=False)
    template: Template = field(compare=False)


class Tokenisations:
    """All that occur in an evaluation, equal ones once."""

    def __init__(self) -> None:
        self._known: dict[Any, Tokenisation] = {}

    def of(self, tokenizer: Any, template: Template) -> Tokenisation:
        key = (serialised(tokenizer), template.hash)
        return self._known.setdefault(key, Tokenisation(str(len(self._known)), tokenizer, template))


Origin = tuple[str | None, str | None]
"""Hashes of the base's weights and of the parent's manifest, as a run records what it starts from."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, before its weights are loaded."""

    name: str
    path: str
    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    config: Any  # of the base
    tokenisation: Tokenisation
    is_reward_model: bool  # it gives scores and writes nothing
    series: str | None  # the name that the checkpoints of its run share; None: it stands alone
    step: int | None  # of a checkpoint
    beta: float  # scale of its implicit rewards
    origin: Origin | None  # of a checkpoint's run; None: not known

    @property
    def record(self) -> dict[str, Any]:
        """What identifies it."""
        return {
            "base": self.base and self.base.weights_hash,
            "adapter": self.start.adapter_hash,
            "template": self.tokenisation.template.hash,
        }

    @property
    def as_origin(self) -> Origin:
        """What a run would record that starts from this model."""
        parent = self.start.parent
        return self.base.weights_hash if self.base else None, parent.manifest_hash if parent else None


def recipe_of(loaded: Loaded) -> evaluations.EvalRecipe:
    assert isinstance(loaded.recipe, evaluations.EvalRecipe)
    return loaded.recipe


def find_models(loaded: Loaded, tokenisations: Tokenisations, check: bool) -> list[EvaluatedModel]:
    """Every model that `models` names, those of a pattern in the order of their names.

    UsageError: a pattern that nothing matches or several folders of one name do, a path that is no model, an unfinished or
        changed run.
    MachineError: a hub id that cannot be reached.
    """
    recipe, found = recipe_of(loaded), []
    bases: dict[Any, BaseModel] = {}  # many checkpoints sit on one, whose weights are read through once
    for entry, pattern in recipe.models.items():
        place = loaded.named(f"models.{entry}")
        for name, path in _expand(entry, pattern, place):
            start = resolve_start(path, None, place, stages=TRAINING_STAGES)
            if start.separator is not None:
                raise UsageError(f"{place}: {path} scores steps. name it as a term: reward: [{{model: {path}, aggregate: min}}]")
            tokenizer = load_tokenizer(start.tokenizer, start.revision, recipe.trust_remote_code)
            if recipe.chat_template is None and not recipe.template_options:
                template = recorded_template(start, tokenizer, path, place)
            else:
                template = choose_template(tokenizer, recipe.chat_template, recipe.template_options)
            recorded = start.manifest["base_model"] if start.adapter and start.manifest else {}
            key = start.base, start.revision, recorded.get("weights_hash"), recorded.get("settings_hash")
            if key not in bases and (not check or Path(start.base).exists()):
                bases[key] = base_model(start)
            run, step = Path(path).parent.parent, STEP.fullmatch(Path(path).name)
            inputs = read_json(run / INPUTS) if step and (run / INPUTS).exists() else None
            found.append(
                EvaluatedModel(
                    name=name,
                    path=path,
                    start=start,
                    base=bases.get(key),
                    config=load_config(start.base, start.revision, recipe.trust_remote_code),
                    tokenisation=tokenisations.of(tokenizer, template),
                    is_reward_model=is_reward_model(str(start.adapter or start.base), start.revision),
                    series=entry if evaluations.is_pattern(pattern) else None,
                    step=int(step[1]) if step else None,
                    beta=_own_beta(start, run if step else None) if recipe.beta is None else recipe.beta,
                    origin=None if inputs is None else (inputs.get("base"), inputs.get("parent")),
                )
            )
    return found


def _expand(name: str, path: str, place: str) -> Iterator[tuple[str, str]]:
    """(name, path) of every model that one entry stands for."""
    if not evaluations.is_pattern(path):
        yield name, path
        return
    folders = [match for match in sorted(glob.glob(path)) if Path(match).is_dir()]  # noqa: PTH207  (of any path)
    if not folders:
        raise UsageError(f"{place}: no folder matches {path}. a run keeps its last train.keep_checkpoints ones")
    if twice := [last for last, count in Counter(Path(folder).name for folder in folders).items() if count > 1]:
        raise UsageError(f"{place}: several folders that match {path} are called {twice[0]}. name each of them by itself")
    for folder in folders:
        yield f"{name}/{Path(folder).name}", folder


def _own_beta(start: Start, run: Path | None) -> float:
    """β of the objective that a model was trained with; `run`: of a checkpoint."""
    manifest = start.manifest or {}
    if not manifest and run is not None and (run / "manifest.json").exists():
        manifest = read_json(run / "manifest.json")
    beta = manifest.get("objective", {}).get("beta")
    return BETA if beta is None else float(beta)
