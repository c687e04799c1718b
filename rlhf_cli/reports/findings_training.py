"""What the curves and samples of a run on the responses of its data say, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.evaluation.intervals import wilson
from rlhf_cli.figures import percent, short
from rlhf_cli.reports.document import Finding
from rlhf_cli.reports.run_result import Ends, History, TrainingSample, ends, window

RISE = 1.01  # held-out loss this far above its lowest is a rise and not noise
DISPLACED = 0.01  # a log-probability of the chosen responses that falls by more than this share of itself is displacement
DRIFT = 0.25  # a mean length that changes by more than this share is drift


def training_findings(history: History, rows: int) -> list[Finding]:
    """Whether it learned, and what else happened. rows: held-out ones, the observations of an interval."""
    return [*_training_loss(history), *_held_out_loss(history), *_preferences(history, rows)]


def _training_loss(history: History) -> Iterator[Finding]:
    train = history.train
    if len(train) < 2:
        yield Finding("note", "", "Too few steps to say how the training loss moved.")
        return
    first, last = ends([line["loss"] for line in train])
    size = window(len(train))
    over = f" (means of the first and the last {size} steps)" if size > 1 else ""
    if last < first:
        yield Finding("better", "", f"Training loss fell from {short(first)} to {short(last)}{over}.")
    else:
        said = f"{short(first)} at the start, {short(last)} at the end{over}. Is the learning rate right? Is the run too short?"
        yield Finding("warning", "Training loss did not fall:", said)


def _held_out_loss(history: History) -> Iterator[Finding]:
    held_out = history.held_out
    if not held_out:
        said = "No rows were held out, so nothing tells learning from memorising: set `data.holdout: 0.05` or `data.eval`."
        yield Finding("note", "", said)
        return
    first, last = held_out[0]["loss"], held_out[-1]["loss"]
    if len(held_out) == 1:
        yield Finding("note", "", f"Held-out loss was measured once, after step {held_out[0]['step']}: {short(last)}.")
        return
    moved = f"from {short(first)} to {short(last)}" + (f", {percent((last - first) / abs(first), '+')}" if first else "")
    if last < first:
        yield Finding("better", "", f"Held-out loss fell {moved}: the model is better on rows it has not seen.")
    else:
        said = f"({moved}): on rows it has not seen, the model is not better than at the start."
        yield Finding("warning", "Held-out loss did not fall", said)
    best = min(held_out, key=lambda line: line["loss"])
    later = [line["loss"] for line in history.train if line["step"] > best["step"]]
    size = window(len(history.train))
    since, until = sum(later[:size]) / size, sum(later[-size:]) / size
    # The training loss just after the best step and at the end, where those share no steps.
    if last - best["loss"] > (RISE - 1) * abs(best["loss"]) and len(later) >= 2 * size and until < since:
        said = (
            f"held-out loss was lowest after step {best['step']} ({short(best['loss'])}) and rose to {short(last)}, "
            f"while training loss fell from {short(since)} to {short(until)}. Train for fewer steps, "
            "or keep the best checkpoint with `train.keep_best: {metric: loss, mode: min}`."
        )
        yield Finding("warning", "Overfitting:", said)


def _preferences(history: History, rows: int) -> Iterator[Finding]:
    """What the implicit rewards and log-probabilities of preferred responses say; nothing where a run has none."""
    where, of = "held-out" if history.held_out else "training", history.moved
    if accuracies := of("rewards/accuracies"):
        yield _accuracy(accuracies[1], where, rows if history.held_out else 0)
    if (desirable := of("rewards/desirable")) and (undesirable := of("rewards/undesirable")):
        means = f"is {short(desirable[1])}, of undesirable ones {short(undesirable[1])}"
        said = f"the mean implicit reward of {where} desirable responses {means}"
        if desirable[1] > undesirable[1]:
            yield Finding("better", "", f"At the end {said}.")
        else:
            yield Finding("warning", "The policy does not tell desirable from undesirable responses:", f"at the end {said}.")
    for better, worse in (("chosen", "rejected"), ("desirable", "undesirable")):
        if (margins := of("rewards/margins")) and (logps := of(f"logps/{better}")):
            yield _displacement((better, worse), logps, margins, where)
    if (logratio := of("margin/logratio")) and (target := of("margin/target")) and target[1] > 0:
        said = f"The mean difference that IPO compares is {short(logratio[1])} on {where} pairs, its target {short(target[1])}"
        gap, share = short(abs(logratio[1] - target[1])), percent(logratio[1] / target[1])
        beside = f"{gap} beyond it" if logratio[1] > target[1] else f"{gap} short of it, {share} of the way"
        yield Finding("note", "", f"{said}: {beside}.")
    elif saturated := of("rewards/saturated"):
        said = f"{percent(saturated[1])} of the {where} pairs are saturated: "
        said += "the loss has less than 5 % of its gradient at equal rewards there."
        advice = "More steps teach little and move the policy on: train for fewer epochs."
        yield Finding("warning", said, advice) if saturated[1] > 0.5 else Finding("note", "", said)


def _accuracy(share: float, where: str, rows: int) -> Finding:
    said = f"The implicit reward prefers the better response in {percent(share)} of the {where} pairs"
    if not rows:
        return Finding("note", "", f"{said}.")
    low, high = wilson(share, rows)
    said += f" (95 % interval {percent(low)} to {percent(high)}, each of {rows:,} rows one observation)"
    if low <= 0.5:
        return Finding("warning", f"{said}: that cannot be told from guessing.", "")
    return Finding("better", "", f"{said}.")


def _displacement(classes: tuple[str, str], logps: Ends, margins: Ends, where: str) -> Finding:
    (better, worse), (first, last) = classes, logps
    said = f"the log-probability of the {where} {better} responses"
    if last >= first - DISPLACED * abs(first):
        return Finding("note", "", f"No displacement: {said} went from {short(first)} to {short(last)} nats.")
    fell = f"{said} fell by {short(first - last)} nats, from {short(first)} to {short(last)}"
    if margins[1] <= margins[0]:
        return Finding("warning", f"The {better} responses became less likely:", f"{fell}, and the margin did not grow.")
    hold = ", `objective.sft_weight` holds the chosen responses up" if better == "chosen" else ""
    return Finding(
        "warning",
        "Displacement:",
        f"{fell}, although the margin grew from {short(margins[0])} to {short(margins[1])}. The policy tells "
        f"the responses apart by making the {worse} ones unlikely, and what both lost went to responses that nobody has judged. "
        f"Read the samples; a lower learning rate or fewer steps limit it{hold}.",
    )


def length_findings(samples: list[TrainingSample]) -> Iterator[Finding]:
    """How long the sampled responses were before and after; nothing where that is not known."""
    known = [(sample.step, sample.tokens, sample.ended) for sample in samples if sample.tokens is not None]
    steps = [step for step, _, _ in known]
    if not steps or min(steps) == max(steps):
        return
    before, after = ([tokens for at, tokens, _ in known if at == step] for step in (min(steps), max(steps)))
    first, last = sum(before) / len(before), sum(after) / len(after)
    said = f"{first:.1f} tokens before, {last:.1f} after"
    cut = any(not ended for step, _, ended in known if step in (min(steps), max(steps)))
    note = "; those that did not end count as far as they were sampled" if cut else ""
    if abs(last - first) <= DRIFT * first:
        yield Finding("note", "", f"Mean length of these responses: {said}{note}.")
        return
    share = percent(last / first - 1, "+") if first else "from nothing"
    text = (
        f"these responses have a mean of {said} ({share}){note}. "
        f"Preferences often follow length: are the {'longer' if last > first else 'shorter'} ones better?"
    )
    yield Finding("warning", "Length drift:", text)
