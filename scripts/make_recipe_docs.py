"""Write docs/recipes.md, the reference of every recipe key, from the schema.

    python scripts/make_recipe_docs.py [--check]

--check writes nothing and exits 1 if the file is not what the schema says.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rlhf_cli.objectives.base import Objective, Trained
from rlhf_cli.recipe.dump import MAY_CHANGE, ONLY_GROW
from rlhf_cli.recipe.keys import (
    Key,
    arms,
    as_yaml,
    describe,
    keys_of,
    kind_of,
    known_keys,
    sections_in,
    source_list,
    walk,
)
from rlhf_cli.recipe.recipes import Recipe, TrainingRecipe
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES, TrainingStage

DEST = Path(__file__).parents[1] / "docs" / "recipes.md"
HEAD = """\
<!-- Made by scripts/make_recipe_docs.py from rlhf_cli/sections.py, recipe/recipes.py and objectives/; change it there. -->
# Recipe keys

`*` marks a key without a default. `rlhf COMMAND --help` shows the same keys. A recipe is YAML 1.2: `1e-5` is a number, `yes` is a
text. A key that is unknown, written twice, or without effect in this stage is an error with a suggestion. All errors are told at
once, with file and line, before anything is loaded.
"""
RESUMING = """\
## What may change on `--resume`

Everything else must be as it was when the run began; a difference is told in a table, and nothing is changed.

{training}

Of an evaluation:

{evaluation}
"""
SETTING = """\
## On the command line

A stage is `rlhf STAGE RECIPE.yaml`. Its options:

- `--check` reads the recipe and the data, and prints the plan: rows kept and dropped, lengths, the share of responses that end,
  steps, memory, and the first example with the words that the model will learn in marks. It loads no weights and trains nothing.
- `--devices 8x80GB`, with `--check`: the memory of a step on machines one does not have ([memory.md](memory.md)).
- `--set KEY=VALUE` overrides a key below by its dotted path and wins over the file; VALUE is YAML; repeatable. A list is
  addressed by position: `--set data.train.0.limit=1000`. Values after the recipe are the same:
  `rlhf sft sft.yaml train.steps=20`.
