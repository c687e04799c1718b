"""What all objectives on the policy's own responses share: clipped ratios, several updates a rollout, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from rlhf_cli.data.formats import PROMPTS, Use
from rlhf_cli.metrics import OVERLONG, REDRAWN
from rlhf_cli.objectives.base import LossTerm, Objective, Tensor
from rlhf_cli.objectives.kl import k2, k3
from rlhf_cli.objectives.policy_loss import PolicyLoss, shares
from rlhf_cli.sections import key

if TYPE_CHECKING:
    import numpy as np

    from rlhf_cli.data.trees import Batch, Recorded, Tree
    from rlhf_cli.models.backbone import Backbone

RATIO_TOLERANCE = 5e-2
"""How far the first mean ratio may be from 1: a bf16 log-probability moves by 1e-2 or so when its row is packed otherwise, and
a small rollout's mean keeps some of that. In float32 the ratio is 1 to 1e-4."""

LOGRATIO_TOLERANCE = 0.2
"""How large the first log-ratios may be, in nats a token. Where the responses were drawn at other odds than recorded their mean
ratio may still be 1 (its expectation is, whatever the policy), but their size is not 0."""

REDRAWS = 4
"""Rounds in which other prompts are drawn for those whose responses all score alike."""


@dataclass(frozen=True)
class Experience:
    """What a rollout's M responses of N tokens were before any update; float64, responses tree by tree."""

    lengths: np.ndarray  # (M,) int64, their sum is N
    prompt: np.ndarray  # (M,) int64: which prompt of the batch; those of one prompt follow each other
    scores: np.ndarray  # (M,) combined reward, penalties taken off
    old: np.ndarray  # (N,) log π at the rollout's temperature
    reference: np.ndarray  # (N,) log π_ref at the rollout's temperature
    values: np.ndarray  # (N,) V before each token; NaN for kinds without a value
    dense: np.ndarray | None = None  # (N,) the parts of the scores that belong to a token; the rest comes at the last one


