"""Every public shape of rows trains its stage, as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.test_shapes import READ, TOOLS
from tests.data.test_template_zoo import ZOO
from tests.tiny import make_base, rlhf, write_pairs, write_recipe

DRAWN = {
    "rollout": {"max_new_tokens": 4},
    "reward": [{"function": "length.py:length"}],
    "objective": {"epochs": 1},
}


@pytest.mark.parametrize("stage", sorted({shape[0] for shape in READ.values()}))
def test_every_shape_trains_its_stage_for_two_steps(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(TOOLS)
    Path("length.py").write_text("def length(prompts, responses):\n    return [len(response) for response in responses]\n")
    shapes = [shape for shape in READ.values() if shape[0] == stage]
    sources = []
    for i, (_, _, rows, _, _) in enumerate(shapes):
        sources.append({"path": f"{i}.jsonl"})
        Path(f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stage == "kto":  # needs both classes
        sources.append({"path": "bad.jsonl"})
        Path("bad.jsonl").write_text(json.dumps({"prompt": "What?", "completion": "Mud.", "label": 0}))
    recipe = write_recipe(
        tmp_path / "r.yaml",
        base,
        Path("unused"),
        tmp_path / "run",
        data={"train": sources, "max_length": 1024},
        train={"steps": 2, "batch_size": len(sources), "save_every": None},
        **(DRAWN if stage == "ppo" else {}),
    )
    rlhf(stage, recipe)
    report = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert report["kept"] == len(sources) and report["dropped"] == {}
    assert [source["format"] for source in report["sources"]][: len(shapes)] == [shape[1] for shape in shapes]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == 2


def test_options_of_a_chat_template_go_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(ZOO["thinking unless told"])
    rows = write_pairs(tmp_path / "rows.jsonl", 4)
    short = {"steps": 1, "batch_size": 4, "save_every": None}
    plain = write_recipe(tmp_path / "plain.yaml", base, rows, tmp_path / "sft", train=short)
    assert rlhf("sft", plain, "--check") == 2
    assert "set model.template_options: {enable_thinking: false}" in " ".join(capsys.readouterr().err.split())
    assert rlhf("sft", plain, "--set", "model.template_options.enable_thinking=false") == 0
    template = (tmp_path / "sft" / "model" / "chat_template.jinja").read_text()
    assert template.startswith("{% if enable_thinking is not defined %}{% set enable_thinking = False %}{% endif %}")
    after = write_recipe(tmp_path / "dpo.yaml", tmp_path / "sft", rows, tmp_path / "dpo", train=short)
    assert rlhf("dpo", after, "--check") == 0
    assert "<think></think>" in capsys.readouterr().out
