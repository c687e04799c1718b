"""What the ppo kinds share: updates, counts, the terms of a pass; and what each makes of scores that say nothing."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Tree
from rlhf_cli.objectives.advantages import explained_variance, gae, whiten
from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.policy_gradient import Advantages, Experience, PolicyGradient
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.recipe.stages import TRAINING_STAGES
from tests.objectives.lookup import Lookup, make_trees, run
from tests.objectives.rollouts import experience, recorded

PPO_KINDS: dict[str, PolicyGradient] = {kind.kind: kind() for kind in (Ppo, Reinforce, Rloo, Grpo, Bandit)}
OPTIONS: dict[str, PolicyGradient] = {
    "rloo over responses": Rloo(mean_over="responses", clip_high=0.5),
    "Dr. GRPO": Grpo(scale="none", mean_over="constant"),
    "DAPO": Grpo(mean_over="tokens", clip_high=0.28),
    "by the rollout's deviation": Grpo(scale="batch"),
    "GSPO": Grpo(ratio="sequence", clip=0.02, clip_high=0.05),
}
"""Of rloo and grpo, but for cispo, whose gradient is not that of its loss."""
FAMILY = PPO_KINDS | OPTIONS
WARM = {"temperature": 1.0, "max_new_tokens": 7.0}
SHAPE = [[2, 3], [4, 1], [1, 2], [3, 2]]
"""Lengths of the responses of four prompts."""


def test_kinds_are_all_here() -> None:
    assert [type(objective) for objective in PPO_KINDS.values()] == list(TRAINING_STAGES["ppo"].objectives)


def drawn_experience(shape: list[list[int]], seed: int = 0) -> Experience:
    """Random numbers for responses of these lengths; the policy that drew them is not the reference."""
    random = np.random.default_rng(seed)
    count = sum(map(sum, shape))
    old = -0.1 - random.exponential(size=count)
    return Experience(
        lengths=np.concatenate(shape),
        prompt=np.repeat(np.arange(len(shape)), [len(row) for row in shape]),
        scores=random.normal(size=sum(map(len, shape))),
        old=old,
        reference=old - 0.4 * random.normal(size=count),
        values=random.normal(size=count),
    )


def rollout(objective: PolicyGradient, shape: list[list[int]] = SHAPE) -> tuple[list[Tree], Lookup]:
    """A rollout that was learned from, and a policy and value that moved since."""
    seen = drawn_experience(shape)
    assert seen.values is not None
    trees = recorded(make_trees(shape), seen, objective.estimate_advantages(seen, 0.1, {}))
    random = np.random.default_rng(1)

    def moved(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(([0.0], values + 0.3 * random.normal(size=len(values))))).requires_grad_()

    return trees, Lookup(policy=moved(seen.old), value=moved(seen.values))


def ptx_rows(count: int) -> list[Tree]:
    """Rows of two, three, … tokens, of which the last of the prompt belongs to an earlier turn."""
    trees = make_trees([[2 + n] for n in range(count)])
    return [
        tree._replace(prompt=np.zeros(3, np.int32), supervised=np.array([False, False, True]), row=100 + tree.row)
        for tree in trees
    ]


class TestUpdates:
    trees, _ = rollout(Ppo())

    @staticmethod
    def rows(update: list[Tree]) -> list[int]:
        return [tree.row for tree in update]

    def test_one_minibatch_is_the_rollout_as_it_stands(self) -> None:
        ptx = ptx_rows(3)
        updates = Ppo(epochs=3).updates(self.trees + ptx, 7)
        assert [self.rows(update) for update in updates] == [[0, 1, 2, 3, 100, 101, 102]] * 3

    @pytest.mark.parametrize(("minibatches", "sizes"), [(2, [2, 2]), (3, [2, 1, 1]), (4, [1] * 4), (9, [1] * 4)])
    def test_parts_are_nearly_equal_and_never_empty(self, minibatches: int, sizes: list[int]) -> None:
        """Every epoch sees every prompt once, with all its responses."""
        updates = Ppo(epochs=2, minibatches=minibatches).updates(self.trees, 7)
        assert [len(update) for update in updates] == sizes * 2
        for epoch in (updates[: len(sizes)], updates[len(sizes) :]):
            assert sorted(row for update in epoch for row in self.rows(update)) == [0, 1, 2, 3]
        assert {len(tree.responses) for update in updates for tree in update} == {2}

    def test_each_has_its_share_of_ptx_rows(self) -> None:
        updates = Ppo(epochs=2, minibatches=2).updates(self.trees + ptx_rows(5), 7)
        shares = [[row for row in self.rows(update) if row >= 100] for update in updates]
        assert [len(share) for share in shares] == [3, 2, 3, 2]
        assert sorted(shares[0] + shares[1]) == sorted(shares[2] + shares[3]) == [100, 101, 102, 103, 104]

    def test_order_is_the_seeds(self) -> None:
        trees, _ = rollout(Ppo(), [[1]] * 16)
        objective = Ppo(epochs=2, minibatches=2)

        def dealt(seed: int) -> list[list[int]]:
            return [self.rows(update) for update in objective.updates(trees, seed)]

        assert dealt(2**62) == dealt(2**62)
        assert dealt(1) != dealt(2)
        first, _, second, _ = dealt(1)
        assert set(first) != set(second)
        assert set(first) != set(range(8))


def test_counts() -> None:
    """By hand: 5 + 5 + 3 + 5 response tokens; 2 + 1 and 3 + 1 supervised tokens of the ptx rows."""
    wanted = {"tokens": 18, "responses": 8, "ptx_tokens": 7}
    valued = {"ppo": 18, "bandit": 8}
    for name, objective in PPO_KINDS.items():
        trees, _ = rollout(objective)
        assert objective.counts(trees + ptx_rows(2)) == wanted | {"valued": valued.get(name, 0)}


def test_rollout_and_ptx_rows_have_passes_apart() -> None:
    trees, _ = rollout(Rloo())
    ptx = ptx_rows(2)
    assert Rloo().phases(trees + ptx) == ([], [trees, ptx])
    assert Rloo().phases(trees) == ([], [trees])


def one_token(advantage: float, move: float, value: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> tuple[list[Tree], Lookup]:
    """One response of one token whose log-probability moved; value before, after, and its target."""
    old, new, target = value
    seen = experience([[-1.0]], [[-1.0]], [0.0], [[old]])
    lesson = Advantages(np.array([advantage]), np.array([target]), {}, {})
    policy = torch.tensor([0.0, -1.0 + move], dtype=torch.float64, requires_grad=True)
    model = Lookup(policy=policy, value=torch.tensor([0.0, new], dtype=torch.float64, requires_grad=True))
    return recorded(make_trees([[1]]), seen, lesson), model


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.5, -2.4, 0.0),  # far enough: clipped
        (2.0, 0.5, -1.0, -1.0),  # on its way back: not
        (-2.0, 1.5, 3.0, 3.0),
        (-2.0, 0.5, 1.6, 0.0),
    ],
)
def test_clipped_loss(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """And its slope in log π, which is −A w or 0."""
    trees, model = one_token(advantage, math.log(ratio))
    result = run(Rloo(), model, trees, given=WARM)
    assert result.means["loss/policy"] == result.means["loss"] == pytest.approx(loss, abs=1e-6)
    assert float(torch.autograd.grad(result.loss, model.tables["policy"])[0][1]) == pytest.approx(slope, abs=1e-6)
    assert result.means["policy/clipfrac"] == float(slope == 0)
    assert result.means["policy/ratio"] == pytest.approx(ratio, abs=1e-6)
    assert result.means["policy/approxkl"] == pytest.approx(math.log(ratio) ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        ((1.0, 1.0, 3.0), 2.0, -2.0),
        ((1.0, 1.1, 3.0), 1.805, -1.9),
        ((1.0, 1.5, 3.0), 1.62, 0.0),  # far enough: the clipped value is 1.2
        ((1.0, 0.5, 3.0), 3.125, -2.5),  # on its way back: not
    ],
)
def test_clipped_value_loss(value: tuple[float, float, float], loss: float, slope: float) -> None:
    """½ the larger square; its coefficient is in the loss alone."""
    trees, model = one_token(0.0, 0.0, value)
    result = run(Ppo(value_coef=0.3), model, trees, given=WARM)
    assert result.means["loss/value"] == pytest.approx(loss, abs=1e-6)
    assert result.means["loss"] == pytest.approx(0.3 * loss, abs=1e-6)
    assert float(torch.autograd.grad(result.loss, model.tables["value"])[0][1]) == pytest.approx(0.3 * slope, abs=1e-6)


def test_bandit_values_are_those_before_first_tokens() -> None:
    """By hand: two responses of two tokens, returns 1 and −2; the values before their second tokens change nothing."""
    for other in (0.0, 50.0):
        seen = experience([[-1.0, -1.0]] * 2, [[-1.0, -1.0]] * 2, [1.0, -2.0], [[0.5, other], [0.1, other]])
        lesson = Bandit().estimate_advantages(seen, 0.0, {})
        assert lesson.advantages == pytest.approx([1, 1, -1, -1], abs=1e-6)
        assert lesson.targets == pytest.approx([1.0, math.nan, -2.0, math.nan], nan_ok=True)
        model = Lookup(policy=torch.full((5,), -1.0), value=torch.tensor([0.0, 0.6, other, 0.1, -other]))
        means = run(Bandit(), model, recorded(make_trees([[2], [2]]), seen, lesson), given=WARM).means
        assert means["loss/value"] == pytest.approx((0.4**2 + 2.1**2) / 4, abs=1e-6)
        assert means["loss"] == pytest.approx(means["loss/policy"] + 0.5 * means["loss/value"], abs=1e-9)


class TestPtx:
    def test_adds_its_mean_negative_log_likelihood(self) -> None:
        """Weighted in the loss, plain in loss/ptx; at temperature 1, while the rollout has its own."""
        trees, model = rollout(Rloo())
        rows = ptx_rows(2)
        plain = run(Rloo(), model, trees, given=WARM | {"temperature": 0.7})
        model.temperatures.clear()
        both = run(Rloo(), model, trees + rows, given={"temperature": 0.7, "ptx_coef": 27.8})
        assert sorted(model.temperatures) == [0.7, 1.0]
        # Of 7 tokens, those of earlier turns have the id 0, and the responses the first five.
        known = model.tables["policy"].detach()
        wanted = -float(known[:6].sum() + known[0]) / 7
        assert both.means["loss/ptx"] == pytest.approx(wanted, abs=1e-9)
        assert both.means["loss"] == pytest.approx(plain.means["loss"] + 27.8 * wanted, abs=1e-9)
        assert {name: both.means[name] for name in plain.means if name != "loss"} == pytest.approx(
            {name: value for name, value in plain.means.items() if name != "loss"}
        )

    def test_has_no_value_loss(self) -> None:
        trees, model = rollout(Ppo())
        values = [run(Ppo(), model, trees + rows, given=WARM | {"ptx_coef": 1.0}).means for rows in ([], ptx_rows(2))]
        assert values[0]["loss/value"] == values[1]["loss/value"] > 0


@pytest.mark.parametrize("name", PPO_KINDS)
def test_metrics_and_memory(name: str) -> None:
    trees, model = rollout(PPO_KINDS[name])
    result = run(PPO_KINDS[name], model, trees, given=WARM, memory={"baseline": 0.5})
    policy = {"loss", "loss/policy", "policy/clipfrac", "policy/approxkl", "policy/ratio"}
    assert result.metrics.keys() == policy | ({"loss/value"} if name in ("ppo", "bandit") else set())
    assert result.memory == {"baseline": 0.5}


GIVENS: dict[str, Any] = {"plain": WARM, "k2": WARM | {"k2_coef": 0.5}, "k3": WARM | {"k3_coef": 0.5}}


@pytest.mark.parametrize("given", GIVENS)
@pytest.mark.parametrize("name", FAMILY)
def test_gradient_by_finite_differences(name: str, given: str) -> None:
    trees, model = rollout(FAMILY[name])
    for role in ("policy", "value") if FAMILY[name].values else ("policy",):

        def loss(values: torch.Tensor, role: str = role) -> torch.Tensor:
            return run(FAMILY[name], Lookup(**(model.tables | {role: values})), trees, given=GIVENS[given]).loss

        start = model.tables[role].detach().requires_grad_()
        assert torch.autograd.gradcheck(loss, start, eps=1e-6, atol=1e-6)
        assert torch.autograd.functional.jacobian(loss, start.detach()).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*FAMILY, "CISPO"])
def test_passes_change_nothing(name: str) -> None:
    """Loss, gradient and metrics of an update in one pass, and with one or two trees in each."""
    objective = FAMILY.get(name, Grpo(surrogate="cispo"))
    found = []
    for budget in (4096, 16, 1):
        trees, model = rollout(objective)
        result = run(objective, model, trees + ptx_rows(3), budget=budget, given=WARM | {"k2_coef": 0.2, "ptx_coef": 2.0})
        found.append((torch.autograd.grad(result.loss, model.tables["policy"])[0], result))
    for (a, one), (b, other) in pairwise(found):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)


class TestFault:
    def test_none_on_the_policy_that_drew(self) -> None:
        """The ratio is 1 and its logarithm 0 up to what float32 keeps of the recorded numbers."""
        seen = drawn_experience(SHAPE)
        trees = recorded(make_trees(SHAPE), seen, Rloo().estimate_advantages(seen, 0.1, {}))
        means = run(Rloo(), Lookup(policy=torch.from_numpy(np.concatenate(([0.0], seen.old)))), trees, given=WARM).means
        assert means["policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert means["policy/approxkl"] < 1e-12
        assert Rloo().start_error(means) is None

    def test_names_the_ratio(self) -> None:
        """e^0.1 at every token."""
        said = Ppo().start_error({"policy/ratio": math.exp(0.1), "policy/approxkl": 0.005})
        assert said is not None
        assert said.startswith("the policy's ratio to the policy that drew the responses is 1.105, where 1 is right")
        assert "root mean square is 0.1," in said

    def test_sees_odds_that_average_out(self) -> None:
        """Half of the tokens at w = 1.4, half at 0.6: the mean is 1. ½(ln² 1.4 + ln² 0.6)/2 is half of 0.4338²."""
        half = (math.log(1.4) ** 2 + math.log(0.6) ** 2) / 4
        said = Ppo().start_error({"policy/ratio": 1.0, "policy/approxkl": half})
        assert said is not None
        assert "root mean square is 0.43," in said

    def test_bf16_noise_is_none(self) -> None:
        """Log-probabilities off by 2e-2, over ten tokens."""
        noise = 2e-2 * np.random.default_rng(0).normal(size=10)
        assert Ppo().start_error({"policy/ratio": np.exp(noise).mean(), "policy/approxkl": (noise**2 / 2).mean()}) is None

    def test_is_of_the_first_update(self) -> None:
        assert Ppo.of_first_update == {"policy/ratio"}


def distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log π of three tokens, and of the reference."""
    return logits.log_softmax(0), torch.tensor([-0.3, 0.9, 0.1], dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_gradient_of_kl_losses_on_policy(name: str) -> None:
    """Every response as often as π draws it, ½, ¼, ¼: k2 has the gradient of KL(π‖π_ref), k3 that of KL(π_ref‖π)."""
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    logps, reference = distribution(logits)
    policy = logps.exp()
    closed = {"k2": (policy * (logps - reference)).sum(), "k3": (reference.exp() * (reference - logps)).sum()}
    wanted = {key: torch.autograd.grad(value, logits, retain_graph=True)[0] for key, value in closed.items()}
    drawn = [0, 0, 1, 2]
    logps, reference = distribution(logits)
    old = [[p] for p in logps[drawn].tolist()]
    seen = experience(old, [[p] for p in reference[drawn].tolist()], [0.0] * 4)
    trees = recorded(make_trees([[1]] * 4), seen, Advantages(np.zeros(4), None, {}, {}))
    model = Lookup(policy=torch.cat((torch.zeros(1), logps[drawn])))
    loss = run(Reinforce(), model, trees, given=WARM | {f"{name}_coef": 0.5}).loss
    (found,) = torch.autograd.grad(loss, logits)
    assert found.tolist() == pytest.approx((0.5 * wanted[name]).tolist(), abs=1e-6)
    assert not torch.allclose(wanted["k2"], wanted["k3"], atol=0.05)


class TestConstantScore:
    """A score that is the same for all responses, 0.7, and no KL: nothing is to be learned."""

    old = ((-1.0, -2.0), (-0.5,), (-1.0, -0.3, -2.0), (-0.2,))

    def advantages(self, objective: PolicyGradient, values: float = 0.0) -> np.ndarray:
        level = [[values] * len(response) for response in self.old]
        reference = [[-1.0] * len(response) for response in self.old]
        return objective.estimate_advantages(experience(self.old, reference, [0.7] * 4, level, [0, 0, 1, 1]), 0.0, {}).advantages

    @pytest.mark.parametrize("objective", [Rloo(), Grpo(), Reinforce(), Reinforce(whiten=True), Reinforce(baseline="ema")])
    def test_gives_no_advantage(self, objective: PolicyGradient) -> None:
        assert self.advantages(objective) == pytest.approx([0.0] * 7, abs=1e-9)

    @pytest.mark.parametrize(
        ("objective", "value", "nothing"),
        [
            (Ppo(lam=1.0, whiten=False), 0.7, True),
            (Ppo(lam=1.0, whiten=False), 0.2, False),
            (Ppo(lam=0.95, whiten=False), 0.7, True),  # every δ is 0
            (Ppo(lam=0.95, whiten=False), 0.2, False),
            (Ppo(lam=1.0), 0.7, True),
            (Ppo(lam=1.0), 0.2, True),  # the same everywhere, and whitening takes it off
            (Ppo(lam=0.95), 0.2, False),
            (Bandit(whiten=False), 0.7, True),
            (Bandit(whiten=False), 0.2, False),
        ],
    )
    def test_with_a_value(self, objective: PolicyGradient, value: float, nothing: bool) -> None:
        found = self.advantages(objective, value)
        assert (np.abs(found).max() < 1e-9) == nothing
        if not nothing:
            assert np.abs(found).max() > 0.1

    def test_gives_ppo_advantages_that_grow_towards_the_end(self) -> None:
        """With V = 0.2 and γ = 1: δ is 0 but for the last token's 0.5, so A is 0.5 λ^(T − t)."""
        found = self.advantages(Ppo(lam=0.9, whiten=False), 0.2)
        assert found == pytest.approx([0.45, 0.5, 0.5, 0.405, 0.45, 0.5, 0.5], abs=1e-12)


def test_gae_by_its_definition() -> None:
    """A_t = Σ_k (γλ)^k δ_{t+k}, summed term by term, with no value after the last token."""
    random, sizes = np.random.default_rng(3), np.array([5, 1, 3])
    rewards, values = random.normal(size=(2, 9))
    found, targets = gae(rewards, values, sizes, 0.9, 0.8)
    wanted = []
    for r, v in zip(np.split(rewards, [5, 6]), np.split(values, [5, 6]), strict=True):
        delta = [r[t] + (0.9 * v[t + 1] if t + 1 < len(r) else 0.0) - v[t] for t in range(len(r))]
        wanted += [sum(0.72 ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert targets == pytest.approx(wanted + values, abs=1e-12)


def test_the_kl_lowers_the_reward_of_likelier_tokens() -> None:
    """κ = 0.5, log-ratios 0.4 and −0.2: the return is 1 − 0.5 · 0.2; each response is against the other one."""
    seen = experience([[-0.6, -1.2], [-1.0]], [[-1.0, -1.0], [-1.0]], [1.0, 0.0], prompt=[0, 0])
    assert Rloo().estimate_advantages(seen, 0.5, {}).advantages == pytest.approx([0.9, 0.9, -0.9], abs=1e-12)


def test_prompts_do_not_mix() -> None:
    """Two prompts of two and three responses of one token; the second has higher scores."""
    seen = experience([[-1.0]] * 5, [[-1.0]] * 5, [1.0, 3.0, 10.0, 20.0, 60.0], prompt=[0, 0, 1, 1, 1])
    assert Rloo().estimate_advantages(seen, 0.0, {}).advantages == pytest.approx([-2.0, 2.0, -30.0, -15.0, 45.0])
    spread = math.sqrt((20**2 + 10**2 + 30**2) / 3) + 1e-4
    wanted = [-1 / 1.0001, 1 / 1.0001, -20 / spread, -10 / spread, 30 / spread]
    assert Grpo().estimate_advantages(seen, 0.0, {}).advantages == pytest.approx(wanted)


class TestRunningMean:
    def estimate_advantages(self, scores: list[float], memory: dict[str, float], **fields: Any) -> Advantages:
        ones = [[-1.0]] * len(scores)
        return Reinforce(baseline="ema", **fields).estimate_advantages(experience(ones, ones, scores), 0.0, memory)

    def test_is_the_one_before_the_rollout(self) -> None:
        """The first rollout has its own mean, 2; the second, of mean 7, moves it to 0.9 · 2 + 0.1 · 7."""
        first = self.estimate_advantages([1.0, 3.0], {"other": 4.0})
        assert first.advantages.tolist() == [-1.0, 1.0]
        assert first.memory == pytest.approx({"other": 4.0, "baseline": 2.0})
        second = self.estimate_advantages([6.0, 8.0], first.memory)
        assert second.advantages.tolist() == [4.0, 6.0]
        assert second.memory == pytest.approx({"other": 4.0, "baseline": 2.5})

    def test_that_whitening_takes_off_is_announced(self) -> None:
        said = "objective.baseline: ema has no effect with whiten, which takes off each rollout's own mean"
        assert Reinforce(baseline="ema", whiten=True).announcement == said
        assert Reinforce(baseline="ema").announcement == Reinforce(whiten=True).announcement == ""
        assert self.estimate_advantages([6.0, 8.0], {"baseline": 2.0}, whiten=True).advantages == pytest.approx([-1.0, 1.0])


def test_whitening_by_responses() -> None:
    """Returns 1 and 3 with lengths 1 and 3: mean and deviation are of the two responses, not of the four tokens."""
    old = [[-1.0], [-1.0] * 3]
    assert Reinforce(whiten=True).estimate_advantages(experience(old, old, [1.0, 3.0]), 0.0, {}).advantages == pytest.approx(
        [-1, 1, 1, 1]
    )
    assert whiten(np.array([2.0, 2.0])).tolist() == [0.0, 0.0]


class TestExplainedVariance:
    @pytest.mark.parametrize(
        ("values", "targets", "wanted"),
        [
            ([1.0, 3.0], [1.0, 3.0], 1.0),
            ([6.0, 8.0], [1.0, 3.0], 1.0),  # an offset is not variance
            ([2.0, 2.0], [1.0, 3.0], 0.0),
            ([3.0, 1.0], [1.0, 3.0], -3.0),
            ([1.0, 9.0, 3.0], [1.0, math.nan, 3.0], 1.0),
            ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], 0.0),
        ],
    )
    def test_by_hand(self, values: list[float], targets: list[float], wanted: float) -> None:
        assert explained_variance(np.array(values), np.array(targets)) == pytest.approx(wanted)

    def test_is_what_kinds_with_a_value_tell(self) -> None:
        """One token each, returns 1 and 3, values 1 and 2: targets less values are 0 and 1."""
        seen = experience([[-1.0]] * 2, [[-1.0]] * 2, [1.0, 3.0], [[1.0], [2.0]], [0, 0])
        found = {name: objective.estimate_advantages(seen, 0.0, {}).metrics for name, objective in PPO_KINDS.items()}
        told = {"value/explained_variance": pytest.approx(0.75)}
        assert found == {"ppo": told, "bandit": told, "reinforce": {}, "rloo": {}, "grpo": {}}


def test_fields() -> None:
    """Widths of 0 would stop all learning; a value's keys belong to the kinds that have one."""
    for objective in PPO_KINDS.values():
        bounds = {field.name: field.metadata["low"] for field in dataclasses.fields(objective) if "clip" in field.name}
        other = ("value_clip",) if objective.values else ("clip_high",) if objective.least_samples > 1 else ()
        assert bounds == dict.fromkeys(("clip", *other), 1e-9)
    assert {name: objective.least_samples for name, objective in PPO_KINDS.items() if objective.least_samples > 1} == {
        "rloo": 2,
        "grpo": 2,
    }
