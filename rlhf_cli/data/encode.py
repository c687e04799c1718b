"""Records become token trees: rendered, tokenised in batches, fitted to max_length, counted, and cached."""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data import cache as store
from rlhf_cli.data import sandbox, stored, templates, turns
from rlhf_cli.data.flat import Flattener, Trees, select
from rlhf_cli.data.formats import Taken
from rlhf_cli.data.records import BadRow, Facts, Message, Prompt, Record, remedies
from rlhf_cli.data.sandbox import TookTooLong, memory_limit, time_limit
from rlhf_cli.data.stored import Stored
from rlhf_cli.data.templates import ChatFormat, Template, tokenise
from rlhf_cli.data.trees import Tree, span
from rlhf_cli.data.turns import Letters, Rendered, check_text, read_letters, render_row, supervised
from rlhf_cli.errors import UsageError

CHUNK = 1000  # rows that are rendered and tokenised at a time
EXAMPLES = 5  # lost rows that are named one by one
TIMEOUTS = 3  # rows on which a template may use up its time before it is refused
TRIES = 8  # cutting n tokens' worth of text may save a few less: the cut is repeated until the row fits
READY = "ready-made texts, with a BOS or an end of their own: {count:,}; neither is written twice"
AS_DRAWN = sections.Data(train=[], max_length=sys.maxsize, control_tokens="keep")
"""How drawn text is encoded: whatever the policy wrote, and however long it is, has to get its score."""
WITH_OFFSETS = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}


@dataclass(frozen=True)
class Encoded:
    """Trees, and what became of the rows they were made from."""

    trees: Trees
    read: int
    kept: int
    lost: dict[str, int]  # reason → rows
    truncated_rows: tuple[int, ...]  # of those kept
    examples: tuple[str, ...]  # the first lost rows: "where: reason: detail"
    eos_share: float | None  # responses that end in their end-of-turn or EOS, of those that fit max_length; None: no responses
    percentiles: dict[str, dict[str, int]]  # prompt | response (the longest) | total → p50 | p90 | p99 | max, before max_length;
    # of prompts without responses: prompt alone
    notices: tuple[str, ...] = ()  # for the console

    @property
    def truncated(self) -> int:
        return len(self.truncated_rows)


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    template: Template,
    data: sections.Data,
    *,
    responses: Taken,
    cache: Path | None,
    reserve: int = 0,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Encoded:
    """Tokenises the first, all or none of the responses of each record, or reads the same tokens from the `cache` folder.

    Earlier assistant turns are supervised for `first` alone: comparing responses says nothing about a prompt they share.
    `none`: trees without responses, whose prompts leave `reserve` tokens of max_length free; facts about responses are dropped.
    Raises UsageError if the template or every row is unusable, or (overlong: error) a row is too long.
    """
    encoder = _Encoder(records, tokenizer, template, data, responses, reserve, progress)
    if cache is None:
        return _restore(encoder.run(), records, responses)
    path = cache / f"tokens-{store.key(encoder.key_parts())}.safetensors"
    notices: tuple[str, ...] = ()
    try:
        kept = store.read(path)
    except store.Damaged as damaged:
        kept, notices = None, (f"{damaged}: damaged; its tokens are made again",)
    if kept is None:
        kept = encoder.run()
        if store.write(path, kept):
            kept = store.read(path) or kept  # mapped, and no longer in memory
    encoded = _restore(kept, records, responses)
    return replace(encoded, notices=(*notices, *encoded.notices))


def _restore(kept: store.Stored, records: Sequence[Record], responses: Taken) -> Encoded:
    """Adds what the cache does not know: where rows stand and what is said of them, which may change while their text stays."""
    said, rows = dict(kept.facts), kept.arrays["rows"]
    examples = tuple(f"{records[row].where}: {text}" for row, text in said.pop("examples"))
    used = stored.take(records, rows) if len(rows) < len(records) else records
    locations = stored.each(used, lambda record: record.where, Stored.places)
    facts: list[Facts] = stored.each(used, lambda record: record.facts, Stored.all_facts)
    if responses == "none":
        facts = [own if own == Facts() else Facts(subset=own.subset) for own in facts]
    trees = Trees(**kept.arrays, locations=tuple(locations), facts=tuple(facts))
    truncated, notices = (tuple(said.pop(name)) for name in ("truncated", "notices"))
    return Encoded(trees, len(records), len(trees), truncated_rows=truncated, examples=examples, notices=notices, **said)


