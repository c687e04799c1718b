"""The reference's log-probabilities: computed once, token by token, and kept in a store that all runs share.

The store's folder has one subfolder per weights; in it lie shards, files that are written whole and never changed. A shard holds
rows: the digest of a prompt with one response, and the log-probability of each token of that response. So data sets, stages,
resumed runs and sweeps share whatever prompts and responses they have in common.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch

from rlhf_cli.console import Console, clock
from rlhf_cli.data import cache
from rlhf_cli.data.flat import Trees
from rlhf_cli.data.trees import Tree, supervised_tokens, tree_length
from rlhf_cli.errors import NumberError
from rlhf_cli.files import read_json
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import Passes, parts
from rlhf_cli.runs.manifest import weights_hash
from rlhf_cli.training.step import within_memory

WHAT = "reference log-probabilities"
CHUNK_PASSES = 4
"""Passes of each rank between two exchanges of results: few are lost with a killed run, and rows still pack well."""

FLUSH_SECONDS = 60.0
"""Work that a killed run may lose, but for the chunk in hand."""

CHECKED = 8
"""Stored responses that are computed again at every load."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest mean difference of a stored response's log-probabilities from those computed again, in nats per token. Logits between
16 and 32 are 0.125 apart in bfloat16 and 0.016 in float16, and another packing rounds them differently."""

INDIFFERENT = frozenset({"base_model_name_or_path", "revision", "lora_dropout", "inference_mode", "peft_version", "task_type"})
"""Entries of adapter_config.json that change no value of a forward pass in evaluation mode."""

CODE = (
    "data/trees.py",
    "models/attention.py",
    "models/backbone.py",
    "models/body.py",
    "models/logps.py",
    "training/reference.py",
)
"""What computes; another version of it never reads what this one wrote."""


def weights_key(backbone: Backbone, base: str, adapter: Path | None) -> str:
    """The name of all that log-probabilities depend on besides the tokens.

    `base` is the hash of the base's weights and `adapter` the folder of the LoRA adapter on them (or merged into them in memory),
    None for the bare base. The backbone gives the architecture, the dtypes and the quantisation.
    """
    config = {k: v for k, v in backbone.model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    package, adapter_key = Path(__file__).parents[1], ""
    if adapter is not None:
        found = read_json(adapter / "adapter_config.json")
        # PEFT writes sets of module names as lists in any order.
        settings = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in found.items() if k not in INDIFFERENT}
        adapter_key = cache.key((weights_hash(adapter), json.dumps(settings, sort_keys=True)))
    return cache.key(
        (
            base,
            adapter_key,
            json.dumps(config, sort_keys=True, default=str),
            str(backbone.compute_dtype),
            cache.source_hash(*(str(package / name) for name in CODE)),
            *(version(name) for name in ("torch", "transformers", "peft")),
        )
    )


def reference_logps(
    passes: Passes,
    role: str,
    datasets: Sequence[Trees],
    *,
    reached: Sequence[np.ndarray],
    key: str,
    console: Console,
    folder: Path | None,
) -> list[Trees]:
    """The same trees with `reference` filled under `role`: from the store where it has them, else computed and stored.

    NaN stands at prompt tokens, where nothing predicts a token, the first after an empty prompt, and in trees that the run does
    not come to; all else is finite. `reached`: of each data set (T,) bool, the trees that it does come to. `key` is of
    `weights_key`, `folder` the cache's (None: nothing is stored). Every rank must call it; rank 0 alone reads and writes it.

    NumberError: a computed log-probability is not finite; it is not stored.
    MachineError: memory runs out with a single tree in a pass.
    """
    passes, ranks = replace(passes, backbone=passes.backbone.at(role)), passes.ranks
    table = _Table.of(datasets, reached)
    shards = None if folder is None else folder / "reference" / key
    read = table.read(shards, console) if shards is not None and ranks.main else []
    table.values[:] = ranks.gather(table.values if ranks.main else None)[0]
    work = _Work(passes, role, datasets, table)

    known = table.known
    if known.any() and (difference := work.difference(known)) > TOLERANCE[passes.backbone.compute_dtype]:
        console.warn(
            f"{WHAT}: those in {shards} are not this model's (they differ by {difference:.2g} nats per token); "
            "they are set aside and all are computed again"
        )
        for path in read:
            with contextlib.suppress(OSError):  # another process was first, or the folder cannot be written
                path.replace(path.with_suffix(".wrong"))
        table.values[:] = np.nan
        known[:] = False

    started = time.monotonic()
    found, total = int(known.sum()), len(known)
    if found < total:
        work.fill(shards, console)
    console.say(
        f"{WHAT}: {found:,} of {total:,} from the store"
        + (f", {total - found:,} computed in {time.monotonic() - started:.0f} s" if found < total else "")
    )
    return [table.filled(dataset, numbers) for dataset, numbers in zip(datasets, table.numbers, strict=True)]


@dataclass(frozen=True)
class _Table:
    """The U different responses to the same prompt, numbered in the order of their first places, and what is known of them.

    Those of trees that the run does not come to are not among them.
    """

    keys: dict[bytes, int]  # digest → number
    places: list[tuple[int, int, int]]  # (U,) data set, tree and response where each stands first
    offsets: np.ndarray  # (U + 1,) int64: response u's predicted tokens are offsets[u] … offsets[u + 1] − 1 of all values
    numbers: list[list[int]]  # of each data set's responses, tree by tree; -1: of a tree that the run does not come to
    values: np.ndarray  # (offsets[U],) float32: NaN where it is not known

    @classmethod
    def of(cls, datasets: Sequence[Trees], reached: Sequence[np.ndarray]) -> _Table:
        keys: dict[bytes, int] = {}
        places: list[tuple[int, int, int]] = []
        lengths: list[int] = []
        numbers: list[list[int]] = []
        for d, dataset in enumerate(datasets):
            numbers.append([])
            ids = np.ascontiguousarray(dataset.ids, "<i4")
            for t, (first, last) in enumerate(pairwise(dataset.first.tolist())):
                if not reached[d][t]:
                    numbers[-1] += [-1] * (last - first - 1)
                    continue
                bounds = dataset.segments[first : last + 1].tolist()
                prompt = ids[bounds[0] : bounds[1]]
                start = blake2b(len(prompt).to_bytes(8, "little") + prompt.tobytes(), digest_size=16)
                for r, (a, b) in enumerate(pairwise(bounds[1:])):
                    digest = start.copy()
                    digest.update(ids[a:b].tobytes())
                    number = keys.setdefault(digest.digest(), len(keys))
                    numbers[-1].append(number)
                    if number == len(places):
                        places.append((d, t, r))
                        lengths.append(b - a if len(prompt) else max(b - a - 1, 0))
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        return cls(keys, places, offsets, numbers, np.full(offsets[-1], np.nan, np.float32))

    @property
    def known(self) -> np.ndarray:
        """(U,) bool: which responses have their values. One without a predicted token has."""
        gaps = np.concatenate([[0], np.cumsum(~np.isfinite(self.values))])
        whole: np.ndarray = np.diff(gaps[self.offsets]) == 0
        return whole

    def part(self, number: int) -> np.ndarray:
        """The values of a response, to read and to write."""
        return self.values[self.offsets[number] : self.offsets[number + 1]]

    def read(self, shards: Path, console: Console) -> list[Path]:
        """Take what the shards have of the responses; returns those that gave something."""
        used: dict[Path, None] = {}
        for path in sorted(shards.glob("rows-*.safetensors")):
            try:
                stored = cache.read(path)
            except cache.Damaged:
                console.warn(f"{path}: damaged; it is removed and its {WHAT} are computed again")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            if stored is None:
                continue
            digests, offsets, rows = (stored.arrays[name] for name in ("keys", "offsets", "values"))
            text = digests.tobytes()
            for row, (a, b) in enumerate(pairwise(offsets.tolist())):
                number = self.keys.get(text[16 * row : 16 * row + 16])
                if number is not None and b - a == len(self.part(number)):
                    self.part(number)[:] = rows[a:b]
                    used[path] = None
        return list(used)

    def write(self, shards: Path, numbers: list[int]) -> bool:
        """One more shard; False if the folder takes none.

        Its name follows from its rows, so that runs that compute the same at once write the same file.
        """
        digests, parts = list(self.keys), [self.part(number) for number in numbers]
        text = b"".join(digests[number] for number in numbers)
        arrays: dict[str, np.ndarray] = {
            "keys": np.frombuffer(text, np.uint8).reshape(-1, 16),
            "offsets": np.cumsum([0, *map(len, parts)], dtype=np.int64),
            "values": np.concatenate(parts),
        }
        return cache.write(shards / f"rows-{blake2b(text, digest_size=16).hexdigest()}.safetensors", cache.Stored(arrays, {}))

    def filled(self, dataset: Trees, numbers: list[int]) -> Trees:
        """The data set with its reference.

        NumberError: a token that something predicts has no value, or one that nothing predicts has.
        """
        reference, sizes = np.full(len(dataset.ids), np.nan, np.float32), np.diff(dataset.segments)
        is_response = np.ones(len(sizes), bool)
        is_response[dataset.first[:-1]] = False
        is_response[is_response] = np.array(numbers) >= 0
        known = (number for number in numbers if number >= 0)
        for number, end in zip(known, dataset.segments[1:][is_response].tolist(), strict=True):
            part = self.part(number)
            reference[end - len(part) : end] = part
        predicted = np.repeat(is_response, sizes)
        after_nothing = np.repeat(sizes[dataset.first[:-1]] == 0, np.diff(dataset.first))
        predicted[dataset.segments[:-1][is_response & after_nothing]] = False
        if len(wrong := np.flatnonzero(np.isfinite(reference) != predicted)):
            tree = int(np.searchsorted(dataset.segments[dataset.first], wrong[0], "right")) - 1
            raise NumberError(
                f"{WHAT}: {dataset.locations[tree]}: {len(wrong)} tokens have none, or one too many; set reference.cache: false"
            )
        return replace(dataset, reference=reference)


@dataclass
class _Work:
    """What computes: forward passes under one role, dealt to ranks, in evaluation mode and without gradients."""

    passes: Passes
    role: str
    datasets: Sequence[Trees]
    table: _Table

    def fill(self, shards: Path | None, console: Console) -> None:
        """Compute what is missing in the order of the data; what is done is stored every minute, and however this ends."""
        missing = np.flatnonzero(~self.table.known).tolist()
        pending: list[int] = []
        done, refused = 0, False
        flushed = started = time.monotonic()

        def flush() -> None:
            nonlocal refused
            if pending and shards is not None and self.passes.ranks.main:
                refused |= not self.table.write(shards, pending)
            pending.clear()

        try:
            for chunk in self._chunks(missing):
                for number, computed in self._compute(chunk):
                    self.table.part(number)[:] = computed
                    pending.append(number)
                done += sum(len(numbers) for _, numbers in chunk)
                if (now := time.monotonic()) - flushed >= FLUSH_SECONDS:
                    flush()
                    flushed = now
                    left = (now - started) / done * (len(missing) - done)
                    console.say(f"{WHAT}: {done:,} of {len(missing):,} computed, {clock(left)} left")
        finally:
            flush()
            if refused:
                console.warn(f"{shards} takes no files: {WHAT} are not stored, and computed again the next time")

    def difference(self, known: np.ndarray) -> float:
        """Between stored values and those computed again: the largest of a few responses' means over their tokens."""
        sizes = np.diff(self.table.offsets)
        candidates = np.flatnonzero(known & (sizes > 0))
        # Other weights show on any response; those among the shorter half cost least.
        short = candidates[np.argsort(sizes[candidates], kind="stable")][: max(CHECKED, len(candidates) // 2)]
        chosen = np.random.default_rng(len(short)).permutation(short)[:CHECKED]
        again = self._compute(list(self._trees(sorted(chosen.tolist()))))
        return max((float(np.abs(computed - self.table.part(u)).mean()) for u, computed in again), default=0.0)

    def _trees(self, numbers: Iterable[int]) -> Iterator[tuple[Tree, list[int]]]:
        """The prompts of these responses, each with those of them that branch off it."""
        for (d, t), group in groupby(numbers, lambda u: self.table.places[u][:2]):
            mine, tree = list(group), self.datasets[d][t]
            branches = tuple(tree.responses[self.table.places[u][2]] for u in mine)
            yield Tree(tree.prompt, np.zeros(len(tree.prompt), bool), branches, t), mine

    def _chunks(self, numbers: Iterable[int]) -> Iterator[list[tuple[Tree, list[int]]]]:
        limit = CHUNK_PASSES * self.passes.budget * self.passes.ranks.size
        chunk, tokens = [], 0
        for tree, mine in self._trees(numbers):
            chunk.append((tree, mine))
            tokens += tree_length(tree)
            if tokens >= limit:
                yield chunk
                chunk, tokens = [], 0
        if chunk:
            yield chunk

    def _compute(self, chunk: list[tuple[Tree, list[int]]]) -> list[tuple[int, np.ndarray]]:
        """Number and values of every response of the chunk, the same on every rank."""
        trees = [tree for tree, _ in chunk]
        self.passes, mine = within_memory(self.passes, trees, lambda passes: self._forward(passes, trees))
        computed = {index: values for share in self.passes.ranks.gather(mine) for index, values in share.items()}
        found: list[tuple[int, np.ndarray]] = []
        for index, (_, numbers) in enumerate(chunk):
            ends = np.cumsum([len(self.table.part(u)) for u in numbers])
            found += zip(numbers, np.split(computed[index], ends[:-1]), strict=True)
        for number, values in found:
            if len(wrong := np.flatnonzero(~np.isfinite(values))):
                d, t, r = self.table.places[number]
                raise NumberError(
                    f"{WHAT}: {self.datasets[d].locations[t]}: response {r + 1} has {values[wrong[0]]} at {len(wrong)} of "
                    f"{len(values)} tokens\nthe weights or the row are damaged, or the numbers too large for model.dtype; "
                    "try model.dtype: float32"
                )
        return found

    @torch.no_grad()
    def _forward(self, passes: Passes, trees: list[Tree]) -> dict[int, np.ndarray]:
        """This rank's share: tree → the values of its responses, one after the other."""
        passes.backbone.model.eval()
        found: dict[int, np.ndarray] = {}
        for batch in passes.over(trees):
            values = passes.backbone.logps(self.role, batch)[0].cpu().numpy()
            own = parts(values, [supervised_tokens(trees[index]) for index in batch.trees])
            found |= dict(zip(batch.trees, own, strict=True))
        return found
