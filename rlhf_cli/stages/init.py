"""`rlhf init`: a commented recipe for somebody's own rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.formats import LESS, PROMPTS, readings
from rlhf_cli.data.guess import guess
from rlhf_cli.data.records import Record, plain_prompt, prompt_lines, spoken
from rlhf_cli.data.sources import first_rows
from rlhf_cli.errors import UsageError
from rlhf_cli.files import write_atomic
from rlhf_cli.recipe.dump import one_line
from rlhf_cli.recipe.schema import recipe_schema
from rlhf_cli.recipe.stages import ROW_USES, TRAINING_STAGES
from rlhf_cli.stages.rows import Rows, figures, read_rows
from rlhf_cli.suggest import did_you_mean

CHARACTERS = 3.0  # of a token at least, where no tokenizer counts them
AROUND = 64  # tokens that a chat template may put around a row
STEP = 64  # lengths are rounded up to a multiple
LEAST_STEPS = 20  # a batch is made smaller for rows that give fewer
DRAWN = 256  # tokens of a response that is drawn
_CLOSER = "how close to the start the policy is kept: more is closer"
BETA = {"dpo": _CLOSER, "ipo": "asks for a log-ratio margin of 1/(2 beta), in nats", "kto": _CLOSER}


def write_recipe(stage: str, paths: Sequence[str], model: str | None, recipe: Path | None) -> str:
    """The recipe, or where it was written.

    UsageError: the rows cannot be read, are of no use to the stage, or the file is there already.
    """
    if stage not in TRAINING_STAGES:
        raise UsageError(f"rlhf init {stage}: no such stage. {did_you_mean(stage, TRAINING_STAGES, ', '.join(TRAINING_STAGES))}")
    if recipe is not None and recipe.exists():
        raise UsageError(f"{recipe}: exists already, and is not overwritten. give another name")
    sources = [_source(stage, path) for path in paths]
    rows = read_rows([own.readable for own in sources])
    text = "\n".join(_lines(stage, rows, sources, model)) + "\n"
    if recipe is None:
        return text
    schema = recipe.with_suffix(".schema.json")
    write_atomic(schema, json.dumps(recipe_schema(stage), ensure_ascii=False).encode())
    write_atomic(recipe, f"# yaml-language-server: $schema={schema.name}\n{text}".encode())
    return f"{recipe}: written; `rlhf {stage} {recipe} --check` shows what it would do"


class _Source(NamedTuple):
    """A file of rows, and what the recipe is to say of it."""

    readable: sections.Source  # as its rows can be read, if only to see how long they are
    format: str
    columns: dict[str, str | None]  # ours → theirs, as guessed; None: to be filled in
    there: list[str]  # the columns that it has


def _source(stage: str, path: str) -> _Source:
    """UsageError: the rows cannot be read, or are of a known format that is of no use to the stage."""
    source, refusal = sections.Source(path), None
    try:
        found = read_rows([source])
        if stage in found.stages:
            return _Source(source, found.reading.reports[0].format, {}, [])
        good = f"they are good for {', '.join(found.stages)}" if found.stages else "`rlhf data` shows what is in them"
        report = found.reading.reports[0]
        refusal = UsageError(f"{path}: {report.format} rows are of no use to {stage}. {good}")
    except UsageError as error:
        refusal = error
    rows = first_rows(source, "the rows")
    there = list(dict.fromkeys(str(name) for row in rows for name in row))
    format, columns = guess(rows, ROW_USES[stage])
    named = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    with suppress(UsageError):
        guessed = dataclasses.replace(source, format=cast(Any, format.name), columns=named)
        if named == columns and stage in read_rows([guessed]).stages:
            return _Source(guessed, format.name, columns, there)
    if len(there) < len(columns) or any({*readings(row)} - {*LESS} for row in rows):
        raise refusal
    whole = "\n\n".join(f"{{{name}}}" for name in there)
    return _Source(dataclasses.replace(source, format="prompt", columns={"prompt": whole}), format.name, columns, there)


def _columns(source: _Source) -> Iterator[str]:
    if not source.columns:
        return
    filled, guess = all(source.columns.values()), "A guess from the names of the columns. Mend it where it is wrong."
    yield f"      # {guess if filled else 'FILL IN which of your columns are meant.'}"
    yield f"      # The rows have: {', '.join(one_line(name) for name in source.there)}"
    yield "      columns:"
    for ours, theirs in source.columns.items():
        told = "" if filled else "a guess" if theirs else "FILL IN"
        text = f"        {ours}: {one_line(theirs) if theirs else ''}".rstrip()
        yield _line(text, told) if told else text


def _lines(stage: str, rows: Rows, sources: Sequence[_Source], model: str | None) -> Iterator[str]:
    found, draws, reports = figures(rows.records), ROW_USES[stage] is PROMPTS, rows.reading.reports
    most, room = _lengths(rows.records, model, with_responses=not draws)
    yield f"# `rlhf {stage} THIS --check` shows the plan, `rlhf {stage} --help` every key."
    yield "model:"
    fill_in = _line("  path:", "FILL IN: a hub id, a transformers folder, or an earlier run")
    yield f"  path: {one_line(model)}" if model else fill_in
    yield "data:"
    yield "  train:"
    for source, report in zip(sources, reports, strict=True):
        read = {*source.columns.values(), *([rows.answer[0]] if draws and rows.answer else [])}
        names = [name for name in (*report.left_out, *report.lent) if name not in read]
        unread = f"; not read: {', '.join(names)}" if names else ""
        yield f"    - path: {one_line(source.readable.path)}"
        yield _line(f"      format: {source.format}", f"{report.kept:,} rows{unread}")
        yield from _columns(source)
    if found["prompts"] >= LEAST_STEPS:
        yield _line("  holdout: 0.05", "of the prompts, to measure on; the same in every stage")
    what = "prompts" if draws else "rows"
    told = f"tokens of prompt and response; 99 % of the {what} have {most:,} at most"
    yield _line(f"  max_length: {max(STEP, math.ceil(room / STEP) * STEP) + (DRAWN if draws else 0)}", told)
    batch = max(1, min(32, 2 ** int(math.log2(max(1, found["rows"] / LEAST_STEPS)))))
    yield "train:"
    yield _line(f"  batch_size: {batch}", "rows of a step, over all devices; memory does not depend on it")
    yield _line(f"  epochs: {3 if stage == 'sft' and found['rows'] < 5000 else 1}", f"of {found['rows']:,} rows")
    rate = TRAINING_STAGES[stage].learning_rate
    yield _line("  learning_rate: null", f"null: {rate['lora']:g} with LoRA, {rate['full']:g} with all weights (`lora: null`)")
    if draws:
        yield from _rewards(rows)
    elif stage in BETA:
        yield "objective:"
        yield _line("  beta: 0.1", BETA[stage])
    yield f"output: runs/{stage}"


def _rewards(rows: Rows) -> Iterator[str]:
    yield "objective:"
    yield _line("  kind: grpo", "or ppo, rloo, reinforce, bandit")
    yield "rollout:"
    yield _line(f"  max_new_tokens: {DRAWN}", "of a response")
    yield "  responses_per_prompt: 8"
    if rows.answer is None:
        yield _line("reward: []", "FILL IN: terms, such as {model: runs/train-rm} or {function: rewards.py:name}")
        return
    column, value = rows.answer
    number = any(letter.isdigit() for letter in str(value).rpartition("####")[2])
    how = "extract: last-number, compare: number" if number else "extract: text, compare: exact"
    yield "reward:"
    yield _line(f"  - match: {{column: {column}, {how}}}", "1 for the right answer, else 0")


def _line(text: str, told: str) -> str:
    return f"{text:<28}# {told}" if len(text) < 28 else f"{text}   # {told}"


def _lengths(records: Sequence[Record], model: str | None, *, with_responses: bool) -> tuple[int, int]:
    """(99th percentile, longest within twice that) of tokens of the first rows, by the model's tokenizer if it is here."""
    answers = [record.responses if with_responses else () for record in records[:2000]]
    asked = [prompt_lines(plain_prompt(record.prompt)) for record in records[:2000]]
    texts = [f"{question}\n{max((*map(spoken, own), ''), key=len)}" for question, own in zip(asked, answers, strict=True)]
    if model is not None and Path(model).exists():
        from rlhf_cli.models.load import load_tokenizer
        from rlhf_cli.runs.parents import resolve_start

        start = resolve_start(model, None, "--model", (*TRAINING_STAGES,))
        tokenizer = load_tokenizer(start.tokenizer, start.revision, False)
        counts = [len(tokenizer(text)["input_ids"]) + AROUND for text in texts]
    else:
        counts = [int(len(text) / CHARACTERS) + AROUND for text in texts]
    most = int(np.percentile(counts, 99, method="inverted_cdf"))
    return most, min(max(counts), 2 * most)
