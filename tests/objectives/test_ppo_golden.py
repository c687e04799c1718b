"""The ppo kinds against numbers from the papers' formulas, losses through real batches of ragged responses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.advantages import response_returns, token_rewards, whiten
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.kl import k2, k3, next_coef
from rlhf_cli.objectives.policy_gradient import Experience, PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from tests.objectives.lookup import GOLDEN, Lookup, make_trees, run, table
from tests.objectives.rollouts import experience, flat, recorded

PPO = GOLDEN["ppo"]
KL_COEF = PPO["settings"]["kl_coef"]
PLAIN: dict[str, Any] = {name: PPO["settings"][name] for name in ("gamma", "lam", "clip", "value_clip")}
SEEN = experience(PPO["old_logps"], PPO["ref_logps"], PPO["score"], PPO["old_values"])


def one_each(name: str) -> torch.Tensor:
    """The numbers of three responses, each with a prompt of its own."""
    return table([[response] for response in PPO[name]])


def golden_rollout() -> list[Tree]:
    objective = Ppo(**PLAIN)
    return recorded(make_trees([[4], [3], [4]]), SEEN, objective.estimate_advantages(SEEN, KL_COEF, {}))


def test_token_rewards() -> None:
    assert token_rewards(SEEN, KL_COEF) == pytest.approx(flat(PPO["token_rewards"]), abs=1e-9)


def test_generalised_advantages_and_returns() -> None:
    plain = Ppo(**PLAIN, whiten=False).estimate_advantages(SEEN, KL_COEF, {"kept": 1.0})
    assert plain.advantages == pytest.approx(flat(PPO["advantages"]), abs=1e-9)
    assert plain.targets == pytest.approx(flat(PPO["returns"]), abs=1e-9)
    assert plain.memory == {"kept": 1.0}


def test_whitening() -> None:
    assert whiten(flat(PPO["advantages"])) == pytest.approx(flat(PPO["whitened_advantages"]), abs=1e-9)
    lesson = Ppo(**PLAIN).estimate_advantages(SEEN, KL_COEF, {})
    assert lesson.advantages == pytest.approx(flat(PPO["whitened_advantages"]), abs=1e-9)
    assert lesson.targets == pytest.approx(flat(PPO["returns"]), abs=1e-9)


@pytest.mark.parametrize("budget", [4096, 1])
def test_losses(budget: int) -> None:
    """Together in one pass, and each response in a pass of its own."""
    model = Lookup(policy=one_each("new_logps"), value=one_each("new_values"))
    means = run(Ppo(**PLAIN), model, golden_rollout(), budget=budget, given={"temperature": 1.0}).metrics
    policy = PPO["policy_loss (mean over response tokens)"]
    value = PPO["value_loss (0.5 * max of squares, mean over response tokens)"]
    assert means["loss/policy"] == pytest.approx(policy, abs=1e-6)
    assert means["loss/value"] == pytest.approx(value, abs=1e-6)
    assert means["loss"] == pytest.approx(policy + 0.5 * value, abs=1e-6)
    clipfrac = PPO["policy/clipfrac (tokens whose clipped term is the larger loss)"]
    assert means["policy/clipfrac"] == pytest.approx(clipfrac, abs=1e-9)


def test_kl_estimates() -> None:
    """Of the policy that drew, from the reference."""
    old, reference = torch.from_numpy(SEEN.old), torch.from_numpy(SEEN.reference)
    found = [float(estimate.mean()) for estimate in (old - reference, k2(old, reference), k3(old, reference))]
    assert found == pytest.approx([PPO["k1 mean"], PPO["k2 mean"], PPO["k3 mean"]], abs=1e-9)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_kl_losses(name: str) -> None:
    """What they add to the loss of the policy that drew, with κ = 0.3; loss/policy stays as it was."""
    model = Lookup(policy=one_each("old_logps"), value=one_each("old_values"))
    plain, with_kl = (
        run(Ppo(**PLAIN), model, golden_rollout(), given={"temperature": 1.0} | kl).means for kl in ({}, {f"{name}_coef": 0.3})
    )
    assert with_kl["loss"] - plain["loss"] == pytest.approx(0.3 * PPO[f"{name} mean"], abs=1e-6)
    assert with_kl["loss/policy"] == plain["loss/policy"]


ONE_PROMPT = PPO["one prompt, K = 4, R = sum of token rewards (score and KL)"]
KINDS: dict[str, PolicyGradient] = {
    "rloo": Rloo(),
    "reinforce baseline=mean": Reinforce(),
    "bandit with V(x) = 0.6": Bandit(whiten=False),
}
LENGTHS = (2, 1, 3, 2)


def drawn(returns: list[float]) -> Experience:
    """Four responses with these returns, of which the KL is a part; V(x) = 0.6, and values that must not matter."""
    old = [[-0.1 * (t + 1) for t in range(length)] for length in LENGTHS]
    reference = [[-0.4 - 0.3 * t for t in range(length)] for length in LENGTHS]
    penalties = [0.5 * sum(a - b for a, b in zip(x, y, strict=True)) for x, y in zip(old, reference, strict=True)]
    values = [[0.6, 5.0, -7.0][:length] for length in LENGTHS]
    scores = [r + penalty for r, penalty in zip(returns, penalties, strict=True)]
    return experience(old, reference, scores, values, [0] * len(LENGTHS))


@pytest.mark.parametrize("name", KINDS)
def test_advantages_of_a_response(name: str) -> None:
    """They stand at each of its tokens."""
    seen = drawn(ONE_PROMPT["R"])
    assert response_returns(seen, 0.5) == pytest.approx(ONE_PROMPT["R"], abs=1e-12)
    wanted = [advantage for advantage, length in zip(ONE_PROMPT[name], LENGTHS, strict=True) for _ in range(length)]
    assert KINDS[name].estimate_advantages(seen, 0.5, {}).advantages == pytest.approx(wanted, abs=1e-9)


def of_scores(scores: list[float], prompt: list[int]) -> list[float]:
    """grpo's advantage of each response, at the first of its tokens; the log-ratios differ from response to response."""
    random, lengths = np.random.default_rng(0), [1 + i % 3 for i in range(len(scores))]
    old, reference = ([(-random.random(length)).tolist() for length in lengths] for _ in range(2))
    found = Grpo().estimate_advantages(experience(old, reference, scores, old, prompt), 0.5, {}).advantages
    responses = np.split(found, np.cumsum(lengths)[:-1])
    assert all((own == own[0]).all() for own in responses)
    return [float(own[0]) for own in responses]


