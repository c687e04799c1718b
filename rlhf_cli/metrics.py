"""The catalogue of metrics: what each is called, in what unit, and where a person sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Plot:
    """A picture of one or several metrics over the steps."""

    file: str  # in plots/, without .png; of terms, each of which has its own picture, the terms' names follow
    title: str
    unit: str
    smooth: bool = True  # many training steps are also drawn as a moving average
    of_step: bool = False  # of the step itself, where others are of the weights before its update


class Column(NamedTuple):
    """Of an evaluation's tables."""

    title: str
    table: Literal["Reward", "Distance", "Form"]
    meaning: str


@dataclass(frozen=True)
class Metric:
    """A measured quantity and where it is shown: nowhere but in metrics.jsonl, unless something below says so."""

    name: str  # one that ends in / stands for all that begin with it: the terms of a reward; one that begins with /, for its ends
    label: str = ""  # in the table of a training's report
    unit: str = ""  # of the label
    progress: str = ""  # on the line of a step, as a format
    spare: bool = False  # the first to go where a terminal is too narrow for the line
    held_out_only: bool = False  # no part of the line of a training step, whose loss says it already
    plot: Plot | None = None
    curve: Literal["", "chosen", "rejected", "desirable", "undesirable"] = ""  # which of several in one picture
    column: Column | None = None  # in an evaluation

    @property
    def is_term(self) -> bool:
        return "/" in (self.name[0], self.name[-1])

    def matches(self, name: str) -> bool:
        if self.is_term:
            return name.endswith(self.name) if self.name[0] == "/" else name.startswith(self.name)
        return name == self.name

    def labelled(self, name: str) -> str:
        """The label of one of its names, with the unit."""
        rest = name.removeprefix(self.name).removesuffix(self.name)
        own = f"{self.label} {rest}" if rest else self.label
        return f"{own}, {self.unit}" if self.unit else own

    def titled(self, name: str) -> str:
        """The head of the column of one of its names; its name where it has none.

        >>> metric("gold/helpful").titled("gold/helpful"), metric("gold/gold").titled("gold/gold")
        ('Gold helpful', 'Gold')
        """
        if self.column is None:
            return name
        own = name.removeprefix(self.name).removesuffix(self.name)
        return self.column.title if own.lower() in ("", self.column.title.lower()) else f"{self.column.title} {own}"


ZERO_SPREAD = "reward/zero_spread"
"""The share of a step's prompts whose responses all have one score: they do not say which is better."""
REDRAWN, OVERLONG, ADAPTER_KEPT = "rollout/redrawn", "response/overlong", "rollout/adapter_kept"
LOGP_GAP, LOGP_GAP_MAX, TRUNCATED = "rollout/logp_gap", "rollout/logp_gap_max", "rollout/truncated_weights"
MOST_GAP = 0.05  # nats a token from which on a run warns; half precision, computed in two ways, differs by 0.01 or so

NATS = "nats a response"
LOSS = Plot("loss", "Loss", "loss")
ACCURACY = Plot("accuracy", "Accuracy", "share of pairs in their order")
MARGIN = Plot("margin", "Margin", "score or implicit reward")
IMPLICIT_REWARDS = Plot("rewards", "Implicit rewards", "implicit reward")
LOGPS = Plot("logps", "Log-probabilities of the responses", NATS)

