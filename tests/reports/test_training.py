"""The report of a training run, from hand-made files, and its sentences, from hand-made lines."""

import json
import math
import re
import struct
from pathlib import Path

import pytest

from rlhf_cli.figures import duration
from rlhf_cli.reports.findings_training import length_findings, training_findings
from rlhf_cli.reports.plots_training import Curve, _panels, moving_average, thinned
from rlhf_cli.reports.run_result import History, TrainingSample, ends
from rlhf_cli.reports.training import write_report
from rlhf_cli.runs.folder import RunFolder

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
    "objective": {"kind": "supervised", "normalize": "tokens"},
    "learning_rate": 1e-4,
    "batch_size": 8,
    "steps": 4,
    "tokens": 12345,
    "seconds": 130.0,
    "tokens_per_second": 94.96,
    "peak_memory": 1.26,
}


def line(step, split, loss, **more):
    return {"step": step, "split": split, "time": 0.0, "loss": loss, **more}


def words(found):
    """Findings as sentences, their heads set off as in report.md."""
    return [" ".join(part for part in (each.head and f"**{each.head}**", each.text) if part) for each in found]


def said_of(train, held_out, rows=0):
    return words(training_findings(History(train, held_out), rows))


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
        "## In short\n\nHeld-out loss fell from 2 to 1.5, -25.0 %: the model is better on rows it has not seen.\n\n"
        "- `rlhf train-rm`, `rlhf dpo` and `rlhf ppo` go on from it: `model.path: runs/mine`."
    ) in text
    assert (
        "Started from `runs/first` (on the base model `org/tiny`) and trained a LoRA adapter of rank 16 "
        "on 1,000 rows of `hh.jsonl`: 4 steps, 12,345 tokens, 2 min 10 s."
    ) in text
    assert '2 min 10 s. Objective `supervised` (normalize "tokens"), learning rate 0.0001, batches of 8.' in text
    assert "Training loss fell from 4 to 1." in text
    assert "Held-out loss fell from 2 to 1.5, -25.0 %: the model is better on rows it has not seen." in text
    assert "| training loss | 4 | 1 | -75.0 % |" in text
    assert "| held-out perplexity | 7.389 | 4.482 | -39.3 % |" in text
    assert "| held-out token accuracy | 0.4 | 0.5 | +0.1 |" in text
    assert "| prompt | before (step 0) | after (step 4) |" in text
    assert r"| 2+2? | a\|b<br>\*c\* \<\|im\_end\|\>\\x1b\[31m _(did not end)_ | 4 |" in text
    assert "between" not in text
    assert (
        "| dropped: not JSON | 150 |\n| dropped: too long | 50 |\n| truncated | 3 |\n| responses that end (EOS) | 99.7 % |"
        in text
    )
    assert "| tokens, total: median / 90 % / 99 % / longest | 10 / 20 / 30 / 1,234 |" in text
    assert "- training: `hh.jsonl` (messages), 1,000 of 1,200 rows kept, 50 beyond the limit, 150 not JSON" in text
    assert "**0.3 % of the training responses have no end:** they do not teach the model to stop." in text
    assert "2 min 10 s for 12,345 tokens (95 a second); at most 1.3 GiB of memory." in text
    assert 'base = AutoModelForCausalLM.from_pretrained("org/tiny", revision="r1")' in text
    model = Path("runs/mine/model").resolve()
    assert f'model = PeftModel.from_pretrained(base, "{model}")\nmodel.generation_config = Generation' in text
    assert "- earlier run `runs/first`, manifest p1\n- seed 7, git commit c0ffee\n- rlhf_cli 0.1.0, torch 2.13" in text
    assert "- reference" not in text
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
    assert "**Training loss did not fall:** 1 at the start, 1 at the end." in text
    assert "No rows were held out" in text
    assert f'model = AutoModelForCausalLM.from_pretrained("{Path("runs/mine/model").resolve()}")' in text
    assert "## Samples" not in text
    assert [path.name for path in run.plots.iterdir()] == ["loss.png"]