def test_grpo_takes_the_scores_alone() -> None:
    assert of_scores(ONE_PROMPT["R"], [0] * 4) == pytest.approx(ONE_PROMPT["grpo"], abs=1e-9)
    golden = GOLDEN["grpo"]
    by_prompt = np.argsort(golden["prompt"], kind="stable")
    scores, prompt, wanted = (np.array(golden[name])[by_prompt].tolist() for name in ("score", "prompt", "advantages"))
    assert of_scores(scores, prompt) == pytest.approx(wanted, abs=1e-9)


def test_grpo_of_tied_scores_is_0_whatever_the_kl() -> None:
    assert of_scores([0.7] * 3 + [0.1, 0.3], [0, 0, 0, 1, 1])[:3] == [0.0] * 3  # three times 0.7 has another mean than 0.7
    assert of_scores([0.3] * 4, [0] * 4) == ONE_PROMPT["grpo of equal R"]


def test_every_kind_of_golden_advantage_is_used() -> None:
    assert KINDS.keys() | {"R", "grpo", "grpo of equal R"} == ONE_PROMPT.keys()


def test_adaptive_coefficient() -> None:
    golden = PPO["adaptive kl"]
    given = (golden["target"], golden["horizon"], golden["episodes"])
    found = [next_coef(golden["coef"], observed, *given) for observed in golden["observed"]]
    assert found == pytest.approx(golden["coef_after"], abs=1e-12)
