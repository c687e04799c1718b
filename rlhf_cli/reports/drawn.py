"""What responses that a policy drew itself say about its run, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.figures import NOISE, figure, percent
from rlhf_cli.reports.verdict import Lines, moved, window

GOLD_FELL = 0.02
"""A gold reward that falls by more than this share of itself fell, and not by noise."""
GOLD_LOST = 0.25
"""A gold reward that loses more than this share of what it had gained was better before the end."""
KL_HIGH = 10.0
"""Nats a response: this far from its reference a policy writes what the reward model was hardly trained on."""
LENGTH_MOVED = 0.5
"""A mean length that changes by more than this share, far from the reference, is a sign of hacking."""
COLLAPSE = 0.8
"""An entropy a token that loses more than this share of itself is a collapse."""
CLIPPED = 0.3
"""More than this share of clipped tokens: the updates leave the region in which the clipped objective is trusted."""
ENDED = 0.5
"""Where fewer responses end than this share, most scores are of torsos."""
CLOSER = "hold it closer to its reference (`kl.coef`; direct objectives: `objective.beta`), train for fewer steps"


def is_drawn(train: Lines, held_out: Lines) -> bool:
    """Did the run draw its responses itself?"""
    return any("objective/scores" in line for line in (*train, *held_out))


def drawn_verdict(train: Lines, held_out: Lines) -> list[str]:
    """Whether the score rose, at what price, and what went wrong on the way."""
    parts = (_score, _distance, _yardstick, _collapse, _clipping, _value, _endings)
    return [words for part in parts for words in part(train, held_out)]


def _score(train: Lines, held_out: Lines) -> Iterator[str]:
    found = {"held-out": moved([], held_out, "objective/scores"), "training": moved(train, [], "objective/scores")}
    said = [f"from {figure(ends[0])} to {figure(ends[1])} on {where} prompts" for where, ends in found.items() if ends]
    if not said:
        yield "Too few steps to say how the score moved."
        return
    rose = [ends[1] > ends[0] for ends in found.values() if ends]
    if all(rose):
        yield f"The score rose {' and '.join(said)}."
    elif not any(rose):
        yield f"**The score did not rise**: it went {' and '.join(said)}. Is the learning rate right? Is the run too short?"
    else:
        yield f"**The score did not rise on all prompts**: it went {' and '.join(said)}."
    if not held_out:
        yield "No prompts were held out, so all of this is of training prompts: set `data.holdout: 0.05` or `data.eval`."


def _distance(train: Lines, held_out: Lines) -> Iterator[str]:
    if kl := moved(train, held_out, "objective/kl"):
        yield f"The policy is {figure(kl[1])} nats a response from its reference (KL, on its own responses)."


def _yardstick(train: Lines, held_out: Lines) -> Iterator[str]:
    """Reward hacking: the score goes up, and what it stands for does not; Gao et al. 2023."""
    score, kl, length = (moved(train, held_out, name) for name in ("objective/scores", "objective/kl", "response/length"))
    golds = sorted({name for line in (*train, *held_out) for name in line if name.startswith("gold/")})
    if not golds:
        if kl and kl[1] > KL_HIGH and length and abs(length[1] - length[0]) > LENGTH_MOVED * length[0]:
            yield (
                f"**This may be reward hacking**: the policy moved {figure(kl[1])} nats away, and {_lengths(length)}. Nothing "
                "measured whether it is better by another yardstick: add `gold:`, and read the samples."
            )
        else:
            yield "Nothing measured whether the responses are better by another yardstick than the reward itself: add `gold:`."
    for name in golds:
        if ends := moved(train, held_out, name):
            yield _gold(name, ends, score, kl, length)
            yield from _peak(name, held_out)


def _gold(
    name: str,
    gold: tuple[float, float],
    score: tuple[float, float] | None,
    kl: tuple[float, float] | None,
    length: tuple[float, float] | None,
) -> str:
    said = f"`{name}`, which nothing was trained on, went from {figure(gold[0])} to {figure(gold[1])}"
    fell = gold[0] - gold[1] > GOLD_FELL * max(map(abs, gold))
    if not (fell and score and kl and score[1] > score[0] and kl[1] > kl[0]):
        return f"{said}."
    how = f"the score rose and the policy moved {figure(kl[1])} nats away"
    if length and length[1] > length[0]:
        how += f", {_lengths(length)}"
    return (
        f"**Reward hacking**: {how}, but {said}. The policy learned what the reward mistakes for good: {CLOSER}, "
        "or mend the reward (an ensemble with `reward_combine`, a term against what it exploits)."
    )


def _peak(name: str, held_out: Lines) -> Iterator[str]:
    """A gold reward that was higher on the way."""
    lines = [line for line in held_out if name in line]
    if len(lines) < 3:
        return
    best = max(lines, key=lambda line: float(line[name]))
    gained, lost = best[name] - lines[0][name], best[name] - lines[-1][name]
    if gained > NOISE and lost > GOLD_LOST * gained:
        yield (
            f"`{name}` was highest after step {best['step']} ({figure(best[name])}): "
            f"`train.keep_best: {{metric: {name}, mode: max}}` keeps that checkpoint."
        )


def _lengths(length: tuple[float, float]) -> str:
    share = f" ({percent(length[1] / length[0] - 1, '+')})" if length[0] else ""
    return f"the responses went from {length[0]:.1f} to {length[1]:.1f} tokens{share}"


def _collapse(train: Lines, held_out: Lines) -> Iterator[str]:
    of_response, length = (moved(train, held_out, name) for name in ("objective/entropy", "response/length"))
    if of_response is None or length is None or not all(length):
        return
    first, last = (nats / tokens for nats, tokens in zip(of_response, length, strict=True))
    if first > NOISE and last < (1 - COLLAPSE) * first:
        yield (
            f"**Policy collapse**: the entropy fell from {figure(first)} to {figure(last)} nats a token "
            f"({percent(last / first - 1, '+')}), so that each prompt has nearly one response: "
            f"{CLOSER}, or lower `train.learning_rate`."
        )


def _clipping(train: Lines, held_out: Lines) -> Iterator[str]:
    values = [line["policy/clipfrac"] for line in train if "policy/clipfrac" in line]
    size = window(len(values))
    worst = max((sum(values[k : k + size]) / size for k in range(len(values) - size + 1)), default=0.0)
    if worst > CLIPPED:
        yield (
            f"**The learning rate is too high**: up to {percent(worst)} of a step's tokens were clipped. Lower "
            "`train.learning_rate` or `objective.epochs`."
        )


def _value(train: Lines, held_out: Lines) -> Iterator[str]:
    explained = moved(train, [], "value/explained_variance")
    if explained and explained[1] < 0:
        yield (
            f"**The value was not learned**: at the end its explained variance is {figure(explained[1])}, worse than one number "
            "for all. Raise `value.learning_rate`, or use a kind without values (rloo, grpo)."
        )


def _endings(train: Lines, held_out: Lines) -> Iterator[str]:
    rate = moved(train, held_out, "response/eos_rate")
    if rate and rate[1] < ENDED:
        yield (
            f"**Only {percent(rate[1])} of the responses end**; the others are cut off. Raise `rollout.max_new_tokens`, or set "
            "`rollout.missing_eos_penalty`."
        )
