"""The report's sentences and numbers, from hand-made runs."""

import json
import math
import struct

import pytest

from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.plots import moving_average
from rlhf_cli.runs.report import duration, write_report
from rlhf_cli.runs.verdict import ends, held_out_verdict, train_verdict

LENGTHS = {"p50": 10, "p90": 20, "p99": 30, "max": 1234}
SOURCE = {
    "path": "hh.jsonl",
    "format": "messages",
    "read": 1200,
    "kept": 1000,
    "bad": {"not JSON": 150},
    "unused": {"beyond the limit": 50},
    "bad_examples": [],
    "fingerprint": "f",
}
SPLIT = {
    "read": 1200,
    "kept": 1000,
    "dropped": {"too long": 50, "not JSON": 150},
    "truncated": 3,
    "eos_share": 0.997,
    "lengths": {"prompt": LENGTHS, "response": LENGTHS, "total": LENGTHS},
    "sources": [SOURCE],
}
MANIFEST = {
    "stage": "sft",
    "status": "finished",
    "versions": {"rlhf_cli": "0.1.0", "torch": "2.13"},
    "git_commit": "c0ffee",
    "seed": 7,
    "base_model": {"path": "org/tiny", "revision": "r1", "weights_hash": "w1"},
    "parents": [{"path": "runs/first", "manifest_hash": "p1"}],
    "steps": 4,
    "tokens": 12345,
    "seconds": 130.0,
    "tokens_per_second": 94.96,
    "peak_memory": 1.26,
}


def line(step, split, loss, **more):
    return {"step": step, "split": split, "time": 0.0, "loss": loss, **more}


