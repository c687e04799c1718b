"""Responses ranked by their scores."""

from __future__ import annotations

import numpy as np

from rlhf_cli.data.trees import Tree
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.source import ranked


def test_the_best_response_comes_first_and_ties_share_a_rank() -> None:
    prompt = np.zeros(1, np.int32)
    tree = Tree(prompt, np.zeros(1, bool), tuple(np.full(1, k, np.int32) for k in range(4)), 0)
    known = np.array([-0.1, -0.2, -0.3, -0.4])
    tokens = TokenFigures(old=known, reference=known, plain=known, plain_reference=known, value=known, dense=0 * known)
    (found,) = ranked(Rollout([tree], np.ones(4, bool), {}, np.array([0.5, 2.0, 0.5, 1.0]), tokens, {}), known)
    assert [int(response[0]) for response in found.responses] == [1, 3, 0, 2]
    assert (found.facts.ranks, found.facts.scores) == ((0.0, 1.0, 2.0, 2.0), (2.0, 1.0, 0.5, 0.5))
    assert found.reference is not None
    assert [float(part[0]) for part in found.reference] == [float(np.float32(value)) for value in (-0.2, -0.4, -0.1, -0.3)]
