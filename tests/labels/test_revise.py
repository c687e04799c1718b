"""Critique and revision: what is asked, with which principle, what is kept, and which rows come of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.data.records import Message, Record
from rlhf_cli.judges import asking
from rlhf_cli.judges.question import read_principles
from rlhf_cli.labels import revise as module
from rlhf_cli.labels.revise import Step, drift, for_sft, principles_of
from tests.judges.server import Model, Reply, Serve, error, said, serve
from tests.tiny import make_base, make_model, read_lines, rlhf

__all__ = ["serve"]
PROMPTS = 14
PRINCIPLES = ("kind", "short", "true")


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(asking, "BACKOFF", 0.0)


def label(folder: Path, revise: dict[str, Any], *options: str, **sections: Any) -> tuple[int, Path]:
    rows = [{"prompt": f"Why {n}?"} for n in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "principles.txt").write_text("\n".join(PRINCIPLES))
    recipe = {
        "prompts": str(folder / "prompts.jsonl"),
        "revise": {"principles": str(folder / "principles.txt"), "rounds": 2, **revise},
        "output": str(folder / "out"),
        **sections,
    }
    (folder / "revise.yaml").write_text(yaml.safe_dump(recipe))
    return rlhf("label", folder / "revise.yaml", *options), folder / "out"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of texts that a random model wrote, which hold every kind of line break."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def writes(_: Model, message: str) -> Reply:
    """The answer to "Why 3?" is "answer to Why 3?", its critique says how long it is, and a revision adds the principle."""
    response = re.search(r"<response>\n(.*)\n</response>", message, re.DOTALL)
    if response is None:
        return said(f"answer to {message}")
    found = re.search(r"principle: (\w+)[?.]", message)
    assert found
    if critique := re.search(r"<critique>\n(.*)\n</critique>", message):
        assert critique[1] == f"{found[1]} {len(response[1])}"
        return said(f"{response[1]} {found[1]}")
    return said(f"<think>{message[:9]}</think>{found[1]} {len(response[1])}")


def test_every_text_follows_from_the_one_before(serve: Serve, tmp_path: Path) -> None:
    model = serve(writes)
    code, out = label(tmp_path, {"endpoint": model.url, "model": "m"}, seed=1, rollout={"temperature": 0.7, "max_new_tokens": 50})
    assert code == 0
    assert len(model.asked) == 5 * PROMPTS
    drawn = {key: {body.get(key) for body in model.bodies} for key in ("temperature", "max_tokens", "logprobs")}
    assert drawn == {"temperature": {0.7}, "max_tokens": {50}, "logprobs": {None}}
    assert len({body["seed"] for body in model.bodies}) == 5 * PROMPTS
    steps = {(line["row"], line["step"]): line for line in read_lines(out / "revisions.jsonl")}
    principles = {}
    for row in range(PROMPTS):
        first, second = (steps[row, step]["principle"] for step in (1, 3))
        assert first != second and {first, second} <= {*PRINCIPLES}  # all are drawn before one comes again
        assert (steps[row, 2]["principle"], steps[row, 4]["principle"], steps[row, 0]["principle"]) == (first, second, None)
        assert steps[row, 0]["text"] == f"answer to Why {row}?"
        assert steps[row, 1]["text"] == f"{first} {len(steps[row, 0]['text'])}"
        assert steps[row, 4]["text"] == f"answer to Why {row}? {first} {second}"
        principles[f"Why {row}?"] = f"{first} {second}"
    assert len({*principles.values()}) > 2
    sft, pairs = read_lines(out / "sft.jsonl"), read_lines(out / "pairs.jsonl")
    assert sorted(row["prompt"] for row in [*sft, *pairs]) == sorted(principles)  # separate halves, and nothing lost
    assert 0 < len(sft) < PROMPTS
    for row in sft:
        assert row["completion"] == f"answer to {row['prompt']} {principles[row['prompt']]}"
    for row in pairs:
        assert row["chosen"] == f"answer to {row['prompt']} {principles[row['prompt']]}"
        assert (row["rejected"], row["annotator"]) == (f"answer to {row['prompt']}", "m")
        assert row["principle"] == principles[row["prompt"]].replace(" ", "; ")
    figures = json.loads((out / "label.json").read_text())
    assert [own["words"]["value"] for own in figures["rounds"]] == [4.0, 5.0, 6.0]
    assert [own["overlap_1"]["value"] for own in figures["rounds"]] == pytest.approx([1, 4 / 5, 4 / 6])
    assert [own["overlap_2"]["value"] for own in figures["rounds"]] == pytest.approx([1, 3 / 4, 3 / 5])
    assert (figures["lost"], figures["unchanged"], figures["sft"] + figures["pairs"]) == (0, 0, PROMPTS)
    assert "Revisions are longer" in " ".join((out / "report.md").read_text().split())


def test_a_server_that_goes_down_loses_nothing(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def dies(own: Model, message: str) -> Reply:
        return error(503, "no power") if len(own.asked) > 20 else writes(own, message)

    model = serve(dies)
    revise = {"endpoint": model.url, "model": "m", "retries": 0, "parallel": 1}
    code, out = label(tmp_path, revise)
    assert code == 4
    assert "no power" in capsys.readouterr().err
    assert len(read_lines(out / "revisions.jsonl")) == 20
    with (out / "revisions.jsonl").open("a") as file:
        file.write('{"row": 3, "st')  # as a kill leaves it
    model.behave = writes
    assert label(tmp_path, {**revise, "parallel": 4}, "--resume")[0] == 0
    assert len(model.asked) == 21 + 5 * PROMPTS - 20
    assert len({*model.asked}) == 5 * PROMPTS
    assert len(read_lines(out / "sft.jsonl")) + len(read_lines(out / "pairs.jsonl")) == PROMPTS


def test_what_is_cut_off_or_unchanged_makes_no_row(serve: Serve, tmp_path: Path) -> None:
    """Even prompts get an answer that is cut off, so nothing more is asked about them; the others stay as they were."""

    def cut(_: Model, message: str) -> Reply:
        if found := re.fullmatch(r"Why (\d+)\?", message):
            return said("the same", finish_reason="stop" if int(found[1]) % 2 else "length")
        return said("the same")

    model = serve(cut)
    code, out = label(tmp_path, {"endpoint": model.url, "split": 0.0, "rounds": 1})
    assert code == 0
    assert len(model.asked) == PROMPTS + 2 * (PROMPTS // 2)
    assert (read_lines(out / "sft.jsonl"), read_lines(out / "pairs.jsonl")) == ([], [])
    figures = json.loads((out / "label.json").read_text())
    assert (figures["lost"], figures["unchanged"]) == (PROMPTS // 2, PROMPTS // 2)
    report = " ".join((out / "report.md").read_text().split())
    assert "7 prompts lost" in report and "7 pairs less" in report


def test_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are a function of seed, prompt and step: the same however they are drawn together, and after a torn log."""
    make_base(tmp_path / "base")
    revise = {"model": str(tmp_path / "base"), "rounds": 1, "split": 0.5}
    sampling = {"rollout": {"max_new_tokens": 8}}
    code, out = label(tmp_path, revise, **sampling)
    assert code == 0
    whole = {(line["row"], line["step"]): line["text"] for line in lines_of(out / "revisions.jsonl")}
    assert sum(step == 0 for _, step in whole) == PROMPTS
    before = (out / "revisions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "revisions.jsonl").write_bytes(b"".join(before[:9]) + before[9][:20])
    (out / "manifest.json").unlink()
    monkeypatch.setattr(module, "TOGETHER", 3)
    assert label(tmp_path, revise, "--resume", **sampling)[0] == 0
    assert {(line["row"], line["step"]): line["text"] for line in lines_of(out / "revisions.jsonl")} == whole
    kept = [*lines_of(out / "sft.jsonl"), *lines_of(out / "pairs.jsonl")]
    figures = json.loads((out / "label.json").read_text())
    assert len(kept) == PROMPTS - figures["lost"] - figures["unchanged"] > 0
    assert rlhf("label", tmp_path / "revise.yaml", "--resume", "revise.rounds=2") == 2  # another run


def test_halves_and_principles_depend_on_seed_and_prompt_alone() -> None:
    prompts = [f"p{n}" for n in range(2000)]
    chosen = [for_sft(prompt, 3, 0.3) for prompt in prompts]
    assert sum(chosen) / 2000 == pytest.approx(0.3, abs=0.04)
    assert chosen != [for_sft(prompt, 4, 0.3) for prompt in prompts]
    assert [for_sft(prompt, 3, share) for share in (0.0, 1.0) for prompt in prompts[:9]] == [False] * 9 + [True] * 9
    assert for_sft("hi", 3, 0.5) == for_sft((Message("user", "hi"),), 3, 0.5)
    drawn = Counter(principles_of(Record(prompt, (), ""), PRINCIPLES, 1, 3)[0] for prompt in prompts)
    assert all(count / 2000 == pytest.approx(1 / 3, abs=0.04) for count in drawn.values())
    assert len({*principles_of(Record("p", (), ""), PRINCIPLES, 3, 3)}) == 3
    assert len(principles_of(Record("p", (), ""), PRINCIPLES, 5, 3)) == 5


def test_drift_by_hand() -> None:
    """Overlap counts an n-gram as often as the answer has it: of "a a b" against "a b c" two words of three, one pair of two."""

    def chain(*texts: str) -> list[Step]:
        return [Step(0, 2 * n, text, True, None, "") for n, text in enumerate(texts)]

    _, last = drift([chain("a b c", "a a b"), chain("d e", "d e")], 0)
    assert last["words"]["value"] == 2.5
    assert last["overlap_1"]["value"] == pytest.approx((2 + 2) / (3 + 2))
    assert last["overlap_2"]["value"] == pytest.approx((1 + 1) / (2 + 1))
    assert last["distinct_1"]["value"] == pytest.approx(4 / 5)
    assert last["unchanged"]["value"] == 0.5
    (only,) = drift([chain("a")], 0)
    assert only["words"] is None


def test_the_constitution_that_ships() -> None:
    found = read_principles(Path(__file__).parents[2] / "configs" / "constitution.txt", "")
    assert len(found) == len({*found}) >= 10


@pytest.mark.parametrize(
    ("revise", "sections", "words"),
    [
        ({}, {}, "nobody writes. name a model, or an endpoint"),
        ({"model": "BASE", "parallel": 2}, {}, "revise.parallel: has no effect on a local model"),
        ({"endpoint": "http://h/v1"}, {"rollout": {"top_k": 3}}, "rollout.top_k: has no effect on an endpoint"),
        ({"model": "BASE"}, {"rows": "x.jsonl"}, "rows: has no effect beside revise"),
        ({"model": "BASE"}, {"judge": {"path": "x"}}, "judge: has no effect beside revise"),
        ({"model": "BASE"}, {"prompts": None}, "prompts: there is nothing to answer"),
        ({"model": "BASE", "principles": "/nowhere.txt"}, {}, "/nowhere.txt: No such file"),
    ],
)
def test_what_cannot_be_revised(
    revise: dict[str, Any], sections: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if revise.get("model") == "BASE":
        revise = {**revise, "model": str(make_model(tmp_path / "base"))}
    assert label(tmp_path, revise, "--check", **sections)[0] == 2
    assert words in " ".join(capsys.readouterr().err.split())
