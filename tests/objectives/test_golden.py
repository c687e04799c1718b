"""Every kind against numbers from the papers' formulas, through real batches of ragged responses."""

from __future__ import annotations

import dataclasses
import math
from statistics import mean
from typing import Any

import pytest
import torch

from rlhf_cli.data.records import Facts
from rlhf_cli.objectives.apo import ApoDown, ApoZero, UnpairedApoZero
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.bco import Bco, UnpairedBco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.discopop import DiscoPop
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.exo import Exo
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
from rlhf_cli.objectives.squared import Squared
from rlhf_cli.objectives.tdpo2 import Tdpo2
from rlhf_cli.objectives.wpo import Wpo
from rlhf_cli.recipe.stages import TRAINING_STAGES
from tests.objectives.lookup import GOLDEN, Lookup, lengths, make_trees, run, table

PAIRS = GOLDEN["pairs"]["inputs"]
POLICY = list(zip(PAIRS["policy_chosen"], PAIRS["policy_rejected"], strict=True))
REFERENCE = list(zip(PAIRS["ref_chosen"], PAIRS["ref_rejected"], strict=True))
SCORES = list(zip(PAIRS["score_chosen"], PAIRS["score_rejected"], strict=True))

KINDS: dict[str, Objective] = {
    "dpo beta=0.3": Dpo(beta=0.3),
    "dpo beta=0.3 label_smoothing=0.1 (cDPO)": Dpo(beta=0.3, label_smoothing=0.1),
    "robust beta=0.3 label_smoothing=0.1": Robust(beta=0.3, label_smoothing=0.1),
    "hinge beta=0.3": Hinge(beta=0.3),
    "squared beta=0.3": Squared(beta=0.3),
    "ipo beta=0.3 normalize=sum": Ipo(beta=0.3),
    "ipo beta=0.3 normalize=token_mean": Ipo(beta=0.3, normalize="token_mean"),
    "simpo beta=2.0 gamma=0.5": Simpo(beta=2.0, gamma=0.5),
    "orpo lambda=0.2": Orpo(lambda_=0.2),
    "slic delta=1.0 lambda=0.05 (sums; regulariser on the chosen response)": Slic(delta=1.0, lambda_=0.05),
    "odpo beta=0.3 alpha=0.7 f=identity": Odpo(beta=0.3, alpha=0.7, f="identity"),
    "cal_dpo beta=0.3 calibration=0.5 (authors' code)": CalDpo(beta=0.3, calibration=0.5),
    "rebel eta=0.5": Rebel(eta=0.5),
    "bco_pair beta=0.3 delta=0.2": Bco(beta=0.3, decay=0.0),
    "apo_zero beta=0.3": ApoZero(beta=0.3),
    "apo_down beta=0.3": ApoDown(beta=0.3),
    "nca beta=0.3": Nca(beta=0.3),
    "exo beta=0.3 label_smoothing=0.01": Exo(beta=0.3, label_smoothing=0.01),
    "discopop beta=0.3 tau=0.05": DiscoPop(beta=0.3),
    "wpo beta=0.3": Wpo(beta=0.3),
    "tdpo2 beta=0.3 alpha=0.5": Tdpo2(beta=0.3),
}
"""Name of a row of golden values → the objective it is of."""


def pair_trees() -> Any:
    return make_trees(lengths(POLICY), [Facts(scores=scores) for scores in SCORES])


def pair_model() -> Lookup:
    figures = {name: zip(PAIRS[f"{name}_chosen"], PAIRS[f"{name}_rejected"], strict=True) for name in ("typicality", "kl")}
    tables = {name: table([*rows]) for name, rows in figures.items()}
    return Lookup(policy=table(POLICY), reference=table(REFERENCE), **tables)


def memory_of(objective: Objective) -> dict[str, float]:
    """For bco with decay 0, mean rewards with the mid-point 0.2; nothing for the others."""
    return objective.remember({}, {"rewards/chosen": 0.9, "rewards/rejected": -0.5})


@pytest.mark.parametrize("name", KINDS)
def test_pairs(name: str) -> None:
    """Each pair alone, and their mean."""
    objective, wanted = KINDS[name], GOLDEN["pairs"]["loss per pair"][name]
    trees, memory = pair_trees(), memory_of(objective)
    found = [float(run(objective, pair_model(), [tree], memory=memory).loss) for tree in trees]
    assert found == pytest.approx(wanted, abs=1e-10)
    assert float(run(objective, pair_model(), trees, memory=memory).loss) == pytest.approx(mean(wanted), abs=1e-10)


def test_every_row_of_golden_values_is_used() -> None:
    assert KINDS.keys() == GOLDEN["pairs"]["loss per pair"].keys()


