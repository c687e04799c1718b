"""The report of an evaluation, and what the terminal shows of it, from a made-up eval.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.eval_json import EvaluationResult, read_result
from rlhf_cli.reports import terminal
from rlhf_cli.reports.document import Finding
from rlhf_cli.reports.evaluation import write_report
from rlhf_cli.reports.findings_evaluation import findings
from rlhf_cli.runs.folder import RunFolder
from tests.reports.an_evaluation import HOSTILE, MODELS, empty, evaluation, figures, preference, rate, samples, share, tables

Result = dict[str, Any]


def found_in(result: Result) -> list[Finding]:
    return findings(EvaluationResult.from_json(result))


def terminal_table(result: Result) -> str:
    return terminal.terminal_table(EvaluationResult.from_json(result))


def said(result: Result, head: str) -> str:
    """The one finding that begins so, whole."""
    (found,) = [each for each in found_in(result) if each.head.startswith(head)]
    return f"{found.head} {found.text}"


def heads(result: Result) -> list[str]:
    return [each.head for each in found_in(result)]


def two_models(**rates: float | dict[str, float]) -> Result:
    """dpo against sft, nothing else."""
    result = empty()
    result["about"] |= {"baseline": "sft", "judge": "reward"}
    result["models"] = {"sft": {}, "dpo": {}}
    result["winrate"] = {"dpo": {**rate(0.6, 0.6), **rates}}
    return result


def report(folder: Path, result: Result, lines: list[dict[str, Any]]) -> str:
    write_report(RunFolder(folder), EvaluationResult.from_json(result), tables(lines))
    return (folder / "report.md").read_text("utf-8")


def test_eval_json_is_what_was_found(tmp_path: Path) -> None:
    for result in (evaluation(), empty()):
        assert json.loads(json.dumps(EvaluationResult.from_json(result).to_json())) == result
    for damaged in (
        '{"about": {}}',
        '{"about": 3}',
        "null",
        "[]",
        json.dumps(empty() | {"models": {"sft": {"kl": {"mean": 1}}}}),
    ):
        (tmp_path / "eval.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"eval.json is damaged \(.*\)\n  evaluate again with --force"):
            read_result(tmp_path / "eval.json")


def test_who_is_better_worse_or_undecided() -> None:
    result = evaluation()
    assert said(result, "Better than sft").startswith(
        "Better than sft (the 95 % interval is above 50 %, and holds among 7 models (Holm)): dpo's responses are preferred "
        "by gold to sft's in 72.1 % (68.0 to 75.9 %) of 512 comparisons; "
        "pushed/step-00000020's in 70.0 % (66.0 to 74.0 %); ppo's in"
    )
    assert said(result, "Better than sft").endswith("; 1 more in the table.")  # five are better, four are named
    assert "base's responses are preferred by gold to sft's in 21.0 % (17.0 to 25.0 %)" in said(result, "Worse than sft")
    assert "pushed/step-00000080's responses" in said(result, "Not told apart from sft")


def test_judges_in_words() -> None:
    result = two_models()
    assert "preferred by the reward to" in said(result, "Better")
    result["about"]["judge"] = "helpful"
    assert "preferred by the term helpful to" in said(result, "Better")
    result["about"]["judge"] = {"endpoint": "http://localhost:1/v1", "model": "big"}
    assert "preferred by big (an endpoint) to" in said(result, "Better")


@pytest.mark.parametrize(
    ("raw", "equal", "effect"),
    [
        (share(0.7, 0.05), share(0.69, 0.06), None),  # within its noise
        (share(0.7, 0.05), share(0.6, 0.05), "its gain is partly length"),
        (share(0.7, 0.05), share(0.52, 0.05), "that it is better than sft for its content cannot be told"),
        (share(0.7, 0.05), share(0.4, 0.05), "its gain is its length, and beside that it is worse"),
        (share(0.3, 0.05), share(0.5, 0.05), "its length is what it loses by"),
        (share(0.6, 0.05), share(0.75, 0.05), "its length costs it comparisons"),
        (share(0.52, 0.05), share(0.65, 0.05), None),  # there is no gain to explain
        (share(0.55, 0.04), share(0.49, 0.07), "that it is better than sft for its content cannot be told"),
    ],
)
def test_length(raw: dict[str, float], equal: dict[str, float], effect: str | None) -> None:
    result = two_models(**raw, length_controlled=equal)
    if effect is None:
        assert "Length plays a part." not in heads(result)
    else:
        assert said(result, "Length plays a part.").endswith(f": {effect}.")


def test_the_largest_effect_of_length_comes_first() -> None:
    result = evaluation()
    for name, equal in {"dpo": 0.66, "ipo": 0.5}.items():
        result["winrate"] |= {name: {**rate(0.75, equal)}}
    words = said(result, "Length plays a part.")
    assert -1 < words.find("ipo wins 75.0 %") < words.find("dpo wins 75.0 %")


def test_ties_alone_are_no_lack_of_prompts() -> None:
    result = two_models(**share(0.5, 0.01))
    (own,) = result["winrate"].values()
    own["ties"] = 1
    assert said(result, "No difference at all:").endswith("every comparison of dpo is a tie.")
    assert "Not told apart from sft" not in heads(result)


def test_where_the_reward_is_fooled() -> None:
    result = evaluation()
    assert said(result, "pushed fools the reward after step 20:").endswith(
        "gold is highest at step 20 (0.701, KL 4.80 nats) and falls by 0.271 (0.220 to 0.322) to step 80, while the proxy rises "
        "from 1.180 to 2.35. The interval holds for whichever point is the highest; the fall itself is, if anything, overstated."
    )
    assert "It is highest at n = 16 (0.678," in said(result, "best of n: gold did not fall.")
    result["fits"]["pushed"]["peak"]["fall"] = {"mean": 0.02, "low": -0.01, "high": 0.05}
    assert "lower by 0.020 (-0.010 to 0.050), an interval that includes 0." in said(result, "pushed: whether gold fell cannot")
    assert not any("fools" in head for head in heads(result))


def test_a_fall_without_a_rising_proxy_is_not_fooling() -> None:
    result = evaluation()
    result["overoptimisation"][4]["proxy"] = 1.0  # the last of pushed; it had 1.18 at gold's peak
    assert "while the proxy goes from 1.180 to 1.000" in said(result, "pushed: gold fell after step 20:")
    result["fits"]["pushed"]["peak"] = None  # no gold
    assert not any(head.startswith("pushed:") or "fools" in head for head in heads(result))


def test_gold_at_equal_kl(tmp_path: Path) -> None:
    result = evaluation()
    assert said(result, "pushed has less gold than dpo and ppo at equal KL:").endswith(
        "the difference is -0.025 (-0.046 to -0.004) in the mean over 0 to 9.35 nats from sft, and -0.020 (-0.040 to 0.000) at "
        "the end of that range."
    )
    result["at_kl"]["mean"] = share(0.2, 0.1)
    assert "pushed has more gold than dpo and ppo at equal KL:" in heads(result)
    result["at_kl"]["mean"] |= {"low": -0.1}
    assert "pushed has not surely more or less gold than dpo and ppo at equal KL:" in heads(result)
    del result["at_kl"]["a"]["points"][1:3]
    assert said(result, "pushed has not").endswith(
        "range. pushed has hardly a model in that range: its line there is a guess. keep more checkpoints."
    )
    del result["at_kl"]["a"]["points"][1:]
    result["at_kl"] |= {"matched": [], "mean": None}
    assert said(result, "pushed and dpo and ppo have no range of KL in common:").endswith(
        "the KL of pushed from sft cannot be told from 0. train longer, or evaluate on more prompts."
    )
    text = report(tmp_path, result, samples())
    assert "no range of KL in common" in text and (tmp_path / "plots/at-kl.png").exists() and "pushed less" not in text


def test_an_eval_json_from_before_equal_kl() -> None:
    result = evaluation()
    del result["at_kl"]
    assert EvaluationResult.from_json(result).at_kl is None


def test_variety_endings_and_texts() -> None:
    result = evaluation()
    assert said(result, "Less variety:").endswith(
        ": pushed/step-00000080 46.0 % (44.8 to 47.2 %), against 2.1 % (0.9 to 3.3 %) of sft's."
    )
    assert "within 64 tokens: pushed/step-00000080 41.0 % (39.0 to 43.0 %), against 98.5 %" in said(result, "Responses are cut")
    assert "3 more in the table, against 11.2 (10.8 to 11.6) of sft" in said(result, "The texts became less likely:")
    for own in result["models"].values():
        own["response/duplicates"], own["response/eos_rate"] = share(0.46, 0.01), share(0.6, 0.01)
    assert not {"Less variety:", "Responses are cut off:"} & set(heads(result))  # as in the baseline


def test_a_model_alone_is_held_against_a_half() -> None:
    result = empty()
    result["models"] = {
        "only": {**figures("sft"), "response/duplicates": share(0.6, 0.01), "response/eos_rate": share(0.3, 0.01)}
    }
    assert said(result, "Less variety:").endswith("word for word: only 60.0 % (59.0 to 61.0 %).")
    assert "64 tokens: only 30.0 % (29.0 to 31.0 %). The others" in said(result, "Responses are cut off:")
    assert said(result, "Gold:") == "Gold: highest for only, 0.512 (0.481 to 0.543)."
    del result["models"]["only"]["gold/gold"]
    assert "add gold." in said(result, "No second yardstick.")


def test_preferences(tmp_path: Path) -> None:
    result = empty()
    result["preferences"] = {"rm": preference(0.5, 0.55)}
    assert said(result, "Hardly a judge:").endswith(
        "that cannot be told from guessing and is no better than always preferring the longer response, which has 55.0 % "
        "(51.0 % to 59.0 %)."
    )
    assert "**rm:** its accuracy" in report(tmp_path, result, [])
    result["preferences"] = {"rm": preference(0.8, 0.85)}
    assert said(result, "Length explains it:").endswith(
        "that is explained by length alone: always preferring the longer response has 85.0 % (81.0 % to 89.0 %) on the same "
        "pairs. Pairs whose better response is the shorter one would tell whether it judges anything else."
    )
    policy = preference(0.75, 0.55) | {"kind": "policy"}
    result["preferences"] = {"rm": preference(0.8, 0.55), "dpo": policy, "ipo": policy}
    assert said(result, "Preferences:").endswith("540 pairs; always the longer response reaches 55.0 % (51.0 to 59.0 %).")
    assert said(result, "Implicit rewards").endswith("dpo 75.0 % (71.0 to 79.0 %); ipo 75.0 % (71.0 to 79.0 %).")


def test_terminal_table() -> None:
    lines = terminal_table(evaluation()).splitlines()
    assert lines[0].split() == ["model", "gold", "score", "win", "rate", "KL", "length", "Elo", "perplexity"]
    row = next(line for line in lines if line.startswith("dpo "))
    assert row.split("  ")[0] == "dpo"
    assert [part.strip() for part in row.split("  ") if part] == [
        "dpo", "0.721 ±0.031", "0.950 ±0.060", "0.721 (0.680 to 0.759)", "4.12", "38.9", "1104 ±20", "12.4",
    ]  # fmt: skip
    assert max(map(len, lines[:-1])) <= 120
    assert row.index("0.721 (") == lines[0].index("win rate")
    assert "rm           0.740 (0.700 to 0.780)  0.550 (0.510 to 0.590), longer  540" in lines
    assert lines[-3] == "pushed: gold peaks at 0.701 at step 20, KL 4.80 nats; 0.271 (0.220 to 0.322) lower at the end"
    assert lines[-2] == "best of n: gold is highest at the last point, 0.678 at n = 16, KL 1.835 nats"
    assert lines[-1].startswith(
        "pushed has less gold than dpo and ppo at equal KL: the difference is -0.025 (-0.046 to -0.004) in"
    )


def test_terminal_table_has_only_what_exists() -> None:
    result = empty()
    assert terminal_table(result) == ""
    result["models"] = {
        "a\x1b[31m/b": {"perplexity": share(12.0, 0.0) | {"high": 12.0, "low": 12.0}, "response/length": share(5, 0)}
    }
    assert [line.split() for line in terminal_table(result).splitlines()] == [
        ["model", "length", "perplexity"],
        ["a\\x1b[31m/b", "5.00", "12.0"],
    ]


def test_report_has_every_part(tmp_path: Path) -> None:
    text = report(tmp_path, evaluation(), samples())
    for part in ("Findings", "Win rates", "Over-optimisation", "Gold at equal KL", "Metrics", "Ratings", "Preferences"):
        assert f"\n## {part}\n" in text
    assert "\n## Side by side\n" in text and "\n## Notes\n" in text
    assert "| KL, nats | pushed | dpo and ppo | pushed less dpo and ppo |" in text
    assert "| 9.35 (8.95 to 9.75) | 0.600 (0.570 to 0.630) | 0.620 (0.590 to 0.650) | -0.020 (-0.040 to 0.000) |" in text
    assert "| mean up to there, even in √KL |  |  | -0.025 (-0.046 to -0.004) |" in text
    assert "| dpo | 0.721 (0.680 to 0.759) | 0.700 (0.650 to 0.750) | 0.031 | 512 |" in text
    assert "| pushed | gold | d (α − β log d) | 0.150 (0.120 to 0.180) | 0.095 (0.076 to 0.114) | 0.940 | 25.0 % |" in text
    assert "| rm: harm\\_less\\|x | 0.720 (0.690 to 0.870) | 120 | 118 |" in text
    assert "- best of n has 16 responses to a prompt." in text
    assert "bootstrap over prompts (2,000 resamples)" in text
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {
        *("winrates.png", "ratings.png", "overoptimisation-1-pushed.png", "at-kl.png"),
        *(f"{kind}-{name}.png" for kind in ("reliability", "margins") for name in ("1-rm",)),
    }
    assert all(f"](plots/{name})" in text for name in pictures)
    assert not [path for path in tmp_path.rglob("*.tmp")]


def side_by_side(folder: Path, judge: Any, lines: list[dict[str, Any]]) -> list[str]:
    """The last cells of the rows of dpo's table."""
    result = evaluation()
    result["about"]["judge"] = judge
    text = report(folder, result, lines).split("### dpo beside sft\n\n")[1].split("\n\n")[0]
    return [row.split(" | ")[-1].removesuffix(" |") for row in text.splitlines()[2:]]


