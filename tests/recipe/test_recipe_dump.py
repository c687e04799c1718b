"""A dumped recipe reads back equal, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.dump import differences, dump_recipe, flatten, refuse_changes
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.recipe.recipes import SftRecipe
from rlhf_cli.sections import KeepBest, Lora, Model, SftData, Source, StopRule, Train

PLAIN = SftRecipe(model=Model("m"), data=SftData([Source("x.jsonl")]), output="o")
FULL = SftRecipe(
    model=Model("m", revision="1e5", dtype="float32", quantize="4bit", chat_template="null"),
    data=SftData(
        [Source("x.jsonl", columns={"prompt": "yes", "completion": "0x1"}), Source("ns/set", name="on", weight=2.5)],
        eval=[Source("e")],
    ),
    output="öl: #1 'a' \"b\"",
    lora=Lora(r=8, alpha=1e-05, target_modules=["q", "010"]),
    train=Train(
        steps=7,
        learning_rate=1e-05,
        weight_decay=1e22,
        betas=(0.5, 1e-7),
        tokens_per_device=512,
        eval_every=None,
        keep_best=KeepBest("loss", "min"),
        stop_if={"grad_norm": StopRule(above=20.0), "loss": StopRule(falls=0.1)},
    ),
    seed=2**32 - 1,
    trackers=["wandb", "no"],
)


def reread(folder: Path, text: str) -> SftRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe("sft", path).recipe


@pytest.mark.parametrize("recipe", [PLAIN, FULL, dataclasses.replace(PLAIN, lora=None)])
def test_round_trip(tmp_path: Path, recipe: SftRecipe) -> None:
    text = dump_recipe(recipe, "sft")
    again = reread(tmp_path, text)
    assert again == recipe
    assert type(again.train.betas) is tuple
    assert dump_recipe(again, "sft") == text


@pytest.mark.slow
def test_round_trip_of_odd_text_and_numbers(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabet = "aZ019 _-+.:#,[]{}&*!|>'\"%@`~\\/?=\n\té\u0085\u2028\ufeff日😀e"
    for _ in range(300):
        word = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))
        number = rng.choice([rng.random(), 10 ** rng.uniform(-30, 30), float(rng.randrange(10**6))])
        recipe = dataclasses.replace(
            PLAIN,
            model=Model("m", revision=word),
            trackers=[word, "1e5"],
            train=Train(learning_rate=number, stop_if={"loss": StopRule(above=-number)}),
        )
        assert reread(tmp_path, dump_recipe(recipe, "sft")) == recipe


def test_dump_says_every_key() -> None:
    text = dump_recipe(PLAIN, "sft")
    assert "  learning_rate: null\n" in text
    assert "  betas: [0.9, 0.999]\n" in text
    assert "learning_rate: 1.0e-05\n" in dump_recipe(FULL, "sft")
    assert text.startswith("# every value in force; `rlhf sft THIS --output OTHER` repeats the run\nmodel:\n  path: m\n")


def test_flatten() -> None:
    flat = flatten(FULL)
    assert flat["data.train.1.weight"] == 2.5
    assert flat["train.betas"] == [0.5, 1e-7]
    assert flat["train.stop_if.grad_norm.above"] == 20.0
    assert flat["lora.target_modules"] == ["q", "010"]
    assert flatten(PLAIN)["lora"] == "auto"
    assert flatten(PLAIN)["train.stop_if"] == {}


def changed(**train: object) -> SftRecipe:
    return dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, **train))  # type: ignore[arg-type]


def test_differences() -> None:
    old = dump_recipe(PLAIN, "sft")
    assert differences(old, PLAIN) == []
    assert differences(old, changed(batch_size=4, learning_rate=1e-05)) == [
        ("train.batch_size", 32, 4),
        ("train.learning_rate", None, 1e-05),
    ]
    assert differences(old, dataclasses.replace(PLAIN, lora=Lora()))[-1] == ("lora", "auto", None)
    with pytest.raises(UsageError, match=r"^the earlier run's recipe\.yaml cannot be read, line 1: a tab where"):
        differences("a:\tb", PLAIN)


def test_what_a_resumed_run_may_change() -> None:
    old = dump_recipe(changed(steps=10), "sft")
    may = changed(
        steps=20,
        log_every=5,
        eval_every=3.0,
        save_every=None,
        keep_checkpoints=9,
        keep_best=KeepBest("loss", "min"),
        stop_if={"a": StopRule(above=1.0)},
        tokens_per_device=99,
    )
    refuse_changes(old, dataclasses.replace(may, trackers=["wandb"], output="p"))


def test_a_key_that_an_older_release_did_not_know_had_its_default() -> None:
    new = changed()
    old = "".join(line for line in dump_recipe(new, "sft").splitlines(True) if "ignore:" not in line and "shuffle:" not in line)
    assert differences(old, new) == []
    other = dataclasses.replace(new, data=SftData([dataclasses.replace(new.data.train[0], ignore=["a"])], shuffle=False))
    assert [row[0] for row in differences(old, other)] == ["data.train.0.ignore", "data.shuffle"]


def test_what_a_resumed_run_may_not_change() -> None:
    old = dump_recipe(changed(steps=10), "sft")
    new = dataclasses.replace(changed(steps=9, learning_rate=1e-05), seed=3, data=SftData([Source("x.jsonl"), Source("y")]))
    with pytest.raises(UsageError) as caught:
        refuse_changes(old, new, "runs/a/recipe.yaml")
    assert str(caught.value).splitlines() == [
        "--resume: 9 values differ from runs/a/recipe.yaml and may not. put them back, or start another run with --output",
        "  key                   old   new",
        "  data.train.1.path     null  y",
        "  data.train.1.split    null  train",
        "  data.train.1.format   null  auto",
        "  data.train.1.columns  null  {}",
        "  data.train.1.ignore   null  []",
        "  data.train.1.weight   null  1.0",
        "  train.steps           10    9",
        "  train.learning_rate   null  1.0e-05",
        "  seed                  0     3",
    ]
