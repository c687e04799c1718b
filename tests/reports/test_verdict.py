"""The line on top of a report, and what it says to do next."""

from __future__ import annotations

from rlhf_cli.reports.document import Finding, Items
from rlhf_cli.reports.write import in_short, verdict

BETTER = Finding("better", "", "The score rose from 1 to 2.")
WORSE = Finding("worse", "Worse than base", "(…): b's responses are preferred in 40 %.")
HACKING = Finding("warning", "Reward hacking:", "the score rose, but gold did not.")
CARD = Finding("warning", "The accuracy, 52 %, is no better than a guess. Train on more pairs.", "")


def test_warnings_come_first_and_are_named_once() -> None:
    assert verdict([BETTER, HACKING, CARD, CARD]) == Finding(
        "warning", "3 warnings:", "Reward hacking; The accuracy, 52 %, is no better than a guess."
    )


def test_without_warnings_the_first_that_tells_better_from_worse() -> None:
    assert verdict([Finding("note", "", "x"), WORSE, BETTER]) == BETTER
    assert verdict([WORSE]) == WORSE
    assert verdict([Finding("open", "", "x")]).text == "Nothing here tells better from worse."


def test_what_to_do_next() -> None:
    assert in_short([HACKING], ["Go on."]).blocks[1] == Items(
        ("First look at the warnings: each says what would mend it.", "Go on.")
    )
    assert in_short([BETTER], ["Go on."]).blocks[1] == Items(("Go on.",))
    assert len(in_short([BETTER], []).blocks) == 1