def test_odpo_with_the_default_f() -> None:
    """softplus(0.7 ln(s_w − s_l) − z): the first pair's z is 1 − 0.7747789 (from hinge's row), its score gap 2.688212."""
    z, gap = 1 - GOLDEN["pairs"]["loss per pair"]["hinge beta=0.3"][0], SCORES[0][0] - SCORES[0][1]
    found = run(Odpo(beta=0.3, alpha=0.7), pair_model(), pair_trees()[:1]).loss
    assert float(found) == pytest.approx(math.log1p(gap**0.7 * math.exp(-z)), abs=1e-9)


def test_plackett_luce_over_ranked_responses() -> None:
    """With ρ = r/β its loss is that of the rewards r."""
    ranked = [[[value / 0.3] for value in row] for row in GOLDEN["reward"]["ranked_scores_best_first"]]
    model = Lookup(policy=table(ranked), reference=torch.zeros_like(table(ranked)))
    found = [float(run(PlackettLuce(beta=0.3), model, [tree]).loss) for tree in make_trees(lengths(ranked))]
    assert found == pytest.approx(GOLDEN["reward"]["plackett_luce"], abs=1e-6)


REWARD: dict[str, tuple[Objective, str]] = {
    "bradley_terry": (BradleyTerry(), "chosen"),
    "bradley_terry margin": (BradleyTerry(margin_column="by"), "chosen"),
    "bradley_terry label_smoothing=0.1": (BradleyTerry(label_smoothing=0.1), "chosen"),
    "plackett_luce": (PlackettLuceReward(), "ranked"),
    "all_pairs_mean": (AllPairs(), "ranked"),
}


def scored(rows: list[list[float]], facts: list[Facts] | None = None) -> Any:
    """Trees of responses of three tokens, and a model with these scores at their last ones, NaN at the others."""
    values = [[[math.nan, math.nan, value] for value in row] for row in rows]
    return make_trees(lengths(values), facts), Lookup(reward=table(values))


@pytest.mark.parametrize("name", REWARD)
def test_reward_models(name: str) -> None:
    objective, inputs = REWARD[name]
    golden = GOLDEN["reward"]
    pairs = [list(pair) for pair in zip(golden["chosen"], golden["rejected"], strict=True)]
    rows = pairs if inputs == "chosen" else golden["ranked_scores_best_first"]
    trees, model = scored(rows, [Facts(margin=margin) for margin in golden["margin"]])
    found = [float(run(objective, model, [tree]).loss) for tree in trees]
    assert found == pytest.approx(golden[name], abs=1e-6)
    assert float(run(objective, model, trees).loss) == pytest.approx(mean(golden[name]), abs=1e-6)


def test_centring_adds_its_term() -> None:
    golden = GOLDEN["reward"]
    trees, model = scored([list(pair) for pair in zip(golden["chosen"], golden["rejected"], strict=True)])
    found = [float(run(BradleyTerry(center_coef=0.01), model, [tree]).loss) for tree in trees]
    plain, centring = golden["bradley_terry"], golden["center_coef=0.01 term"]
    assert found == pytest.approx([a + b for a, b in zip(plain, centring, strict=True)], abs=1e-6)


UNPAIRED = GOLDEN["unpaired"]


def unpaired(mismatched: list[float]) -> Any:
    """The golden rows as single-token responses: the prompt's own, then the mismatched one; the reference is not 0."""
    ratios = [[[a], [b]] for a, b in zip(UNPAIRED["logratio"], mismatched, strict=True)]
    reference = torch.linspace(-5, -1, 1 + 2 * len(ratios), dtype=torch.float64)
    model = Lookup(policy=table(ratios) + reference, reference=reference)
    return make_trees(lengths(ratios), [Facts(label=label) for label in UNPAIRED["desirable"]]), model


def test_kto() -> None:
    """z0 belongs to the whole batch: a row has its golden loss alone if its own mismatched log-ratio is that z0."""
    objective, wanted = Kto(beta=0.3, lambda_d=1.1, lambda_u=0.9), UNPAIRED["kto beta=0.3 lambda_d=1.1 lambda_u=0.9"]
    trees, model = unpaired(UNPAIRED["mismatched_logratio"])
    result = run(objective, model, trees)
    assert float(result.loss) == pytest.approx(mean(wanted), abs=1e-6)
    assert result.metrics["kl"] == pytest.approx(UNPAIRED["z0"], abs=1e-9)
    trees, model = unpaired([UNPAIRED["z0"]] * len(wanted))
    assert [float(run(objective, model, [tree]).loss) for tree in trees] == pytest.approx(wanted, abs=1e-6)