def test_held_out_loss_that_does_not_fall():
    _, said = said_of([], [line(0, "eval", 2.0), line(4, "eval", 2.5)])
    assert said.startswith("**Held-out loss did not fall** (from 2 to 2.5, +25.0 %): on rows it has not seen, ")


def test_overfitting_is_said():
    train = [line(k, "train", 3.0 - k / 100) for k in range(1, 101)]
    held_out = [line(0, "eval", 3.0), line(50, "eval", 2.0), line(100, "eval", 2.5)]
    _, fell, overfit = said_of(train, held_out)
    assert fell.startswith("Held-out loss fell from 3 to 2.5, -16.7 %")
    # Steps 51 to 60 and 91 to 100: means of 3 − k/100 at 55.5 and 95.5.
    assert "lowest after step 50 (2) and rose to 2.5, while training loss fell from 2.445 to 2.045." in overfit
    held_out[2]["loss"] = 2.0 * 1.005  # noise
    assert len(said_of(train, held_out)) == 2
    flat = [line(k, "train", 3.0) for k in range(1, 101)]
    held_out[2]["loss"] = 2.5
    assert len(said_of(flat, held_out)) == 2


def test_small_numbers_of_measurements():
    assert said_of([line(1, "train", 1.0)], [line(4, "eval", 1.5)]) == [
        "Too few steps to say how the training loss moved.",
        "Held-out loss was measured once, after step 4: 1.5.",
    ]


def test_a_long_log_is_thinned_without_losing_a_peak():
    steps = [float(k) for k in range(100_000)]
    values = [math.sin(k / 5000) for k in range(100_000)]
    values[54_321], values[77_777] = 9.0, -9.0
    kept, drawn = thinned(steps, values)
    assert len(kept) == len(drawn) <= 2000 and kept == sorted(kept)
    assert (max(drawn), min(drawn)) == (9.0, -9.0)
    assert all(values[int(k)] == value for k, value in zip(kept, drawn, strict=True))


def curve(kind, values):
    return Curve(f"{kind}, training", kind, "#000000", [float(k) for k in range(len(values))], values, False, False)


@pytest.mark.parametrize(
    ("chosen", "rejected", "panels"),
    [
        ([-4.0, -4.5, -5.0], [-125.0, -126.0, -128.0], 2),  # on one axis neither would be seen to move
        ([-4.0, -4.5, -5.0], [-4.2, -5.0, -9.0], 1),
        ([0.0, 1.0, 3.0], [0.0, -1.0, -3.0], 1),
    ],
)
def test_curves_far_apart_have_an_axis_each(chosen, rejected, panels):
    found = _panels([curve("chosen", chosen), curve("rejected", rejected)])
    assert [[each.kind for each in own] for own in found] == (
        [["chosen"], ["rejected"]] if panels == 2 else [["chosen", "rejected"]]
    )


def test_arithmetic():
    assert ends([1.0] * 10 + [5.0] * 90) == (1.0, 5.0)
    assert ends([float(k) for k in range(40)]) == (1.5, 37.5)
    assert moving_average([4.0, 2.0, 0.0, 7.0, 1.0], 2) == [2.0, 13 / 4, 14 / 5, 10 / 4, 8 / 3]
    assert [duration(seconds) for seconds in (3.14, 59.96, 61, 7325)] == ["3.1 s", "60.0 s", "1 min 1 s", "2 h 2 min"]


RATE = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "pairs": 30, "prompts": 10}
CARD = {
    "accuracy": 0.714,
    "accuracy_low": 0.668,
    "accuracy_high": 0.756,
    "pairs": 400,
    "prompts": 400,
    "constant": 0.5,
    "length_baseline": {
        "prefers": "shorter",
        "accuracy": 0.55,
        "low": 0.501,
        "high": 0.598,
        "lead": {"mean": 0.164, "low": -0.012, "high": 0.22},
    },
    "ece": 0.034,
    "confidence": 0.75,
    "reliability": [
        {"low": 0.5, "high": 0.55, "count": 150, "confidence": 0.52, "accuracy": 0.5},
        {"low": 0.95, "high": 1.0, "count": 250, "confidence": 0.97, "accuracy": 0.9},
    ],
    "margins": {"mean": 1.5, "edges": [-2.0, 0.0, 2.0], "counts": [110, 290]},
    "subsets": {},
    "score_mean": 0.25,
    "score_std": 1.75,
    "score_responses": 2000,
    "warning": None,
}


