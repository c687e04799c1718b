"""What a run takes of a device's memory: of those that are here, and of machines that one does not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from rlhf_cli import sections
from rlhf_cli.console import Console
from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.models.load import load_config
from rlhf_cli.models.logps import ON_CUDA
from rlhf_cli.models.memory import FITS, Memory, Parts, auto_budget, estimate, gpu_memory
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.recipe.stages import POLICY_STAGES, REWARD_STAGES
from rlhf_cli.rollout.generate import GPU_SHARE
from rlhf_cli.runs.parents import Start, resolve_start

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the memory of a run's steps follows from."""

    recipe: recipes.TrainingRecipe  # with its adapter resolved
    config: Any
    base: str
    frozen: dict[str, Any]  # configurations of the bases of roles that do not train
    dtype: torch.dtype
    longest: int  # tokens of a tree
    shards: int  # devices over which the models are sharded
    capacity: float | None = None  # bytes of a GPU; None: a CPU, where neither masks nor other models are counted

    @cached_property
    def memory(self) -> Memory:
        recipe, lora = self.recipe, self.recipe.lora
        assert not isinstance(lora, str)
        values, shared = recipe.objective.values, lora is not None
        masked = self.capacity is not None and recipe.model.attention in ("auto", "sdpa", "eager")
        known: dict[str, Any] = {"dtype": self.dtype, "devices": self.shards, "optimizer": recipe.train.optimizer}
        roles, row = len(recipe.objective.roles) + (values and shared), self.longest * masked
        memory = estimate(self.config, recipe.model, rank=lora.r if lora else None, roles=roles, row=row, **known)
        if self.capacity is None:
            return dataclasses.replace(memory, most={"logits": memory.most["logits"] / ON_CUDA})
        others = [config for base, config in self.frozen.items() if not (shared and base == self.base)]
        beside = sum(estimate(config, recipe.model, rank=0, **known).weights for config in others)
        if values and not shared:
            beside += 16 * estimate(self.config, recipe.model, rank=sections.Lora().r, **known).trained
        moments = [(fixed | {"other models": beside}, each) for fixed, each in memory.moments]
        if recipe.draws:
            text = self.config.get_text_config().to_dict()
            heads = text.get("num_key_value_heads") or text["num_attention_heads"]
            head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            # Of the longest prompts and responses; beyond the share they are drawn in waves.
            samples, new = recipe.draws.responses_per_prompt, recipe.draws.max_new_tokens
            drawn = recipe.train.batch_size * samples / self.shards * (self.longest - (samples - 1) * new)
            cache = min(2 * text["num_hidden_layers"] * heads * head * self.dtype.itemsize * drawn, GPU_SHARE * self.capacity)
            kept = {part: moments[0][0][part] for part in ("weights", "optimiser", "other models")}
            gathered = memory.whole * (self.shards > 1)
            moments.append((kept | {"gathered weights": gathered, "K/V cache": cache}, {}))
        return dataclasses.replace(memory, moments=tuple(moments))

    def others(self) -> Iterator[tuple[str, Needs]]:
        """The recipe with one thing changed, and with all at once that takes less memory."""
        recipe, model = self.recipe, self.recipe.model

        def changed(lora: Any, **values: Any) -> Needs:
            other = dataclasses.replace(recipe, lora=lora, model=dataclasses.replace(model, **values))
            return dataclasses.replace(self, recipe=other)

        lora, full = recipe.lora or sections.Lora(), recipe.lora is None
        if full:
            yield "lora: auto", changed(lora)
        if not model.gradient_checkpointing:
            yield "model.gradient_checkpointing: true", changed(recipe.lora, gradient_checkpointing=True)
        if not full and model.quantize is None:
            yield "model.quantize: 4bit", changed(lora, quantize="4bit")
        if self.shards > 1:
            yield "not sharded", dataclasses.replace(self, shards=1)
        yield f"sharded over {2 * self.shards} devices", dataclasses.replace(self, shards=2 * self.shards)
        if full or not model.gradient_checkpointing:
            all_of_it = changed(lora, gradient_checkpointing=True, quantize=model.quantize or "4bit")
            yield "LoRA, checkpointing and 4bit together", all_of_it