def test_unpaired_bco() -> None:
    trees, model = unpaired(UNPAIRED["mismatched_logratio"])
    wanted = UNPAIRED["bco beta=0.3 delta=0.15"]
    objective = UnpairedBco(beta=0.3, decay=0.0)
    memory = objective.remember({}, {"rewards/desirable": 0.7, "rewards/undesirable": -0.4})
    found = [float(run(objective, model, [tree], memory=memory).loss) for tree in trees]
    assert found == pytest.approx(wanted, abs=1e-6)


def test_unpaired_apo_zero() -> None:
    trees, model = unpaired(UNPAIRED["mismatched_logratio"])
    found = [float(run(UnpairedApoZero(beta=0.3), model, [tree]).loss) for tree in trees]
    assert found == pytest.approx(UNPAIRED["apo_zero beta=0.3"], abs=1e-10)


GROUPS: dict[str, Any] = {"clip_high": None, "ties": "keep", "overlong": None}
FIELDS = {
    ("train-rm", "bradley_terry"): {"members": None, "margin_column": None, "label_smoothing": 0.0, "center_coef": 0.0},
    ("train-rm", "plackett_luce"): {"members": None},
    ("train-rm", "pairs"): {"members": None},
    ("train-rm", "general"): {"tau": 0.1, "width": 8},
    ("train-rm", "steps"): {"separator": "\n\n"},
    ("dpo", "dpo"): {"beta": 0.1, "label_smoothing": 0.0},
    ("dpo", "robust"): {"beta": 0.1, "label_smoothing": 0.0},
    ("dpo", "hinge"): {"beta": 0.1},
    ("dpo", "squared"): {"beta": 0.1},
    ("dpo", "slic"): {"delta": 1.0, "lambda_": 0.1},
    ("dpo", "simpo"): {"beta": 2.0, "gamma": 1.0},
    ("dpo", "orpo"): {"lambda_": 0.1},
    ("dpo", "odpo"): {"beta": 0.1, "alpha": 1.0, "f": "log"},
    ("dpo", "cal_dpo"): {"beta": 0.1, "calibration": 0.5},
    ("dpo", "rebel"): {"eta": 1.0},
    ("dpo", "bco"): {"beta": 0.1, "decay": 0.9},
    ("dpo", "plackett_luce"): {"beta": 0.1},
    ("dpo", "apo_zero"): {"beta": 0.1},
    ("dpo", "apo_down"): {"beta": 0.1},
    ("dpo", "nca"): {"beta": 0.1},
    ("dpo", "exo"): {"beta": 0.1, "label_smoothing": 1e-3},
    ("dpo", "discopop"): {"beta": 0.1, "tau": 0.05},
    ("dpo", "wpo"): {"beta": 0.1},
    ("dpo", "tdpo2"): {"beta": 0.1, "alpha": 0.5},
    ("dpo", "aot"): {"beta": 0.1, "pairing": "paired"},
    ("dpo", "sppo"): {"eta": 1000.0},
    ("dpo", "dno"): {"beta": 0.1},
    ("ipo", "ipo"): {"beta": 0.1, "normalize": "sum"},
    ("kto", "kto"): {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0, "lambda_": None},
    ("kto", "bco"): {"beta": 0.1, "decay": 0.9},
    ("kto", "apo_zero"): {"beta": 0.1},
    ("ppo", "ppo"): {"value_clip": 0.2, "value_coef": 0.5, "gamma": 1.0, "lam": 0.95, "whiten": True},
    ("ppo", "reinforce"): {"baseline": "mean", "whiten": False},
    ("ppo", "rloo"): GROUPS | {"mean_over": "tokens"},
    ("ppo", "grpo"): GROUPS | {"scale": "group", "mean_over": "auto", "ratio": "token", "surrogate": "clip"},
    ("ppo", "bandit"): {"value_clip": 0.2, "value_coef": 0.5, "whiten": True},
}


def test_fields_and_defaults() -> None:
    """A kind has the fields it uses and no other, `kind` first; those on pairs have `sft_weight`."""
    found = {
        (stage, kind().kind): vars(kind()) for stage, row in TRAINING_STAGES.items() if stage != "sft" for kind in row.objectives
    }
    shared = {"dpo": {"sft_weight": 0.0}, "ipo": {"sft_weight": 0.0}, "ppo": {"epochs": 4, "minibatches": 1, "clip": 0.2}}
    assert found == {(stage, kind): {"kind": kind} | shared.get(stage, {}) | own for (stage, kind), own in FIELDS.items()}
    assert list(found) == list(FIELDS)
    for row in TRAINING_STAGES.values():
        for kind in row.objectives:
            first, *others = dataclasses.fields(kind)
            assert first.name == "kind"
            assert [field.name for field in others if not field.metadata.get("help")] == []
