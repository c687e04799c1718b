"""What the curves of a run on the policy's own responses say, in plain words: its loss says nothing of progress."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.figures import NOISE, percent, short
from rlhf_cli.metrics import REDRAWN, ZERO_SPREAD, golds
from rlhf_cli.reports.document import Finding
from rlhf_cli.reports.run_result import Ends, History, window

GOLD_FELL = 0.02  # a gold reward that falls by more than this share of itself fell, and not by noise
GOLD_LOST = 0.25  # a gold reward that loses more than this share of what it had gained was better before the end
KL_HIGH = 10.0  # nats a response: this far from its reference a policy writes what the reward model was hardly trained on
LENGTH_MOVED = 0.5  # a mean length that changes by more than this share, far from the reference, is a sign of hacking
COLLAPSE = 0.8  # an entropy a token that loses more than this share of itself is a collapse
CLIPPED = 0.3  # more than this share of clipped ratios: the updates leave the region in which the clipped objective is trusted
MANY_TIED = 0.5  # where more of the prompts have responses that all score alike, most of a rollout teaches nothing
CONTRADICTING, CONTRADICTED = "/contradicting", 0.3  # a judge that contradicts itself in more than this share tells little
ENDED = 0.5  # where fewer responses end than this share, most scores are of torsos
CLOSER = "hold it closer to its reference (`kl.coef`; direct objectives: `objective.beta`), train for fewer steps"


def online_findings(history: History) -> list[Finding]:
    """Whether the score rose, at what price, and what went wrong on the way."""
    parts = (_score, _ties, _judges, _yardstick, _collapse, _clipping, _value, _endings)
    return [said for part in parts for said in part(history)]


def _score(history: History) -> Iterator[Finding]:
    name = "objective/scores"
    found = {"held-out": history.on_held_out(name), "training": history.in_training(name)}
    known = {where: ends for where, ends in found.items() if ends}
    if not known:
        yield Finding("note", "", "Too few steps to say how the score moved.")
        return
    said = " and ".join(f"from {short(first)} to {short(last)} on {where} prompts" for where, (first, last) in known.items())
    rose = [last > first for first, last in known.values()]
    if all(rose):
        yield Finding("better", "", f"The score rose {said}.")
    elif not any(rose):
        yield Finding("warning", "The score did not rise:", f"it went {said}. Is the learning rate right? Is the run too short?")
    else:
        yield Finding("warning", "The score did not rise on all prompts:", f"it went {said}.")
    if not history.held_out:
        said = "No prompts were held out, so all of this is of training prompts: set `data.holdout: 0.05` or `data.eval`."
        yield Finding("note", "", said)


def _ties(history: History) -> Iterator[Finding]:
    shares = [line[ZERO_SPREAD] for line in history.train if ZERO_SPREAD in line]
    mean = sum(shares) / len(shares) if shares else 0.0
    if mean == 1:
        said = "no response was told from the others to its prompt, so nothing was learned of which is better."
        yield Finding("warning", "All scores of a prompt were equal in every step:", f"{said} Is the reward a constant?")
    elif mean > MANY_TIED:
        did, advice = "did not say which is better", ", or let others replace such prompts (grpo, rloo: `objective.ties: redraw`)"
        if REDRAWN in history.names:
            did, advice = "made others necessary in their place", ""
        said = f"and {did}: draw more responses per prompt, raise `rollout.temperature`, take other prompts{advice}."
        yield Finding("warning", f"In {percent(mean)} of the prompts all responses scored alike", said)


def _judges(history: History) -> Iterator[Finding]:
    for name in sorted(name for name in history.names if name.endswith(CONTRADICTING)):
        shares = [line[name] for line in history.train if name in line]
        mean = sum(shares) / len(shares) if shares else 0.0
        if mean > CONTRADICTED:
            said = (
                f"in {percent(mean)} of its comparisons the response in the same place won, whichever stood there. These teach "
                "next to nothing: write another `prompt`, or take another judge."
            )
            yield Finding("warning", f"The judge of `{name.removesuffix(CONTRADICTING)}` contradicts itself:", said)


def _yardstick(history: History) -> Iterator[Finding]:
    """How far it went, and reward hacking: the score goes up, and what it stands for does not; Gao et al. 2023."""
    kl, length = history.moved("objective/kl"), history.moved("response/length")
    if kl:
        said = f"The policy is {short(kl[1])} nats a response from its reference (KL, on its own responses)."
        yield Finding("note", "", said)
    known = sorted(golds(history.names))
    for name in known:
        if gold := history.moved(name):
            yield _gold(history, name, gold)
            yield from _peak(history, name)
    if known:
        return
    if kl and kl[1] > KL_HIGH and length and abs(length[1] - length[0]) > LENGTH_MOVED * length[0]:
        said = (
            f"the policy moved {short(kl[1])} nats away, and {_lengths(length)}. Nothing "
            "measured whether it is better by another yardstick: add `gold:`, and read the samples."
        )
        yield Finding("warning", "This may be reward hacking:", said)
    else:
        said = "Nothing measured whether the responses are better by another yardstick than the reward itself: add `gold:`."
        yield Finding("note", "", said)


def _gold(history: History, name: str, gold: Ends) -> Finding:
    score, kl, length = map(history.moved, ("objective/scores", "objective/kl", "response/length"))
    said = f"`{name}`, which nothing was trained on, went from {short(gold[0])} to {short(gold[1])}"
    fell = gold[0] - gold[1] > GOLD_FELL * max(map(abs, gold))
    if not (fell and score and kl and score[1] > score[0] and kl[1] > kl[0]):
        return Finding("better" if gold[1] > gold[0] else "note", "", f"{said}.")
    how = f"the score rose and the policy moved {short(kl[1])} nats away"
    if length and length[1] > length[0]:
        how += f", {_lengths(length)}"
    return Finding(
        "warning",
        "Reward hacking:",
        f"{how}, but {said}. The policy learned what the reward mistakes for good: {CLOSER}, "
        "or mend the reward (an ensemble with `reward_combine`, a term against what it exploits).",
    )


def _peak(history: History, name: str) -> Iterator[Finding]:
    lines = [line for line in history.held_out if name in line]
    if len(lines) < 3:
        return
    best = max(lines, key=lambda line: line[name])
    gained, lost = best[name] - lines[0][name], best[name] - lines[-1][name]
    if gained > NOISE and lost > GOLD_LOST * gained:
        keep = f"`train.keep_best: {{metric: {name}, mode: max}}` keeps that checkpoint"
        yield Finding("open", "", f"`{name}` was highest after step {best['step']} ({short(best[name])}): {keep}.")


def _lengths(length: Ends) -> str:
    share = f" ({percent(length[1] / length[0] - 1, '+')})" if length[0] else ""
    return f"the responses went from {length[0]:.1f} to {length[1]:.1f} tokens{share}"


def _collapse(history: History) -> Iterator[Finding]:
    of_response, length = history.moved("objective/entropy"), history.moved("response/length")
    if of_response is None or length is None or not all(length):
        return
    first, last = (nats / tokens for nats, tokens in zip(of_response, length, strict=True))
    if first > NOISE and last < (1 - COLLAPSE) * first:
        said = (
            f"the entropy fell from {short(first)} to {short(last)} nats a token "
            f"({percent(last / first - 1, '+')}), so that each prompt has nearly one response: "
            f"{CLOSER}, or lower `train.learning_rate`."
        )
        yield Finding("warning", "Policy collapse:", said)


def _clipping(history: History) -> Iterator[Finding]:
    values = [line["policy/clipfrac"] for line in history.train if "policy/clipfrac" in line]
    size = window(len(values))
    worst = max((sum(values[k : k + size]) / size for k in range(len(values) - size + 1)), default=0.0)
    if worst > CLIPPED:
        said = f"up to {percent(worst)} of a step's ratios were clipped. Lower `train.learning_rate` or `objective.epochs`."
        yield Finding("warning", "The learning rate is too high:", said)


def _value(history: History) -> Iterator[Finding]:
    explained = history.in_training("value/explained_variance")
    if explained and explained[1] < 0:
        said = (
            f"at the end its explained variance is {short(explained[1])}, worse than one number "
            "for all. Raise `value.learning_rate`, or use a kind without values (rloo, grpo)."
        )
        yield Finding("warning", "The value was not learned:", said)


def _endings(history: History) -> Iterator[Finding]:
    rate = history.moved("response/eos_rate")
    if rate and rate[1] < ENDED:
        said = "the others are cut off. Raise `rollout.max_new_tokens`, or set `rollout.missing_eos_penalty`."
        yield Finding("warning", f"Only {percent(rate[1])} of the responses end:", said)
