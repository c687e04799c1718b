"""A report's files, and what stands on top of every report: in one line what its findings come to, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf_cli.figures import count
from rlhf_cli.files import disk_errors, write_atomic
from rlhf_cli.reports import html, markdown
from rlhf_cli.reports.document import Document, Finding, Items, Picture, Section
from rlhf_cli.runs.folder import RunFolder


def write(
    run: RunFolder, title: str, lead: str, found: Sequence[Finding], then: Iterable[str], sections: Iterable[Section]
) -> None:
    """Write plots/*.png, report.md and report.html, which say the same; empty sections are left out. Can be repeated."""
    parts = tuple(section for section in (in_short(found, then), *sections) if section.blocks)
    report = Document(f"{run.path.resolve().name}: {title}", lead, parts)
    with disk_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    for block in (block for section in report.sections for block in section.blocks):
        if isinstance(block, Picture):
            write_atomic(run.plots / block.name, block.png)
    write_atomic(run.report, markdown.render(report))
    write_atomic(run.page, html.render(report))


def in_short(found: Sequence[Finding], then: Iterable[str]) -> Section:
    """The verdict; `then`: what to do next, sentence by sentence."""
    mend = ["First look at the warnings: each says what would mend it."] if _warnings(found) else []
    items = (*mend, *then)
    return Section("verdict", "In short", (verdict(found), *([Items(items)] if items else [])))


def verdict(found: Sequence[Finding]) -> Finding:
    """The warnings by their heads; without one what is better, or else worse; else that nothing was told apart."""
    if warnings := _warnings(found):
        heads = dict.fromkeys((each.head or each.text).partition(". ")[0].rstrip(":.") for each in warnings)
        return Finding("warning", f"{count(len(warnings), 'warning')}:", "; ".join(heads) + ".")
    told = [each for kind in ("better", "worse") for each in found if each.kind == kind]
    of_unseen_rows = [each for each in told if "held-out" in each.text.lower()]  # they say more than those that were learned
    return next(iter(of_unseen_rows or told), Finding("open", "", "Nothing here tells better from worse."))


def _warnings(found: Sequence[Finding]) -> list[Finding]:
    return [each for each in found if each.kind == "warning"]