class Advantages(NamedTuple):
    """What an objective makes of an experience."""

    advantages: np.ndarray  # (N,)
    targets: np.ndarray | None  # (N,) what V is to become, NaN where nothing is learned; None for kinds without a value
    memory: dict[str, float]  # the objective's own numbers afterwards
    metrics: dict[str, float]  # of the whole rollout, e.g. how well the values knew its returns


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """max(−A w, −A clip(w, 1 − ε, 1 + ε)), a mean over the response tokens of a mini-batch; w = π/π_old of each token.

    Schulman et al. 2017, eq. 7; the kinds differ in A, and some in what `policy_loss` says. Trees with `recorded` are the
    rollout's, and nothing in their prompts is supervised. Trees without are ptx rows, whose weighted negative log-likelihood is
    added (Ouyang et al. 2022, eq. 2).
    """

    epochs: int = key(4, "passes over a rollout's responses", low=1)
    minibatches: int = key(1, "updates a pass: a rollout's prompts are dealt to so many", low=1)
    clip: float = key(0.2, "ε: token ratios are clipped to 1 − ε … 1 + ε", low=1e-9)

    rows: ClassVar[Use] = PROMPTS
    of_first_update: ClassVar[frozenset[str]] = frozenset({"policy/ratio"})
    reference: ClassVar[bool] = True
    least_samples: ClassVar[int] = 1  # responses per prompt that it needs
    kl_in_loss: ClassVar[bool] = False  # is the KL a loss term, unless the recipe says that it is in the return?

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "loss/policy", "policy/clipfrac", "policy/approxkl", "policy/ratio"

    @property
    def policy_loss(self) -> PolicyLoss:
        return PolicyLoss(self.clip, self.clip)

    @property
    def redraws(self) -> bool:
        """Are prompts replaced by others whose responses all have one score?"""
        return False

    def length_penalty(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """What is added to the scores of responses of these lengths, (M,)."""
        return lengths * 0.0

    def estimate_advantages(self, experience: Experience, kl_coef: float, memory: Mapping[str, float]) -> Advantages:
        """Advantages and value targets. `kl_coef`: κ of the log-ratio in the reward, 0 where the KL is a loss term."""
        raise NotImplementedError

    def counts(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Response tokens, responses and tokens with a value target of the rollout's trees, supervised tokens of the ptx rows."""
        import numpy as np

        from rlhf_cli.data.trees import supervised_tokens

        drawn, ptx = _split(trees)
        return {
            "tokens": sum(map(supervised_tokens, drawn)),
            "responses": sum(len(tree.responses) for tree in drawn),
            "valued": sum(int(np.isfinite(known.target).sum()) for tree in drawn for known in tree.recorded or ()),
            "ptx_tokens": sum(map(supervised_tokens, ptx)),
        }

    def updates(self, trees: list[Tree], seed: int) -> list[list[Tree]]:
        """`epochs` passes over all trees, each dealt anew into `minibatches` parts; no part is without a prompt.

        Prompts keep all their responses. ptx rows are dealt likewise, so that each update has its share of them.
        """
        import numpy as np

        drawn, ptx = _split(trees)
        parts = min(self.minibatches, len(drawn))
        random = np.random.default_rng(seed)

        def deal(mine: list[Tree]) -> list[list[Tree]]:
            order = random.permutation(len(mine)) if parts > 1 else np.arange(len(mine))
            return [[mine[i] for i in part] for part in np.array_split(order, parts)]

        return [some + others for _ in range(self.epochs) for some, others in zip(deal(drawn), deal(ptx), strict=True)]

    def phases(self, trees: list[Tree]) -> tuple[list[Tree], list[list[Tree]]]:
        """The rollout's trees and the ptx rows apart: a pass has either."""
        return [], [part for part in _split(trees) if part]

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        """The policy's loss and the KL loss. policy/approxkl is the mean of ½(log π − log π_old)², k2 of KL(π_old‖π).

        `given`: "temperature", "max_new_tokens"; "k2_coef" or "k3_coef", κ of a KL loss term; "ptx_coef" where ptx rows are.
        """
        if batch.recorded is None:
            logps, _ = backbone.logps("policy", batch)
            loss = -logps.double().sum()
            yield LossTerm({"ptx_tokens": given["ptx_coef"] * loss}, {"loss/ptx": (loss.detach(), "ptx_tokens")})
            return
        recorded = _recorded(batch)
        new = backbone.logps("policy", batch, given["temperature"])[0].double()
        rule, share, difference = self.policy_loss, shares(batch), new - recorded.old
        ratio = rule.ratios(difference, batch, share)
        losses, clipped = rule.of_tokens(new, ratio, recorded.advantage)
        weight, unit = rule.weights(share, given)
        loss = policy = (weight * losses).sum()
        for name, estimate in (("k2_coef", k2), ("k3_coef", k3)):
            if coef := given.get(name, 0.0):
                loss = loss + coef * (weight * estimate(new, recorded.reference)).sum()
        each, counted = (share, "responses") if rule.by_response else (1.0, "tokens")
        sums = {
            "loss/policy": (policy.detach(), unit),
            "policy/clipfrac": ((each * clipped).double().sum(), counted),
            "policy/approxkl": ((difference.detach() ** 2 / 2).sum(), "tokens"),
            "policy/ratio": ((each * ratio.detach()).sum(), counted),
        }
        yield LossTerm({unit: loss}, sums)

    def start_error(self, means: Mapping[str, float]) -> str | None:
        ratio, size = means["policy/ratio"], math.sqrt(2 * means["policy/approxkl"])
        if abs(ratio - 1) <= RATIO_TOLERANCE and size <= LOGRATIO_TOLERANCE:
            return None
        return (
            f"the policy's ratio to the policy that drew the responses is {ratio:.4g}, where 1 is right "
            f"(its logarithm's root mean square is {size:.2g}, where 0 is right)"
        )


@dataclass(frozen=True)
class ActorCritic(PolicyGradient):
    """A policy gradient with a learned value: ½ max((V − R)², (V_clipped − R)²), a mean over the tokens that have a target R.

    V_clipped = V_old + clip(V − V_old, ±value_clip); Schulman et al. 2017's implementation, Ouyang et al. 2022.
    """

    value_clip: float = key(0.2, "values move at most so far from those of the rollout", low=1e-9)
    value_coef: float = key(0.5, "weight of the value loss", low=0.0)

    values: ClassVar[bool] = True
    of_value: ClassVar[tuple[str, ...]] = ("loss/value", "value/explained_variance", "grad_norm/value", "learning_rate/value")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, *self.of_value)

    def terms(self, backbone: Backbone, batch: Batch, given: Mapping[str, float]) -> Iterator[LossTerm]:
        import torch

        yield from super().terms(backbone, batch, given)
        if batch.recorded is None:
            return
        recorded = _recorded(batch)
        values = backbone.values("value", batch).double()
        # A token without a target has its own value for one, and no loss: the device need not be asked which they are.
        learned = recorded.target.isfinite()
        old, target = (torch.where(learned, known, values.detach()) for known in (recorded.value, recorded.target))
        clipped = old + (values - old).clamp(-self.value_clip, self.value_clip)
        loss = torch.maximum((values - target) ** 2, (clipped - target) ** 2).sum() / 2
        yield LossTerm({"valued": self.value_coef * loss}, {"loss/value": (loss.detach(), "valued")})


@dataclass(frozen=True)
class GroupGradient(PolicyGradient):
    """A policy gradient that holds the responses of a prompt against each other, and the options that came with such kinds."""

    clip_high: float | None = key(None, "ε above 1, where it is another than below: 0.28 beside clip: 0.2 in DAPO", low=1e-9)
    ties: Literal["keep", "redraw"] = key(
        "keep", f"prompts whose responses all score alike; redraw: the next prompts replace them, in at most {REDRAWS} rounds"
    )
    overlong: int | None = key(
        None, "a response's last so many tokens before rollout.max_new_tokens lower its score, evenly from 0 to 1", low=1
    )

    least_samples: ClassVar[int] = 2

    @property
    def metric_names(self) -> tuple[str, ...]:
        own = {REDRAWN: self.redraws, OVERLONG: self.overlong is not None}
        return (*super().metric_names, *(name for name, there in own.items() if there))

    @property
    def redraws(self) -> bool:
        return self.ties == "redraw"

    @property
    def policy_loss(self) -> PolicyLoss:
        return PolicyLoss(self.clip, self.clip if self.clip_high is None else self.clip_high)

    def length_penalty(self, lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """0 up to max_new_tokens − overlong tokens, then linear to −1 at max_new_tokens; Yu et al. 2025, eq. 13."""
        if self.overlong is None:
            return super().length_penalty(lengths, max_new_tokens)
        penalty: np.ndarray = ((max_new_tokens - self.overlong - lengths) / self.overlong).clip(-1, 0)
        return penalty


def _split(trees: Sequence[Tree]) -> tuple[list[Tree], list[Tree]]:
    """A rollout's trees, and the ptx rows among them."""
    return [tree for tree in trees if tree.recorded is not None], [tree for tree in trees if tree.recorded is None]


def _recorded(batch: Batch) -> Recorded[Tensor]:
    """What the rollout recorded of a pass's tokens, float64."""
    from rlhf_cli.data.trees import Recorded

    assert batch.recorded is not None
    return Recorded(*(values.double() for values in batch.recorded))
