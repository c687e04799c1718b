"""The recipes of the stages that compare responses: which keys each takes, their defaults, metrics and learning rates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.objectives.base import Trained
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.slic import Slic
from rlhf_cli.recipe.dump import dump_recipe, refuse_changes
from rlhf_cli.recipe.help import key_table
from rlhf_cli.recipe.keys import kind_of
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.recipe.stages import (
    POLICY_STAGES,
    REWARD_STAGES,
    TRAINING_STAGES,
    learning_rate_of,
    resolved,
    sane_learning_rate,
)
from rlhf_cli.sections import PolicyReference, Reference

GOOD = "model: {path: m}\noutput: runs/a\ndata: {train: x.jsonl, holdout: 0.1}\n"
EVERY_KIND = [(name, kind) for name, stage in TRAINING_STAGES.items() for kind in map(kind_of, stage.objectives)]
DRAWN = GOOD + "reward: [{model: rm}]\nrollout: {responses_per_prompt: 2}\n"
REFERENCE_FREE = [("dpo", "slic"), ("dpo", "simpo"), ("dpo", "orpo")]


def load(folder: Path, stage: str, *overrides: str, text: str | None = None) -> Loaded:
    path = folder / "r.yaml"
    path.write_text(text or (DRAWN if stage == "ppo" else GOOD))
    return load_recipe(stage, path, overrides)


def refused(folder: Path, stage: str, *overrides: str, text: str | None = None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(folder, stage, *overrides, text=text)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_the_kinds_of_each_stage() -> None:
    numbers = {"sft": 2, "train-rm": 5, "dpo": 22, "ipo": 1, "kto": 3, "ppo": 5}
    assert {name: len(stage.objectives) for name, stage in TRAINING_STAGES.items()} == numbers


def test_what_a_stage_trains_and_starts_from() -> None:
    policies = ("sft", "dpo", "ipo", "kto", "ppo")
    assert (policies, ("train-rm",)) == (POLICY_STAGES, REWARD_STAGES)
    assert {name: stage.parents for name, stage in TRAINING_STAGES.items()} == {
        name: ("sft", "train-rm", "dpo", "ipo", "kto", "ppo") if name == "train-rm" else policies for name in TRAINING_STAGES
    }
    for stage in TRAINING_STAGES.values():
        assert {objective.role for objective in stage.objectives} == {stage.role}


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_the_default_kind(tmp_path: Path, stage: str) -> None:
    recipe: Any = load(tmp_path, stage).recipe
    kinds = {"sft": "sft", "train-rm": "bradley_terry", "dpo": "dpo", "ipo": "ipo", "kto": "kto", "ppo": "ppo"}
    references = dict.fromkeys(("dpo", "ipo", "kto"), Reference("auto", True)) | {"ppo": PolicyReference("start")}
    assert (recipe.stage, recipe.objective.kind) == (stage, kinds[stage])
    assert vars(recipe).get("reference") == references.get(stage)


SELF_PLAY = {kind: ["rollout={}", "reward=[{model: rm}]"] for kind in ("sppo", "dno")}
NEEDED = {"distil": ["objective.teacher=models/large"], **SELF_PLAY}
"""Keys without a default, or that a kind cannot do without."""


@pytest.mark.parametrize(("stage", "kind"), EVERY_KIND)
def test_round_trip_of_every_kind(tmp_path: Path, stage: str, kind: str) -> None:
    recipe = load(tmp_path, stage, f"objective.kind={kind}", *NEEDED.get(kind, ())).recipe
    assert recipe.objective.kind == kind
    text = dump_recipe(recipe, stage)
    assert load(tmp_path, stage, text=text).recipe == recipe
    assert f"objective:\n  kind: {kind}\n" in text
    keys = [line.split(":")[0] for line in text.splitlines()[1:] if line[0].isalpha()]
    direct = ["reference", "rollout", "reward", "reward_combine"]
    added = {"ppo": [*direct, "kl", "value", "ptx", "gold"]} | {name: [*direct, "gold"] for name in ("dpo", "ipo", "kto")}
    added |= {"sft": ["rollout"], "dpo": [*added["dpo"], "explore"]}
    assert keys == ["model", "lora", "data", "train", "objective", *added.get(stage, []), "seed", "output", "env", "trackers"]


def test_keys_of_the_chosen_kind(tmp_path: Path) -> None:
    assert load(tmp_path, "dpo", "objective={kind: hinge, beta: 0.3}").recipe.objective == Hinge(beta=0.3)
    assert load(tmp_path, "dpo", "objective={kind: slic, lambda: 0.3}").recipe.objective == Slic(lambda_=0.3)
    assert load(tmp_path, "kto", "objective={lambda: auto}").recipe.objective == Kto(lambda_="auto")


REFUSALS = {
    ("dpo", "objective={kind: hinge, label_smoothing: 0.1}"): "objective.label_smoothing: has no effect with kind: hinge "
    "(it belongs to dpo, robust, exo). remove it",
    ("dpo", "objective={gamma: 2}"): "objective.gamma: has no effect with kind: dpo (it belongs to simpo). remove it",
    (
        "kto",
        "objective={kind: bco, lambda_d: 2}",
    ): "objective.lambda_d: has no effect with kind: bco (it belongs to kto). remove it",
    ("dpo", "objective={kind: hing}"): "objective.kind: expected dpo | robust | hinge | squared | slic | simpo | orpo | odpo | "
    "cal_dpo | rebel | bco | plackett_luce | apo_zero | apo_down | nca | exo | discopop | wpo | tdpo2 | aot | sppo | dno, "
    "found the text 'hing'. did you mean hinge?",
    ("ipo", "objective={kind: kto}"): "objective.kind: expected ipo, found the text 'kto'. kto is a kind of rlhf kto",
    (
        "kto",
        "objective={kind: dpo}",
    ): "objective.kind: expected kto | bco | apo_zero, found the text 'dpo'. dpo is a kind of rlhf dpo",
    ("dpo", "objective={normalize: sum}"): "objective.normalize: has no effect in dpo. remove it",
    ("dpo", "objective={zzzz: 1}"): "objective.zzzz: unknown key. dpo takes kind, sft_weight, beta, label_smoothing",
    ("dpo", "data.train_on=last"): "data.train_on: has no effect in dpo. remove it",
    ("sft", "rollout={temperature: 1}"): "rollout: kind: sft learns from the responses of its data. "
    "remove it, or write kind: distil with a teacher",
    ("dpo", "kl={coef: 1}"): "kl: has no effect in dpo. remove it",
    ("ppo", "reference={cache: false}"): "reference.cache: has no effect in ppo. remove it",
    ("train-rm", "reference={model: base}"): "reference: has no effect in train-rm. remove it",
    ("train-rm", "objective={beta: 1}"): "objective.beta: has no effect in train-rm. remove it",
    ("dpo", "objective={label_smoothing: 0.5}"): "objective.label_smoothing: expected at most 0.499, found 0.5",
    ("dpo", "objective={kind: robust, label_smoothing: 0.5}"): "objective.label_smoothing: expected at most 0.499, found 0.5",
    ("train-rm", "objective={label_smoothing: 0.5}"): "objective.label_smoothing: expected at most 0.499, found 0.5",
    (
        "dpo",
        "objective={kind: simpo}\nreference={model: base}",
    ): "reference.model: has no effect with kind: simpo, which needs no reference. remove it",
    ("dpo", "objective={kind: orpo}\nreference={cache: false}"): "reference.cache: has no effect with kind: orpo, which needs no "
    "reference. remove it",
    ("kto", "objective={lambda: auto, lambda_u: 2}"): "objective.lambda_u: has no effect beside objective.lambda: auto. "
    "keep one of the two",
    (
        "dpo",
        "train.keep_best={metric: rewards/accuracy, mode: max}",
    ): "train.keep_best.metric: no metric is named rewards/accuracy. did you mean rewards/accuracies?",
    ("train-rm", "train.keep_best={metric: grad_norm, mode: min}"): "train.keep_best.metric: no metric is named grad_norm. "
    "there are loss, accuracy, margin, score_mean, score_std",
    (
        "dpo",
        "objective={kind: simpo}\ntrain.stop_if={logratio/mean: {below: -9}}",
    ): "train.stop_if.logratio/mean: no metric is named "
    "logratio/mean. there are loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, rewards/saturated, "
    "logps/chosen, logps/rejected, grad_norm, learning_rate, tokens, tokens_per_second, epoch",
}


@pytest.mark.parametrize(("stage", "given"), REFUSALS)
def test_refusals(tmp_path: Path, stage: str, given: str) -> None:
    (line,) = refused(tmp_path, stage, *given.split("\n"))
    assert line == f"--set {REFUSALS[stage, given]}"


def test_a_refusal_names_the_line_of_the_file(tmp_path: Path) -> None:
    text = GOOD + "objective:\n  kind: hinge\n  beta: 0.2\n  label_smoothing: 0.1\nreference:\n  modle: base\n"
    assert refused(tmp_path, "dpo", text=text) == [
        "r.yaml:7: objective.label_smoothing: has no effect with kind: hinge (it belongs to dpo, robust, exo). remove it",
        "r.yaml:9: reference.modle: unknown key. did you mean reference.model?",
    ]
    changed = GOOD + "objective: {kind: dpo, label_smoothing: 0.1}\n"
    assert refused(tmp_path, "dpo", "objective.kind=hinge", text=changed) == [
        "r.yaml:4: objective.label_smoothing: has no effect with kind: hinge (it belongs to dpo, robust, exo). remove it, "
        "or replace the whole section: --set 'objective={kind: hinge}'"
    ]
    assert load(tmp_path, "dpo", "objective={kind: hinge}", text=changed).recipe.objective == Hinge()


def test_a_kind_from_the_command_line_does_not_take_over_what_was_meant_for_another(tmp_path: Path) -> None:
    text = GOOD + "objective: {kind: dpo, beta: 0.1}\n"
    assert refused(tmp_path, "dpo", "objective.kind=simpo", text=text) == [
        "r.yaml:4: objective.beta: is the file's, and kind simpo has a default of its own, 2. give it with --set too, "
        "or replace the whole section: --set 'objective={kind: simpo}'"
    ]
    for settings in (["objective={kind: simpo}"], ["objective.kind=simpo", "objective.beta=2"]):
        assert load(tmp_path, "dpo", *settings, text=text).recipe.objective == Simpo()
    assert load(tmp_path, "dpo", "objective.kind=hinge", text=text.replace("0.1", "0.3")).recipe.objective == Hinge(beta=0.3)


def test_an_unknown_kind_hides_no_other_fault(tmp_path: Path) -> None:
    text = GOOD + "objective: {kind: hing}\nseed: x\ntrain: {epochs: 0, keep_best: {metric: loss, mode: min}}\n"
    assert [line.split(": ")[1] for line in refused(tmp_path, "dpo", text=text)] == ["objective.kind", "seed", "train.epochs"]


def test_where(tmp_path: Path) -> None:
    loaded = load(tmp_path, "dpo", "reference.cache=false", text=GOOD + "objective:\n  kind: hinge\nreference:\n  model: base\n")
    assert loaded.where("objective.kind").endswith("r.yaml:5")
    assert loaded.where("objective.beta").endswith("r.yaml:4")
    assert loaded.where("reference.model").endswith("r.yaml:7")
    assert loaded.where("reference.cache") == "--set reference.cache"


def test_a_path_of_the_reference_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_ROOT", "/big")
    recipe: Any = load(tmp_path, "ipo", "reference.model=${RLHF_TEST_ROOT}/m").recipe
    assert recipe.reference.model == "/big/m"


def test_a_resumed_run_may_change_the_cache_and_nothing_else_of_the_reference(tmp_path: Path) -> None:
    def found(*given: str) -> Any:
        return resolved(load(tmp_path, "dpo", *given).recipe, 1)

    old = dump_recipe(found("reference.model=start"), "dpo")
    refuse_changes(old, found("reference.cache=false"))
    with pytest.raises(UsageError, match=r"1 value differs.*\n.*\n  reference\.model  start  base"):
        refuse_changes(old, found("reference.model=base"))
    with pytest.raises(UsageError, match=r"\n  objective\.beta  0\.1  0\.2"):
        refuse_changes(old, found("objective.beta=0.2"))


def test_the_reference_of_an_iterated_kind(tmp_path: Path) -> None:
    """rebel's, sppo's and dno's: the policy at the last refresh, unless the recipe says another; a run of before says `start`."""

    def found(*given: str) -> Any:
        return resolved(load(tmp_path, "dpo", *given).recipe, 1)

    drawn = ("rollout={}", "reward=[{model: rm}]")
    for kind in ("rebel", *SELF_PLAY):
        assert found(f"objective.kind={kind}", *drawn).reference.model == "previous"
    assert found("objective.kind=rebel", *drawn, "reference.model=start").reference.model == "start"
    assert found("objective.kind=rebel").reference.model == found(*drawn).reference.model == "start"
    old = dump_recipe(found("objective.kind=rebel", *drawn, "reference.model=start"), "dpo")
    with pytest.raises(UsageError, match=r"\n  reference\.model  start  previous$"):
        refuse_changes(old, found("objective.kind=rebel", *drawn))


