"""An adapted κ: it follows the KL that the penalty takes off, and moves far enough within a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli import sections
from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.kl import next_coef
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.recipe.stages import resolved
from rlhf_cli.rollout.experience import Rollout, TokenFigures
from rlhf_cli.rollout.source import PolicySource

RECIPE = """model: {path: m}
data: {train: x.jsonl}
reward: [{function: f.py:worth}]
kl: {target: 6}
output: run
"""


def drawn() -> Rollout:
    """Two prompts of two responses, of 1, 2, 1 and 2 tokens; at the rollout's temperature the log-ratios are twice as large."""
    prompt = np.zeros(1, np.int32)
    trees = [Tree(prompt, np.zeros(1, bool), (prompt, np.zeros(2, np.int32)), row) for row in range(2)]
    ratios = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    zero = np.zeros(6)
    tokens = TokenFigures(old=2 * ratios, reference=zero, plain=ratios, plain_reference=zero, value=zero, dense=zero, gap=zero)
    return Rollout(trees, np.ones(4, bool), {}, np.arange(4.0), tokens, {})


class FromAList:
    """Stands for a sampler and for the prompts."""

    settings, records = sections.PolicySampling(temperature=0.5), ()

    def rollout(self, *_: Any, **__: Any) -> Rollout:
        return drawn()

    def batch(self, step: int) -> list[Tree]:
        return []

    def locations(self, step: int) -> list[str]:
        return ["rows.jsonl:1", "rows.jsonl:2"]


def test_it_follows_the_kl_at_the_rollouts_temperature() -> None:
    """The penalty, and what is left of the reward, are taken at that temperature; the reported KL is at 1."""
    stub: Any = FromAList()
    source = PolicySource(stub, stub, Rloo(), sections.Kl(coef=0.1, target=1.0, horizon=20), None, 0.0, 0)
    found = source.collect(1, {})
    assert drawn().tempered_kl == pytest.approx(4.2 / 4)
    assert found.metrics["objective/kl"] == pytest.approx(2.1 / 4)
    assert found.memory["kl_coef"] == pytest.approx(next_coef(0.1, 4.2 / 4, 1.0, 20, 4))
    assert found.metrics["objective/rlhf_reward"] == pytest.approx(1.5 - 0.1 * 4.2 / 4)


@pytest.mark.parametrize(
    ("steps", "batch", "samples", "horizon"), [(100, 32, 1, 64), (100, 32, 4, 256), (10, 32, 1, 32), (5000, 64, 2, 12800)]
)
def test_its_horizon_follows_from_the_run(steps: int, batch: int, samples: int, horizon: int, tmp_path: Path) -> None:
    """κ may change by e^10 in a long run, a fifth at most in each of 50 horizons, and by a fifth a step in a short one."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    given = [f"train.batch_size={batch}", f"rollout.responses_per_prompt={samples}"]
    recipe: Any = load_recipe("ppo", tmp_path / "r.yaml", given).recipe
    assert recipe.kl.horizon is None
    found: Any = resolved(recipe, steps)
    assert found.kl.horizon == horizon
    coef = 1.0
    for _ in range(steps):
        coef = next_coef(coef, 100.0, 6.0, found.kl.horizon, batch * samples)
    assert math.log(coef) == pytest.approx(min(50 * 0.2, steps * math.log(1.2)), rel=0.06)
    written: Any = resolved(load_recipe("ppo", tmp_path / "r.yaml", [*given, "kl.horizon=10000"]).recipe, steps)
    assert written.kl.horizon == 10000
    untargeted: Any = resolved(load_recipe("ppo", tmp_path / "r.yaml", [*given, "kl.target=null"]).recipe, steps)
    assert untargeted.kl.horizon is None
