"""Preference data from judged responses: which ones, in what order, and what is no difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.records import PlainPrompt
from rlhf_cli.evaluation.dump import pair_rows, ranked_rows
from rlhf_cli.evaluation.samples import Sample, Samples

TALK: list[dict[str, str]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "what?"},
    {"role": "user", "content": "why not?"},
]


def table(model: str, *rows: list[str], prompts: tuple[PlainPrompt, ...] = ("p0", "p1", "p2"), cut: str = "") -> Samples:
    """Responses to p0, p1, …; those that are `cut` did not end."""
    return Samples(
        model,
        tuple(
            tuple(
                Sample(model, row, number, f"f:{row + 1}", prompts[row], text, text != cut, 3, -1.0, None)
                for number, text in enumerate(texts)
            )
            for row, texts in enumerate(rows)
        ),
    )


def ranked(scores: dict[str, Any], *tables: Samples) -> list[tuple[Any, ...]]:
    rows = ranked_rows({each.model: each for each in tables}, {name: np.array(own, float) for name, own in scores.items()})
    assert all(list(row) == ["prompt", "responses", "scores", "models"] for row in rows)
    return [tuple(row.values()) for row in rows]


def test_all_models_together_the_best_first() -> None:
    """Prompt by prompt; equal scores stay in the order of the models."""
    one, two = table("one", ["a", "b"], ["c", "d"]), table("two", ["e", "f"], ["g", "h"])
    assert ranked({"one": [[1, 3], [0, -2]], "two": [[4, 2], [0, 5]]}, one, two) == [
        ("p0", ["e", "b", "f", "a"], [4, 3, 2, 1], ["two", "one", "two", "one"]),
        ("p1", ["h", "c", "g", "d"], [5, 0, 0, -2], ["two", "one", "two", "one"]),
    ]


@pytest.mark.parametrize("other", ["", "  \n", "x\0y", "cut off"], ids=["empty", "blank", "NUL", "cut off"])
def test_a_response_that_no_stage_should_learn_from_is_left_out(other: str) -> None:
    """Of three the other two are ranked; of two there is nothing to rank."""
    both = table("one", ["a", other, "b"], ["c", other, other], cut="cut off")
    assert ranked({"one": [[1, 9, 2], [1, 9, 0]]}, both) == [("p0", ["b", "a"], [2, 1], ["one", "one"])]
    versus = table("two", [other, "a", "e"], ["d", other, "c"], cut="cut off")
    rows = pair_rows({"one": both, "two": versus}, {("one", "two"): np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])})
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("e", "b"), ("c", "d")]


def test_texts_that_differ_in_white_space_around_them_are_one() -> None:
    """Rows are read without it, and two ranks of one response would be refused."""
    both = table("one", ["a", "a\n", "b"])
    assert ranked({"one": [[1, 9, 2]]}, both) == [("p0", ["b", "a"], [2, 1], ["one", "one"])]
    versus = table("two", [" a", "a", "b\x1c"])
    assert pair_rows({"one": both, "two": versus}, {("one", "two"): np.array([[1.0, 0.0, 1.0]])}) == []


def test_a_text_that_is_said_twice_stands_once() -> None:
    """As the first that said it, with its score; if only one text is left there is no ranking."""
    one, two = table("one", ["a", "a"], ["b", "b"]), table("two", ["c", "a"], ["b", "b"])
    assert ranked({"one": [[1, 7], [1, 2]], "two": [[2, 8], [3, 4]]}, one, two) == [("p0", ["c", "a"], [2, 1], ["two", "one"])]


def test_scores_that_differ_by_rounding_are_no_ranking() -> None:
    """Below 1e-5, also after a large score; and a tie is not broken by it where others differ."""
    one = table("one", ["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"])
    scores = [[0.5, 0.500004, 0.499996], [0.1, 0.10002, 0.1], [7.000004, 2.0, 7.0]]
    assert ranked({"one": scores}, one) == [
        ("p1", ["e", "d", "f"], [0.10002, 0.1, 0.1], ["one"] * 3),
        ("p2", ["g", "i", "h"], [7, 7, 2], ["one"] * 3),
    ]
    swapped = [[0.5, 0.5, 0.5], [0.1, 0.1, 0.1], [7.0, 2.0, 7.000004]]
    assert ranked({"one": swapped}, one) == [("p2", ["g", "i", "h"], [7, 7, 2], ["one"] * 3)]


def test_a_conversation_stays_one() -> None:
    one, two = (table(name, [f"by {name}"], prompts=(TALK,)) for name in ("one", "two"))
    assert ranked({"one": [[1]], "two": [[2]]}, one, two) == [(TALK, ["by two", "by one"], [2, 1], ["two", "one"])]
    assert pair_rows({"one": one, "two": two}, {("one", "two"): np.array([[0.0]])}) == [
        {"prompt": TALK, "chosen": "by two", "rejected": "by one", "models": ["two", "one"]}
    ]


def test_pairs_of_wins_and_losses_and_none_of_ties() -> None:
    """Nor of a share of wins, nor of what was not judged."""
    tables = {
        "one": table("one", ["a", "b", "c"], ["d", "e", "f"]),
        "base": table("base", ["g", "h", "i"], ["j", "k", "l"]),
        "two": table("two", ["m", "n", "o"], ["p", "q", "r"]),
    }
    judged = {
        ("one", "base"): np.array([[1.0, 0.0, 0.5], [0.75, np.nan, 1.0]]),
        ("two", "base"): np.array([[0.5, 0.5, 0.5], [0.5, 0.0, 0.5]]),
    }
    assert [tuple(row.values()) for row in pair_rows(tables, judged)] == [
        ("p0", "a", "g", ["one", "base"]),
        ("p0", "h", "b", ["base", "one"]),
        ("p1", "f", "l", ["one", "base"]),
        ("p1", "k", "q", ["base", "two"]),
    ]
