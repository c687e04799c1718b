"""`rlhf import`: a configuration of TRL, LLaMA-Factory or axolotl → the text of a recipe, with all that differs above it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.importing.convert import convert
from rlhf_cli.importing.job import TABLES, UNKNOWN, Job, Tool
from rlhf_cli.recipe.build import Builder, spell_out
from rlhf_cli.recipe.checks import findings
from rlhf_cli.recipe.dump import as_yaml_text, one_line
from rlhf_cli.recipe.keys import as_yaml, walk
from rlhf_cli.recipe.load import read_keys
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES
from rlhf_cli.recipe.yaml_reader import plain, read


def import_file(path: Path, stage: str | None, gpus: int) -> tuple[str, str]:
    """(stage, text of the recipe). Raises UsageError with a line for each thing that has no counterpart."""
    job = converted(path, plain(read_keys(path)), stage, gpus)
    text = as_yaml_text(_nested(job))
    for key, what in _problems(job.stage, text):
        if job.values["data.train"] or not key.startswith("data."):  # else its rows are refused already
            job.refuse(job.name(key), f"{key}: {what}")
    if job.refused:
        raise UsageError("\n".join(job.refused))
    return job.stage, "\n".join(_comments(job)) + f"\nstage: {job.stage}\n{text}"


def _problems(stage: str, text: str) -> list[tuple[str, str]]:
    section = STAGES[stage].recipe
    builder = Builder(section, stage)
    recipe = builder.section(section, spell_out(read(text, []), section), "")
    found = [(problem.key, problem.what) for problem in builder.problems]
    return [*found, *findings(STAGES[stage].checks, recipe, builder.bad)]


def converted(path: Path, given: dict[str, Any], stage: str | None, gpus: int) -> Job:
    """What becomes of the keys of a file."""
    tool = _tool(path, given)
    job = Job(path, tool, given, *_stage(path, tool, given, stage), gpus)
    convert(job)
    return job


def _tool(path: Path, given: dict[str, Any]) -> Tool:
    signs: dict[Tool, str] = TABLES["signs"]
    if isinstance(given.get("model"), dict) and "data" in given:
        raise UsageError(f"{path}: is a recipe already. train it: rlhf STAGE {path}")
    found = {tool: [name for name in names.split() if name in given] for tool, names in signs.items()}
    most = max(map(len, found.values()))
    best = [tool for tool, names in found.items() if len(names) == most]
    if not most:
        examples = "; ".join(f"{tool}: {', '.join(names.split()[:4])}" for tool, names in signs.items())
        raise UsageError(f"{path}: no key tells which trainer it is for. expected some of {examples}")
    if len(best) > 1:
        keys = " and of ".join(f"{tool} ({', '.join(found[tool])})" for tool in best)
        raise UsageError(f"{path}: has keys of {keys}. keep those of one")
    return best[0]


def _stage(path: Path, tool: Tool, given: dict[str, Any], asked: str | None) -> tuple[str, str]:
    """Our stage, and the kind of loss where the name of theirs says it."""
    stages: dict[str, list[str]] = TABLES["stages"]
    loss = given.get("loss_type")
    words = {*given, *map(str, loss if isinstance(loss, list) else [loss])}
    if tool == "TRL":
        found = [stage for stage, signs in TABLES["stage signs"].items() if words & set(signs.split())]
    elif given.get("reward_model") is True:
        found = ["rm"]
    else:
        found = [str(given[key]) for key in ("stage", "rl") if given.get(key)] or ["sft"] * (asked is None)
    choice = "--stage sft, train-rm, dpo, ipo, kto, orpo or simpo"
    if asked is not None and asked not in stages:
        raise UsageError(f"--stage {asked}: is not imported. give {choice}")
    if asked is not None and found and stages[asked][0] not in [stages.get(one, [one])[0] for one in found]:
        raise UsageError(f"{path}: has keys of {' and '.join(found)}, and --stage says {asked}. remove one of the two")
    if asked is None and len(found) != 1:
        what = f"has keys of {' and '.join(found)}" if found else "no key tells its stage"
        raise UsageError(f"{path}: {what}. add {choice}")
    name = asked if asked is not None and not (found and found[0] in ("orpo", "simpo")) else found[0]
    if name not in stages:
        what = "its reward is code of its own" if name in ("ppo", "grpo", "rloo") else "there is nothing like it"
        raise UsageError(f"{path}: {name} is not imported: {what}. docs/importing.md says how to write such a recipe")
    return stages[name][0], stages[name][1]


def _nested(job: Job) -> dict[str, Any]:
    order = list(dict.fromkeys(key for key, _ in walk(TRAINING_STAGES[job.stage].recipe)))
    root: dict[str, Any] = {}
    for key in sorted(job.values, key=order.index):
        *sections, leaf = key.split(".")
        place = root
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = job.values[key]
    return root


def _comments(job: Job) -> Iterator[str]:
    yield f"# Made by rlhf import of {job.path.name}, a configuration of {job.tool}. Next: rlhf {job.stage} RECIPE.yaml --check"
    told = {heading: job.told[heading] for heading in ("To fill in", "Computed")}
    usual = [f"{key}: {one_line(job.values[key])} (ours: {as_yaml(own)})" for key, own in job.assumed.items()]
    told["Defaults of theirs, written out because ours are others"] = usual
    told["Done otherwise"] = job.told["Done otherwise"]
    told["Left out"] = [f"{', '.join(names)}: {why}" for why, names in job.left_out.items() if names]
    told[UNKNOWN] = [", ".join(job.told[UNKNOWN])] * bool(job.told[UNKNOWN])
    for heading, lines in told.items():
        if lines:
            yield f"# {heading}:"
        for line in lines:
            yield from textwrap.wrap(line, 110, initial_indent="#   - ", subsequent_indent="#     ", break_long_words=False)
