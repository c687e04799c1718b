"""Recipes whose responses are drawn from the policy: what their sections must agree on, their metrics, their help."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.recipe.dump import dump_recipe, refuse_changes
from rlhf_cli.recipe.help import key_table
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.recipe.rewards import name_of
from rlhf_cli.recipe.stages import resolved
from rlhf_cli.sections import OnlineSampling, Reward

PLAIN = "model: {path: m}\noutput: runs/a\ndata: {train: x.jsonl, holdout: 0.1}\n"
GOOD = PLAIN + "reward: [{model: runs/rm}]\n"


def load(folder: Path, stage: str, *overrides: str, text: str = GOOD) -> Loaded:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(stage, path, overrides)


def refused(folder: Path, stage: str, *overrides: str, text: str = GOOD) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(folder, stage, *overrides, text=text)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


NO_VALUE = "has no effect with kind: rloo, which learns no value. remove it"
WHOLE = "has no place in ppo: the ratio and the KL would compare a truncated distribution with whole ones. remove it"
RLOO = "objective.kind=rloo\nrollout.responses_per_prompt=4\n"
GRPO = "objective.kind=grpo\nrollout.responses_per_prompt=4\n"
REFUSALS = {
    # terms
    ("ppo", "reward=[]"): "reward: the list is empty. name a term, such as {model: …} or {function: file.py:name}",
    ("ppo", "gold=[]"): "gold: the list is empty. name a term, such as {model: …} or {function: file.py:name}",
    (
        "ppo",
        "reward=[{weight: 2}]",
    ): "reward.0: expected one of model, function, match, format, length, judge, found none. name one",
    (
        "ppo",
        "reward=[{model: a, function: f.py:b}]",
    ): "reward.0: expected one of model, function, match, format, length, judge, found model and function. make it 2 terms",
    (
        "ppo",
        "reward=[{function: f.py}]",
    ): "reward.0.function: expected file.py:name, found f.py. name a function in a Python file",
    (
        "ppo",
        "reward=[{function: f.py:a-b}]",
    ): "reward.0.function: expected file.py:name, found f.py:a-b. name a function in a Python file",
    ("ppo", "reward=[{function: f:a}]"): "reward.0.function: expected file.py:name, found f:a. name a function in a Python file",
    (
        "ppo",
        "reward=[{function: f.py:a, normalize: true}]",
    ): "reward.0.normalize: has no effect on a function, it is for reward models. remove it",
    (
        "ppo",
        "gold=[{function: f.py:a, revision: main}]",
    ): "gold.0.revision: has no effect on a function, it is for reward models. remove it",
    ("ppo", "reward.0.weight=0"): "reward.0.weight: 0 leaves the term out of the score. move it to gold, where it is only "
    "measured",
    ("ppo", "gold=[{model: g}]\ngold.0.weight=2"): "gold.0.weight: has no effect on a term that is only measured. remove it",
    (
        "ppo",
        "reward=[{model: a/rm}, {model: b/rm}]",
    ): "reward.1.name: a second term would be logged as reward/rm. give one of them another name",
    ("ppo", "reward.0.name=' '"): "reward.0.name: expected a name, found blank text. remove it for the default",
    ("ppo", "reward_combine=min"): "reward_combine: has no effect on one term. remove it, or add a term to reward",
    ("ppo", "reward={model: m}"): "reward: expected a list, found keys with values. it is a list: begin each of its terms "
    "with `- `",
    ("ppo", "reward.0.wieght=2"): "reward.0.wieght: unknown key. did you mean reward.0.weight?",
    # rollouts
    ("ppo", "objective.kind=rloo"): "rollout.responses_per_prompt: 1 is too few for kind: rloo, which compares the responses "
    "of a prompt. set it to 2 or more",
    ("ppo", "objective.kind=grpo"): "rollout.responses_per_prompt: 1 is too few for kind: grpo, which compares the responses "
    "of a prompt. set it to 2 or more",
    (
        "ppo",
        "objective.kind=grpo\nrollout.responses_per_prompt=2\nkl.estimator=k1",
    ): "kl.estimator: k1 is part of "
    "the return, and kind: grpo with scale: group takes the scores alone. write k2 or k3, which are loss terms, or remove it",
    (
        "ppo",
        GRPO + "objective.scale=batch\nkl.estimator=k1",
    ): "kl.estimator: k1 is part of the return, and kind: grpo with scale: batch takes the scores alone. write k2 or k3, which "
    "are loss terms, or remove it",
    ("ppo", GRPO + "objective.overlong=129"): "objective.overlong: 129 is more than rollout.max_new_tokens (128). lower it",
    ("ppo", RLOO + "objective.overlong=129"): "objective.overlong: 129 is more than rollout.max_new_tokens (128). lower it",
    ("ppo", GRPO + "objective.ratio=sequence\nobjective.surrogate=cispo"): "objective.surrogate: cispo weighs every token by its "
    "own ratio, and ratio: sequence gives a response one. remove one of the two",
    ("ppo", GRPO + "objective.ratio=sequence\nobjective.mean_over=tokens"): "objective.mean_over: tokens lets long responses "
    "count for more, and with ratio: sequence each counts once. remove it",
    ("ppo", GRPO + "objective.ratio=sequence\nobjective.mean_over=constant"): "objective.mean_over: constant lets long responses "
    "count for more, and with ratio: sequence each counts once. remove it",
    ("ppo", GRPO + "objective.surrogate=cispo\nobjective.mean_over=responses"): "objective.mean_over: responses does not go with "
    "surrogate: cispo, which is a mean over tokens. remove it",
    ("ppo", GRPO + "objective.surrogate=cispo\nobjective.clip=0.1\nobjective.clip_high=0.3"): "objective.clip: has no effect "
    "beside clip_high with surrogate: cispo, which is not clipped below 1. remove it",
    **{
        (
            "ppo",
            f"{RLOO}objective.{key}={value}",
        ): f"objective.{key}: has no effect with kind: rloo (it belongs to grpo). remove it"
        for key, value in (("scale", "group"), ("scale", "none"), ("ratio", "token"), ("surrogate", "cispo"))
    },
    ("ppo", "objective.ties=keep"): "objective.ties: has no effect with kind: ppo (it belongs to rloo, grpo). remove it",
    ("ppo", "reward.0.name=zero_spread"): "reward.0.name: reward/zero_spread is logged of something else. give the term "
    "another name",
    ("ppo", "objective.minibatches=33"): "objective.minibatches: 33 updates cannot share train.batch_size (32) prompts. lower it",
    ("ppo", "rollout.max_new_tokens=1024"): "rollout.max_new_tokens: leaves no room for a prompt in data.max_length (1024). "
    "lower it, or raise data.max_length",
    ("ppo", "data.overlong=truncate-response"): "data.overlong: truncate-response has no effect where responses are drawn. "
    "use drop, error or truncate-prompt",
    ("ppo", "rollout.top_p=0.9"): f"rollout.top_p: {WHOLE}",
    ("ppo", "rollout.repetition_penalty=1.1"): f"rollout.repetition_penalty: {WHOLE}",
    ("dpo", "rollout={top_p: 0.9, min_p: 0.1, engine: vllm}"): "rollout.min_p: vllm would apply it before top_p, which then "
    "keeps fewer tokens. keep one of the two",
    ("dpo", "rollout={correction: truncate}"): "rollout.correction: weighs the policy gradients of ppo, and this stage has none. "
    "remove it",
    ("ppo", "rollout.correction=truncate"): "rollout.correction: has no effect where the model that learns draws by itself. "
    "remove it",
    ("ppo", "rollout={engine: {endpoint: http://x/v1}, temperature: 0.7, correction: truncate}"): "rollout.correction: has no "
    "effect with a server, whose log-probabilities are those at temperature 1. write rollout.temperature: 1, or engine: vllm",
    ("ppo", "rollout.engine={endpoint: http://x/v1}\nlora=null"): "rollout.engine: a server is given adapters, and lora: null "
    "trains all weights. write vllm, or remove lora: null",
    (
        "ppo",
        "rollout.engine=vlm",
    ): "rollout.engine: expected transformers | vllm or keys (endpoint, folder), found the text 'vlm'. did you mean vllm?",
    ("dpo", "rollout={top_k: 0}"): "rollout.top_k: expected at least 1, found 0",
    ("ppo", "rollout.refresh=2"): "rollout.refresh: has no effect in ppo. remove it",
    # values, KL, ptx
    ("ppo", RLOO + "value.init=policy"): f"value.init: {NO_VALUE}",
    ("ppo", RLOO + "value.learning_rate=1e-5"): f"value.learning_rate: {NO_VALUE}",
    ("ppo", "kl.horizon=500"): "kl.horizon: has no effect without kl.target. set one, or remove it",
    ("ppo", "kl={coef: 0, target: 6}"): "kl.target: has no effect with kl.coef: 0, which stays 0 whatever it is multiplied by. "
    "give coef a start",
    ("ppo", "kl={coef: 0, estimator: k2}"): "kl.estimator: has no effect with kl.coef: 0. remove it, or give coef a weight",
    ("ppo", "ptx={data: y.jsonl, coef: 0}"): "ptx.coef: 0 learns nothing from these rows. give it a weight, or remove ptx",
    ("ppo", "ptx={data: {path: y.jsonl, weight: 2}}"): "ptx.data.weight: has no effect with one source. remove it",
    # metrics
    ("ppo", "train.keep_best={metric: loss, mode: min}"): "train.keep_best.metric: no metric is named loss. there are "
    "objective/rlhf_reward, objective/scores, objective/kl, objective/entropy, response/length, response/eos_rate, reward/rm",
    ("ppo", "train.keep_best={metric: rewrad/rm, mode: max}"): "train.keep_best.metric: no metric is named rewrad/rm. "
    "did you mean reward/rm?",
    ("ppo", "train.stop_if={policy/clipfarc: {above: 0.5}}"): "train.stop_if.policy/clipfarc: no metric is named "
    "policy/clipfarc. did you mean policy/clipfrac?",
    ("ppo", RLOO + "train.stop_if={loss/value: {above: 9}}"): "train.stop_if.loss/value: no metric is named loss/value. there "
    "are loss, loss/policy, policy/clipfrac, policy/approxkl, policy/ratio, kl_coef, "
    "objective/rlhf_reward, objective/scores, objective/kl, objective/entropy, response/length, response/eos_rate, reward/rm, "
    "time/rollout, time/score, time/update, reward/zero_spread, grad_norm, learning_rate, tokens, tokens_per_second, epoch",
    # direct objectives
    ("dpo", ""): "reward: has no effect without rollout. add `rollout: {}` to draw responses, or remove it",
    ("dpo", "rollout={}\nreward=null"): "rollout: needs a reward to rank what is drawn. add reward: [{model: …}] or "
    "[{function: file.py:name}]",
    ("dpo", "rollout={}\nreference.cache=false"): "reference.cache: has no effect with rollout: responses are new, so "
    "nothing can be kept. remove it",
    (
        "dpo",
        "reward=null\nreference.model=previous",
    ): "reference.model: previous is the policy when responses were last drawn, and "
    "without rollout none are. write start, or add rollout",
    ("dpo", "rollout={}\nobjective.kind=tdpo2\nreference.model=previous"): "reference.model: of an earlier policy one number a "
    "token is kept, and tdpo2 compares whole distributions. write start, base or a path",
    ("dpo", "reward=null\nobjective.kind=sppo"): "objective.kind: kind sppo learns from how probably the policy's own responses "
    "win. add rollout: {} and a reward that compares",
    ("dpo", "rollout={}\nobjective.kind=dno\nreward=[{model: rm}, {length: {max: 9}}]"): "reward: kind dno learns from how "
    "probably the policy's own responses win, which one term says. name one, of weight 1",
    ("dpo", "rollout={missing_eos_penalty: 1}\nobjective.kind=dno"): "rollout.missing_eos_penalty: kind dno learns from how "
    "probably the policy's own responses win, and this would change that. remove it",
    ("dpo", "rollout={}\nobjective.kind=simpo\nreference.model=previous"): "reference.model: has no effect with kind: simpo, "
    "which needs no reference. remove it",
    (
        "ppo",
        "reference.model=previous",
    ): "reference.model: previous would be the policy that draws: its KL would be 0 and hold "
    "nothing. write start, base or a path",
    ("dpo", "rollout={}\nrollout.responses_per_prompt=1"): "rollout.responses_per_prompt: expected at least 2, found 1",
    ("kto", "rollout={}\ndata.overlong=truncate-response"): "data.overlong: truncate-response has no effect where responses "
    "are drawn. use drop, error or truncate-prompt",
    ("dpo", "rollout={}\ntrain.keep_best={metric: loss, mode: min}"): "train.keep_best.metric: no metric is named loss. there "
    "are objective/scores, objective/kl, objective/entropy, response/length, response/eos_rate, reward/rm",
}


@pytest.mark.parametrize(("stage", "given"), REFUSALS)
def test_refusals(tmp_path: Path, stage: str, given: str) -> None:
    (line,) = refused(tmp_path, stage, *(part for part in given.split("\n") if part))
    told = line.removeprefix("--set ") if line.startswith("--set ") else line.partition(": ")[2]
    assert told == REFUSALS[stage, given]


def test_every_fault_of_a_list_of_terms_has_its_line(tmp_path: Path) -> None:
    text = PLAIN + "reward:\n  - model: a\n    wieght: 2\n  - function: f.py\n  - {}\ngold:\n  - modle: g\n"
    assert refused(tmp_path, "ppo", text=text) == [
        "r.yaml:6: reward.0.wieght: unknown key. did you mean reward.0.weight?",
        "r.yaml:10: gold.0.modle: unknown key. did you mean gold.0.model?",
    ]
    assert refused(tmp_path, "ppo", text=text.replace("wieght", "weight").replace("modle", "model")) == [
        "r.yaml:7: reward.1.function: expected file.py:name, found f.py. name a function in a Python file",
        "r.yaml:8: reward.2: expected one of model, function, match, format, length, judge, found none. name one",
    ]
    assert refused(tmp_path, "ppo", text=PLAIN) == [
        "r.yaml:1: reward: missing. add it: a list of terms, each one of model, function, match, format, length and judge: "
        "[{model: runs/rm}]"
    ]


def test_a_term_is_changed_from_the_command_line(tmp_path: Path) -> None:
    changed: Any = load(tmp_path, "ppo", "reward.0.weight=2", "gold.0.function=g.py:gold").recipe
    assert changed.reward == [Reward(model="runs/rm", weight=2.0)]
    assert changed.gold == [Reward(function="g.py:gold")]


def test_sections_that_may_be_empty(tmp_path: Path) -> None:
    online: Any = load(tmp_path, "dpo", text=GOOD + "rollout: {}\n").recipe
    assert online.rollout == OnlineSampling() == online.draws
    assert (online.rollout.responses_per_prompt, online.rollout.refresh) == (2, 1)
    offline: Any = load(tmp_path, "dpo", text=PLAIN + "rollout:\n").recipe
    assert offline.draws is None
    assert offline.terms == ([], [])


def test_round_trip_with_every_section(tmp_path: Path) -> None:
    text = GOOD + "gold: [{function: 'g.py:gold'}]\nkl: {target: 6}\nvalue: {init: policy}\nptx: {data: y.jsonl}\n"
    recipe = load(tmp_path, "ppo", "reward.0.normalize=false", text=text).recipe
    dumped = dump_recipe(recipe, "ppo")
    assert load(tmp_path, "ppo", text=dumped).recipe == recipe
    refuse_changes(dumped, recipe)
    with pytest.raises(UsageError, match=r"\n  reward\.0\.weight  1\.0  2\.0$"):
        refuse_changes(dumped, load(tmp_path, "ppo", "reward.0.weight=2", text=dumped).recipe)


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (Reward(model="runs/quickstart/rm/"), "rm"),
        (Reward(model="org/judge", name="judge"), "judge"),
        (Reward(function="a/b.py:gold"), "gold"),
        (Reward(model="org/judge", name="mine"), "mine"),
    ],
)
def test_names_of_terms(term: Reward, name: str) -> None:
    assert name_of(term) == name
    assert name_of(dataclasses.replace(term, name=None)) in (name, "judge")


DRAWN = {"objective/scores", "objective/kl", "objective/entropy", "response/length", "response/eos_rate"}
SPREAD = "reward/zero_spread"
TIMES = {"time/rollout", "time/score", "time/update"}
COMMON = {"grad_norm", "learning_rate", "tokens", "tokens_per_second", "epoch"}


def test_metrics_of_ppo(tmp_path: Path) -> None:
    recipe = load(tmp_path, "ppo", "reward.0.name=a", "gold.0.function=g.py:b").recipe
    held_out = DRAWN | {"objective/rlhf_reward", "reward/a", "gold/b"}
    assert set(recipe.held_out_metrics) == held_out
    training = {"loss", "loss/policy", "kl_coef", "policy/clipfrac", "policy/approxkl", "policy/ratio"}
    training |= TIMES
    values = {"loss/value", "value/explained_variance", "grad_norm/value", "learning_rate/value"}
    assert set(recipe.training_metrics) == held_out | training | values | COMMON
    assert len(recipe.training_metrics) == len(set(recipe.training_metrics))
    redrawn = ("{kind: grpo, ties: redraw, overlong: 9}", {"rollout/redrawn", "response/overlong"})
    for kind, more in (("ppo", values), ("bandit", values), ("reinforce", set()), ("rloo", set()), ("grpo", set()), redrawn):
        given = f"objective={kind}" if kind.startswith("{") else f"objective.kind={kind}"
        of_kind = load(tmp_path, "ppo", given, "rollout.responses_per_prompt=2").recipe
        assert set(of_kind.training_metrics) - set(of_kind.held_out_metrics) == training | COMMON | more | {SPREAD}, kind
    mixed = load(tmp_path, "ppo", "ptx.data=y.jsonl").recipe
    assert set(mixed.training_metrics) - set(recipe.training_metrics) == {"loss/ptx", "reward/rm"}


def test_metrics_of_online_direct_objectives(tmp_path: Path) -> None:
    online, offline = load(tmp_path, "dpo", "rollout={}").recipe, load(tmp_path, "dpo", text=PLAIN).recipe
    assert set(online.held_out_metrics) == DRAWN | {"reward/rm"}
    assert set(online.training_metrics) - set(offline.training_metrics) == DRAWN | TIMES | {"reward/rm", SPREAD}
    assert set(offline.held_out_metrics) == set(offline.training_metrics) - COMMON
    load(tmp_path, "dpo", "rollout={}", "train.stop_if={objective/kl: {above: 20}, rewards/margins: {above: 9}}")
    load(tmp_path, "ppo", "train.keep_best={metric: reward/rm, mode: max}", "train.stop_if={kl_coef: {above: 9}}")


def test_help_tells_a_terms_keys_once_and_no_stage_rate_for_the_value() -> None:
    lines = key_table("ppo").splitlines()
    assert max(map(len, lines)) <= 77
    assert [line.split(":")[0] for line in lines if line.startswith("  function")] == ["  function"]
    assert "reward: *" in [line.split("  ")[0] for line in lines]
    text = " ".join(" ".join(lines).split())
    assert "null: 3e-05 lora, 3e-06 full" in text
    assert text.count("learning_rate: null null: the policy's dropout") == 0
    assert text.count("3e-05 lora") == 1


METHODS = {
    "Dr. GRPO": {"scale": "none", "mean_over": "constant"},
    "DAPO": {"mean_over": "tokens", "clip": 0.2, "clip_high": 0.28, "ties": "redraw", "overlong": 25},
    "GSPO": {"ratio": "sequence", "clip": 3e-4, "clip_high": 4e-4, "mean_over": "responses"},
    "CISPO": {"surrogate": "cispo", "clip_high": 0.28, "mean_over": "tokens"},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_other_names_are_what_the_help_says(name: str, tmp_path: Path) -> None:
    """Liu et al. 2025; Yu et al. 2025, section 4; Zheng et al. 2025, section 5; MiniMax-M1 2025, section 3.1."""
    said, known = " ".join(key_table("ppo").split()), Grpo.known_as[name]
    assert f"{name} {known}" in said
    keys = [part.partition(" (")[0].replace(": ", "=") for part in known.split(", ")]
    given = [key if "." in key.partition("=")[0] else f"objective.{key}" for key in keys]
    recipe: Any = resolved(load(tmp_path, "ppo", "objective.kind=grpo", "rollout.responses_per_prompt=4", *given).recipe, 10)
    assert vars(recipe.objective).items() >= METHODS[name].items()
    assert recipe.kl.coef == (0.05 if name == "GSPO" else 0)


def test_what_follows_from_other_options_is_written_down(tmp_path: Path) -> None:
    """And a run that an earlier release began, with its mean over tokens, goes on only where the recipe says so."""
    several = "rollout.responses_per_prompt=4"
    recipe = load(tmp_path, "ppo", "objective.kind=grpo", several).recipe
    found: Any = resolved(recipe, 10)
    assert (found.objective.mean_over, found.kl.estimator) == ("responses", "k2")
    unscaled: Any = resolved(load(tmp_path, "ppo", "objective={kind: grpo, scale: none}", several).recipe, 10)
    assert unscaled.kl.estimator == "k2"
    load(tmp_path, "ppo", "objective={kind: grpo, scale: none}", several, "kl.estimator=k1")
    new = ("clip_high", "ties", "overlong", "scale", "mean_over", "ratio", "surrogate")
    old = "".join(line for line in dump_recipe(found, "ppo").splitlines(True) if line.strip().split(":")[0] not in new)
    with pytest.raises(UsageError, match=r"\n  objective\.mean_over  null  responses$"):
        refuse_changes(old, found)
    refuse_changes(old, resolved(load(tmp_path, "ppo", "objective={kind: grpo, mean_over: tokens}", several).recipe, 10))


def test_a_wide_clip_of_whole_responses_is_said() -> None:
    said = "objective.clip: 0.2 hardly ever clips the ratio of a whole response; GSPO has 3e-4 and 4e-4"
    assert Grpo(ratio="sequence").announcement == said
    assert Grpo().announcement == Grpo(ratio="sequence", clip=3e-4).announcement == ""


def test_paths_of_everything_that_is_read(tmp_path: Path) -> None:
    """Before anything is imported, they tell whether the hub is needed."""
    more = ["data.eval=e.jsonl", "gold=[{model: org/gold}, {function: 'g.py:good'}]", "ptx.data=[p.jsonl, q.jsonl]"]
    assert load(tmp_path, "ppo", *more).recipe.paths == ["m", "runs/rm", "org/gold", "x.jsonl", "e.jsonl", "p.jsonl", "q.jsonl"]
    assert load(tmp_path, "dpo", text=PLAIN).recipe.paths == ["m", "x.jsonl"]
