"""Reference log-probabilities: those of plain transformers, computed once, never from damaged or foreign files."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.console import Console
from rlhf_cli.data import cache
from rlhf_cli.data.flat import Trees, flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import MachineError, NumberError, Stopped
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import Passes
from rlhf_cli.ranks import Ranks
from rlhf_cli.training import reference
from rlhf_cli.training.reference import reference_logps, weights_key
from tests.models.tiny_backbone import draw_trees, make, make_backbone, plain_logps
from tests.ranks import launch

ALONE = Ranks(expected=False)


def flat(trees: Sequence[Tree]) -> Trees:
    records = [Record("", (), f"a.jsonl:{row + 1}") for row in range(max(tree.row for tree in trees) + 1)]
    return flatten(trees, records)


PAIRS = draw_trees(12, branches=2, earlier=True)
DATA = flat(PAIRS)
"""12 pairs: 24 responses, all different."""


def everything(datasets: Sequence[Trees]) -> list[np.ndarray]:
    """That a run comes to all trees."""
    return [np.ones(len(trees), bool) for trees in datasets]


@dataclass
class Run:
    """A call with what it said and how many responses it forwarded."""

    backbone: Backbone
    folder: Path | None
    key: str = "k"
    budget: int = 40
    out: io.StringIO = field(default_factory=io.StringIO)
    err: io.StringIO = field(default_factory=io.StringIO)
    forwarded: int = 0

    def __call__(self, *datasets: Trees, reached: list[np.ndarray] | None = None) -> list[Trees]:
        own = self.backbone.logps

        def counting(role: str, batch: Any) -> Any:
            self.forwarded += len(batch.last)
            return own(role, batch)

        self.backbone.logps = counting  # type: ignore[method-assign]
        try:
            console = Console(True, self.out, self.err)
            return reference_logps(
                Passes(self.backbone, self.budget, ALONE),
                "policy",
                datasets,
                reached=reached or everything(datasets),
                key=self.key,
                console=console,
                folder=self.folder,
            )
        finally:
            self.backbone.logps = own  # type: ignore[method-assign]

    @property
    def said(self) -> str:
        return self.out.getvalue().strip()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference/*/*.safetensors"))


def plain(backbone: Backbone, trees: Sequence[Tree]) -> np.ndarray:
    """What transformers' own logits say of the response tokens, with the attention that the model was loaded with."""
    backbone.model.eval()
    with backbone.plain_attention() as model, torch.no_grad():
        return plain_logps(model, [tree._replace(supervised=np.zeros(len(tree.prompt), bool)) for tree in trees]).numpy()


def values(trees: Trees) -> np.ndarray:
    """The reference of every response token, in order."""
    return np.concatenate([part for tree in trees for part in tree.reference or ()])


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone(make(), dropout=0.5)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "flash-like"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_the_values_are_those_of_plain_transformers(attention: str, budget: int, tmp_path: Path) -> None:
    model = make()
    # A model that takes no mask has a row for each response; BLOOM's positions come from its mask.
    backbone = make_backbone(
        make("bloom") if attention == "flash-like" else model, attention=attention.replace("flash-like", "auto")
    )
    backbone.model.train()
    (found,) = Run(backbone, tmp_path, budget=budget)(DATA)
    wanted = plain(backbone, PAIRS)
    assert np.abs(values(found) - wanted).max() < 1e-5
    prompts = np.concatenate([np.r_[np.ones(len(t.prompt)), np.zeros(sum(map(len, t.responses)))] for t in PAIRS]).astype(bool)
    assert found.reference is not None
    assert (np.isnan(found.reference) == prompts).all()
    assert DATA.reference is None


def test_dropout_is_off(backbone: Backbone) -> None:
    backbone.model.train()
    (found,) = Run(backbone, None)(DATA)
    assert np.abs(values(found) - plain(backbone, PAIRS)).max() < 1e-5


def test_trees_that_the_run_does_not_come_to_are_not_computed(backbone: Backbone, tmp_path: Path) -> None:
    """Of 12 pairs 3 are reached; a longer run computes the others then, and both have the values of one that computes all."""
    (whole,) = Run(backbone, None)(DATA)
    some = np.isin(np.arange(12), (1, 4, 11))
    first, second = Run(backbone, tmp_path), Run(backbone, tmp_path)
    (found,) = first(DATA, reached=[some])
    assert first.said == "reference log-probabilities: 0 of 6 from the store, 6 computed in 0 s"
    for tree, other, reached in zip(found, whole, some.tolist(), strict=True):
        for part, expected in zip(tree.reference or (), other.reference or (), strict=True):
            assert np.isfinite(part).all() == reached
            assert not reached or np.abs(part - expected).max() < 1e-6
    (longer,) = second(DATA)
    assert second.said.startswith("reference log-probabilities: 6 of 24 from the store, 18 computed")
    assert np.abs(values(longer) - values(whole)).max() < 1e-6


