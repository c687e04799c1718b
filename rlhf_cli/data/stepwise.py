"""Rows whose responses are judged step by step: our own, Math-Shepherd's and PRM800K's."""

from __future__ import annotations

import re
from typing import Any

from rlhf_cli.data.columns import Row
from rlhf_cli.data.convert import PROMPTED, field, number, prompt_of
from rlhf_cli.data.records import BadRow, Facts, Record, a_list, a_text, step_spans

STEP_MARK, FIRST_STEP = "ки", "Step 1:"  # of Math-Shepherd: what follows every step, and where the first one begins


def is_stepwise(row: Row) -> bool:
    steps, labels = row.get("steps"), row.get("labels")
    if type(steps) is not list:
        return type(steps) is str and STEP_MARK in steps and type(labels) is str
    rated = all(type(step) is dict and type(step.get("completions")) is list for step in steps)
    return bool(row.keys() & set(PROMPTED)) and (rated or type(labels) is list)


def from_steps(row: Row, where: str, separator: str | None = None) -> Record:
    """A response as a list of its steps, each with a label. `separator`: what is to tell them apart; None: nobody asks."""
    steps, labels = field(row, "steps"), row.get("labels")
    if type(steps) is str:
        row, steps, labels = _marked(steps, labels)
    elif labels is None:
        steps, labels = _rated(steps)
    prompt, texts = prompt_of(row), [a_text(step, "a step") for step in a_list(steps, "'steps'")]
    chances = [float(own) if type(own) is bool else number(own, "a label") for own in a_list(labels, "'labels'")]
    if not all(0 <= p <= 1 for p in chances):
        raise BadRow("a label of a step is not between 0 and 1", "write false, or 0, for a wrong step")
    if len(texts) != len(chances):
        raise BadRow("'steps' and 'labels' differ in number", f"{len(texts)} and {len(chances)}")
    text = ("\n\n" if separator is None else separator).join(texts)
    if separator is not None and len(step_spans(text, separator)) != len(texts):
        raise BadRow("objective.separator does not tell the steps apart", f"{separator!r} stands within one, or is empty")
    return Record(prompt, (text,), where, Facts(steps=tuple(chances)))


def _marked(text: str, labels: Any) -> tuple[Row, list[str], list[bool]]:
    """Math-Shepherd's: the question and its steps, a mark behind each; in `labels` the same text with + or - for the marks."""
    parts = text.split(STEP_MARK)
    signs = re.fullmatch("([-+])".join(map(re.escape, parts)), a_text(labels, "'labels'"))
    question, begins, first = parts[0].partition(FIRST_STEP)
    if signs is None or not begins or parts[-1].strip():
        raise BadRow(f"the row has no '{FIRST_STEP}', text behind its last step, or labels that are not its text with + and -")
    return {"prompt": question.strip()}, [begins + first, *parts[1:-1]], [sign == "+" for sign in signs.groups()]


def _rated(steps: list[Any]) -> tuple[list[Any], list[bool]]:
    """PRM800K's: a step's chosen completion, a person's own, which is right, or the first; up to the first of −1, or unrated."""
    texts, labels = list[Any](), list[bool]()
    for step in steps:
        chosen, own = step.get("chosen_completion"), step.get("human_completion")
        found = own if chosen is None and own else dict(enumerate(step["completions"])).get(chosen or 0)
        if not isinstance(found, dict) or (found is not own and found.get("rating") is None) or False in labels:
            break
        texts.append(found.get("text"))
        labels.append(found is own or number(found["rating"], "a rating") >= 0)
    return texts, labels
