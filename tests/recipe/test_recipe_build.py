"""Sections chosen by kind, and reserved words as keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from rlhf_cli.recipe.build import Builder
from rlhf_cli.recipe.keys import keys_of
from rlhf_cli.recipe.yaml_reader import read
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Hinge:
    kind: Literal["hinge"] = "hinge"
    beta: float = 0.1


@dataclass(frozen=True)
class Slic:
    kind: Literal["slic"] = "slic"
    lambda_: float = key(0.1, "weight", low=0.0)


@dataclass(frozen=True)
class Toy:
    objective: Hinge | Slic
    output: str = key("o", last=True)


@dataclass(frozen=True)
class MoreToy(Toy):
    extra: int = 1


def test_last_keys_come_after_those_of_subclasses() -> None:
    assert list(keys_of(MoreToy)) == ["objective", "extra", "output"]


def build(text: str) -> tuple[Toy, list[str]]:
    builder = Builder(Toy, "toy")
    problems = builder.problems
    toy: Toy = builder.section(Toy, read(text, problems), "")
    return toy, [f"{problem.line}: {problem.key}: {problem.what}" for problem in builder.problems]


def test_kind_chooses_the_section() -> None:
    assert build("objective: {kind: slic, lambda: 0.5}") == (Toy(Slic(lambda_=0.5)), [])
    assert build("objective: {beta: 0.5}") == (Toy(Hinge(beta=0.5)), [])


def test_faults_below_a_kind() -> None:
    assert build("objective: {kind: slic, lambda: -1}")[1] == ["1: objective.lambda: expected at least 0, found -1"]
    assert build("objective:\n  kind: slic\n  lambd: 1")[1] == ["3: objective.lambd: unknown key. did you mean objective.lambda?"]
    assert build("objective: {kind: hinge, lambda: 1}")[1] == [
        "1: objective.lambda: has no effect with kind: hinge (it belongs to slic). remove it",
    ]
    assert build("objective: {lambda: 1}")[1] == build("objective: {kind: hinge, lambda: 1}")[1]
    assert build("objective: {zzzzzz: 1}")[1] == ["1: objective.zzzzzz: unknown key. hinge takes kind, beta"]
    assert build("objective: 3")[1] == ["1: objective: expected keys (kind, …), found 3. write keys below it"]


FAULTS_OF_KINDS = {
    "hing": "expected hinge | slic, found the text 'hing'. did you mean hinge?",
    "zzzzz": "expected hinge | slic, found the text 'zzzzz'. write one of these",
    "sft": "expected hinge | slic, found the text 'sft'. sft is a kind of rlhf sft",
    "[slic]": "expected hinge | slic, found a list. write one of these",
    "3": "expected hinge | slic, found 3. write one of these",
    "null": "expected hinge | slic, found null. write one of these",
    "!!str slic": "tags such as !!str are not read. remove it",
}


@pytest.mark.parametrize("kind", FAULTS_OF_KINDS)
def test_faults_of_a_kind(kind: str) -> None:
    assert build(f"objective: {{kind: {kind}}}")[1] == [f"1: objective.kind: {FAULTS_OF_KINDS[kind]}"]
