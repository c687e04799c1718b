"""When a run shows what its policy answers, and what it says of the time that takes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.stages import training
from rlhf_cli.training import loop
from tests.tiny import make_model, read_lines, rlhf, write_recipe, write_rows


@pytest.mark.parametrize(("share", "steps"), [(0.0, [0, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_samples_take_a_share_of_the_time_but_for_the_first_and_the_last(
    share: float, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "SAMPLES_SHARE", share)
    original = training._samples

    def slow(*arguments: Any) -> Any:
        time.sleep(0.6)
        return original(*arguments)

    monkeypatch.setattr(training, "_samples", slow)
    parts = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run"
    recipe = write_recipe(tmp_path / "x.yaml", *parts, data={"holdout": 0.2}, train={"steps": 4, "eval_every": 1})
    assert rlhf("sft", recipe) == 0
    assert list(dict.fromkeys(line["step"] for line in read_lines(tmp_path / "run" / "samples.jsonl"))) == steps
    said = capsys.readouterr().out.splitlines()[-1]
    found = re.search(rf"finished in (\d+) s, (\d+) s of them for samples: {tmp_path / 'run'}", said)
    assert found and round(0.6 * len(steps)) <= int(found[2]) <= int(found[1])
