"""SFT's sums and counts, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.objectives.sft import Sft


class Probabilities:
    """A backbone that says: probabilities 1/2, 1/4 and 1/8, of which the first and the last are the most likely tokens."""

    def logps(self, role: str, batch: Batch | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert role == "policy"
        return torch.tensor([1 / 2, 1 / 4, 1 / 8]).log(), torch.tensor([True, False, True])


def test_one_pass() -> None:
    """−(ln ½ + ln ¼ + ln ⅛) = 6 ln 2."""
    (term,) = Sft().terms(Probabilities(), None, {})  # type: ignore[arg-type]
    assert {unit: float(loss) for unit, loss in term.losses.items()} == {"tokens": pytest.approx(6 * math.log(2))}
    assert {name: (int(value), unit) for name, (value, unit) in term.sums.items()} == {"token_accuracy": (2, "tokens")}


def test_counts_are_the_supervised_tokens() -> None:
    """2 of the response and 1 of the prompt; and 3 without a prompt, of which nothing predicts the first."""
    ids = lambda *values: np.array(values, np.int32)  # noqa: E731
    chat = Tree(ids(9, 5, 9), np.array([False, True, False]), (ids(4, 1),), 0)
    text = Tree(ids(), np.zeros(0, bool), (ids(4, 5, 1),), 1)
    assert Sft().counts([chat]) == {"tokens": 3}
    assert Sft().counts([text]) == {"tokens": 2}
    assert Sft().counts([chat, text]) == {"tokens": 5}


def test_metrics() -> None:
    assert Sft().metrics({"loss": 2 * math.log(2), "token_accuracy": 0.5}) == {
        "loss": 2 * math.log(2),
        "token_accuracy": 0.5,
        "perplexity": pytest.approx(4.0),
    }
    assert math.isfinite(Sft().metrics({"loss": 1e6})["perplexity"])
