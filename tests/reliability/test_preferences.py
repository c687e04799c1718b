"""What may go wrong where a stage learns from preferences: numbers, rows, and a stop while the reference is computed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.cli import main
from rlhf_cli.data import cache
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import Passes, head_outputs
from rlhf_cli.objectives.base import LossTerm
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.training import loop, reference, step
from tests.ranks import launch, wait_for
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe, write_rows

REFUSED = 3
ROWS = 15

KEPT = "while the reference's log-probabilities were computed; what is done is kept, continue with --resume"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    make_model(folder / "model", initializer_range=0.2)
    write_pairs(folder / "pairs.jsonl", ROWS)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def recipe(home: Path, folder: Path, **sections: Any) -> Path:
    """A recipe of 4 steps for any stage, each of several forward passes, with checkpoints of steps 2 and 4."""
    train = {"steps": 4, "tokens_per_device": 80, "save_every": 2} | sections.pop("train", {})
    parts = home / "model", home / "pairs.jsonl", folder / "run"
    return write_recipe(folder / "x.yaml", *parts, lora={"r": 4}, train=train, **sections)


def note_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """A list whose one entry is the step that is being made."""
    now, update = [0], loop.optimise

    def noting(*arguments: Any, **settings: Any) -> Any:
        now[0] = arguments[-1].step
        return update(*arguments, **settings)

    patch.setattr(loop, "optimise", noting)
    return now


def nan_loss(patch: pytest.MonkeyPatch, stage: str) -> None:
    """The loss of the first tree's pass is NaN at the refused step."""
    kind, now = TRAINING_STAGES[stage].objectives[0], note_steps(patch)
    terms = kind.terms

    def broken(self: Any, backbone: Backbone, batch: Any, given: Any) -> Iterator[LossTerm]:
        spoil = float("nan") if now[0] == REFUSED and 0 in batch.trees else 1.0
        for term in terms(self, backbone, batch, given):
            yield LossTerm({unit: loss * spoil for unit, loss in term.losses.items()}, term.sums)

    patch.setattr(kind, "terms", broken)


def infinite_score(patch: pytest.MonkeyPatch, stage: str) -> None:
    """One response of the first tree's pass has an infinite score at the refused step."""
    now, scores = note_steps(patch), Backbone.scores

    def broken(self: Backbone, role: str, batch: Any) -> torch.Tensor:
        found = scores(self, role, batch)
        spoilt = torch.zeros_like(found)
        spoilt[0] = float("inf") if now[0] == REFUSED and 0 in batch.trees else 0.0
        return found + spoilt

    patch.setattr(Backbone, "scores", broken)


def nan_z0(patch: pytest.MonkeyPatch, stage: str) -> None:
    """The log-ratio of the first tree's mismatched response is NaN at the refused step; every loss is finite."""
    now, statistics = note_steps(patch), Kto.statistics

    def broken(self: Kto, backbone: Backbone, batch: Any) -> Any:
        found = statistics(self, backbone, batch)
        spoil = float("nan") if now[0] == REFUSED and 0 in batch.trees else 1.0
        return {name: (value * spoil, unit) for name, (value, unit) in found.items()}

    patch.setattr(Kto, "statistics", broken)


def infinite_gradient(patch: pytest.MonkeyPatch, stage: str) -> None:
    """One element of one gradient is infinite at the refused step, of a reward model in its head; every loss is finite."""
    now, backward = note_steps(patch), step._backward

    def broken(passes: Passes, *arguments: Any) -> Any:
        found = backward(passes, *arguments)
        gradient = list(passes.backbone.trained_parameters().values())[-1].grad
        if now[0] == REFUSED and gradient is not None:
            gradient[0, 0] = float("inf")
        return found

    patch.setattr(step, "_backward", broken)