def write_reward_report(run, **card):
    held_out = [line(0, "eval", 0.7, accuracy=0.5, margin=0.0), line(2, "eval", 0.6, accuracy=0.714, margin=1.5)]
    jsonl(run.metrics, [held_out[0], *(line(k, "train", 0.7 / k, accuracy=0.5, margin=0.1 * k) for k in (1, 2)), held_out[1]])
    load = ["from transformers import AutoModelForSequenceClassification", 'model = "of a reward"']
    write_report(run, {**MANIFEST, "stage": "train-rm", "reward_model": CARD | card, "load": load})
    return run.report.read_text()


def test_a_reward_model_has_a_card(run):
    text = write_reward_report(run)
    assert text.startswith("# mine: reward model, finished\n")
    assert "| held-out accuracy | 0.5 | 0.714 | +0.214 |\n| held-out margin | 0 | 1.5 | +1.5 |" in text
    assert (
        "The better response of 400 held-out pairs has the higher score in 71.4 % (95 % interval 66.8 % to 75.6 %). "
        "Ties count half.\n\n**Accuracy on held-out pairs**\n\n| by | accuracy | 95 % interval |\n"
    ) in text
    assert (
        "| this model | 71.4 % | 66.8 % to 75.6 % |\n"
        "| always the shorter response | 55.0 % | 50.1 % to 59.8 % |\n"
        "| the difference, pair by pair | 16.4 % | -1.2 % to 22.0 % |\n"
        "| the same score for all | 50.0 % |  |"
    ) in text
    assert "expected error 3.4 %. A mean confidence σ(|margin|) of 75.0 % against an accuracy of 71.4 %: they agree" in text
    assert "| 0.50 to 0.55 | 150 | 52.0 % | 50.0 % |\n| 0.95 to 1.00 | 250 | 97.0 % | 90.0 % |" in text
    assert "Scores of 2,000 training responses have mean 0.25 and standard deviation 1.75." in text
    assert '```python\nfrom transformers import AutoModelForSequenceClassification\nmodel = "of a reward"\n```' in text
    assert "PeftModel" not in text
    assert "--merge" not in text
    pictures = {"loss.png", "accuracy.png", "margin.png", "reliability.png", "margins.png"}
    assert {path.name for path in run.plots.iterdir()} == pictures
    assert all(f"](plots/{name})" in text for name in pictures)
    assert all((run.plots / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)


def test_a_card_of_rankings_with_subsets_and_a_warning(run):
    subsets = {"a|b": RATE, "harm": RATE | {"accuracy": 0.9}}
    text = write_reward_report(run, prompts=100, subsets=subsets, warning="It hardly beats length.", confidence=0.6)
    assert "of 400 held-out pairs of 100 prompts has the higher score in 71.4 % (" in text
    assert (
        "to 75.6 %; it allows for pairs of one prompt being alike). Ties count half.\n\n**It hardly beats length.**\n\n**Acc"
        in text
    )
    assert (
        "| subset | pairs | accuracy | 95 % interval |\n| --- | --- | --- | --- |\n| a\\|b | 30 | 50.0 % | 40.0 % to 60.0 %"
        in text
    )
    assert "| harm | 30 | 90.0 % |" in text
    assert "it is under-confident" in text


def test_a_reward_model_without_held_out_pairs(run):
    nothing = {"accuracy": None, "pairs": 0, "prompts": 0, "length_baseline": None, "reliability": [], "margins": None}
    text = write_reward_report(run, **nothing)
    assert "**No pairs were held out: how well it judges is not known.**" in text
    assert "have mean 0.25" in text
    assert "reliability.png" not in text
    assert not (run.plots / "reliability.png").exists()


def pair_line(step, split, chosen, margins, accuracy, saturated=0.1, **more):
    rewards = {"rewards/margins": margins, "rewards/accuracies": accuracy, "rewards/saturated": saturated}
    return line(step, split, 0.5, **rewards, **{"logps/chosen": chosen}, **more)


def test_the_report_of_a_preference_run(run):
    held_out = [pair_line(0, "eval", -80.0, 0.0, 0.5, 0.0), pair_line(4, "eval", -92.5, 1.5, 0.7, 0.25)]
    train = [pair_line(k, "train", -80.0, 0.1 * k, 0.5 + 0.1 * k) for k in range(1, 5)]
    jsonl(run.metrics, [held_out[0], *train, held_out[1]])
    run.data.write_text(json.dumps({"train": SPLIT, "eval": {**SPLIT, "kept": 100}}))
    samples = [
        {"step": step, "prompt": "p", "response": "r", "ended": step == 0, "where": "x:1", "tokens": tokens}
        for step, tokens in ((0, 10), (0, 20), (4, 30), (4, 24))
    ]
    jsonl(run.samples, samples)
    write_report(run, {**MANIFEST, "stage": "dpo", "reference": {"model": "runs/other/model", "base": "b1", "adapter": "a1"}})
    text = run.report.read_text()
    assert text.startswith("# mine: direct preference optimisation, finished\n")
    assert "\n- reference `runs/other/model`, weights a1\n" in text
    # Wilson with z = 1.96: (0.7 + 0.0192) / 1.0384 ± 1.96 √(0.0021 + 0.000096) / 1.0384.
    assert (
        "The implicit reward prefers the better response in 70.0 % of the held-out pairs "
        "(95 % interval 60.4 % to 78.1 %, each of 100 rows one observation)."
    ) in text
    assert (
        "**Displacement:** the log-probability of the held-out chosen responses fell by 12.5 nats, from -80 to -92.5, although "
        "the margin grew from 0 to 1.5."
    ) in text
    assert (
        "25.0 % of the held-out pairs are saturated: the loss has less than 5 % of its gradient at equal rewards there." in text
    )
    assert "| held-out margin of the implicit reward | 0 | 1.5 | +1.5 |" in text
    assert "| held-out log-probability, chosen | -80 | -92.5 | -12.5 |" in text
    # 15 tokens before, 27 after.
    assert "**Length drift:** these responses have a mean of 15.0 tokens before, 27.0 after (+80.0 %); those that did not" in text
    assert {path.name for path in run.plots.iterdir()} == {"loss.png", "accuracy.png", "margin.png", "logps.png"}


def test_a_metric_may_be_absent_in_some_lines(run):
    one_class = [line(1, "train", 0.5, kl=0.0, **{"rewards/undesirable": 0.0}), line(2, "train", 0.5, kl=0.25)]
    both = {"rewards/desirable": 0.75, "rewards/undesirable": -0.25, "rewards/margins": 1.0, "logps/desirable": -50.0}
    jsonl(run.metrics, [*one_class, line(3, "train", 0.4, kl=0.5, **both), line(4, "train", 0.3, kl=0.75, **both)])
    write_report(run, {**MANIFEST, "stage": "kto"})
    text = run.report.read_text()
    assert text.startswith("# mine: Kahneman–Tversky optimisation, finished\n")
    assert "| training implicit reward, desirable | 0.75 | 0.75 | 0 |" in text
    assert "| training KL estimate z0 | 0 | 0.75 | +0.75 |" in text
    assert "the mean implicit reward of training desirable responses is 0.75, of undesirable ones -0.25." in text
    assert "No displacement: the log-probability of the training desirable responses went from -50 to -50 nats." in text
    assert {path.name for path in run.plots.iterdir()} == {"loss.png", "margin.png", "rewards.png", "logps.png", "kl.png"}


def of_pairs(train, held_out, rows):
    """What is said after the losses."""
    return said_of(train, held_out, rows)[2:]


def test_words_about_pairs():
    def of(first, last):
        return of_pairs([], [pair_line(0, "eval", *first), pair_line(4, "eval", *last)], 100)

    guess, displaced, saturated = of((-80.0, 0.5, 0.5), (-81.0, 0.4, 0.55, 0.6))
    # (0.55 + 0.0192) / 1.0384 ± 1.96 √(0.002475 + 0.000096) / 1.0384.
    assert guess.startswith(
        "**The implicit reward prefers the better response in 55.0 % of the held-out pairs (95 % interval 45.2 %"
    )
    assert guess.endswith("that cannot be told from guessing.**")
    assert displaced.startswith(
        "**The chosen responses became less likely:** the log-probability of the held-out chosen responses "
    )
    assert displaced.endswith("fell by 1 nats, from -80 to -81, and the margin did not grow.")
    assert saturated.startswith("**60.0 % of the held-out pairs are saturated")
    assert of((-80.0, 0.0, 0.5), (-80.5, 1.0, 0.9))[1].startswith("No displacement: ")
    assert of((-80.0, 0.0, 0.5), (-75.0, 1.0, 0.9))[1].endswith("went from -80 to -75 nats.")
    assert of_pairs([], [line(0, "eval", 1.0), line(4, "eval", 0.5)], 100) == []
    train = [pair_line(k, "train", -80.0, 1.0, 0.75) for k in (1, 2)]
    assert of_pairs(train, [], 0)[0] == "The implicit reward prefers the better response in 75.0 % of the training pairs."


def test_classes_that_are_not_told_apart():
    rewards = {"rewards/desirable": 0.1, "rewards/undesirable": 0.2}
    (said,) = of_pairs([], [line(0, "eval", 0.5, **rewards), line(4, "eval", 0.5, **rewards)], 10)
    assert said.startswith("**The policy does not tell desirable from undesirable responses:** ")


@pytest.mark.parametrize(
    ("reached", "words"), [(2.0, "5: 3 short of it, 40.0 % of the way."), (6.5, "5: 1.5 beyond it."), (-1.0, "5: 6 short of it,")]
)
def test_the_gap_to_the_target_of_ipo(reached, words):
    lines = [line(step, "eval", 0.5, **{"margin/logratio": h, "margin/target": 5.0}) for step, h in ((0, 0.0), (4, reached))]
    (said,) = of_pairs([], lines, 10)
    assert f"The mean difference that IPO compares is {reached:g} on held-out pairs, its target {words}" in said


@pytest.mark.parametrize("target", [0.0, -0.4])
def test_labels_of_either_order_have_no_target_to_be_short_of(target):
    lines = [line(step, "eval", 0.5, **{"margin/logratio": 0.1, "margin/target": target}) for step in (0, 4)]
    assert list(of_pairs([], lines, 10)) == []


def test_lengths_of_samples():
    def of(*tokens):
        samples = [TrainingSample(step, "x:1", "p", "r", True, count) for step, count in enumerate(tokens)]
        return words(length_findings(samples))

    assert of(100, 300, 125) == ["Mean length of these responses: 100.0 tokens before, 125.0 after."]
    assert of(100, 126)[0].startswith("**Length drift:** ")
    assert of(100, 74)[0].endswith("(-26.0 %). Preferences often follow length: are the shorter ones better?")
    assert of(100) == []
    assert of(None, None) == []


def test_the_page_says_the_same(run):
    """report.html has every sentence, table, sample and picture of report.md, and loads nothing."""
    write_report(run, MANIFEST)
    page = run.page.read_text("utf-8")
    assert "<title>mine: supervised fine-tuning, finished</title>" in page
    for head in ("Did it learn?", "Samples", "Data", "Cost", "The model", "Where it comes from"):
        assert f">{head}</h2>" in page
        assert f"\n## {head}\n" in run.report.read_text()
    assert "Training loss fell from 4 to 1." in page
    assert '<th scope="row" dir="auto">held-out perplexity</th><td class="number">7.389</td>' in re.sub(r"\n\s*", "", page)
    assert "a|b\n*c* &lt;|im_end|&gt;\\x1b[31m</p>" in page
    assert "<code>org/tiny</code>" in page
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 3
    assert 'alt="Loss over the steps, in loss: training from 4 to 1; held-out rows from 2 to 1.5."' in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "<script" not in page


def test_the_page_of_a_reward_model_has_its_card(run):
    write_reward_report(run)
    page = run.page.read_text("utf-8")
    assert ">Model card</h2>" in page
    assert (
        'alt="How often the reward model is right, by its confidence σ(|margin|); the diagonal is perfect calibration."' in page
    )