def test_a_second_call_forwards_the_checked_rows_alone(backbone: Backbone, tmp_path: Path) -> None:
    first, second = Run(backbone, tmp_path), Run(backbone, tmp_path, budget=4096)
    (fresh,) = first(DATA)
    (again,) = second(DATA)
    assert (first.forwarded, second.forwarded) == (24, 8)
    assert first.said == "reference log-probabilities: 0 of 24 from the store, 24 computed in 0 s"
    assert second.said == "reference log-probabilities: 24 of 24 from the store"
    assert fresh.reference is not None and again.reference is not None
    assert fresh.reference.tobytes() == again.reference.tobytes()
    assert first.err.getvalue() == second.err.getvalue() == ""


def test_data_sets_share_what_they_have_in_common(backbone: Backbone, tmp_path: Path) -> None:
    """Pairs, then KTO's halves with mismatched responses, and more pairs."""
    (pairs,) = Run(backbone, tmp_path)(DATA)
    halves = flat([tree._replace(responses=(response,)) for tree in PAIRS for response in tree.responses])
    mismatched = flat([tree._replace(responses=(PAIRS[n - 1].responses[0],)) for n, tree in enumerate(PAIRS)])
    more = flat([*draw_trees(5, seed=9, branches=2), *PAIRS])
    run = Run(backbone, tmp_path)
    found = run(halves, mismatched, more, halves)
    assert run.forwarded == 12 + 10 + 8
    assert "24 of 46 from the store, 22 computed" in run.said
    assert values(found[0]).tobytes() == values(pairs).tobytes() == values(found[3]).tobytes()
    wanted = plain(backbone, list(mismatched))
    assert np.abs(values(found[1]) - wanted).max() < 1e-5
    assert len(shards(tmp_path)) == 2


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    backbone = make_backbone(make())
    backbone.save("policy", tmp_path / "a")
    other = make_backbone(make(), seed=2)
    other.save("policy", tmp_path / "b")
    keys = {
        weights_key(backbone, "h", None),
        weights_key(backbone, "i", None),
        weights_key(backbone, "h", tmp_path / "a"),
        weights_key(backbone, "h", tmp_path / "b"),
        weights_key(make_backbone(make(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})), "h", None),
    }
    backbone.compute_dtype = torch.bfloat16
    keys.add(weights_key(backbone, "h", None))
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    keys.add(weights_key(other, "h", tmp_path / "a"))
    assert len(keys) == 7
    run = Run(other, tmp_path)
    Run(backbone, tmp_path, key="a")(DATA)
    run.key = "b"
    run(DATA)
    assert run.forwarded == 24


def test_dropout_and_place_are_not_in_the_key(tmp_path: Path) -> None:
    backbone = make_backbone(make())
    backbone.save("policy", tmp_path / "a")
    other = make_backbone(make(), dropout=0.3)
    other.peft.peft_config["policy"].base_model_name_or_path = "elsewhere"
    other.save("policy", tmp_path / "b")
    other.model.config._name_or_path = "elsewhere"
    assert '"lora_dropout": 0.3' in (tmp_path / "b" / "adapter_config.json").read_text()
    assert weights_key(backbone, "h", tmp_path / "a") == weights_key(other, "h", tmp_path / "b")


