"""Identity preference optimisation: least squares on the difference of log-ratios, so that it stops at a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_cli.objectives.base import Tensor
from rlhf_cli.objectives.preference import LogRatioPair, Pair, Responses
from rlhf_cli.sections import key


@dataclass(frozen=True)
class Ipo(LogRatioPair):
    """(h − 1/(2β))², h = ρ_w − ρ_l; Azar et al. 2023, eq. 17. With `token_mean` each ρ is divided by its response's length.

    The implicit reward is β times the ρ that the loss compares, so its margin is ½ at the target.
    """

    kind: Literal["ipo"] = "ipo"
    normalize: Literal["sum", "token_mean"] = key("sum", "log-ratios are sums over a response (the paper's), or means per token")
    soft_labels: ClassVar[bool] = True

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*super().metric_names, "margin/target", "margin/logratio")

    @property
    def target(self) -> float:
        """The h that the loss asks for: nats, with `token_mean` nats per token; of a soft label p, 2p − 1 of it."""
        return 1 / (2 * self.beta)

    @property
    def announcement(self) -> str:
        unit = "nats" if self.normalize == "sum" else "nats per token"
        return f"ipo at beta {self.beta:g} ({self.normalize}) asks for a log-ratio margin of {self.target:g} {unit}"

    def hard_loss(self, margin: Tensor) -> Tensor:
        return (margin / self.beta - self.target) ** 2

    def reward(self, responses: Responses) -> Tensor:
        return self.beta * (responses.logratio if self.normalize == "sum" else responses.logratio / responses.lengths)

    def figures(self, pair: Pair) -> dict[str, Tensor]:
        return super().figures(pair) | {"margin/target": (2 * pair.probability - 1) * self.target}

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the mean of h as margin/logratio."""
        return means | {"margin/logratio": means["rewards/margins"] / self.beta}