@pytest.mark.parametrize(
    ("stage", "fault", "message", "named"),
    [
        ("train-rm", nan_loss, "the loss is nan", True),
        ("dpo", nan_loss, "the loss is nan", True),
        ("kto", nan_loss, "the loss is nan", True),
        ("train-rm", infinite_score, "the loss is (nan|inf)", True),
        ("kto", nan_z0, "the kl is nan", True),
        ("train-rm", infinite_gradient, r"the gradient norm is (nan|inf) \(first in reward.score.weight\)", False),
        ("dpo", infinite_gradient, r"the gradient norm is (nan|inf) \(first in .*lora_B", False),
    ],
)
def test_a_number_that_is_not_finite(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    fault: Callable[[pytest.MonkeyPatch, str], None],
    message: str,
    named: bool,
) -> None:
    path, run = recipe(home, tmp_path), tmp_path / "run"
    written: list[dict[str, torch.Tensor]] = []
    with monkeypatch.context() as patch:
        fault(patch, stage)
        saved = loop.save_checkpoint

        def noting(folder: Path, backbone: Backbone, *arguments: Any) -> None:
            written.append({name: p.detach().clone() for name, p in backbone.trained_parameters().items()})
            saved(folder, backbone, *arguments)

        patch.setattr(loop, "save_checkpoint", noting)
        keep_evidence = loop.Trainer._keep_evidence

        def compare(self: loop.Trainer, *arguments: Any) -> Any:
            written.append({name: p.detach().clone() for name, p in self.backbone.trained_parameters().items()})
            return keep_evidence(self, *arguments)

        patch.setattr(loop.Trainer, "_keep_evidence", compare)
        assert rlhf(stage, path) == 3
    after_two, refused = written
    assert all(torch.equal(after_two[name], refused[name]) for name in after_two)
    evidence = run / "failed" / "step-00000003.json"
    found = json.loads(evidence.read_text())
    rows = [entry["row"] for entry in found["batch"]]
    first, second, third = capsys.readouterr().err.splitlines()[-3:]
    assert re.match(f"error: step 3: {message}", first) and str(evidence) in third
    assert second == (
        f"error: rows of the passes concerned: {', '.join(found['suspects'])}" if named else "error: every loss was finite"
    )
    assert (rows[0] in found["suspects"]) == named and len(found["suspects"]) < len(rows)
    assert set(rows) <= {f"{home / 'pairs.jsonl'}:{number}" for number in range(1, ROWS + 1)}
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (run / "manifest.json").exists() and not (run / "model").exists()
    assert rlhf(stage, path, "--resume") == 0