def test_metrics(tmp_path: Path) -> None:
    assert load(tmp_path, "train-rm").recipe.held_out_metrics == ("loss", "accuracy", "margin", "score_mean", "score_std")
    ipo = set(load(tmp_path, "ipo").recipe.held_out_metrics) - set(load(tmp_path, "dpo").recipe.held_out_metrics)
    assert ipo == {"margin/target", "margin/logratio"}
    assert "rewards/saturated" in load(tmp_path, "dpo").recipe.held_out_metrics
    usual = {stage: set(load(tmp_path, stage).recipe.held_out_metrics) for stage in ("sft", "train-rm", "dpo", "ipo", "kto")}
    for stage, kind in EVERY_KIND:
        if stage == "ppo":
            continue
        own = load(tmp_path, stage, f"objective.kind={kind}", *NEEDED.get(kind, ())).recipe
        missing = usual[stage] - set(own.metric_names)
        absent = {"logratio/mean"} if (stage, kind) in REFERENCE_FREE else {"kl"} if stage == "kto" and kind != "kto" else set()
        if kind == "distil":
            absent = {"perplexity", "token_accuracy"}
        if stage == "dpo" and kind not in ("dpo", "robust", "hinge", "odpo", "simpo", "exo", "discopop", "wpo", "tdpo2"):
            absent |= {"rewards/saturated"}
        if kind in ("general", "steps"):
            absent = {"score_mean", "score_std"} | ({"margin"} if kind == "steps" else set())
        assert missing == absent, (stage, kind)


