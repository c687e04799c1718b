"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rlhf_cli.figures import Interval, with_interval
from rlhf_cli.reports.document import Block, Code, Definitions, Document, Examples, Finding, Items, Paragraph, Picture, Table
from rlhf_cli.reports.text import pieces, visible

NAME_LENGTH, PROMPT_LENGTH, RESPONSE_LENGTH, TEXT_LENGTH = 200, 400, 800, 4000
"""Characters that are shown of a name, of a prompt, of a response and of a sentence."""


def render(document: Document) -> str:
    """The text of report.md."""
    parts = [f"# {literal(document.title)}", prose(document.lead)]
    for section in document.sections:
        parts += [f"## {literal(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def literal(text: str, length: int = NAME_LENGTH) -> str:
    """Any text so that it is shown as it is, also in a cell of a table, on one line and not longer than that."""
    shown = visible(text if len(text) <= length else text[:length] + "…")
    return re.sub(r"([\\`*_\[\]|<>~$&])", r"\\\1", shown.strip("\n")).replace("\n", "<br>")


def prose(text: str) -> str:
    """A sentence; what stands between ` is code."""
    shown = text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "…"
    parts = (f"`{visible(piece)}`" if at % 2 else _escaped(piece) for at, piece in enumerate(pieces(shown)))
    return "".join(parts)


def _escaped(text: str) -> str:
    """As `literal`, but outside of tables, where a line is no end of a cell; nor is one that joins words emphasis."""
    return re.sub(r"([\\`*\[\]<>~$&]|(?<!\w)_|_(?!\w))", r"\\\1", visible(text)).replace("\n", "<br>")


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return prose(text)
        case Finding(_, head, text):
            return " ".join(part for part in (f"**{_escaped(head)}**" if head else "", prose(text)) if part)
        case Table(caption, columns, rows):
            heads = [literal(column.name) for column in columns]
            cells = ([with_interval(own) if isinstance(own, Interval) else literal(own) for own in row] for row in rows)
            return f"**{literal(caption)}**\n\n{_table(heads, cells)}"
        case Picture(title, name):
            return f"![{literal(title)}](plots/{name})"
        case Items(own):
            return "\n".join(f"- {prose(item)}" for item in own)
        case Definitions(own):
            return "\n".join(f"- **{literal(term)}**: {prose(what)}" for term, what in own)
        case Code(lines):
            return "\n".join(["```python", *lines, "```"])
        case Examples(title, own):
            return f"### {literal(title)}\n\n{_examples(block)}" if title else _examples(block)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _examples(examples: Examples) -> str:
    own, rows = examples.own, []
    noted = any(example.note for example in own)
    for example in own:
        said = [
            literal(each.text, RESPONSE_LENGTH) + (f" _({literal(each.facts)})_" if each.facts else "")
            for each in example.responses
        ]
        rows.append([literal(example.prompt, PROMPT_LENGTH), *said, *([example.note] if noted else [])])
    heads = ["prompt", *(literal(each.by) for each in own[0].responses), *(["difference"] if noted else [])]
    return _table(heads, rows)
