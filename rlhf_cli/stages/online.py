"""What runs share that learn from the policy's own responses: where they are drawn, and what scores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from rlhf_cli import sections
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.sources import Reading
from rlhf_cli.data.streams import Stream
from rlhf_cli.data.trees import Tree
from rlhf_cli.data.unpaired import unpaired, with_mismatches
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import Weights
from rlhf_cli.models.placement import Placement
from rlhf_cli.recipe import recipes
from rlhf_cli.rollout.experience import Sampler
from rlhf_cli.rollout.generate import Engine, TransformersEngine
from rlhf_cli.rollout.rewards import Scorer
from rlhf_cli.rollout.source import KL_COEF, probe
from rlhf_cli.rollout.terms import RewardTerms
from rlhf_cli.rollout.vllm import ServerEngine, VllmEngine
from rlhf_cli.stages.prepare import TrainingJob
from rlhf_cli.stages.reference import ReferenceModel
from rlhf_cli.training.checkpoint import State
from rlhf_cli.training.loop import Measure


def set_up_rollouts(
    job: TrainingJob, reward_terms: RewardTerms, placement: Placement, base: Weights
) -> tuple[Sampler, Measure | None, list[Tree]]:
    """What draws and scores responses, what measures held-out ones (None: nothing is held out), and a few for the start's check.

    Loads the reward models; `base` is what the policy's adapter sits on.

    UsageError: a reward model's weights do not fit.
    MachineError: the engine is not installed.
    """
    recipe, backbone = job.recipe, placement.policy
    assert isinstance(recipe, recipes.PpoRecipe | recipes.DirectRecipe)
    terms, gold = reward_terms.load(placement, job.budget)
    sampler = samplers(job, backbone, base, terms, gold, recipe.reward_combine)
    reading, held_out = job.dataset.reading, job.dataset.held_out
    own = sampler(reading.train)
    measure: Measure | None = None
    if held_out is not None:
        least = 2 if any(term.compares for term in reward_terms) else 1
        unseen, prompts, seed = sampler(reading.held_out), list(held_out.trees), Stream.HELD_OUT.seed(recipe.seed)

        def measure(state: State) -> dict[str, float]:
            """Of one response to every prompt, or of two where a term compares.

            The same random numbers each time: two measurements differ by the policy.
            """
            rollout = unseen.rollout(prompts, seed, samples=least)
            return rollout.figures(state.memory.get(KL_COEF, recipe.kl.coef) if isinstance(recipe, recipes.PpoRecipe) else None)

    return own, measure, probe(own, job.source.batch(1), recipe.seed)


def samplers(
    job: TrainingJob,
    backbone: Backbone,
    base: Weights,
    terms: Sequence[Scorer] = (),
    gold: Sequence[Scorer] = (),
    combine: str = "sum",
) -> Callable[[Sequence[Record]], Sampler]:
    """What draws and scores responses to the prompts of given records. `base` is what the policy's adapter sits on.

    MachineError: the engine is not installed.
    """
    recipe, settings = job.recipe, job.recipe.draws
    assert settings is not None
    save, raw = partial(backbone.save, "policy"), isinstance(settings, sections.Warping) and bool(settings.warps)
    engine: Engine = TransformersEngine(backbone, "policy")
    if isinstance(settings.engine, sections.VllmServer):
        engine, raw = ServerEngine(settings.engine, job.loaded.named("rollout.engine"), save), True
    elif settings.engine == "vllm":
        engine = VllmEngine(
            save,
            model=base.base,
            revision=base.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype=str(backbone.compute_dtype).removeprefix("torch."),
            max_model_len=recipe.data.max_length,
            logprobs_mode="raw_logprobs" if raw else "processed_logprobs",
        )

    def sampler(records: Sequence[Record]) -> Sampler:
        return Sampler(
            backbone=backbone,
            engine=engine,
            tokenizer=job.tokenizer,
            ends=tuple(backbone.stop_ids(job.tokenizer, job.template)),
            settings=settings,
            records=records,
            terms=terms,
            gold=gold,
            combine=combine,
            budget=job.budget,
            ranks=job.ranks,
            pause=job.signals.pause,
            raw=raw,
        )

    return sampler


def as_unpaired(trees: list[Tree], seed: int, records: Sequence[Record], max_length: int, mismatches: bool) -> list[Tree]:
    """Ranked responses one by one, the best of a prompt as desirable and its worst as undesirable.

    NumberError: all of them are one text, and the objective compares each with another one.
    """
    flat = unpaired(flatten(trees, records))
    if not mismatches:
        return list(flat)
    try:
        return list(with_mismatches(flat, seed, max_length))
    except UsageError as error:
        raise NumberError(f"what the policy draws has collapsed: {error}") from error


def recorded(reference: ReferenceModel, reward_terms: RewardTerms, reading: Reading) -> dict[str, str]:
    """What a resumed run must have in common beside its data."""
    scores = {"reward": reward_terms.reward, "gold": reward_terms.gold}
    identities = {name: json.dumps([term.identity for term in terms]) for name, terms in scores.items() if terms}
    if any(report.lent for report in (*reading.reports, *reading.eval_reports)):
        lent = hashlib.sha256()
        for record in chain(reading.train, reading.held_out):
            lent.update(record.columns.encode() + b"\n")
        identities["columns"] = lent.hexdigest()
    return {"reference": json.dumps(reference.record), **identities}
