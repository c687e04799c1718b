"""One objective of every kind, with trees it can learn from: rows of a table for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cli.data.formats import COMPARISONS, LABELS
from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.aot import Aot
from rlhf_cli.objectives.apo import ApoDown, ApoZero, UnpairedApoZero
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.bco import Bco, UnpairedBco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.discopop import DiscoPop
from rlhf_cli.objectives.dno import Dno
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.exo import Exo
from rlhf_cli.objectives.general import General
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.nca import Nca
from rlhf_cli.objectives.odpo import Odpo
from rlhf_cli.objectives.orpo import Orpo
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuce, PlackettLuceReward
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.slic import Slic
from rlhf_cli.objectives.sppo import Sppo
from rlhf_cli.objectives.squared import Squared
from rlhf_cli.objectives.steps import Steps
from rlhf_cli.objectives.tdpo2 import Tdpo2
from rlhf_cli.objectives.wpo import Wpo
from rlhf_cli.recipe.stages import TRAINING_STAGES
from tests.objectives.lookup import Lookup, make_trees

PAIR_KINDS: dict[str, Any] = {
    "dpo": Dpo(beta=0.3),
    "cdpo": Dpo(beta=0.3, label_smoothing=0.2),
    "robust": Robust(beta=0.3, label_smoothing=0.2),
    "hinge": Hinge(beta=0.3),
    "squared": Squared(beta=0.3),
    "slic": Slic(lambda_=0.3),
    "simpo": Simpo(),
    "orpo": Orpo(lambda_=0.5),
    "odpo": Odpo(beta=0.3),
    "cal_dpo": CalDpo(beta=0.3),
    "rebel": Rebel(eta=2.0),
    "sppo": Sppo(eta=0.7),
    "dno": Dno(beta=0.3),
    "bco": Bco(beta=0.3),
    "plackett_luce": PlackettLuce(beta=0.3),
    "apo_zero": ApoZero(beta=0.3),
    "apo_down": ApoDown(beta=0.3),
    "nca": Nca(beta=0.3),
    "exo": Exo(beta=0.3, label_smoothing=0.01),
    "discopop": DiscoPop(beta=0.3, tau=0.4),
    "wpo": Wpo(beta=0.3),
    "tdpo2": Tdpo2(beta=0.3, alpha=0.7),
    "aot": Aot(beta=0.3),
    "aot unpaired": Aot(beta=0.3, pairing="unpaired"),
    "ipo": Ipo(beta=0.3),
    "ipo per token": Ipo(beta=0.3, normalize="token_mean"),
}
REWARD_KINDS: dict[str, Objective] = {
    "bradley_terry": BradleyTerry(label_smoothing=0.1, center_coef=0.1),
    "reward plackett_luce": PlackettLuceReward(),
    "pairs": AllPairs(),
    "general": General(tau=0.5),
}
STEP_KINDS: dict[str, Objective] = {"steps": Steps()}
UNPAIRED_KINDS: dict[str, Any] = {
    "kto": Kto(beta=0.3, lambda_u=1.5),
    "unpaired bco": UnpairedBco(beta=0.3),
    "unpaired apo_zero": UnpairedApoZero(beta=0.3),
}
ALL: dict[str, Objective] = PAIR_KINDS | REWARD_KINDS | STEP_KINDS | UNPAIRED_KINDS

assert {type(objective) for objective in ALL.values()} == {
    kind for stage in TRAINING_STAGES.values() if stage.rows in (COMPARISONS, LABELS) for kind in stage.objectives
}

SHAPE = [[2, 3], [4, 1, 2], [1, 1], [3, 2], [2, 5, 1, 3]]
"""Lengths of the responses of five prompts."""


def trees_for(name: str) -> list[Tree]:
    """Pairs and rankings with scores, responses of both classes, each with a mismatched one, or responses of several steps."""
    if name in STEP_KINDS:
        facts = [Facts(steps=(1.0, 0.3, 0.0, 0.5)[: len(row)], ends=(tuple(range(len(row) - 1, -1, -1)),)) for row in SHAPE]
        return make_trees([[sum(row)] for row in SHAPE], facts)
    if name in UNPAIRED_KINDS:
        return make_trees([row[:2] for row in SHAPE], [Facts(label=row % 3 != 1) for row in range(len(SHAPE))])
    return make_trees(SHAPE, [Facts(scores=tuple(float(3 * len(row) - k * k) for k in range(len(row)))) for row in SHAPE])


def draw_model(seed: int = 0, count: int = 40) -> Lookup:
    """Random log-probabilities, the reference's near the policy's, random scores, and figures of whole distributions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    policy = -0.1 - draw().exp()
    reference, reward = policy.detach() + 0.5 * draw(), draw().requires_grad_()
    return Lookup(policy=policy.requires_grad_(), reference=reference, reward=reward, typicality=draw() - 0.2, kl=draw().exp())