def _unusable(rows: int, lost: Counter[str], first: str) -> UsageError:
    counts = ", ".join(f"{reason} ({count})" for reason, count in lost.most_common())
    advice = remedies(lost).removesuffix(", ")
    return UsageError(f"none of {rows} rows can be used: {counts}\nthe first: {first}" + (f"\n{advice}" if advice else ""))


def checked(encoded: Encoded, check: Callable[[Tree], str | None]) -> Encoded:
    """Without the trees that `check` has a reason against: these rows are lost. Raises UsageError if none is left."""
    faults = {i: fault for i, tree in enumerate(encoded.trees) if (fault := check(tree)) is not None}
    if not faults:
        return encoded
    lost = Counter(encoded.lost) + Counter(faults.values())
    named = [f"{encoded.trees.locations[i]}: {fault}" for i, fault in faults.items()]
    kept = np.array([i for i in range(encoded.kept) if i not in faults], np.int64)
    if not len(kept):
        raise _unusable(encoded.read, lost, named[0])
    trees = select(encoded.trees, kept)
    return replace(
        encoded,
        trees=trees,
        kept=len(trees),
        lost=dict(lost),
        truncated_rows=tuple(sorted(set(encoded.truncated_rows) & set(trees.rows.tolist()))),
        examples=(*encoded.examples, *named)[:EXAMPLES],
    )


def same_tokens(tree: Tree) -> str | None:
    """Why the tree cannot be compared: what told its responses apart was cut off, or is nothing to the tokenizer."""
    responses = [response.tobytes() for response in tree.responses]
    ranked = set(zip(responses, tree.facts.ranks or range(len(responses)), strict=True))
    return "a better and a worse response are the same, cut and tokenised" if len(ranked) > len(set(responses)) else None