def test_the_code_is_in_the_key(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_key(backbone, "h", None)
    monkeypatch.setattr(cache, "source_hash", lambda *_: "other")
    assert weights_key(backbone, "h", None) != before


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_removed_and_computed_again(damage: str, backbone: Backbone, tmp_path: Path) -> None:
    (fresh,) = Run(backbone, tmp_path)(DATA)
    Run(backbone, tmp_path)(flat(draw_trees(3, seed=7)))
    path = next(p for p in shards(tmp_path) if len(cache.read(p).arrays["keys"]) == 24)  # type: ignore[union-attr]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes({"flip": bytes(flipped), "cut": whole[:-3], "empty": b""}[damage])
    run = Run(backbone, tmp_path)
    (again,) = run(DATA, flat(draw_trees(3, seed=7)))[:1]
    message = f"warning: {path}: damaged; it is removed and its reference log-probabilities are computed again\n"
    assert run.err.getvalue() == message
    assert "3 of 27 from the store, 24 computed" in run.said
    assert np.abs(values(again) - values(fresh)).max() < 1e-5
    last = Run(backbone, tmp_path)
    last(DATA)
    assert (last.forwarded, last.err.getvalue(), path.is_file()) == (8, "", True)


def _spoil(path: Path, change: Any) -> None:
    """Other values under a right checksum."""
    stored = cache.read(path)
    assert stored is not None
    assert cache.write(path, cache.Stored(stored.arrays | {"values": change(stored.arrays["values"])}, stored.facts))


def test_wrong_values_with_a_right_checksum_are_found_out(backbone: Backbone, tmp_path: Path) -> None:
    (fresh,) = Run(backbone, tmp_path)(DATA)
    (path,) = shards(tmp_path)
    _spoil(path, lambda stored: stored - np.float32(0.5))
    run = Run(backbone, tmp_path)
    (again,) = run(DATA)
    assert run.err.getvalue() == (
        f"warning: reference log-probabilities: those in {path.parent} are not this model's (they differ by 0.5 nats per token); "
        "they are set aside and all are computed again\n"
    )
    assert run.said.startswith("reference log-probabilities: 0 of 24 from the store, 24 computed")
    assert values(again).tobytes() == values(fresh).tobytes()
    assert path.with_suffix(".wrong").is_file()
    last = Run(backbone, tmp_path)
    last(DATA)
    assert (last.forwarded, last.err.getvalue()) == (8, "")


def test_a_stored_gap_is_computed_again(backbone: Backbone, tmp_path: Path) -> None:
    (fresh,) = Run(backbone, tmp_path)(DATA)
    _spoil(shards(tmp_path)[0], lambda stored: np.where(np.arange(len(stored)) == 0, np.inf, stored).astype(np.float32))
    run = Run(backbone, tmp_path)
    assert np.abs(values(run(DATA)[0]) - values(fresh)).max() < 1e-5
    assert "23 of 24 from the store, 1 computed" in run.said


def test_a_number_that_is_not_finite_names_its_row_and_is_not_stored(backbone: Backbone, tmp_path: Path) -> None:
    low = [tree._replace(prompt=tree.prompt % 40, responses=tuple(part % 40 for part in tree.responses)) for tree in PAIRS]
    low[3] = low[3]._replace(responses=(low[3].responses[0], np.array([5, 47, 6], np.int32)))
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[47] = float("nan")
    with pytest.raises(NumberError) as error:
        Run(backbone, tmp_path, budget=1)(flat(low))
    # The token after 47, and that before it where attention multiplies what it masks by 0.
    assert str(error.value).startswith("reference log-probabilities: a.jsonl:4: response 2 has nan at ")
    assert str(error.value).splitlines()[0].endswith("of 3 tokens")
    assert error.value.exit_code == 3
    (stored,) = map(cache.read, shards(tmp_path))
    assert stored is not None
    assert len(stored.arrays["keys"]) == 6
    assert np.isfinite(stored.arrays["values"]).all()


def test_bfloat16_in_another_packing_is_no_mismatch(tmp_path: Path) -> None:
    backbone = Backbone(make(), torch.bfloat16)
    backbone.train_all_weights()
    first, second = Run(backbone, tmp_path, budget=1), Run(backbone, tmp_path, budget=4096)
    (found,) = first(DATA)
    second(DATA)
    assert (second.forwarded, second.err.getvalue()) == (8, "")
    assert 1e-4 < np.abs(values(found) - plain(backbone, PAIRS)).mean() < 0.05


def test_a_lost_value_is_a_gap(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference._Work, "fill", lambda self, *_: self.table.part(5).fill(0))
    with pytest.raises(NumberError, match=r"a\.jsonl:1: \d+ tokens have none, or one too many"):
        Run(backbone, None)(DATA)


def test_without_a_folder_or_with_one_that_takes_no_files(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs = [Run(backbone, None), Run(backbone, tmp_path / "file" / "cache"), Run(backbone, tmp_path)]
    found = [values(run(DATA)[0]).tobytes() for run in runs]
    assert len(set(found)) == 1
    assert [run.forwarded for run in runs] == [24, 24, 24]
    assert [len(run.err.getvalue().splitlines()) for run in runs] == [0, 1, 0]
    assert "takes no files" in runs[1].err.getvalue()


def test_an_interruption_keeps_the_finished_chunks(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = backbone.batches, []

    def until_third(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise Stopped("stopped by SIGTERM", 15)
        return own(*arguments)

    monkeypatch.setattr(backbone, "batches", until_third)
    with pytest.raises(Stopped):
        Run(backbone, tmp_path, budget=20)(DATA)
    monkeypatch.setattr(backbone, "batches", own)
    kept = 2 * sum(calls[:2])
    assert 0 < kept < 24
    run = Run(backbone, tmp_path, budget=20)
    (found,) = run(DATA)
    assert f"{kept} of 24 from the store, {24 - kept} computed" in run.said
    assert np.abs(values(found) - plain(backbone, PAIRS)).max() < 1e-5


def test_long_work_is_stored_and_told_as_it_goes(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FLUSH_SECONDS", 0.0)
    run = Run(backbone, tmp_path, budget=20)
    run(DATA)
    lines = run.said.splitlines()
    assert len(shards(tmp_path)) == len(lines) - 1 > 1
    assert lines[-2] == "reference log-probabilities: 24 of 24 computed, 00:00 left"
    last = Run(backbone, tmp_path)
    last(DATA)
    assert last.forwarded == 8


def test_an_empty_prompt_predicts_no_first_token(backbone: Backbone, tmp_path: Path) -> None:
    nothing = np.zeros(0, np.int32)
    trees = [
        Tree(nothing, np.zeros(0, bool), (np.array([3, 4, 5], np.int32), np.array([3], np.int32)), 0),
        Tree(np.array([3], np.int32), np.zeros(1, bool), (np.array([4, 5], np.int32),), 1),
    ]
    for _ in range(2):
        (found,) = Run(backbone, tmp_path)(flat(trees))
        wanted = plain(backbone, trees[1:])
        assert found.reference is not None
        assert np.isnan(found.reference).tolist() == [True, False, False, True, True, False, False]
        assert np.abs(found.reference[[1, 2]] - wanted).max() < 1e-5
        assert np.abs(found.reference[[5, 6]] - wanted).max() < 1e-5


def test_no_rows_are_no_error(backbone: Backbone, tmp_path: Path) -> None:
    run = Run(backbone, tmp_path)
    assert run() == []
    assert run.said == "reference log-probabilities: 0 of 0 from the store"


def test_memory_that_runs_out_halves_the_budget(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = values(Run(backbone, None)(DATA)[0])
    own = backbone.logps

    def small(role: str, batch: Any) -> Any:
        if batch.tokens > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(role, batch)

    monkeypatch.setattr(backbone, "logps", small)
    assert np.abs(values(Run(backbone, None, budget=4096)(DATA)[0]) - wanted).max() < 1e-5
    monkeypatch.setattr(backbone, "logps", lambda *_: small("", replace(_[1], tokens=99)))
    with pytest.raises(MachineError, match="out of memory with one tree"):
        Run(backbone, None, budget=4096)(DATA)


@pytest.mark.slow
def test_many_rows_take_time_in_proportion(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the model: 20,000 pairs of 2 tokens; four times the rows take well below sixteen times the time."""
    zeros = lambda role, batch: (torch.zeros(len(batch.source)), None)  # noqa: E731
    monkeypatch.setattr(backbone, "logps", zeros)

    def seconds(count: int) -> float:
        random = np.random.default_rng(count)
        drawn = random.integers(0, 40, (count, 3, 4)).astype(np.int32)
        data = flat([Tree(a, np.zeros(4, bool), (b, c), row) for row, (a, b, c) in enumerate(drawn)])
        started = time.monotonic()
        for forwarded in (2 * count, 8):
            run = Run(backbone, tmp_path, key=str(count), budget=2048)
            run(data)
            assert run.forwarded == forwarded
        return time.monotonic() - started

    assert seconds(20000) < 8 * seconds(5000) + 1


def ranked(folder: str) -> int:
    """What one of two ranks does; each has a store of its own to write to, if it wrote."""
    ranks, out = Ranks(), io.StringIO()
    store = Path(folder) if ranks.main else Path(folder) / "not-shared"
    console = Console(ranks.main, out)
    for sets in ([DATA], [DATA, flat(draw_trees(5, seed=3))]):
        passes = Passes(make_backbone(make()), 40, ranks)
        found = reference_logps(passes, "policy", sets, reached=everything(sets), key="k", console=console, folder=store)
    np.save(Path(folder) / f"{ranks.rank}.npy", np.concatenate([trees.reference for trees in found]))
    print(out.getvalue())
    ranks.close()
    return 0


@pytest.mark.slow
def test_two_ranks_give_the_values_of_one(tmp_path: Path) -> None:
    launched = launch(tmp_path, ranks=2, function=ranked)
    code, errors = launched.wait()
    assert code == 0, errors
    assert "0 of 24 from the store, 24 computed" in launched.said
    assert "24 of 29 from the store, 5 computed" in launched.said
    one, two = np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy")
    assert one.tobytes() == two.tobytes()
    alone = Run(make_backbone(make()), None)(DATA, flat(draw_trees(5, seed=3)))
    wanted = np.concatenate([trees.reference for trees in alone if trees.reference is not None])
    np.testing.assert_allclose(one, wanted, atol=1e-5)
    assert not (tmp_path / "not-shared").exists()
    # What two ranks stored, one finds.
    run = Run(make_backbone(make()), tmp_path)
    run(DATA)
    assert run.forwarded == 8