METRICS: tuple[Metric, ...] = (
    Metric("loss", "loss", progress="loss {:.3f}", plot=LOSS),
    Metric(
        "objective/scores",
        "score",
        progress="score {:.3f}",
        plot=Plot("score", "Score", "score"),
        column=Column("Score", "Reward", "all terms of the reward together, penalties taken off; mean over the responses"),
    ),
    Metric("objective/rlhf_reward", "score less the KL penalty"),
    Metric(
        "/na",
        "responses that a term says nothing of:",
        column=Column("Says nothing:", "Reward", "share of responses that a term says nothing of"),
    ),
    Metric(ZERO_SPREAD, "prompts whose responses all score alike", plot=Plot("zero_spread", "Prompts of one score", "share")),
    Metric(REDRAWN, "prompts that others replaced"),
    Metric(ADAPTER_KEPT),
    Metric(LOGP_GAP, "log-probabilities of engine and trainer apart", "nats a token"),
    Metric(LOGP_GAP_MAX),
    Metric(TRUNCATED),
    Metric(
        "/contradicting",
        "comparisons in which a judge contradicts itself:",
        column=Column("Contradicts itself:", "Reward", "share of comparisons in which the same place wins in both orders"),
    ),
    Metric(
        "/disagreement",
        "deviation over the members of a reward:",
        plot=Plot("disagreement", "Disagreement of the members", "deviations"),
        column=Column("Disagreement:", "Reward", "deviation over a reward model's members; mean over the responses"),
    ),
    Metric(
        "reward/",
        "reward",
        plot=Plot("reward", "Term of the reward", "score"),
        column=Column("Reward", "Reward", "one term of the reward, before its weight; mean over the responses"),
    ),
    Metric(
        "gold/",
        "gold",
        progress="{name} {:.3f}",
        plot=Plot("gold", "Gold reward", "score"),
        column=Column(
            "Gold", "Reward", "what people really want, where it can be computed; before its weight; mean over the responses"
        ),
    ),
    Metric(
        "objective/kl",
        "KL to the reference",
        NATS,
        progress="KL {:.3f}",
        plot=Plot("reference_kl", "KL to the reference", NATS),
        column=Column(
            "KL, nats",
            "Distance",
            "log π − log π_ref of a whole response, mean over the model's own responses: how far it went from the reference",
        ),
    ),
    Metric(
        "objective/kl_per_token",
        column=Column("KL per token", "Distance", "the same, summed over all responses and divided by their tokens"),
    ),
    Metric("objective/entropy", "entropy", NATS, progress="entropy {:.3f}", plot=Plot("entropy", "Entropy", NATS)),
    Metric(
        "response/length",
        "length of a response",
        "tokens",
        progress="length {:.1f}",
        plot=Plot("length", "Length of the responses", "tokens"),
        column=Column("Length, tokens", "Form", "tokens of a response, its end included"),
    ),
    Metric(
        "response/eos_rate",
        "responses that end",
        plot=Plot("eos_rate", "Responses that end", "share"),
        column=Column("Ended", "Form", "share of responses that end within the limit"),
    ),
    Metric(OVERLONG, "penalty for length"),
    Metric(
        "response/distinct_1",
        column=Column("Distinct words", "Form", "different words / all words of the model's responses (Li et al. 2016)"),
    ),
    Metric(
        "response/distinct_2",
        column=Column(
            "Distinct pairs", "Form", "the same of neighbouring pairs of words; compare only at equal numbers of responses"
        ),
    ),
    Metric(
        "response/duplicates",
        column=Column("Duplicates", "Form", "share of responses that another response of the model, to any prompt, repeats"),
    ),
    Metric(
        "value/explained_variance",
        "explained variance of the value",
        plot=Plot("explained_variance", "Explained variance of the value", "share"),
    ),
    Metric("policy/clipfrac", "clipped ratios", plot=Plot("clipfrac", "Clipped ratios", "share")),
    Metric("policy/approxkl", "KL of an update (estimate)"),
    Metric("policy/ratio"),
    Metric("loss/policy", "policy loss"),
    Metric("loss/value", "value loss"),
    Metric("loss/ptx", "loss on the supervised rows"),
    Metric("kl_coef", "κ, the weight of the KL"),
    Metric(
        "perplexity",
        "perplexity",
        progress="perplexity {:.4g}",
        held_out_only=True,
        column=Column(
            "Perplexity", "Distance", "e to the mean negative log-likelihood of a token of the texts' responses; lower is better"
        ),
    ),
    Metric("token_accuracy", "token accuracy", progress="accuracy {:.3f}", held_out_only=True),
    Metric("accuracy", "accuracy", progress="accuracy {:.3f}", plot=ACCURACY),
    Metric("margin", "margin", progress="margin {:.3f}", plot=MARGIN),
    Metric("score_mean", "mean score"),
    Metric("score_std", "standard deviation of the scores"),
    Metric("rewards/accuracies", "accuracy of the implicit reward", progress="accuracy {:.3f}", plot=ACCURACY),
    Metric("rewards/margins", "margin of the implicit reward", progress="margin {:.3f}", plot=MARGIN),
    Metric("rewards/chosen", "implicit reward, chosen", plot=IMPLICIT_REWARDS, curve="chosen"),
    Metric("rewards/rejected", "implicit reward, rejected", plot=IMPLICIT_REWARDS, curve="rejected"),
    Metric("rewards/saturated", "saturated pairs"),
    Metric("rewards/desirable", "implicit reward, desirable", plot=IMPLICIT_REWARDS, curve="desirable"),
    Metric("rewards/undesirable", "implicit reward, undesirable", plot=IMPLICIT_REWARDS, curve="undesirable"),
    Metric("kl", "KL estimate z0", progress="kl {:.3f}", plot=Plot("kl", "KL estimate z0", NATS)),
    Metric("logps/chosen", "log-probability, chosen", plot=LOGPS, curve="chosen"),
    Metric("logps/rejected", "log-probability, rejected", plot=LOGPS, curve="rejected"),
    Metric("logps/desirable", "log-probability, desirable", plot=LOGPS, curve="desirable"),
    Metric("logps/undesirable", "log-probability, undesirable", plot=LOGPS, curve="undesirable"),
    Metric("teacher/agreement", "tokens of which policy and teacher think the same most likely", "share"),
    Metric("logratio/mean", "mean log-ratio to the reference"),
    Metric("margin/logratio", "difference of the log-ratios"),
    Metric("margin/target", "its target"),
    Metric(
        "learning_rate",
        progress="lr {:.1e}",
        spare=True,
        plot=Plot("learning_rate", "Learning rate", "learning rate", smooth=False, of_step=True),
    ),
    Metric("learning_rate/value"),
    Metric("learning_rate/reward/"),
    Metric("grad_norm"),
    Metric("grad_norm/value"),
    Metric("grad_norm/reward/"),
    Metric("tokens"),
    Metric(
        "tokens_per_second",
        progress="{:,.0f} tok/s",
        spare=True,
        plot=Plot("tokens_per_second", "Speed", "tokens per second", of_step=True),
    ),
    Metric("epoch"),
    Metric("time/rollout"),
    Metric("time/score"),
    Metric("time/update"),
)
"""A row for each metric, in the order in which people read them."""


@cache
def metric(name: str) -> Metric:
    """The first row that matches a metric's name; one without a label for a name that has none."""
    return next((row for row in METRICS if row.matches(name)), Metric(name))


def golds(names: Iterable[str]) -> list[str]:
    """Those of gold terms alone, without what is told beside them.

    >>> golds(["gold/helpful", "gold/helpful/na", "reward/helpful", "objective/kl"])
    ['gold/helpful']
    """
    return [name for name in names if metric(name).name == "gold/"]


def in_order(names: Iterable[str]) -> list[tuple[Metric, str]]:
    """(row, name) of the names that the catalogue has, in its order; terms of one row by name."""
    known = sorted(set(names))
    return [(row, name) for row in METRICS for name in known if metric(name) is row]
