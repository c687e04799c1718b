"""A report's files."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.files import disk_errors, write_atomic
from rlhf_cli.reports import html, markdown
from rlhf_cli.reports.document import Document, Picture, Section
from rlhf_cli.runs.folder import RunFolder


def write(run: RunFolder, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write plots/*.png, report.md and report.html, which say the same; empty sections are left out. Can be repeated."""
    report = Document(title, lead, tuple(section for section in sections if section.blocks))
    with disk_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    for block in (block for section in report.sections for block in section.blocks):
        if isinstance(block, Picture):
            write_atomic(run.plots / block.name, block.png)
    write_atomic(run.report, markdown.render(report))
    write_atomic(run.page, html.render(report))