def test_samples_that_gain_and_lose_most(tmp_path: Path) -> None:
    # Worth (3.5 − row)/4 + number/100, against 0: the best of each prompt is number 1, the worst number 0; gold is half.
    assert side_by_side(tmp_path, "reward", samples()) == [
        *("Gain of 0.885", "Gain of 0.635", "Gain of 0.385"),
        *("Loss of 0.875", "Loss of 0.625", "Loss of 0.375"),
    ]
    only_gains = side_by_side(tmp_path, "reward", samples(prompts=2))
    assert only_gains == ["Gain of 0.885", "Gain of 0.635"]
    assert side_by_side(tmp_path, "rm", samples())[0] == "Gain of 0.885"
    assert side_by_side(tmp_path, "gold", samples())[0] == "Gain of 0.443"
    assert side_by_side(tmp_path, None, samples())[0] == "Gain of 0.443"
    lines = [{**line, "terms": {"reward/rm": line["terms"]["reward/rm"]}} for line in samples()]
    assert side_by_side(tmp_path, None, lines)[0] == "Gain of 0.885"


def test_an_endpoint_has_no_scores(tmp_path: Path) -> None:
    rows = side_by_side(tmp_path, {"endpoint": "http://localhost/v1", "model": "big"}, samples())
    assert len(rows) == 3
    assert "alert(1)" in rows[0]  # the first response of dpo


