"""From files to trees: rows that cannot be trained on, single responses, sizes and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import sections
from rlhf_cli.data import encode as encode_module
from rlhf_cli.data.dataset import Dataset, data_report, prepare
from rlhf_cli.data.templates import Template
from rlhf_cli.data.trees import Tree, tree_length
from rlhf_cli.data.unpaired import unpaired_dataset
from rlhf_cli.errors import UsageError
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.data.uses import request_of

PAIRS = [{"prompt": f"Hi {i}", "chosen": f"Yes {i}", "rejected": f"No {i}", "by": i} for i in range(6)]
RANKED = [
    {"prompt": "Hello", "responses": ["a", "b", "c"]},
    {"prompt": "Hello", "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 2]},
]
JUDGED = [{"prompt": f"Who {i}?", "completion": f"It {i}", "label": i % 3 == 0} for i in range(5)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))


def run(
    stage: str,
    *sources: list[dict[str, Any]],
    check: Any = None,
    margin: str | None = None,
    kind: Any = sections.Data,
    **data: Any,
) -> Dataset:
    names = [f"{number}.jsonl" for number in range(len(sources))]
    for name, rows in zip(names, sources, strict=True):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = kind([sections.Source(name) for name in names], **data)
    template = Template("x", CHATML)
    return prepare(settings, request_of(stage, check=check, margin_column=margin), tiny_tokenizer(), template)


def needs_a_large_margin(tree: Tree) -> str | None:
    return None if tree.facts.margin is not None and tree.facts.margin >= 2 else "the margin is small"


def test_rows_that_cannot_be_trained_on_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when their tokens come out of the cache, which knows nothing of margins."""
    for _ in range(2):
        dataset = run("train-rm", PAIRS, check=needs_a_large_margin, margin="by", max_lost=0.4)
        assert [tree.facts.margin for tree in dataset.train.trees] == [2.0, 3.0, 4.0, 5.0]
        report = data_report(dataset)["train"]
        assert (report["read"], report["kept"], report["dropped"]) == (6, 4, {"the margin is small": 2})
        assert report["examples"] == ["0.jsonl:1: the margin is small", "0.jsonl:2: the margin is small"]
        monkeypatch.setattr(encode_module._Encoder, "run", None)
    with pytest.raises(UsageError, match=r"^2 of 6 rows \(33.3%\) are dropped or truncated; data.max_lost allows 5.0%\n"):
        run("train-rm", PAIRS, check=needs_a_large_margin, margin="by")


def test_truncated_rows_are_lost_too() -> None:
    rows = [*PAIRS, {"prompt": "Hi", "chosen": "It is four. " * 9, "rejected": "No"}]
    assert run("dpo", rows, max_length=40, overlong="truncate-response", max_lost=0.2).train.truncated == 1
    with pytest.raises(UsageError, match=r"^1 of 7 rows \(14.3%\) are dropped or truncated; data.max_lost allows 10.0%\n"):
        run("dpo", rows, max_length=40, overlong="truncate-response", max_lost=0.1)


def test_a_source_has_the_rows_that_encoding_left_it() -> None:
    good, lost = ({"prompt": prompt, "chosen": "It is four", "rejected": "Five"} for prompt in ("2+2?", "<s>"))
    sources = [good, lost, good], [lost, lost], [good, good, good, lost]
    several, single = run("train-rm", *sources, max_lost=1.0), run("train-rm", sources[0], max_lost=1.0)
    assert several.source(sections.Train(), sections.Data([]), 0).sizes == (2, 0, 3)
    assert single.source(sections.Train(), sections.Data([]), 0).sizes == (2,)


def test_pairs_that_are_the_same_once_cut_count_as_lost() -> None:
    rows = [{"prompt": "Hi", "chosen": "It is four. " * 9 + "Yes", "rejected": "It is four. " * 9 + "No"}, *PAIRS]
    dataset = run("dpo", rows, max_length=40, overlong="truncate-response", max_lost=0.2)
    assert dataset.train.lost == {"a better and a worse response are the same, cut and tokenised": 1}
    assert (dataset.train.kept, dataset.train.truncated) == (6, 0)
    assert data_report(dataset)["train"]["pairs"] == 6


TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What is two?\n\nAssistant:"


@pytest.mark.parametrize(
    "row", [{"chosen": f"{TALK} Four", "rejected": f"{TALK} No"}, {"prompt": TALK, "completion": " Four"}], ids=["hh", "a prompt"]
)
def test_of_transcripts_the_last_turn_alone_is_learned(row: dict[str, str]) -> None:
    """Unless the recipe says otherwise; of messages all turns are."""
    counts = {}
    for asked in ("auto", "last", "all"):
        dataset = run("sft", [row], kind=sections.SftData, train_on=asked)
        counts[asked] = int(dataset.train.trees.supervised.sum())
        assert [notice[:20] for notice in dataset.train.notices] == (["data.train_on: last,"] if asked == "auto" else [])
    assert counts["auto"] == counts["last"] < counts["all"]
    said = (("user", "Hi"), ("assistant", "Hello"), ("user", "Two?"), ("assistant", "Four"))
    turns = [{"role": role, "content": text} for role, text in said]
    auto, every = (run("sft", [{"messages": turns}], kind=sections.SftData, train_on=asked).train for asked in ("auto", "all"))
    assert auto.trees.supervised.sum() == every.trees.supervised.sum()
    assert auto.notices == ()