RATES = {
    ("sft", "sft"): (2e-4, 2e-5),
    ("train-rm", "bradley_terry"): (1e-4, 1e-5),
    ("train-rm", "plackett_luce"): (1e-4, 1e-5),
    ("dpo", "dpo"): (1e-5, 1e-6),
    ("dpo", "plackett_luce"): (1e-5, 1e-6),
    ("dpo", "simpo"): (5e-6, 5e-7),
    ("dpo", "orpo"): (8e-5, 8e-6),
    ("ipo", "ipo"): (1e-5, 1e-6),
    ("kto", "kto"): (1e-5, 1e-6),
    ("ppo", "ppo"): (3e-5, 3e-6),
    ("ppo", "rloo"): (3e-5, 3e-6),
}


@pytest.mark.parametrize(("stage", "kind"), RATES)
def test_learning_rates(tmp_path: Path, stage: str, kind: str) -> None:
    chosen = f"objective.kind={kind}"
    found = tuple(learning_rate_of(load(tmp_path, stage, chosen, f"lora={lora}").recipe) for lora in ("{r: 4}", "null"))
    assert found == RATES[stage, kind]
    assert learning_rate_of(load(tmp_path, stage, chosen).recipe) == found[0]
    assert learning_rate_of(load(tmp_path, stage, chosen, "train.learning_rate=0.5").recipe) == 0.5


