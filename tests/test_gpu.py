"""scripts/gpu.py on a CPU: every part from end to end on a tiny model, and what it says where there is no GPU."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import ROOT, WARM


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, where torch finds no GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "PRELOAD", [*WARM, "gpu"])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)  # no TRL
    monkeypatch.setattr(module, "PPO_PEER", ROOT / "nothing")
    return module


@pytest.fixture
def say(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(exit code, stdout, stderr) of the script with these words."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
        code = gpu.main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.mark.slow
def test_all_parts_on_a_tiny_model(gpu: Any, say: Any, tmp_path: Path) -> None:
    parts = [part for part in gpu.parts(tmp_path, True) if not part.lacking]
    late = gpu.run(dataclasses.replace(parts[0], limit=0), tmp_path, True)
    assert late == "ended at its limit of 0 s, with 0 rows" and not gpu.read(tmp_path, parts[0].name)["done"]

    code, out, _ = say("--tiny", "--out", tmp_path)
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert code == 0, (out, logs)
    found: dict[str, Any] = {name: row for part in parts for name, row in gpu.read(tmp_path, part.name)["rows"]}
    for stage in ("sft", "train-rm", "dpo", "kto", "ppo"):
        assert found[f"tiny | {stage}"]["exit code"] == 0
    starts = {"sft": math.log(1280), "train-rm": math.log(2), "dpo": math.log(2), "kto": 0.5}
    for stage, loss in starts.items():  # of an untrained model
        row = found[f"tiny | {stage} | rlhf, rlhf_trees"]
        assert row["loss"] == pytest.approx(loss, rel=0.02)
        assert (row["and of the reference"] > 0) == (stage in ("dpo", "kto"))
        assert 0 < row["MFU, %"] < 100 and row["tokens/s"] > 0 and row["peak GiB"] > 0.1
    kernels = [found[f"tiny | dpo, {name}"] for name in ("trees | rlhf, rlhf_trees", "sdpa | rlhf, sdpa")]
    assert kernels[0]["loss"] == pytest.approx(kernels[1]["loss"], rel=1e-5)
    for rows in (1, 4):
        drawn = found[f"tiny | rlhf | {rows}"]
        assert drawn["tokens/s"] == pytest.approx(rows * drawn["steps/s"])
    weights = 1280 * 16 + (2 * 16 * 16 + 2 * 16 * 8) + 3 * 16 * 32 + 3 * 16  # embeddings, attention, feed-forward, norms
    assert found["tiny | rlhf, lora"]["GiB of four copies"] == pytest.approx(4 * 4 * weights / 2**30, rel=0.05)

    table = (tmp_path / "tables.md").read_text()
    assert re.findall("^## (.*)", table, re.MULTILINE) == ["Machine", "Commands", "Steps", "Drawing", "PPO", "Attention"]
    for block in table.split("\n\n")[1::2]:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block

    (tmp_path / "machine.json").unlink()
    code, out, _ = say("--tiny", "--out", tmp_path)
    said = dict(line.split(": ", 1) for line in out.splitlines())
    assert code == 0 and said["machine"].startswith("done in ")
    assert {said[part.name] for part in parts[1:]} == {"done before"}
    assert said["trl-tiny-sft"] == "trl is not installed: make .venv/.installed-bench"


def test_a_part_that_fails_is_told_and_what_does_not_fit_is_left(say: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file where the folder is to be")
    code, out, _ = say("--tiny", "--out", tmp_path, "--only", "decode")
    assert code == 1 and re.search(r"^decode-tiny: failed after \d+ s: .*/decode-tiny.log tells why$", out, re.MULTILINE)
    code, out, _ = say("--tiny", "--out", tmp_path, "--only", "decode", "--minutes", "0.1")
    assert code == 0 and "decode-tiny: left for another call: it is expected to take 35 s" in out


def test_without_a_gpu_it_says_so(say: Any, tmp_path: Path) -> None:
    code, _, told = say("--out", tmp_path / "out")
    assert code == 4 and not (tmp_path / "out").exists()
    assert "finds no NVIDIA GPU on this machine; --plan tells what would run on one" in told and told.count("\n") == 1


def test_the_plan_fits_into_ten_minutes(gpu: Any, say: Any, tmp_path: Path) -> None:
    code, out, _ = say("--plan", "--out", tmp_path)
    assert code == 0 and list(tmp_path.iterdir()) == []
    names = re.findall(r"^\| ([a-z]\S+) \| \d+ \| \d+ \|", out, re.MULTILINE)
    for size in ("0.1B", "1B"):
        wanted = {f"{part}-{size}" for part in ("runs", "decode", "attention")} | {
            f"ppo-{size}-{kind}" for kind in ("lora", "all")
        }
        assert wanted | {f"steps-{size}-{stage}" for stage in gpu.STAGES} <= set(names)
    assert {f"trl-1B-{stage}" for stage in (*gpu.STAGES, "ppo")} <= set(names)
    (minutes,) = re.findall(r"expected, by a guess: (.*) minutes on one card", out)
    assert float(minutes) <= 10
    assert all(part.expected < part.limit for part in gpu.parts(tmp_path, False))