def frozen_models(recipe: recipes.TrainingRecipe, start: Start, loaded: Loaded) -> dict[str, Any]:
    """Base → configuration of the models that score, judge or are compared with while the policy trains."""
    found: list[Start] = []
    if isinstance(recipe, recipes.ReferenceRecipe):
        own, path = recipe.reference, recipe.reference.model
        live = recipe.objective.token_figure == "kl" or (isinstance(own, sections.Reference) and not own.cache)
        if recipe.draws or (recipe.objective.reference and live):
            given = path in ("start", "base", "previous")
            found.append(start if given else resolve_start(path, None, loaded.named("reference.model")))
    found += [resolve_start(path, None, loaded.named(f"objective.{role}")) for role, path in recipe.objective.frozen.items()]
    for term in chain(*recipe.terms):
        if model := term.model or (term.judge.path if term.judge else None):
            stages = REWARD_STAGES if term.model else POLICY_STAGES
            found.append(resolve_start(model, term.revision, loaded.where("reward"), stages))
    if recipe.objective.values:
        found.append(start)
    trust = recipe.model.trust_remote_code
    return {each.base: load_config(each.base, each.revision, trust) for each in found}


def find_needs(
    recipe: recipes.TrainingRecipe,
    start: Start,
    config: Any,
    dtype: torch.dtype,
    longest: int,
    loaded: Loaded,
    ranks: Ranks,
) -> Needs:
    capacity = loaded.devices.memory if loaded.devices else None
    if capacity is None and ranks.device.type != "cpu":
        capacity = gpu_memory(ranks.device)[1]
    frozen = {} if capacity is None else frozen_models(recipe, start, loaded)
    shards = loaded.devices.count if loaded.devices else ranks.size if ranks.sharding else 1
    return Needs(recipe, config, start.base, frozen, dtype, longest, shards, capacity)


def check_memory(needs: Needs, tokens: int, console: Console, *, imagined: bool) -> None:
    """Of devices that are `imagined`, show the peak by the closed formula and by simulation, and what would change it.

    UsageError: the recipe does not fit on them.
    MachineError: it does not fit on the GPU that is here, even in its shortest passes.
    """
    if needs.capacity is None:
        return
    if not imagined and needs.memory.total(needs.longest) <= needs.capacity:
        return
    room = FITS * needs.capacity
    total = needs.memory.total(tokens)
    rows = [(name, other.memory.total(tokens)) for name, other in needs.others()]
    most = auto_budget(needs.memory, 0, torch.device("cuda"), capacity=needs.capacity)
    fitting = [f"{name} ({_gib(size)})" for name, size in rows if size <= room]
    fitting += [f"train.tokens_per_device: {most}"] * (needs.longest <= most < tokens)
    if imagined:
        console.say(f"peak per device: {_gib(total)} of {_gib(needs.capacity)}, in passes of {tokens:,} tokens, by formula")
        console.say(f"  {_words(needs.memory.parts(tokens))}")
        limit = f"{most:,}" if most >= needs.longest else f"none: the longest row has {needs.longest:,} tokens"
        words = [(name, _gib(size) + (", fits" if size <= room else ", too much")) for name, size in rows]
        console.plan([("memory with another setting", [*words, ("largest train.tokens_per_device", limit)])])
        _simulated(needs, tokens, console)
    if total > room:
        advice = f"it fits with {', or with '.join(fitting)}" if fitting else "take more devices, or larger ones"
        raise (UsageError if imagined else MachineError)(
            f"the recipe takes about {_gib(total)} of a device's memory, and {_gib(room)} can be planned with ({FITS:.0%} of "
            f"{_gib(needs.capacity)}). {advice}"
        )


def _simulated(needs: Needs, tokens: int, console: Console) -> None:
    from rlhf_cli.models.simulate import Step, simulate

    recipe, role = needs.recipe, needs.recipe.objective.role
    assert not isinstance(recipe.lora, str)
    if recipe.model.quantize:
        console.say("not simulated: quantised weights need their numbers")
        return
    roles = (role, "value") if recipe.objective.values and recipe.lora else (role,)
    step = Step(recipe.model, recipe.lora, needs.dtype, needs.shards, tokens, min(needs.longest, tokens), roles)
    try:
        parts = simulate(needs.config, step)
    except Exception as error:  # whatever a model does that needs numbers
        console.say(f"not simulated: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
        return
    parts |= {"other models": needs.memory.moments[0][0].get("other models", 0)}
    what = ", of its updates alone" if recipe.draws else ""
    console.say(f"peak per device, simulated{what}: {_gib(sum(parts.values()))}")
    console.say(f"  {_words(parts)}")


def _words(parts: Parts) -> str:
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value >= 0.05 * GIB)


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"
