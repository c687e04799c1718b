"""What a person sees before a run starts, and all that --check prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.encode import Encoded
from rlhf_cli.models.memory import Memory
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.stages import TRAINING_STAGES, learning_rate_of, sane_learning_rate

Section = tuple[str, list[tuple[str, object]]]


def plan(
    recipe: recipes.TrainingRecipe,
    dataset: Dataset,
    source: DatasetSource,
    steps: int,
    memory: Memory,
    budget: int,
    facts: dict[str, str],
) -> list[Section]:
    """Rows by fate, lengths, EOS share, steps, trees and tokens per step, memory."""
    lengths = source.trees.lengths
    each, several = min(recipe.train.batch_size, len(lengths)), len(recipe.objective.roles)
    per_step, of_members = each * several, f", {each} for each member" if several > 1 else ""
    tokens, words = _tokens_a_step(recipe, source, per_step)
    sections: list[Section] = [("model", list(facts.items())), ("training rows", _rows(dataset.train, dataset.reading.reports))]
    if dataset.held_out is not None:
        sections.append(("held-out rows", _rows(dataset.held_out, dataset.reading.eval_reports)))
    if len(source.sizes) > 1:
        shares = zip(dataset.reading.reports, source.sizes, source.shares, strict=True)
        mix: list[tuple[str, object]] = [
            (r.path, f"{share:.1%} of an epoch, each of its {size:,} rows {share * len(lengths) / max(1, size):.2f} times")
            for r, size, share in shares
        ]
        sections.append(("mix", mix))
    passes, often = max(float(several), tokens / budget), "for all of these, each" if recipe.draws else "a step"
    training: list[tuple[str, object]] = [
        ("steps", f"{steps:,} ({source.steps_per_epoch:,} an epoch, {steps / source.steps_per_epoch:.3g} epochs)"),
        ("batch", f"{per_step} {_unit(recipe, source)} a step, over all devices{of_members}"),
        ("tokens a step", words),
        ("forward passes", f"about {passes:.0f} {often} of at most {budget:,} tokens (tokens_per_device)"),
        ("learning rate", f"{recipe.train.learning_rate:g}, {recipe.train.schedule}"),
        ("memory", f"about {memory.total(budget) / 2**30:.1f} GiB a device beside the libraries"),
        ("trained", f"{memory.trained:,} parameters"),
    ]
    return [*sections, ("training", training)]


def _tokens_a_step(recipe: recipes.TrainingRecipe, source: DatasetSource, per_step: int) -> tuple[float, str]:
    """Tokens of a step's batch, on average or (of drawn responses) at most, and the same in words."""
    mean = float(source.trees.lengths.mean())
    if rollout := recipe.draws:
        longest = rollout.responses_per_prompt * rollout.max_new_tokens
        words = f"{per_step * (mean + longest):,.0f} at most: prompts of {mean:,.0f} on average and {longest:,} drawn for each"
        return per_step * (mean + longest), words
    learned = per_step * source.trees.supervised_counts.mean()
    supervised = f", {learned:,.0f} supervised" if recipe.objective.rows.responses == "first" else ""
    return per_step * mean, f"{per_step * mean:,.0f} on average{supervised}"


def _unit(recipe: recipes.TrainingRecipe, source: DatasetSource) -> str:
    """What batch_size counts: KTO's pairs count twice."""
    if rollout := recipe.draws:
        each = f"{rollout.responses_per_prompt} responses" if rollout.responses_per_prompt > 1 else "one response"
        return f"prompts, each with {each} of the policy,"
    return "judged responses" if source.trees.facts[0].label is not None else "prompts with their responses"


def _rows(encoded: Encoded, reports: list[Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [(f"from {r.path}", f"{r.read:,} rows read as {r.format}") for r in reports]
    rows += [("columns not used", ", ".join(r.left_out)) for r in reports if r.left_out]
    fates = Counter(kept=encoded.kept)
    for reasons in (*(reasons for report in reports for reasons in (report.bad, report.unused)), encoded.lost):
        fates.update(reasons)
    rows += [(name, f"{count:,}") for name, count in fates.items()]
    rows.append(("truncated", f"{encoded.truncated:,}"))
    if encoded.eos_share is not None:
        rows.append(("end in EOS", f"{encoded.eos_share:.1%}"))
    for part, p in encoded.percentiles.items():
        rows.append((f"{part} tokens", f"median {p['p50']}, 90 % {p['p90']}, 99 % {p['p99']}, longest {p['max']}"))
    rows += [("", example) for r in reports for example in r.bad_examples[:3]]
    rows += [("", example) for example in encoded.examples[:3]]
    return rows


SMALL, SMALL_BEARS = 20_000_000, 100
"""Models of fewer parameters, trained in full, bear so many times the rates of large ones."""


def learning_rate_warning(recipe: recipes.TrainingRecipe, memory: Memory) -> str | None:
    """Words for a rate outside what has worked."""
    (low, high), rate = sane_learning_rate(recipe), learning_rate_of(recipe)
    if recipe.lora is None and memory.trained < SMALL:
        high *= SMALL_BEARS
    if low <= rate <= high:
        return None
    usual = TRAINING_STAGES[recipe.stage].default_learning_rate(recipe.objective, recipe.trained)
    where = f"{recipe.stage} with {'training all weights' if recipe.trained == 'full' else 'LoRA'}"
    return f"train.learning_rate {rate:g} is outside {low:g} … {high:g}, where {where} works; {usual:g} is usual"
