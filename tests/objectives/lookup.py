"""A model that knows every token by heart, and a step without an optimiser: what the tests of the objectives share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Batch, Tree, build_batch, plan_passes
from rlhf_cli.objectives.base import Objective

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
"""Inputs and expected values in float64, computed from the papers' formulas without this package."""

Ragged = Sequence[Sequence[Sequence[float]]]
"""Tree → response → a number for every token."""


class Lookup:
    """A backbone whose roles are tables: the log-probability of a token, the value before it or the score at it, by its id alone.

    No two tokens of `make_trees` share an id, so a number that goes to another response, or to none, shows.
    """

    def __init__(self, **tables: torch.Tensor) -> None:
        self.tables = tables
        self.asked: list[tuple[str, bool]] = []  # role, with gradients
        self.temperatures: list[float] = []

    def logps(self, role: str, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((role, torch.is_grad_enabled()))
        self.temperatures.append(temperature)
        return self.tables[role][batch.target], torch.zeros(len(batch.target), dtype=torch.bool)

    def tempered_logps(
        self, role: str, batch: Batch, temperatures: Sequence[float]
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """At 1 and at ½, whose difference is a table too: constant, whatever the policy's log-probabilities are."""
        logps, hits = self.logps(role, batch)
        return (logps, logps + self.tables["typicality"][batch.target]), hits

    def logps_and_kl(self, role: str, other: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The KL is a table."""
        with torch.no_grad():
            before, _ = self.logps(other, batch)
        return self.logps(role, batch)[0], before, self.tables["kl"][batch.target]

    def values(self, role: str, batch: Batch) -> torch.Tensor:
        return self.tables[role][batch.target]

    def scores(self, role: str, batch: Batch) -> torch.Tensor:
        return self.tables[role][batch.ids.flatten()[batch.last]]

    def vectors(self, role: str, batch: Batch) -> torch.Tensor:
        """What a head gives of which all numbers follow from a score: it and its multiples as angles, (M, 8)."""
        angles = self.scores(role, batch)[:, None] * torch.arange(1, 5)
        return torch.stack((angles.cos(), angles.sin()), 2).flatten(1)


def make_trees(shape: Sequence[Sequence[int]], facts: Sequence[Facts] | None = None) -> list[Tree]:
    """Trees whose responses have these lengths. Their tokens are numbered from 1, tree by tree; the prompts are zeros."""
    trees, start = [], 1
    for row, lengths in enumerate(shape):
        responses = []
        for length in lengths:
            responses.append(np.arange(start, start + length, dtype=np.int32))
            start += length
        prompt = np.zeros(1 + row % 3, np.int32)
        about = facts[row] if facts else Facts()
        trees.append(Tree(prompt, np.zeros(len(prompt), bool), tuple(responses), row, about))
    return trees


def table(values: Ragged) -> torch.Tensor:
    """The numbers of the tokens that `make_trees` gives to responses of these lengths."""
    return torch.tensor([0.0, *(v for tree in values for response in tree for v in response)], dtype=torch.float64)


def lengths(values: Ragged) -> list[list[int]]:
    return [[len(response) for response in tree] for tree in values]


class Result(NamedTuple):
    loss: torch.Tensor
    means: dict[str, float]
    metrics: dict[str, float]
    memory: dict[str, float]


def run(
    objective: Objective,
    backbone: Any,
    trees: list[Tree],
    *,
    budget: int = 4096,
    memory: Mapping[str, float] | None = None,
    given: Mapping[str, float] | None = None,
) -> Result:
    """What an optimiser step makes of a global batch: sums over its passes, divided by its counts; float64, without weights."""
    counts = objective.counts(trees)
    seen, parts = objective.phases(trees)
    statistics: dict[str, float] = {}
    for batch in passes(seen, budget):
        for name, (value, unit) in objective.statistics(backbone, batch).items():
            assert not value.requires_grad
            statistics[name] = statistics.get(name, 0.0) + float(value) / counts[unit]
    kept = dict(memory or {})
    constants = kept | dict(given or {}) | statistics
    loss = torch.zeros((), dtype=torch.float64)
    means: dict[str, float] = {}
    for batch in [batch for part in parts for batch in passes(part, budget)]:
        for term in objective.terms(backbone, batch, constants):
            for unit, value in term.losses.items():
                loss = loss + value / counts[unit]
            for name, (value, unit) in term.sums.items():
                assert not value.requires_grad
                means[name] = means.get(name, 0.0) + float(value) / counts[unit]
    means |= statistics | {"loss": float(loss.detach())}
    return Result(loss, means, objective.metrics(means), objective.remember(kept, means))


def passes(trees: list[Tree], budget: int) -> list[Batch]:
    return [build_batch(trees, rows) for rows in plan_passes(trees, 1, budget, "packed")[0]] if trees else []
