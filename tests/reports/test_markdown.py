"""report.md shows every text as it is, and lets only its own code be code."""

from __future__ import annotations

from rlhf_cli.figures import Interval
from rlhf_cli.reports.document import (
    Code,
    Column,
    Document,
    Example,
    Examples,
    Finding,
    Items,
    Paragraph,
    Response,
    Section,
    Table,
)
from rlhf_cli.reports.markdown import literal, prose, render


def test_sentences_are_shown_as_they_are() -> None:
    assert prose("a_b and _c_ of |m|, *not* <b>") == "a_b and \\_c\\_ of |m|, \\*not\\* \\<b\\>"
    assert prose("set `kl.coef: {a_b}` to `<x>`") == "set `kl.coef: {a_b}` to `<x>`"
    assert prose("one ` alone\x1b") == "one \\` alone\\\\x1b"


def test_cells_stay_on_their_line() -> None:
    assert literal("a|b\nc_d") == "a\\|b<br>c\\_d"
    assert literal("x" * 300) == "x" * 200 + "…"


def test_every_block() -> None:
    example = Example("Why?", (Response("before", "No", "did not end"), Response("after", "So", "")))
    blocks = (
        Paragraph("Words."),
        Finding("warning", "Drift:", "it moved."),
        Finding("note", "", "Nothing else."),
        Table("Shares", (Column("by"), Column("mean")), (("a", Interval(0.5, 0.25, 0.75)), ("b", "n/a"))),
        Items(("one", "two")),
        Code(("import x",)),
        Examples("", (example,)),
        Examples("Folded", (example,)),
    )
    samples = "| prompt | before | after |\n| --- | --- | --- |\n| Why? | No _(did not end)_ | So |"
    assert render(Document("t", "lead", (Section("s", "S", blocks),))).split("\n\n") == [
        "# t",
        "lead",
        "## S",
        "Words.",
        "**Drift:** it moved.",
        "Nothing else.",
        "**Shares**",
        "| by | mean |\n| --- | --- |\n| a | 0.500 (0.250 to 0.750) |\n| b | n/a |",
        "- one\n- two",
        "```python\nimport x\n```",
        samples,
        "### Folded",
        f"{samples}\n",
    ]