def jsonl(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(RunFolder(tmp_path).path.relative_to(tmp_path) / "runs" / "mine")
    run.model.mkdir(parents=True)
    (run.model / "adapter_config.json").write_text('{"r": 16}')
    train = [line(k, "train", 4.0 / k, learning_rate=1e-4, tokens_per_second=100.0 * k) for k in range(1, 5)]
    held_out = [
        line(0, "eval", 2.0, perplexity=math.exp(2), token_accuracy=0.4),
        line(4, "eval", 1.5, perplexity=math.exp(1.5), token_accuracy=0.5),
    ]
    jsonl(run.metrics, [held_out[0], *train, held_out[1]])
    run.data.write_text(json.dumps({"train": SPLIT, "eval": None}))
    samples = [
        {"step": 0, "prompt": "2+2?", "response": "a|b\n*c* <|im_end|>\x1b[31m", "ended": False, "where": "hh.jsonl:1"},
        {"step": 2, "prompt": "2+2?", "response": "between", "ended": True, "where": "hh.jsonl:1"},
        {"step": 4, "prompt": "2+2?", "response": "4", "ended": True, "where": "hh.jsonl:1"},
    ]
    jsonl(run.samples, samples)
    return run


def test_every_part_of_the_report(run):
    write_report(run, MANIFEST)
    text = run.report.read_text()
    assert text.startswith("# mine: supervised fine-tuning, finished\n")
    assert (
        "Started from `runs/first` (on the base model `org/tiny`) and trained a LoRA adapter of rank 16 "
        "on 1,000 rows of `hh.jsonl`: 4 steps, 12,345 tokens, 2 min 10 s."
    ) in text
    assert "Training loss fell from 4 to 1." in text
    assert "Held-out loss fell from 2 to 1.5, -25.0 %: the model is better on rows it has not seen." in text
    assert "| training loss | 4 | 1 | -75.0 % |" in text
    assert "| held-out perplexity | 7.389 | 4.482 | -39.3 % |" in text
    assert "| held-out token accuracy | 0.4 | 0.5 | +25.0 % |" in text
    assert "| prompt | before (step 0) | after (step 4) |" in text
    assert r"| 2+2? | a\|b<br>\*c\* \<\|im\_end\|\>\\x1b\[31m _(did not end)_ | 4 |" in text
    assert "between" not in text
    assert (
        "| dropped: not JSON | 150 |\n| dropped: too long | 50 |\n| truncated | 3 |\n| responses that end (EOS) | 99.7 % |"
        in text
    )
    assert "| tokens, total: median / 90 % / 99 % / longest | 10 / 20 / 30 / 1,234 |" in text
    assert "- training: `hh.jsonl` (messages), 1,000 of 1,200 rows kept, 50 beyond the limit, 150 not JSON" in text
    assert "**0.3 % of the training responses have no end**" in text
    assert "2 min 10 s for 12,345 tokens (95 a second); at most 1.3 GiB of memory." in text
    assert 'base = AutoModelForCausalLM.from_pretrained("org/tiny", revision="r1")' in text
    assert 'model = PeftModel.from_pretrained(base, "runs/mine/model")' in text
    assert "- earlier run `runs/first`, manifest p1\n- seed 7, git commit c0ffee\n- rlhf_cli 0.1.0, torch 2.13" in text
    assert "`rlhf sft runs/mine/recipe.yaml --output <another folder>`" in text


def test_the_plots_are_pictures_with_every_curve(run):
    write_report(run, MANIFEST)
    assert sorted(path.name for path in run.plots.iterdir()) == ["learning_rate.png", "loss.png", "tokens_per_second.png"]
    for path in run.plots.iterdir():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", content[16:24]) == (864, 480)  # 7.2 × 4 inches at 120 dots
        assert f"](plots/{path.name})" in run.report.read_text()


def test_a_full_model_without_held_out_rows_or_samples(run):
    (run.model / "adapter_config.json").unlink()
    run.samples.write_text("")
    jsonl(run.metrics, [line(1, "train", 1.0), line(2, "train", 1.0)])
    write_report(run, {**MANIFEST, "parents": [], "steps": 1, "git_commit": None})
    text = run.report.read_text()
    assert "Started from `org/tiny` and trained all weights on 1,000 rows of `hh.jsonl`: 1 step, " in text
    assert "**Training loss did not fall**: 1 at the start, 1 at the end." in text
    assert "No rows were held out" in text
    assert 'model = AutoModelForCausalLM.from_pretrained("runs/mine/model")' in text
    assert "## Samples" not in text
    assert [path.name for path in run.plots.iterdir()] == ["loss.png"]


def test_held_out_loss_that_does_not_fall():
    (words,) = held_out_verdict([], [line(0, "eval", 2.0), line(4, "eval", 2.5)])
    assert words.startswith("**Held-out loss did not fall** (from 2 to 2.5, +25.0 %): on rows it has not seen, ")


def test_overfitting_is_said():
    train = [line(k, "train", 3.0 - k / 100) for k in range(1, 101)]
    held_out = [line(0, "eval", 3.0), line(50, "eval", 2.0), line(100, "eval", 2.5)]
    fell, overfit = held_out_verdict(train, held_out)
    assert fell.startswith("Held-out loss fell from 3 to 2.5, -16.7 %")
    # Steps 51 to 60 and 91 to 100: means of 3 − k/100 at 55.5 and 95.5.
    assert "lowest after step 50 (2) and rose to 2.5, while training loss fell from 2.445 to 2.045." in overfit
    held_out[2]["loss"] = 2.0 * 1.005  # noise
    assert len(held_out_verdict(train, held_out)) == 1
    flat = [line(k, "train", 3.0) for k in range(1, 101)]
    held_out[2]["loss"] = 2.5
    assert len(held_out_verdict(flat, held_out)) == 1


def test_small_numbers_of_measurements():
    assert train_verdict([line(1, "train", 1.0)]) == ["Too few steps to say how the training loss moved."]
    assert held_out_verdict([], [line(4, "eval", 1.5)]) == ["Held-out loss was measured once, after step 4: 1.5."]


def test_arithmetic():
    assert ends([1.0] * 10 + [5.0] * 90) == (1.0, 5.0)
    assert ends([float(k) for k in range(40)]) == (1.5, 37.5)
    assert moving_average([4.0, 2.0, 0.0, 7.0, 1.0], 2) == [4.0, 2.0, 14 / 5, 8 / 3, 1.0]
    assert [duration(seconds) for seconds in (3.14, 59.96, 61, 7325)] == ["3.1 s", "60.0 s", "1 min 1 s", "2 h 2 min"]
