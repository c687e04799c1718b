"""Did-you-mean, on every key of the schema and two of four kinds of typo."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.keys import keys_of, kind_of, walk
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.recipe.stages import STAGES, TRAINING_STAGES
from rlhf_cli.suggest import closest


def test_closest() -> None:
    assert closest("stf", ["sft", "export"]) == "sft"
    assert closest("x" * 61, ["x" * 60]) is None
    assert closest("banana", ["sft", "export"]) is None
    assert closest("any", []) is None


def typos(word: str, rng: random.Random) -> list[str]:
    """One letter dropped, one doubled, two neighbours swapped, one replaced; those that change nothing are left out."""
    at = rng.randrange(len(word))
    swap = rng.randrange(max(1, len(word) - 1))
    made = [
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:swap] + word[swap : swap + 2][::-1] + word[swap + 2 :],
        word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :],
    ]
    return [typo for typo in made if typo and typo != word]


def place_of(prefix: str) -> str:
    """The prefix with a position or a name where a key of a list or of free names needs one."""
    for key in ("data.eval", "reward", "gold", "prompts", "preferences", "text", "rows"):
        prefix = prefix.replace(key, f"{key}.0")
    return "trackers.wandb" if prefix == "trackers" else prefix.replace("train.stop_if", "train.stop_if.loss")


@pytest.mark.slow
def test_first_suggestion_is_right_for_every_key(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "r.yaml"
    path.write_text("output: o\nmodel: {path: m}\ndata: {train: x}\n")
    asked, rejected, right = 0, 0, 0
    for stage, row in STAGES.items():
        known = {dotted for dotted, _ in keys_with_kinds(stage, row.recipe)}
        for dotted, kind in keys_with_kinds(stage, row.recipe):
            prefix, _, name = dotted.rpartition(".")
            place = place_of(prefix)
            for typo in rng.sample(made := typos(name, rng), min(2, len(made))):
                if f"{prefix}.{typo}" in known:  # top_p is one letter from top_k
                    continue
                wrong, meant = (f"{place}.{word}" if place else word for word in (typo, name))
                asked += 1
                with pytest.raises(UsageError) as caught:
                    load_recipe(stage, path, [f"{wrong}=7", *kind])
                said = str(caught.value).replace("eval.0", "eval")
                start = f"--set {wrong}: ".replace("eval.0", "eval")
                rejected += f"{start}unknown key." in said or f"{start}has no effect" in said  # beta less its b is rebel's eta
                right += f"did you mean {meant}?".replace("eval.0", "eval") in said
    assert asked > 400
    assert rejected == asked
    assert right >= 0.95 * asked, f"{right} of {asked}"


def keys_with_kinds(stage: str, section: type) -> Iterator[tuple[str, list[str]]]:
    """Every key of a stage, those of an objective with the override that chooses its kind."""
    for dotted, _ in walk(section):
        if not dotted.startswith("objective."):
            yield dotted, []
    for objective in TRAINING_STAGES[stage].objectives if stage in TRAINING_STAGES else ():
        for name in keys_of(objective):
            yield f"objective.{name}", [f"objective.kind={kind_of(objective)}"] if name != "kind" else []


TOP = "model: {path: m}\noutput: o\ndata: {train: x.jsonl}\n"


@pytest.mark.parametrize(
    ("stage", "override", "meant"),
    [
        ("dpo", "beta=0.1", "objective.beta"),
        ("dpo", "loss_type=hinge", "objective.kind"),
        ("dpo", "objective.loss_type=hinge", "objective.kind"),
        ("dpo", "rpo_alpha=1", "objective.sft_weight"),
        ("dpo", "objective.label_smothing=0.1", "objective.label_smoothing"),
        ("dpo", "objective.gama=0.1", "objective.gamma"),  # of another kind: there is no nearer one
        ("dpo", "ref_model=m", "reference.model"),
        ("dpo", "precompute_ref_log_probs=true", "reference.cache"),
        ("dpo", "refrence.cache=false", "reference"),
        ("kto", "desirable_weight=2", "objective.lambda_d"),
        ("train-rm", "center_rewards_coefficient=0.1", "objective.center_coef"),
        ("dpo", "max_completion_length=64", "rollout.max_new_tokens"),
    ],
)
def test_names_that_people_bring_along(tmp_path: Path, stage: str, override: str, meant: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TOP)
    with pytest.raises(UsageError) as caught:
        load_recipe(stage, path, [override])
    name = override.partition("=")[0] if meant != "reference" else "refrence"
    assert str(caught.value) == f"--set {name}: unknown key. did you mean {meant}?"
