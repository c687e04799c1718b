"""The frozen model that a policy is compared with: what `reference.model` names, and where its weights go."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import UsageError
from rlhf_cli.models.load import Weights, load_tokenizer
from rlhf_cli.models.placement import Placement
from rlhf_cli.recipe import recipes
from rlhf_cli.runs.manifest import BaseModel, Parent, weights_hash
from rlhf_cli.runs.parents import Start, base_if_here, resolve_start
from rlhf_cli.stages.prepare import TrainingJob


@dataclass(frozen=True)
class ReferenceModel:
    """The frozen model that the policy is compared with."""

    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    is_start: bool  # the very weights that the policy starts from
    previous: bool  # for `objective/kl` alone: the loss compares with the policy at the last refresh

    @property
    def record(self) -> dict[str, str | bool | None]:
        """What identifies it, in the manifest and when a run is resumed."""
        return {
            **({"previous": True} if self.previous else {}),
            "model": str(self.start.adapter or self.start.base),
            "base": self.base.weights_hash if self.base else None,
            "adapter": weights_hash(self.start.adapter) if self.start.adapter else None,
        }

    @property
    def words(self) -> str:
        """What a run says of it."""
        path = self.start.adapter or self.start.base
        if self.previous:
            return f"reference: the policy at the last refresh (rollout.refresh); objective/kl is to the start, {path}"
        return f"reference: the weights this run starts from, {path}" if self.is_start else f"reference: {path}"

    def parents(self, job: TrainingJob) -> tuple[Parent, ...]:
        """The run it comes from, unless the policy starts from it too."""
        used = self.start.parent
        return (used,) if used is not None and used != job.start.parent else ()


def find_reference(job: TrainingJob, check: bool, *, needed: bool = True) -> ReferenceModel | None:
    """What `reference.model` names, with the policy's own vocabulary; None where it is not needed.

    UsageError: it cannot be told what it names, its base has changed, or its tokenizer is another one.
    """
    assert isinstance(job.recipe, recipes.ReferenceRecipe)
    path, place = job.recipe.reference.model, job.loaded.named("reference.model")
    if not needed:
        return None
    if path == "base" and job.start.adapter is None and job.start.parent is not None:
        raise UsageError(
            f"{place}: base is the model under an adapter, and {job.recipe.model.path} has none: all its weights were trained. "
            "name the model by its path"
        )
    if path not in ("start", "base", "previous"):
        return find_frozen(job, path, place, check)
    bare = dataclasses.replace(job.start, adapter=None, parent=None, manifest=None)
    return _frozen(job, bare if path == "base" else job.start, check, path == "previous")


def find_frozen(job: TrainingJob, path: str, place: str, check: bool) -> ReferenceModel:
    """A model with the policy's own vocabulary. UsageError: as `find_reference`."""
    found = resolve_start(path, None, place)
    tokenizer = load_tokenizer(found.tokenizer, found.revision, job.recipe.model.trust_remote_code)
    if tokenizer.get_vocab() != job.tokenizer.get_vocab():
        raise UsageError(
            f"{place}: {path} has another tokenizer than {job.recipe.model.path}, and both must read the same tokens"
        )
    return _frozen(job, found, check)


def _frozen(job: TrainingJob, found: Start, check: bool, previous: bool = False) -> ReferenceModel:
    # The same folders, however they are written, or the same hub id.
    weights = [(Path(s.base).resolve(), s.adapter and s.adapter.resolve(), s.revision) for s in (found, job.start)]
    base = base_if_here(found, check, job.loaded.devices is not None)
    return ReferenceModel(found, base, weights[0] == weights[1], previous)


def place_reference(
    job: TrainingJob, reference: ReferenceModel, placement: Placement, base: Weights, role: str = "reference"
) -> None:
    """Give a role its weights; `base` is what the policy's adapter sits on."""
    # Of a merged parent: the policy's adapter is new, and its base is the start.
    merged = reference.is_start and base.base != job.start.base
    placement.add(role, base if merged else reference.start)
