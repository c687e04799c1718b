"""A stage's data, from the recipe's section to token trees, and what became of every row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import comb
from typing import Any

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource
from rlhf_cli.data.cache import default_folder
from rlhf_cli.data.encode import Encoded, checked, encode, same_tokens
from rlhf_cli.data.flat import Trees
from rlhf_cli.data.records import Record
from rlhf_cli.data.requests import RowRequest, SourceReport
from rlhf_cli.data.sources import BEYOND_LIMIT, Reading, check_lost, read_data
from rlhf_cli.data.templates import Template
from rlhf_cli.data.trees import Tree, located
from rlhf_cli.errors import UsageError

OF_TRANSCRIPTS = (
    "data.train_on: last, for these are transcripts, whose earlier assistant turns are often the rejected answers of other rows; "
    "all learns them too"
)


@dataclass(frozen=True)
class Dataset:
    """Encoded rows to train on and, where the recipe holds some out, to evaluate on."""

    reading: Reading
    train: Encoded
    held_out: Encoded | None

    @property
    def fingerprints(self) -> dict[str, str]:
        return {report.path: report.fingerprint for report in (*self.reading.reports, *self.reading.eval_reports)}

    @property
    def longest(self) -> int:
        return max(int(part.trees.lengths.max()) for part in (self.train, self.held_out) if part is not None)

    def check_ids(self, size: int, tokenizer: Any, model: str) -> None:
        """UsageError for a token that a model with so many embeddings does not know."""
        check_ids(self.train.trees, self.reading.train, size, tokenizer, model)
        if self.held_out is not None:
            check_ids(self.held_out.trees, self.reading.held_out, size, tokenizer, model)

    def map_trees(self, change: Callable[[Trees], Trees]) -> Dataset:
        """The same rows as other trees, whose `rows` still name their records; what was counted stays."""
        train, held_out = (e and dataclasses.replace(e, trees=change(e.trees)) for e in (self.train, self.held_out))
        assert train is not None
        return dataclasses.replace(self, train=train, held_out=held_out)

    def source(self, train: sections.Train, data: sections.Data, seed: int) -> DatasetSource:
        """Its training rows as global batches."""
        kept, _ = np.histogram(self.train.trees.rows, np.cumsum((0, *self.reading.sizes)))
        return DatasetSource(self.train.trees, tuple(kept.tolist()), self.reading.shares, train.batch_size, seed, data.shuffle)


def prepare(data: sections.Data, request: RowRequest, tokenizer: Any, template: Template) -> Dataset:
    """Read, check and tokenise, or find the same tokens in the cache.

    Raises UsageError if rows, columns or files are wrong, or more than `data.max_lost` of the rows would be lost.
    """
    reading = read_data(data, dataclasses.replace(request, chat=template.text is not None))
    responses, reserve = request.purpose.use.responses, request.reserve
    checks = ([same_tokens] if responses == "all" else []) + ([request.check] if request.check else [])
    notices = tuple(dict.fromkeys(said for report in (*reading.reports, *reading.eval_reports) for said in report.notices))
    if isinstance(data, sections.SftData) and data.train_on == "auto" and any(report.transcripts for report in reading.reports):
        data = dataclasses.replace(data, train_on="last")
        notices += (OF_TRANSCRIPTS,) if responses == "first" else ()

    def trees_of(records: Sequence[Record]) -> Encoded:
        encoded = encode(
            records,
            tokenizer,
            template,
            data,
            responses=responses,
            cache=default_folder(),
            reserve=reserve,
            progress=partial(request.progress, "tokenised"),
        )
        if request.separator is not None:
            encoded = _with_steps(encoded, tokenizer, request.separator, data.overlong == "truncate-response")
        encoded = reduce(checked, checks, encoded)
        return dataclasses.replace(encoded, notices=(*notices, *encoded.notices))

    dataset = Dataset(reading, trees_of(reading.train), trees_of(reading.held_out) if reading.held_out else None)
    _check_lost(dataset, data.max_lost)
    return dataset


def _with_steps(encoded: Encoded, tokenizer: Any, separator: str, cut: bool) -> Encoded:
    """With where the steps of each response end; nowhere, where its tokens have other steps than the row.

    `cut`: rows that were too long lack their end. They lose the step in which they were cut, and those after it.
    """
    facts, truncated, lost = [], set(encoded.truncated_rows) if cut else set(), 0
    for tree in encoded.trees:
        (found,), count = located(tree, tokenizer, separator).facts.ends or ((),), len(tree.facts.steps or ())
        kept = found[:-1] if tree.row in truncated else found if len(found) == count else ()
        lost += (count - len(kept)) * (tree.row in truncated)
        facts.append(tree.facts._replace(ends=(kept,)))
    said = [f"{lost:,} steps are not learned: data.max_length cuts their rows before they end"] if lost else []
    trees = dataclasses.replace(encoded.trees, facts=tuple(facts))
    return dataclasses.replace(encoded, trees=trees, notices=(*encoded.notices, *said))


def check_ids(trees: Sequence[Tree], records: Sequence[Record], size: int, tokenizer: Any, model: str) -> None:
    """UsageError for a token that a model with so many embeddings does not know; `records` are those that trees name."""
    if isinstance(trees, Trees) and trees.ids.max(initial=0) < size:
        return
    for tree in trees:
        for part in (tree.prompt, *tree.responses):
            if len(beyond := part[part >= size]):
                token = f"{tokenizer.convert_ids_to_tokens(int(beyond[0]))!r} ({beyond[0]})"
                raise UsageError(
                    f"{records[tree.row].where}: the token {token} is beyond the embeddings of {model}, which has {size:,}\n"
                    "  the tokenizer has grown and the weights have not: take that token out of the data, or another model"
                )


def _check_lost(dataset: Dataset, max_lost: float) -> None:
    """Bad rows, dropped ones and truncated ones together, training and evaluation apart."""
    reading = dataset.reading
    shared = [e for e in (dataset.train, dataset.held_out) if e is not None]
    split = [(reading.reports, shared[:1]), (reading.eval_reports, shared[1:])]
    for reports, encoded in split if reading.eval_reports else [(reading.reports, shared)]:
        bad = sum(sum(r.bad.values()) for r in reports)
        used = sum(e.read for e in encoded)
        # Reading sees the whole file, encoding what `limit` left of it: its losses count as if it had seen all.
        good = max(used, sum(r.kept + r.unused.get(BEYOND_LIMIT, 0) for r in reports))
        lost = bad + round(sum(sum(e.lost.values()) + e.truncated for e in encoded) * good / max(1, used))
        check_lost(
            lost, bad + good, max_lost, [x for r in reports for x in r.bad_examples] + [x for e in encoded for x in e.examples]
        )


def data_report(dataset: Dataset) -> dict[str, Any]:
    """data.json: rows read, kept, dropped by reason and truncated, lengths, and the share that ends in its EOS."""
    reading = dataset.reading
    report: dict[str, Any] = {"train": _split(dataset.train, reading.reports), "eval": None}
    if dataset.held_out is not None:
        report["eval"] = _split(dataset.held_out, reading.eval_reports)
        report["train"]["held_out"] = 0 if reading.eval_reports else dataset.held_out.read
    return report


def _split(encoded: Encoded, reports: list[SourceReport]) -> dict[str, Any]:
    return {
        "read": sum(report.read for report in reports) or encoded.read,
        "kept": encoded.kept,
        **_contents(encoded.trees),
        "dropped": dict(sum((Counter(report.bad) for report in reports), Counter(encoded.lost))),
        "unused": dict(sum((Counter(report.unused) for report in reports), Counter())),
        "truncated": encoded.truncated,
        "eos_share": encoded.eos_share,
        "lengths": encoded.percentiles,
        "examples": [x for report in reports for x in report.bad_examples] + list(encoded.examples),
        "sources": [dataclasses.asdict(report) for report in reports],
    }


def _contents(trees: Trees) -> dict[str, Any]:
    """What there is to compare, where there is: judged responses, or several to a prompt and the pairs that are not tied."""
    labels = [facts.label for facts in trees.facts if facts.label is not None]
    if labels:
        return {"labels": {"desirable": labels.count(True), "undesirable": labels.count(False)}}
    if stepwise := [(facts.steps, len(facts.ends[0])) for facts in trees.facts if facts.steps and facts.ends]:
        kept, read = [p > 0.5 for own, found in stepwise for p in own[:found]], sum(len(own) for own, _ in stepwise)
        return {"steps": {"kept": len(kept), "cut": read - len(kept), "right": sum(kept)}}
    counts = np.diff(trees.first) - 1
    if counts.max(initial=0) < 2:
        return {}
    ties = sum(comb(n, 2) for facts in trees.facts if facts.ranks for n in Counter(facts.ranks).values())
    return {"responses": int(counts.sum()), "pairs": int((counts * (counts - 1) // 2).sum()) - ties}