def test_a_report_counts_what_there_is_to_compare() -> None:
    """Three pairs of three responses; of the four, the best one against each of the three that are tied."""
    report = data_report(run("dpo", PAIRS, RANKED))["train"]
    assert (report["responses"], report["pairs"]) == (6 * 2 + 3 + 4, 6 + 3 + 3)
    assert "labels" not in report
    judged = data_report(run("kto", JUDGED))["train"]
    assert judged["labels"] == {"desirable": 2, "undesirable": 3}
    assert "pairs" not in judged


def test_the_longest_tree_has_all_its_responses() -> None:
    dataset = run("dpo", RANKED)
    assert dataset.longest == max(tree_length(tree) for tree in dataset.train.trees)
    ranked = dataset.train.trees[-1]
    assert dataset.longest == len(ranked.prompt) + 4 * 2  # a letter and the end-of-turn each


def test_single_responses_of_pairs_and_judged_rows() -> None:
    whole = run("kto", PAIRS, JUDGED, RANKED, holdout=0.3)
    dataset = unpaired_dataset(whole, "data.train", seed=3, max_length=64, mismatches=True)
    assert dataset.held_out is not None and whole.held_out is not None
    for before, after in ((whole.train, dataset.train), (whole.held_out, dataset.held_out)):
        halves = [(tree.row, label) for tree in before.trees for label in ([True, False] if len(tree.responses) > 1 else [None])]
        assert [tree.row for tree in after.trees] == [row for row, _ in halves]
        labels = [tree.facts.label for tree in after.trees]
        assert all(label in (None, found) for (_, label), found in zip(halves, labels, strict=True))
        assert {len(tree.responses) for tree in after.trees} == {2}
        assert after.kept == before.kept
    report = data_report(dataset)
    for split, encoded in (("train", dataset.train), ("eval", dataset.held_out)):
        labels = [tree.facts.label for tree in encoded.trees]
        assert report[split]["labels"] == {"desirable": labels.count(True), "undesirable": labels.count(False)}
        assert report[split]["kept"] == encoded.kept
    sizes = dataset.source(sections.Train(batch_size=4), sections.Data([]), 0).sizes
    pairs, judged, ranked = dataset.reading.sizes
    assert sizes == (2 * pairs, judged, 2 * ranked)
    alone = unpaired_dataset(whole, "data.train", seed=3, max_length=64, mismatches=False)
    assert {len(tree.responses) for tree in alone.train.trees} == {1}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (True, "every response is desirable; without undesirable ones there is nothing to tell apart"),
        (False, "every response is undesirable; without desirable ones there is nothing to tell apart"),
    ],
)
def test_training_data_of_one_class_are_refused(label: bool, message: str) -> None:
    rows = [row | {"label": label} for row in JUDGED]
    with pytest.raises(UsageError) as error:
        unpaired_dataset(run("kto", rows), "r.yaml:4: data.train", seed=0, max_length=64, mismatches=True)
    assert str(error.value) == f"r.yaml:4: data.train: {message}"


def test_held_out_data_may_be_of_one_class() -> None:
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JUDGED if row["label"]))
    whole = run("kto", JUDGED, eval=[sections.Source("eval.jsonl")])
    dataset = unpaired_dataset(whole, "data.train", seed=0, max_length=64, mismatches=True)
    assert dataset.held_out is not None
    assert {tree.facts.label for tree in dataset.held_out.trees} == {True}


def test_prompts_of_any_rows() -> None:
    """What ppo reads of every kind of row, and a cache that tells prompts from rows and one reserve from another."""
    rows: list[dict[str, Any]] = [*PAIRS, *RANKED, *JUDGED, {"prompt": "Hello"}]
    by_kind = [PAIRS, RANKED, JUDGED, [{"prompt": "Hello"}]]
    names = [f"{number}.jsonl" for number in range(len(by_kind))]
    for name, part in zip(names, by_kind, strict=True):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = sections.Data([sections.Source(name) for name in names], max_length=40, max_lost=1.0)
    template = Template("x", CHATML)

    def prompts(reserve: int) -> Dataset:
        return prepare(settings, request_of("ppo", reserve=reserve), tiny_tokenizer(), template)

    dataset = prompts(4)
    assert dataset.train.kept == len(rows) == 14
    assert dataset.longest == max(len(tree.prompt) for tree in dataset.train.trees)
    report = data_report(dataset)["train"]
    assert (report["kept"], report["eos_share"], list(report["lengths"])) == (14, None, ["prompt"])
    assert "pairs" not in report and "labels" not in report
    shortest = int(dataset.train.trees.lengths.min())
    assert prompts(40 - shortest).train.kept == int((dataset.train.trees.lengths == shortest).sum()) < 14
    assert prompts(4).train.kept == 14
    with pytest.raises(UsageError, match=r"^none of 14 rows can be used: longer than data\.max_length"):
        prompts(39)
    (first,) = dataset.source(sections.Train(batch_size=1), settings, 0).batch(1)
    assert first.responses == ()
