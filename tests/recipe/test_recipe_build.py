"""What the schema does not use yet but stages to come will: sections chosen by kind, reserved words as keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.recipe.build import Builder
from rlhf_cli.recipe.schema import key
from rlhf_cli.recipe.yaml_reader import read


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


def build(text: str) -> tuple[Toy, list[str]]:
    builder = Builder(Toy, "toy")
    toy: Toy = builder.section(Toy, read(text, builder.problems), "")
    return toy, [f"{problem.line}: {problem.key}: {problem.what}" for problem in builder.problems]


def test_kind_chooses_the_section() -> None:
    assert build("objective: {kind: slic, lambda: 0.5}") == (Toy(Slic(lambda_=0.5)), [])
    assert build("objective: {beta: 0.5}") == (Toy(Hinge(beta=0.5)), [])


def test_faults_below_a_kind() -> None:
    assert build("objective: {kind: slic, lambda: -1}")[1] == ["1: objective.lambda: expected at least 0, found -1"]
    assert build("objective:\n  kind: slic\n  lambd: 1")[1] == ["3: objective.lambd: unknown key. did you mean objective.lambda?"]
    assert build("objective: {kind: hinge, lambda: 1}")[1] == [
        "1: objective.lambda: unknown key. the objective of toy takes kind, beta",
    ]
    assert build("objective: {kind: hing}")[1] == [
        "1: objective.kind: expected hinge | slic, found the text 'hing'. did you mean hinge?"
    ]