def test_a_score_of_the_card_that_is_not_finite(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_cli.stages import train_rm

    path, run = recipe(home, tmp_path, data={"holdout": 0.2}), tmp_path / "run"
    with monkeypatch.context() as patch:

        def broken(*arguments: Any) -> list[np.ndarray]:
            found = head_outputs(*arguments)
            found[0][1] = np.nan
            return found

        patch.setattr(train_rm, "head_outputs", broken)
        assert rlhf("train-rm", path) == 3
    where = f"error: {re.escape(str(home / 'pairs.jsonl'))}:\\d+: the score of response 2 is nan"
    assert re.fullmatch(where, capsys.readouterr().err.splitlines()[-2])
    assert not (run / "manifest.json").exists() and not (run / "model").exists()
    assert rlhf("train-rm", path, "--resume") == 0


def spoil_reference(patch: pytest.MonkeyPatch, value: float) -> None:
    """The reference gives `value` for one token of one response."""
    forward = reference._Work._forward

    def broken(self: Any, *given: Any) -> dict[int, np.ndarray]:
        found = forward(self, *given)
        found[0][0] = value
        return found

    patch.setattr(reference._Work, "_forward", broken)


@pytest.mark.parametrize(("stage", "value"), [("dpo", float("nan")), ("kto", float("-inf"))])
def test_a_reference_log_probability_that_is_not_finite(
    home: Path,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    value: float,
) -> None:
    spoil_reference(monkeypatch, value)
    assert rlhf(stage, recipe(home, tmp_path)) == 3
    first, second = capsys.readouterr().err.splitlines()[-2:]
    rows = re.escape(str(home / "pairs.jsonl"))
    assert re.match(rf"error: reference log-probabilities: {rows}:\d+: response 1 has {value} at 1 of \d+ tokens", first)
    assert "model.dtype: float32" in second
    assert not list(store.glob("*/rows-*")) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_stored_log_probability_that_is_not_finite(
    home: Path, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(home, tmp_path)
    assert rlhf("dpo", path) == 0
    (shard,) = store.glob("*/rows-*.safetensors")
    stored = cache.read(shard)
    assert stored is not None
    values = stored.arrays["values"].copy()
    values[5] = np.nan
    shard.unlink()
    assert cache.write(shard, cache.Stored(stored.arrays | {"values": values}, stored.facts))
    capsys.readouterr()
    assert rlhf("dpo", path, "--output", tmp_path / "again") == 0
    assert f"reference log-probabilities: {2 * ROWS - 1} of {2 * ROWS} from the store, 1 computed" in capsys.readouterr().out
    lines = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (tmp_path / "run", tmp_path / "again")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_reference_is_computed_keeps_the_work(
    home: Path,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    path = recipe(home, tmp_path)
    with monkeypatch.context() as patch:
        calls, forward = [0], reference._Work._forward

        def signalled(self: Any, *given: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                signal.raise_signal(number)
            return forward(self, *given)

        patch.setattr(reference._Work, "_forward", signalled)
        assert rlhf("dpo", path) == 128 + number
    message = f"stopped by {number.name} {KEPT}"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert len(list(store.glob("*/rows-*.safetensors"))) == 1
    assert rlhf("dpo", path, "--resume") == 0
    (kept,) = re.findall(rf"(\d+) of {2 * ROWS} from the store", capsys.readouterr().out)
    assert 0 < int(kept) < 2 * ROWS


def test_a_signal_while_the_card_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_cli.stages import train_rm

    path, run = recipe(home, tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:

        def signalled(*arguments: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return head_outputs(*arguments)

        patch.setattr(train_rm, "head_outputs", signalled)
        assert rlhf("train-rm", path) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM after the last step; continue with --resume"
    assert not (run / "manifest.json").exists()
    assert rlhf("train-rm", path, "--resume") == 0
    assert json.loads((run / "manifest.json").read_text())["steps"] == 4
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", ["train-rm", "dpo", "ipo", "kto"])
def test_rows_of_another_stage(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    assert rlhf(stage, recipe(home, tmp_path), "--set", f"data.train={home / 'rows.jsonl'}") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{home / 'rows.jsonl'}: the columns prompt, completion: found prompt-completion data" in message
    assert "(prompt + completion), which sft and ppo can use" in message
    assert f"{stage} needs prompt + chosen + rejected" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["train-rm", "dpo", "ipo", "kto"])
def test_rows_whose_responses_are_the_same(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    """One of 16: it is a bad row, with its line. All: there is nothing to train on."""
    rows = (home / "pairs.jsonl").read_text()
    same = json.dumps({"prompt": "one", "chosen": "sun", "rejected": "sun"}) + "\n"
    (tmp_path / "some.jsonl").write_text(rows + same)
    settings = ["--set", f"data.train={tmp_path / 'some.jsonl'}", "--set", "data.max_lost=0.1", "--check"]
    assert rlhf(stage, recipe(home, tmp_path), *settings) == 0
    assert f"{tmp_path / 'some.jsonl'}:{ROWS + 1}: " in capsys.readouterr().out
    (tmp_path / "all.jsonl").write_text(same * 8)
    assert rlhf(stage, recipe(home, tmp_path), "--set", f"data.train={tmp_path / 'all.jsonl'}") == 2
    assert f"{tmp_path / 'all.jsonl'}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("label", "has", "lacks"), [(True, "desirable", "undesirable"), (False, "undesirable", "desirable")])
def test_judgements_of_one_kind(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bool, has: str, lacks: str
) -> None:
    rows = [{"prompt": f"one {k}", "completion": f"two {k}", "label": label} for k in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rlhf("kto", recipe(home, tmp_path), "--set", f"data.train={tmp_path / 'rows.jsonl'}") == 2
    message = f"every response is {has}; without {lacks} ones there is nothing to tell apart"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert not (tmp_path / "run").exists()


def say_when_computing(*words: str) -> int:
    """`rlhf`, which makes a file in the cache once the reference has made three passes."""
    forward, calls = reference._Work._forward, [0]

    def counting(self: Any, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            Path(os.environ["RLHF_CACHE"], f"computing-{os.environ.get('RANK', '0')}").touch()
        return forward(self, *given)

    reference._Work._forward = counting
    return main(words)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_computes_the_reference(
    home: Path, tmp_path: Path, store: Path, ranks: int, number: signal.Signals
) -> None:
    """Stopped when it has computed for a while, long before its end: nobody is left behind, and the work is in the store."""
    write_pairs(tmp_path / "many.jsonl", 6000)
    path = recipe(home, tmp_path, data={"train": str(tmp_path / "many.jsonl")}, train={"steps": 1500})
    stopped = launch("dpo", path, ranks=ranks, function=say_when_computing)
    for rank in range(ranks):
        wait_for(store.parent / f"computing-{rank}", stopped)
    stopped.send_signal(number)
    code, errors = stopped.wait()
    if ranks == 1:
        message = f"stopped by {number.name} {KEPT}"
        assert (code, errors.splitlines()[-1]) == (128 + number, message)
    assert len(list(store.glob("*/rows-*.safetensors"))) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_is_saved_is_finite(home: Path, tmp_path: Path) -> None:
    """No checkpoint is written of weights that an update made infinite."""
    run = tmp_path / "run"
    assert rlhf("train-rm", recipe(home, tmp_path, train={"learning_rate": 1e30, "save_every": 1})) == 3
    files = list((run / "checkpoints").rglob("*.safetensors")) if (run / "checkpoints").exists() else []
    assert all(torch.isfinite(value).all() for file in files for value in load_file(file).values())
    assert not (run / "manifest.json").exists()
    assert all(line["step"] for line in read_lines(run / "metrics.jsonl"))
