"""A report's files."""

from __future__ import annotations

from rlhf_cli.files import write_atomic
from rlhf_cli.reports import html, markdown
from rlhf_cli.reports.document import Document
from rlhf_cli.runs.folder import RunFolder


def write(run: RunFolder, report: Document) -> None:
    """Write report.md and report.html, which say the same."""
    write_atomic(run.report, markdown.render(report))
    write_atomic(run.page, html.render(report))