@dataclass
class _Encoder:
    """Makes trees of records, and counts what becomes of them."""

    records: Sequence[Record]
    tokenizer: Any
    template: Template
    data: sections.Data
    responses: Taken
    reserve: int  # tokens of max_length that are kept free
    progress: Callable[[int, int], None]  # is told how many of how many rows are done
    lost: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str]] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("i"))  # of each row: tokens of the prompt, the longest response, both
    truncated: list[int] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)  # what is to be said of rows, with their number

    @property
    def find_turns(self) -> bool:
        return self.responses == "first" and self.data.train_on != "last"

    @property
    def room(self) -> int:
        """Tokens of a prompt and its longest response."""
        return self.data.max_length - self.reserve

    @cached_property
    def form(self) -> ChatFormat:
        return templates.read_chat_format(self.tokenizer, self.template)

    @cached_property
    def letters(self) -> Letters:
        return read_letters(self.tokenizer)

    def key_parts(self) -> Iterator[str]:
        """All that the tokens depend on."""
        import tokenizers
        import transformers

        yield store.source_hash(__file__, *(str(module.__file__) for module in (sandbox, templates, turns)))
        yield json.dumps([transformers.__version__, tokenizers.__version__])
        tokenise(self.tokenizer, [""])  # forgets padding and truncation left from other calls, which would be serialised
        yield self.tokenizer.backend_tokenizer.to_str()
        yield json.dumps([self.tokenizer.special_tokens_map, self.template.text])
        data, drawn = self.data, self.responses == "none"
        yield json.dumps(
            [data.max_length, data.overlong, data.control_tokens, data.empty_think, self.find_turns, drawn, self.reserve]
        )
        if isinstance(self.records, Stored | stored.Records):
            yield stored.digest(self.records)
            return
        for record in map(self.taken, self.records):
            yield json.dumps([record.prompt, record.responses, record.given])

    def run(self) -> store.Stored:
        """The trees and the counts, as the cache keeps them."""
        flat = Flattener()
        for start in range(0, len(self.records), CHUNK):
            rows = range(start, min(start + CHUNK, len(self.records)))
            flat.add([kept for tree in self.tokenise(self.render(rows)) if (kept := self.fitted(tree))])
            self.progress(rows.stop, len(self.records))
        arrays = flat.arrays()
        if self.records and not len(arrays["rows"]):
            row, text = self.examples[0]
            raise _unusable(len(self.records), self.lost, f"{self.records[row].where}: {text}")
        last = arrays["ids"][np.delete(arrays["segments"][1:], arrays["first"][:-1]) - 1]
        ended = np.isin(last, [self.form.end_ids[-1], self.form.eos_id])
        sizes = np.frombuffer(self.sizes, np.int32).reshape(-1, 3)
        names = ("prompt", "response", "total") if self.responses != "none" else ("prompt",)
        facts = {
            "lost": dict(self.lost),
            "truncated": self.truncated,
            "examples": self.examples,
            "eos_share": float(ended.mean()) if len(last) else None,
            "percentiles": {name: _percentiles(sizes[:, k]) for k, name in enumerate(names)},
            "notices": [words.format(count=count) for words, count in sorted(self.said.items()) if count],
        }
        return store.Stored(arrays, facts)

    def lose(self, row: int, bad: BadRow) -> None:
        self.lost[bad.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((row, str(bad)))

    def taken(self, record: Record) -> Record:
        """The record with those of its responses that are tokenised."""
        return record if self.responses == "all" else record._replace(responses=record.responses[: self.responses == "first"])

    def written(self, record: Record) -> Rendered:
        return render_row(self.form, record, find_turns=self.find_turns, learn_empty_think=self.data.empty_think == "learn")

    def render(self, rows: range) -> list[tuple[int, Rendered]]:
        rendered = []
        with memory_limit(), time_limit() as start:
            for row, record in zip(rows, self.records[rows.start : rows.stop], strict=True):
                record = self.taken(record)
                try:
                    start()
                    if self.responses == "none" and not record.prompt:
                        raise BadRow("no prompt")
                    if self.responses != "none" and not record.responses:
                        raise BadRow("no response")
                    if self.data.control_tokens == "reject":
                        check_text(self.form, record)
                    written = self.written(record)
                    self.said.update(written.said)
                    self.said[READY] += not record.prompt and written.responses != record.responses
                    rendered.append((row, written))
                except BadRow as bad:
                    self.lose(row, bad)
                    if isinstance(bad, TookTooLong) and self.lost[bad.reason] == TIMEOUTS:
                        raise UsageError(f"chat template ({self.template.source}): {record.where}: {bad}") from None
        return rendered

    def tokenise(self, rendered: Sequence[tuple[int, Rendered]]) -> list[Tree]:
        """Prompts and responses are tokenised apart, each in one batch; a response as it reads after its anchor."""
        anchor = self.form.anchor
        prompts = self._tokenise_prompts([text for _, text in rendered])
        texts = [(anchor if text.prompt else "", response) for _, text in rendered for response in text.responses]
        anchored = tokenise(self.tokenizer, [before + response for before, response in texts])
        length = len(tokenise(self.tokenizer, [anchor])[0])
        answers = iter([ids[length:] if before else ids for (before, _), ids in zip(texts, anchored, strict=True)])
        return [
            Tree(prompt, mask, tuple(np.array([*next(answers), *text.end_ids], np.int32) for _ in text.responses), row)
            for (row, text), (prompt, mask) in zip(rendered, prompts, strict=True)
        ]

    def _tokenise_prompts(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, supervised) of each prompt; offsets, which are slow, are asked for only where there are turns to find."""
        prompts = []
        plain = iter(tokenise(self.tokenizer, [text.prompt for text in rendered if not text.turns]))
        spoken = [text.prompt for text in rendered if text.turns]
        batch = self.tokenizer(spoken, **WITH_OFFSETS) if spoken else {}
        located = zip(batch.get("input_ids", []), batch.get("offset_mapping", []), strict=True)
        for text in rendered:
            ids, offsets = next(located) if text.turns else (next(plain), [])
            mask = supervised(self.letters, np.array(ids), np.array(offsets), text.turns) if text.turns else np.zeros(0, bool)
            prefix = list(self.form.prefix)
            full = ids if ids[: len(prefix)] == prefix else [*prefix, *ids]  # never two BOS
            prompts.append((np.array(full, np.int32), np.concatenate([np.zeros(len(full) - len(mask), bool), mask])))
        return prompts

    def fitted(self, tree: Tree) -> Tree | None:
        """The tree, fitted to max_length; None if it cannot be used."""
        alone, total = self.responses == "none", span(tree)
        self.sizes.extend((len(tree.prompt), total - len(tree.prompt), total))
        try:
            fitted = tree if total <= self.room else self._fitted(tree)
            if alone and not len(fitted.prompt):
                raise BadRow("no prompt", "its text is nothing to the tokenizer")
            if not alone and not len(fitted.prompt) and max(map(len, fitted.responses)) < 2:
                raise BadRow("no supervised token", "one token alone has nothing to be predicted from")
        except BadRow as bad:
            self.lose(tree.row, bad)
            return None
        if fitted is not tree:
            self.truncated.append(tree.row)
        return fitted

    def _fitted(self, tree: Tree) -> Tree:
        """The tree that is too long as `data.overlong` wants it; responses that are cut have no end-of-turn."""
        tokens = span(tree) + self.reserve
        free = f", {self.reserve} of them for the response" if self.reserve else ""
        match self.data.overlong:
            case "truncate-prompt":
                return self._cut_prompt(tree.row)
            case "truncate-response" if (room := self.room - len(tree.prompt)) > 0:
                return tree._replace(responses=tuple(response[:room] for response in tree.responses))
            case "truncate-response":
                raise _too_long(tokens, f", {len(tree.prompt)} of them in the prompt")
            case "drop":
                raise _too_long(tokens, free)
        choices = "drop or truncate-prompt" if self.responses == "none" else "drop, truncate-prompt or truncate-response"
        raise UsageError(
            f"{self.records[tree.row].where}: {tokens} tokens{free}, but data.max_length is {self.data.max_length}\n"
            f"raise it, or set data.overlong to {choices}"
        )

    def _cut_prompt(self, row: int) -> Tree:
        """Drops the oldest exchanges, system turns excepted, then the beginning of the last user turn.

        The text is cut and rendered again, so the template stays whole. Raises BadRow if no text of the prompt would be left.
        """
        prompt = self.records[row].prompt
        for shorter in _without_oldest(prompt):
            prompt = shorter
            if span(tree := self._encode_one(row, prompt)) <= self.room:
                return tree
        for _ in range(TRIES):
            tree = self._encode_one(row, prompt)
            if (excess := span(tree) - self.room) <= 0:
                return tree
            text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt and prompt[-1].role == "user" else ""
            offsets = self.tokenizer(text, **WITH_OFFSETS)["offset_mapping"]
            rest = text[max(1, offsets[excess][0]) :] if excess < len(offsets) else ""
            if not rest.strip():
                raise _too_long(
                    span(tree) + self.reserve,
                    ", too many even without what can be cut: old exchanges, and the text of a last user turn",
                )
            prompt = rest if isinstance(prompt, str) else (*prompt[:-1], prompt[-1]._replace(content=rest))
        raise _too_long(span(tree) + self.reserve)

    def _encode_one(self, row: int, prompt: Prompt) -> Tree:
        with memory_limit(), time_limit():
            rendered = self.written(self.taken(self.records[row])._replace(prompt=prompt))
        return self.tokenise([(row, rendered)])[0]


def _too_long(tokens: int, detail: str = "") -> BadRow:
    """The one reason under which these rows are counted."""
    return BadRow("longer than data.max_length", f"{tokens} tokens{detail}")


def _without_oldest(prompt: Prompt) -> Iterator[tuple[Message, ...]]:
    """Ever shorter prompts that begin at a later user turn, after the system turns that stood first."""
    if isinstance(prompt, str):
        return
    systems = next((k for k, message in enumerate(prompt) if message.role not in ("system", "developer")), len(prompt))
    for k in range(systems + 1, len(prompt)):
        if prompt[k].role == "user":
            yield prompt[:systems] + prompt[k:]


def _percentiles(sizes: np.ndarray) -> dict[str, int]:
    """Nearest rank: each is the length of some row."""
    if not len(sizes):
        return {}
    values = np.percentile(sizes, [50, 90, 99, 100], method="inverted_cdf")
    return dict(zip(("p50", "p90", "p99", "max"), map(int, values), strict=True))


def show_example(tree: Tree, tokenizer: Any) -> list[tuple[str, bool]]:
    """The tree as text, cut where supervision starts or ends: (piece, is it supervised); several responses on a line each."""
    edges = [0, *(np.flatnonzero(np.diff(tree.supervised)) + 1), len(tree.prompt)]
    pieces = [(tree.prompt[a:b], bool(tree.supervised[a])) for a, b in pairwise(edges) if a < b]
    pieces += [(response, True) for response in tree.responses]
    shown = [(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), flag) for ids, flag in pieces]
    if len(tree.responses) == 1:
        return shown
    first = len(shown) - len(tree.responses)
    return [*shown[:first], *(part for piece in shown[first:] for part in (("\n", False), piece))]
