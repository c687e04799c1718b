"""A report's files."""

from __future__ import annotations

from rlhf_cli.files import disk_errors, write_atomic
from rlhf_cli.reports import html, markdown
from rlhf_cli.reports.document import Document, Picture
from rlhf_cli.runs.folder import RunFolder


def write(run: RunFolder, report: Document) -> None:
    """Write plots/*.png, report.md and report.html, which say the same. Can be repeated at any time."""
    with disk_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    for block in (block for section in report.sections for block in section.blocks):
        if isinstance(block, Picture):
            write_atomic(run.plots / block.name, block.png)
    write_atomic(run.report, markdown.render(report))
    write_atomic(run.page, html.render(report))