- `--output DIR` overrides `output`.
- `--resume` continues from the newest intact checkpoint, starts if there is none, and says so if the run is finished. A run that
  was stopped with Ctrl-C, SIGTERM or a closed terminal has saved before. The resumed one ends with the weights of an
  uninterrupted one. Some keys [may change](#what-may-change-on---resume).
- `--force` moves an existing run folder, or a file that is to be written, to `<output>.old-<n>`. Nothing is ever deleted.
- `--terminal`, of `rlhf label` alone: ask in the terminal and not on a page ([labelling.md](labelling.md)).
- `--port P`, of `rlhf label` alone: where the page is; 0, the default, is any free port.
- `--debug` shows full tracebacks.
- `--dump-pairs FILE.jsonl`, of `rlhf eval`, writes the ranked responses as preference data.

`rlhf schema STAGE` prints a JSON schema for editors; with `# yaml-language-server: $schema=FILE` in its first line a recipe is
completed and checked while it is written. `rlhf init` writes both.

## In every recipe

`${NAME}` is replaced by an environment variable, in any text. The run folder's `recipe.yaml` has the paths in full, and other
texts as they were written, so that what the variable holds is in no file. Relative paths start at the working directory.

- `base: other.yaml` names another recipe, by its path from this one: what it says holds where this one says nothing. Sections are
  merged key by key; lists, and a section with another `kind`, replace those of the base. A base may have a base. The run records
  the whole.
- `stage: dpo` says which command the recipe is for; another one refuses it.
"""
RECIPES = {
    "sft": """\
model: {path: MODEL}                      # a hub id, a folder, or an earlier run
data:
  train: answers.jsonl                    # rows of {"prompt", "completion"}, or another format with responses
  holdout: 0.05                           # of the prompts, to measure on
train: {epochs: 2}
output: runs/sft
""",
    "train-rm": """\
model: {path: runs/sft}
data:
  train: pairs.jsonl                      # rows of {"prompt", "chosen", "rejected"}, or rankings
  holdout: 0.05
output: runs/rm
""",
    "dpo": """\
model: {path: runs/sft}                   # where it starts, and what it is held to
data:
  train: pairs.jsonl
  holdout: 0.05
objective: {kind: dpo, beta: 0.1}         # another kind is another loss
output: runs/dpo
""",
    "ipo": """\
model: {path: runs/sft}
data:
  train: pairs.jsonl
  holdout: 0.05
objective: {beta: 0.1}                    # asks for a margin of 1/(2 beta) nats
output: runs/ipo
""",
    "kto": """\
model: {path: runs/sft}
data:
  train: labelled.jsonl                   # rows of {"prompt", "completion", "label"}, or pairs
  holdout: 0.05
objective: {lambda: auto}                 # both classes weigh the same, however many rows each has
output: runs/kto
""",
    "ppo": """\
model: {path: runs/sft}
data:
  train: prompts.jsonl                    # rows of {"prompt"}; responses are drawn from the policy
  holdout: 0.05
train: {steps: 100, batch_size: 32}       # each step one rollout and all its updates
rollout: {max_new_tokens: 256}
reward:
  - {model: runs/rm}
gold:                                     # measured, never trained on
  - {length: {max: 200}}
output: runs/ppo
""",
    "eval": """\
models: {sft: runs/sft, dpo: runs/dpo}
reference: sft                            # KL is measured from here
prompts: prompts.jsonl                    # rows that no model was trained on
reward:
  - {model: runs/rm}
winrate: {baseline: sft, judge: reward}
output: runs/eval
""",
    "label": """\
rows: answers.jsonl                       # {"prompt", "responses"}; or models: with prompts:, or samples: of an evaluation
judge: {people: {annotators: [ann, bo], overlap: 0.2}}   # or {endpoint: URL, model: NAME}, or {path: MODEL}
output: runs/labels
""",
}
"""A small whole recipe of each stage."""
STAGE = """\
## `rlhf {stage}`

```yaml
{recipe}```

{about}
"""
EVAL = "It trains nothing: its keys are {common}, as above, and those of this section."
KINDS = """\
`objective.kind` chooses the loss, and with it the keys that have an effect. The default is `{kind}`.
"""
RATES = """\
## Learning rates

With `train.learning_rate: null` the default of the stage, or of the kind of its objective. A run warns outside the range, of
models below 20 M parameters that are trained in full above a hundred times it.

| stage, kind | LoRA | range | all weights | range |
|---|---|---|---|---|
"""
TABLE = "| key | default | value | meaning |\n|---|---|---|---|"


def reference() -> str:
    """The whole file."""
    every: type = TrainingRecipe
    parts = [SETTING, *_section(every, "Every stage that trains", "")]
    for name, stage in STAGES.items():
        parts += _stage(name, stage.recipe)
    resuming = RESUMING.format(training=_may_change(*TRAINING_STAGES), evaluation=_may_change("eval"))
    body = "\n".join([*parts, RATES + "\n".join(_rates()) + "\n", resuming])
    return "\n".join([HEAD, *_contents(body), "", body])


def _contents(body: str) -> Iterator[str]:
    """Links to the headings; those of the kinds of one stage share a line."""
    stage = ""
    for level, title in re.findall(r"^(##+) (.*)$", body, re.MULTILINE):
        link = f"[{title}](#{_anchor(title)})"
        if level == "##":
            if stage:
                yield stage
            stage = f"- {link}"
        else:
            kind = title.partition("kind: ")[2]
            stage += f"{':' if stage.endswith(')') and ': ' not in stage else ','} [`{kind}](#{_anchor(title)})"
    yield stage


def _anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _section(section: type, title: str, prefix: str) -> Iterator[str]:
    """A table of the section's keys, then one for each section in it; objectives differ from stage to stage."""
    yield f"## {title}\n\n{_table(_row(key, prefix + key.name) for key in keys_of(section).values())}"
    told = set()
    for key in keys_of(section).values():
        for inner in sections_in(key.kind):
            if key.name != "objective" and inner not in told:
                told.add(inner)
                dotted = prefix + key.name
                yield from _section(inner, f"`{dotted}`", f"{dotted}.{_step(key.kind)}")


def _stage(stage: str, section: type) -> Iterator[str]:
    """The keys that a stage adds, and a table for each kind of its objective."""
    every: type = TrainingRecipe if stage in TRAINING_STAGES else Recipe
    common = known_keys(every)
    added = {dotted: key for dotted, key in walk(section) if dotted not in common and not dotted.startswith("objective.")}
    lists = {dotted: f"{dotted}.{step}" for dotted, key in added.items() if (step := _step(key.kind)) and sections_in(key.kind)}
    trains = "The keys of every stage that trains, and those of this section."
    about = trains if stage in TRAINING_STAGES else EVAL.format(common=" and ".join(f"`{name}`" for name in common))
    yield STAGE.format(stage=stage, about=about, recipe=RECIPES[stage])
    rows = [_row(key, _placed(dotted, lists)) for dotted, key in added.items() if _says_something(key)]
    if rows:
        yield _table(rows)
    if stage not in TRAINING_STAGES:
        return
    default, *others = TRAINING_STAGES[stage].objectives
    if others:
        yield KINDS.format(kind=kind_of(default))
    for objective in (default, *others):
        about = " ".join((inspect.getdoc(objective) or "").split("\n\n")[0].split())
        rows = [_row(key, f"objective.{key.name}") for key in keys_of(objective).values()]
        yield f"### `{stage}`, `kind: {kind_of(objective)}`\n\n{about}\n\n{_table(rows)}"
        if objective.known_as:
            names = (f"- {name}: `{keys}`" for name, keys in objective.known_as.items())
            yield "Methods by other names:\n\n" + "\n".join(names) + "\n"


def _says_something(key: Key) -> bool:
    """All but a section that is always there: its keys say it all."""
    return not (dataclasses.is_dataclass(key.kind) and sections_in(key.kind))


def _placed(dotted: str, lists: dict[str, str]) -> str:
    """The key with a position after the list that it stands in, as `--set` wants it."""
    for name, place in lists.items():
        if dotted.startswith(f"{name}."):
            return place + dotted.removeprefix(f"{name}.")
    return dotted


def _table(rows: Iterable[str]) -> str:
    return "\n".join([TABLE, *rows, ""])


def _step(kind: Any) -> str:
    """What stands between a key and the keys of its section: a position, a free name, or nothing."""
    steps = {list: "0.", dict: "NAME."}
    return next((steps[get_origin(arm)] for arm in arms(kind) if get_origin(arm) in steps), "")


def _row(key: Key, dotted: str) -> str:
    cells = (f"`{dotted}`", _default(key), _value(key), key.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: Key) -> str:
    if dataclasses.is_dataclass(key.kind):
        return ""
    return "*" if key.default is dataclasses.MISSING else f"`{as_yaml(key.default)}`"


def _value(key: Key) -> str:
    """Type or choices, with their bounds."""
    words = [_arm(arm) for arm in arms(key.kind)]
    bounds = {"≥": key.low, "≤": key.high}
    limits = ", ".join(f"{sign} {limit:g}" for sign, limit in bounds.items() if limit is not None)
    return " or ".join(words) + (f", {limits}" if limits else "") + (", *path*" if key.path else "")


def _arm(arm: Any) -> str:
    if dataclasses.is_dataclass(arm):
        return "a section"
    if get_origin(arm) is Literal:
        return " ".join(f"`{name}`" for name in get_args(arm))
    if source_list(arm) is not None:
        return describe(arm)
    return "`null`" if arm is type(None) else describe(arm)


def _rates() -> Iterator[str]:
    for stage in TRAINING_STAGES.values():
        default, *others = stage.objectives
        yield f"| `{stage.recipe.stage}` | {_rate(stage, default, 'lora')} | {_rate(stage, default, 'full')} |"
        for objective in others:
            if objective.learning_rate:
                name = f"`{stage.recipe.stage}`, `{kind_of(objective)}`"
                yield f"| {name} | {_rate(stage, objective, 'lora')} | {_rate(stage, objective, 'full')} |"


def _rate(stage: TrainingStage, objective: type[Objective], trained: Trained) -> str:
    low, high = stage.sane[trained]
    return f"{stage.default_learning_rate(objective, trained):g} | {low:g} … {high:g}"


def _may_change(*stages: str) -> str:
    """The keys that one of the stages has."""
    recipes: list[type] = [STAGES[stage].recipe for stage in stages]
    names = [name for name in MAY_CHANGE if any(name in known_keys(recipe) for recipe in recipes)]
    return "\n".join(f"- `{name}`" + (" (may only grow)" if name in ONLY_GROW else "") for name in names)


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/recipes.md from the schema.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if not parser.parse_args().check:
        DEST.write_text(reference(), encoding="utf-8")
        return 0
    if DEST.read_text(encoding="utf-8") == reference():
        return 0
    print(f"{DEST} is out of date: python scripts/make_recipe_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