def test_hostile_text_in_markdown(tmp_path: Path) -> None:
    text = report(tmp_path, evaluation(), samples())
    assert "\\<script\\>" in text
    assert "<script" not in text.replace("\\<script", "")
    assert not {"\x00", "\x1b"} & set(text)
    assert HOSTILE not in text


@pytest.mark.parametrize("part", ["models", "winrate", "ratings", "preferences", "overoptimisation", "fits", "at_kl"])
def test_any_part_may_be_missing(tmp_path: Path, part: str) -> None:
    result = evaluation()
    result[part] = None if part == "at_kl" else type(result[part])()
    text = report(tmp_path, result, samples())
    assert "## Findings" in text
    assert terminal_table(result)


def test_nothing_at_all(tmp_path: Path) -> None:
    result = empty()
    result["about"] |= {"prompts": 0}
    assert "Nothing was measured." in report(tmp_path, result, [])
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_one_model_and_no_baseline(tmp_path: Path) -> None:
    result = empty()
    result["models"] = {"sft": figures("sft")}
    text = report(tmp_path, result, samples(("sft",)))
    assert "### sft\n\n| prompt | sft |\n" in text
    assert "1 model, 4 responses to each of 128 prompts." in text
    result["about"]["baseline"] = "sft"
    assert "| prompt | sft |\n" in report(tmp_path, result, samples(("sft",)))