def test_every_default_rate_is_sane_and_direct_ones_are_bounded_closer_than_sft(tmp_path: Path) -> None:
    trained: list[Trained] = ["lora", "full"]
    for stage, objective, weights in ((s, o, w) for s in TRAINING_STAGES.values() for o in s.objectives for w in trained):
        low, high = stage.sane[weights]
        assert low < stage.default_learning_rate(objective, weights) < high
    assert sane_learning_rate(load(tmp_path, "dpo", "lora=null").recipe) == (5e-8, 5e-5)
    assert sane_learning_rate(load(tmp_path, "sft", "lora=null").recipe) == (1e-7, 3e-4)


def test_help_lists_each_kind_with_its_own_keys() -> None:
    lines = key_table("dpo").splitlines()
    assert max(map(len, lines)) <= 77
    kinds = [line.split()[1] for line in lines if line.startswith("  kind: ")]
    assert kinds == [*map(kind_of, TRAINING_STAGES["dpo"].objectives), "xpo"]  # explore has a kind too
    start = lines.index("  kind: simpo                 with sft_weight: 0")
    assert lines[start + 1].startswith("    beta: 2 ")
    assert lines[start + 2].startswith("    gamma: 1 ")
    assert lines[start + 3].startswith("  kind: orpo ")
    assert "  kind: hinge                 with sft_weight: 0, beta: 0.1" in lines
    text = " ".join(" ".join(lines).split())
    assert "null: 1e-05 lora, 1e-06 full; simpo 5e-06 lora, 5e-07 full; orpo 8e-05 lora, 8e-06 full" in text
    assert "train_on" not in text
    assert "train_on: auto" in key_table("sft")


def test_reading_every_stage_needs_no_torch() -> None:
    code = "import sys, rlhf_cli.recipe.load, rlhf_cli.recipe.help; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[]\n", "")
