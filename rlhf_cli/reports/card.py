"""The model card of a reward model, from the figures in its manifest."""

from __future__ import annotations

from typing import Any

from rlhf_cli.figures import percent
from rlhf_cli.reports.markdown import cell, table

SUBSET_LENGTH = 80
"""Characters of a subset's name that are shown."""


def model_card(card: dict[str, Any], plots: list[tuple[str, str]]) -> str:
    """The section of the report; `card` is the manifest's `reward_model`, `plots` are (title, file name)."""
    parts = ["## Model card"]
    if card["pairs"]:
        parts += _accuracy(card) + _calibration(card) + [f"![{title}](plots/{name})" for title, name in plots]
    else:
        parts.append("**No pairs were held out: how well it judges is not known.** Set `data.holdout: 0.05` or `data.eval`.")
    parts.append(
        f"Scores of {card['score_responses']:,} training responses have mean {card['score_mean']:.4g} and standard deviation "
        f"{card['score_std']:.4g}. Only scores of one prompt's responses compare: the preferences say nothing of the rest."
    )
    return "\n\n".join(parts)


def _accuracy(card: dict[str, Any]) -> list[str]:
    several = card["pairs"] > card["prompts"]
    of = f"{card['pairs']:,} held-out pairs of {card['prompts']:,} prompts" if several else f"{card['pairs']:,} held-out pairs"
    method = "; a prompt's pairs are one observation" if several else ""
    length = card["length_baseline"]
    ahead = length["lead"]
    rows = [
        ("this model", *_rate(card["accuracy"], card["accuracy_low"], card["accuracy_high"])),
        (f"always the {length['prefers']} response", *_rate(length["accuracy"], length["low"], length["high"])),
        ("the difference, pair by pair", *_rate(ahead["mean"], ahead["low"], ahead["high"])),
        ("the same score for all", percent(card["constant"]), ""),
    ]
    parts = [
        f"The better response of {of} has the higher score in {percent(card['accuracy'])} "
        f"(95 % interval {percent(card['accuracy_low'])} to {percent(card['accuracy_high'])}{method}). Ties count half.",
        table(("", "accuracy", "95 % interval"), rows),
    ]
    if card["warning"]:
        parts.insert(1, f"**{card['warning']}**")
    if card["subsets"]:
        subsets = [
            (cell(name, SUBSET_LENGTH), f"{own['pairs']:,}", *_rate(own["accuracy"], own["low"], own["high"]))
            for name, own in card["subsets"].items()
        ]
        parts.append(table(("subset", "pairs", "accuracy", "95 % interval"), subsets))
    return parts


def _rate(accuracy: float, low: float, high: float) -> tuple[str, str]:
    return percent(accuracy), f"{percent(low)} to {percent(high)}"


def _calibration(card: dict[str, Any]) -> list[str]:
    rows = [
        (f"{each['low']:.2f} to {each['high']:.2f}", f"{each['count']:,}", percent(each["confidence"]), percent(each["accuracy"]))
        for each in card["reliability"]
    ]
    return [
        f"Calibration: expected error {percent(card['ece'])}. A mean confidence σ(|margin|) of {percent(card['confidence'])} "
        f"against an accuracy of {percent(card['accuracy'])}{_leaning(card)}.",
        table(("confidence", "pairs", "mean confidence", "accuracy"), rows),
    ]


def _leaning(card: dict[str, Any]) -> str:
    """Said only where the mean confidence is outside the accuracy's interval."""
    if card["confidence"] > card["accuracy_high"]:
        return ": it is over-confident"
    return ": it is under-confident" if card["confidence"] < card["accuracy_low"] else ": they agree within the interval"