def test_nulls(tmp_path: Path) -> None:
    """No gold, no fit, no pair."""
    result = evaluation()
    for point in result["overoptimisation"]:
        point["gold"] = point["intervals"]["gold"] = None
    nothing = {"accuracy": None, "low": None, "high": None, "ties": 0, "pairs": 0, "prompts": 0, "ece": None, "confidence": None}
    empties = {"reliability": [], "margins": None, "subsets": {}, "length_baseline": None}
    result["fits"] = {
        "pushed": {"proxy": {"bon": None, "rl": None}, "gold": None, "peak": None},
        "best of n": result["fits"]["best of n"],
    }
    result["fits"]["best of n"] |= {"gold": None, "peak": None}
    result["preferences"]["rm"] |= nothing | empties
    text = report(tmp_path, result, [])
    assert "| rm | reward model | no pairs |" in text
    assert "there is no pair to measure rm by." in text
    assert "no pairs" in terminal_table(result)
    assert not (tmp_path / "plots" / "reliability-1-rm.png").exists()


def test_odd_names(tmp_path: Path) -> None:
    """They stand in files' names, in pictures' labels and in both reports."""
    odd = {name: f"{name}/$x_{{2}}$ | <b>\u6a21\u578b\n_" for name in MODELS} | {"sft": "../_$"}

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {odd.get(key, key): renamed(each) for key, each in value.items()}
        if isinstance(value, list):
            return [renamed(each) for each in value]
        return odd.get(value, value) if isinstance(value, str) else value

    written = report(tmp_path, renamed(evaluation()), renamed(samples()))
    assert "dpo/\\$x\\_{2}\\$ \\| \\<b\\>\u6a21\u578b" in written
    assert all(path.parent.name == "plots" for path in tmp_path.rglob("*.png"))
    assert (tmp_path / "plots" / "overoptimisation-1-pushed.png").exists()
