"""Rollouts written down by hand: what the tests of the ppo kinds share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_cli.data.trees import Recorded, Tree
from rlhf_cli.objectives.policy_gradient import Advantages, Experience

Tokens = Sequence[Sequence[float]]
"""Response → a number for every token."""


def flat(values: Tokens) -> np.ndarray:
    return np.array([number for response in values for number in response])


def experience(
    old: Tokens,
    reference: Tokens,
    scores: Sequence[float],
    values: Tokens | None = None,
    prompt: Sequence[int] | None = None,
) -> Experience:
    """What a rollout was, each response with a prompt of its own unless `prompt` says which it belongs to."""
    return Experience(
        lengths=np.array([len(response) for response in old]),
        prompt=np.array(range(len(old)) if prompt is None else prompt),
        scores=np.array(scores, float),
        old=flat(old),
        reference=flat(reference),
        values=None if values is None else flat(values),
    )


def recorded(trees: Sequence[Tree], seen: Experience, advantages: Advantages) -> list[Tree]:
    """The rollout's trees with what was seen and learned of their tokens."""
    unknown = np.full(len(seen.old), np.nan)
    columns = Recorded(
        old=seen.old,
        reference=seen.reference,
        advantage=advantages.advantages,
        value=unknown if seen.values is None else seen.values,
        target=unknown if advantages.targets is None else advantages.targets,
    )
    parts = zip(*(np.split(values.astype(np.float32), np.cumsum(seen.lengths)[:-1]) for values in columns), strict=True)
    return [tree._replace(recorded=tuple(Recorded(*next(parts)) for _ in tree.responses)) for tree in trees]
