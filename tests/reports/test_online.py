"""What is said of runs on the policy's own responses, from hand-made lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.reports.findings_online import online_findings
from rlhf_cli.reports.run_result import History
from rlhf_cli.reports.training import write_report
from rlhf_cli.runs.folder import RunFolder

Line = dict[str, Any]
NO_GOLD = "Nothing measured whether the responses are better by another yardstick than the reward itself: add `gold:`."


def held_out(*values: dict[str, float]) -> list[Line]:
    """A line for every ten steps."""
    usual = {"objective/scores": 0.0, "objective/kl": 0.0, "response/length": 20.0, "objective/entropy": 2.0}
    return [{"step": 10 * k, "split": "eval", "time": 0.0, **usual, **each} for k, each in enumerate(values)]


def training(count: int, **metrics: float | list[float]) -> list[Line]:
    """Steps 1 … count; a list gives a value to each. Names with __ for a slash."""
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    lines = ({name: value[k] if isinstance(value, list) else value for name, value in names.items()} for k in range(count))
    return [{"step": k, "split": "train", "time": 0.0, **each} for k, each in enumerate(lines, 1)]


def drawn(score: float, kl: float, length: float = 20.0, **golds: float) -> dict[str, float]:
    named = {f"gold/{name}": value for name, value in golds.items()}
    return {"objective/scores": score, "objective/kl": kl, "response/length": length, **named}


def said_of(train: list[Line], held_out: list[Line]) -> list[str]:
    """Findings as sentences, their heads set off as in report.md."""
    found = online_findings(History(train, held_out))
    return [" ".join(part for part in (each.head and f"**{each.head}**", each.text) if part) for each in found]


def said(start: str, words: list[str]) -> str:
    """The one sentence that begins so."""
    (found,) = [each for each in words if each.startswith(start)]
    return found


def test_what_stands_beside_a_gold_term_is_no_yardstick() -> None:
    beside = {"match": 0.5, "match/na": 0.25, "judge/contradicting": 0.1}
    words = said_of([], held_out(drawn(0.0, 0.0, **beside), drawn(1.0, 2.0, **{name: 0.0 for name in beside})))
    assert [word for word in words if "gold/" in word] == [said("**Reward hacking:**", words)]
    assert "`gold/match`, which" in said("**Reward hacking:**", words)


def test_a_score_that_rose() -> None:
    train = training(30, objective__scores=[float(k) for k in range(30)])
    words = said_of(train, held_out(drawn(0.5, 0.0), drawn(2.0, 4.5)))
    # Three steps at each end: the means of 0, 1, 2 and of 27, 28, 29.
    assert words == [
        "The score rose from 0.5 to 2 on held-out prompts and from 1 to 28 on training prompts.",
        "The policy is 4.5 nats a response from its reference (KL, on its own responses).",
        NO_GOLD,
    ]


def test_a_score_that_did_not_rise() -> None:
    train = training(2, objective__scores=[1.0, 0.5])
    assert said("**The score did not rise", said_of(train, [])) == (
        "**The score did not rise:** it went from 1 to 0.5 on training prompts. Is the learning rate right? Is the run too short?"
    )
    assert said("No prompts were held out", said_of(train, []))
    rising = training(2, objective__scores=[0.5, 1.0])
    assert said_of(rising, held_out(drawn(2, 0), drawn(1.5, 1)))[0] == (
        "**The score did not rise on all prompts:** it went from 2 to 1.5 on held-out prompts "
        "and from 0.5 to 1 on training prompts."
    )
    assert said_of(training(1, objective__scores=1.0), [])[0] == "Too few steps to say how the score moved."


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ([1.0] * 4, "**All scores of a prompt were equal in every step:** no response was told from the others to its prompt"),
        (
            [1.0, 0.5, 0.5, 0.4],
            "**In 60.0 % of the prompts all responses scored alike** and did not say which is better: draw more",
        ),
    ],
)
def test_tied_scores_are_said(shares: list[float], wanted: str) -> None:
    train = training(4, objective__scores=1.0, reward__zero_spread=shares)
    assert said(wanted, said_of(train, held_out(drawn(1, 0), drawn(1, 0))))
    few = said_of(training(4, objective__scores=1.0, reward__zero_spread=0.5), held_out(drawn(1, 0), drawn(1, 0)))
    assert not [each for each in few if "scored alike" in each]


def test_reward_hacking() -> None:
    start = drawn(0.0, 0.0, 20.0, gold=0.5)
    words = said_of([], held_out(start, drawn(3.0, 12.5, 30.0, gold=0.25)))
    assert said("**Reward hacking", words).startswith(
        "**Reward hacking:** the score rose and the policy moved 12.5 nats away, the responses went from 20.0 to 30.0 tokens "
        "(+50.0 %), but `gold/gold`, which nothing was trained on, went from 0.5 to 0.25. The policy learned what the reward "
        "mistakes for good: hold it closer to its reference (`kl.coef`; "
    )
    for last in (drawn(3.0, 12.5, 30.0, gold=0.5 * 0.985), drawn(-1.0, 12.5, 30.0, gold=0.25)):  # noise; no better score either
        assert not any("hacking" in each for each in said_of([], held_out(start, last)))
    better = said_of([], held_out(start, drawn(3.0, 9.0, gold=0.75)))
    assert better[-1] == "`gold/gold`, which nothing was trained on, went from 0.5 to 0.75."


def test_a_gold_reward_that_was_higher_on_the_way() -> None:
    lines = held_out(drawn(0, 0, gold=0.5), drawn(2, 3, gold=0.9), drawn(3, 9, gold=0.7))
    assert said_of([], lines)[-1] == (
        "`gold/gold` was highest after step 10 (0.9): `train.keep_best: {metric: gold/gold, mode: max}` keeps that checkpoint."
    )
    lines[-1]["gold/gold"] = 0.81  # 0.09 of the 0.4 that were gained
    assert not any("was highest" in each for each in said_of([], lines))


def test_without_a_gold_reward() -> None:
    hacked = said_of([], held_out(drawn(0, 0, 20.0), drawn(3, 10.5, 31.0)))
    assert said("**This may be reward hacking", hacked) == (
        "**This may be reward hacking:** the policy moved 10.5 nats away, and the responses went from 20.0 to 31.0 tokens "
        "(+55.0 %). Nothing measured whether it is better by another yardstick: add `gold:`, and read the samples."
    )
    assert said("**This may", said_of([], held_out(drawn(0, 0, 20.0), drawn(3, 10.5, 9.0))))  # shorter by 55 %
    for last in (drawn(3, 9.5, 31.0), drawn(3, 10.5, 29.0)):  # near enough; the length is about the same
        assert NO_GOLD in said_of([], held_out(drawn(0, 0, 20.0), last))


def test_collapse() -> None:
    """By the token: a short response has little entropy anyhow."""

    def words(entropy: float, length: float) -> list[str]:
        usual = {"objective/entropy": 40.0, "response/length": 20.0}
        return said_of([], held_out(usual, {"objective/entropy": entropy, "response/length": length}))

    assert said("**Policy collapse", words(5.0, 20.0)).startswith(
        "**Policy collapse:** the entropy fell from 2 to 0.25 nats a token (-87.5 %), so that each prompt has nearly one "
        "response: hold it closer to its reference (`kl.coef`; "
    )
    assert not any("collapse" in each for each in (*words(10.0, 20.0), *words(5.0, 5.0)))


def test_clipping_is_judged_by_its_worst_steps() -> None:
    """The rate falls to nothing at the end, and with it the clipped share."""
    train = training(30, policy__clipfrac=[0.0] * 10 + [0.5, 0.5, 0.2] + [0.0] * 17)
    assert said("**The learning rate is too high", said_of(train, [])).startswith(
        "**The learning rate is too high:** up to 40.0 % of a step's ratios were clipped. Lower `train.learning_rate`"
    )
    one_step = training(30, policy__clipfrac=[0.0] * 29 + [0.8])
    assert not any("too high" in each for each in said_of(one_step, []))


def test_a_value_that_was_not_learned() -> None:
    train = training(2, value__explained_variance=[0.5, -0.25])
    assert said("**The value", said_of(train, [])).startswith(
        "**The value was not learned:** at the end its explained variance is -0.25, worse than one number for all."
    )
    learned = training(2, value__explained_variance=[-0.5, 0.0])
    assert not any("The value" in each for each in said_of(learned, []))


def test_responses_that_do_not_end() -> None:
    def words(rate: float) -> list[str]:
        return said_of([], held_out({"response/eos_rate": 1.0}, {"response/eos_rate": rate}))

    assert said("**Only", words(0.4)).startswith(
        "**Only 40.0 % of the responses end:** the others are cut off. Raise `rollout.max_new_tokens`, or set "
    )
    assert not any("responses end:**" in each for each in words(0.5))


def test_which_runs_are_online() -> None:
    assert History(training(1, loss=1.0), held_out({})).online
    assert not History(training(2, loss=1.0, rewards__margins=1.0), [{"step": 0, "split": "eval", "loss": 1.0}]).online


LENGTHS = {"p50": 10, "p90": 20, "p99": 30, "max": 40}
SOURCE = {
    "path": "p.jsonl",
    "format": "prompt",
    "read": 90,
    "kept": 90,
    "bad": {},
    "unused": {},
    "bad_examples": [],
    "fingerprint": "f",
}
SPLIT = {
    "read": 90,
    "kept": 90,
    "dropped": {},
    "truncated": 0,
    "eos_share": None,
    "lengths": {"prompt": LENGTHS},
    "sources": [SOURCE],
}
MANIFEST = {
    "stage": "ppo",
    "status": "finished",
    "versions": {},
    "git_commit": None,
    "seed": 0,
    "base_model": {"path": "base", "revision": None, "weights_hash": "w"},
    "parents": [],
    "objective": {"kind": "rloo"},
    "learning_rate": 1e-4,
    "batch_size": 8,
    "steps": 40,
    "tokens": 1000,
    "seconds": 10.0,
    "tokens_per_second": 100.0,
    "peak_memory": 1.0,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "mine")
    run.model.mkdir(parents=True)
    train = training(
        4,
        loss=0.5,
        objective__scores=[0.0, 1.0, 2.0, 3.0],
        objective__kl=[0.0, 1.0, 2.0, 3.0],
        reward__a=1.0,
        reward__b=2.0,
        value__explained_variance=[0.1, 0.2, 0.3, 0.4],
        policy__clipfrac=0.125,
        time__rollout=6.0,
        time__score=1.0,
        time__update=3.0,
    )
    evaluated = held_out(*(drawn(k, 2.0 * k, 20.0 + k, help=0.1 * k) | {"reward/a": k} for k in range(5)))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (evaluated[0], *train, *evaluated[1:])))
    run.data.write_text(json.dumps({"train": SPLIT, "eval": None}))
    texts = {0: "first", 10: "second", 20: "third", 30: "fourth", 40: "fifth"}
    samples = [
        {"step": step, "prompt": "2+2?", "response": text, "ended": True, "where": "p.jsonl:1", "tokens": 3}
        for step, text in texts.items()
    ]
    run.samples.write_text("".join(json.dumps(line) + "\n" for line in samples))
    return run


def test_who_judged_is_no_start(run: RunFolder) -> None:
    model = {"name": "rm", "model": "runs/rm/model", "base": "b1", "adapter": "a1"}
    judged = {"reward": [model], "gold": [{"name": "g", "function": "g.py:g", "hash": "h1"}]}
    parents = [{"path": "runs/sft", "manifest_hash": "s1"}, {"path": "runs/rm", "manifest_hash": "r1"}]
    write_report(run, MANIFEST | judged | {"parents": parents[1:]})
    assert "Started from `base` and trained" in run.report.read_text()
    write_report(run, MANIFEST | judged | {"parents": parents})
    text = run.report.read_text()
    assert "Started from `runs/sft` (on the base model `base`)" in text
    assert "\n- reward `runs/rm/model`, a1\n- gold `g.py:g`, h1\n- seed 0" in text


def test_a_best_checkpoint_that_is_not_the_last_is_named(run: RunFolder) -> None:
    path = (run.checkpoints / "step-00000002").as_posix()
    write_report(run, MANIFEST | {"steps": 4, "best_step": 2})
    assert f"It is that of step 4, the last one. The best by held-out figures is `{path}`" in run.report.read_text()
    write_report(run, MANIFEST | {"steps": 4, "best_step": 4})
    assert "The best by held-out" not in run.report.read_text()


def test_the_report_of_a_ppo_run(run: RunFolder) -> None:
    write_report(run, MANIFEST)
    text = run.report.read_text()
    assert text.startswith("# mine: policy optimisation with a reward, finished\n")
    assert "trained all weights on 90 prompts of `p.jsonl`" in text
    assert "The score rose from 0 to 4 on held-out prompts and from 0 to 3 on training prompts." in text
    assert "Training loss" not in text and "Held-out loss" not in text
    assert "| metric | training, start | training, end | held-out, start | held-out, end |\n" in text
    assert "| score | 0 | 3 | 0 | 4 |\n" in text
    assert "| reward a | 1 | 1 | 0 | 4 |\n| reward b | 2 | 2 |  |  |\n| gold help |  |  | 0 | 0.4 |\n" in text
    assert "| KL to the reference, nats a response | 0 | 3 | 0 | 8 |\n" in text
    assert "| explained variance of the value | 0.1 | 0.4 |  |  |" in text
    assert "| prompt | before (step 0) | halfway (step 20) | after (step 40) |\n" in text
    assert "| 2+2? | first | third | fifth |" in text
    assert "EOS" not in text
    assert "| tokens, prompt: median / 90 % / 99 % / longest | 10 / 20 / 30 / 40 |" in text
    assert "tokens, response" not in text
    assert "Of a step's time: 60.0 % drawing responses, 10.0 % scoring them, 30.0 % updates." in text
    names = {"loss", "score", "reference_kl", "length", "entropy", "explained_variance", "clipfrac"}
    names |= {"gold_help", "reward_a", "reward_b"}
    assert {path.stem for path in run.plots.iterdir()} == names
    assert all(f"](plots/{name}.png)" in text for name in names)


def test_an_online_direct_run_keeps_its_own_metrics(run: RunFolder) -> None:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        if line["split"] == "train":
            line["rewards/margins"] = 0.5 * line["step"]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run, {**MANIFEST, "stage": "dpo"})
    text = run.report.read_text()
    assert text.startswith("# mine: online direct preference optimisation, finished\n")
    assert "| margin of the implicit reward | 0.5 | 2 |  |  |" in text
