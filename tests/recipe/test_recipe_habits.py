"""What people bring along from other trainers: names, values and commands, each answered with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.load import load_recipe

PLAIN = "model: {path: m}\noutput: runs/a\ndata: {train: x.jsonl}\n"
PRODUCT = "write the product: rows of a device × accumulation steps × devices"


def refused(tmp_path: Path, *given: str, stage: str = "dpo") -> str:
    (tmp_path / "r.yaml").write_text(PLAIN)
    with pytest.raises(UsageError) as error:
        load_recipe(stage, tmp_path / "r.yaml", given)
    return str(error.value).removeprefix("--set ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("train.learning_rate=0,001", "train.learning_rate: expected a number or null, found the text '0,001'. write 0.001"),
        ("train.learning_rate=1,5", "train.learning_rate: expected a number or null, found the text '1,5'. write 1.5"),
        ("data.max_length=1,024", "data.max_length: expected a whole number, found the text '1,024'. write 1024"),
        ("data.max_length=10_000", "data.max_length: expected a whole number, found the text '10_000'. write 10000"),
        ("lora=false", "lora: expected keys (r, alpha, dropout, …) or auto or null, found false. write null"),
        ("train.micro_batch_size=4", f"train.micro_batch_size: unknown key. did you mean train.batch_size? {PRODUCT}"),
        (
            "train.per_device_train_batch_size=4",
            f"train.per_device_train_batch_size: unknown key. did you mean train.batch_size? {PRODUCT}",
        ),
        ("train.log_level=info", "train.log_level: unknown key. what is said cannot be chosen; train.log_every says how often"),
    ],
)
def test_numbers_and_names(given: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, given) == message


@pytest.mark.parametrize(
    ("given", "write"),
    [
        ("model.attention=flash_attention_2", "flash"),
        ("model.dtype=bf16", "bfloat16"),
        ("train.optimizer=adamw_torch_fused", "adamw"),
        ("train.optimizer=paged_adamw_8bit", "adamw_8bit"),
        ("train.schedule=constant_with_warmup", "constant, with train.warmup"),
        ("objective.kind=sigmoid", "dpo"),
        ("objective.kind=nca_pair", "nca"),
        ("objective.kind=aot_unpaired", "aot, with pairing: unpaired"),
        ("trackers=none", "[]"),
    ],
)
def test_values(given: str, write: str, tmp_path: Path) -> None:
    assert refused(tmp_path, given).endswith(f". write {write}")


def test_a_kind_of_another_command(tmp_path: Path) -> None:
    assert refused(tmp_path, "objective.kind=ipo").endswith(". ipo is a kind of rlhf ipo")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("grpo", "rlhf ppo has it: objective.kind: grpo"),
        ("simpo", "rlhf dpo has it: objective.kind: simpo"),
        ("reward", "rlhf train-rm"),
        ("merge", "rlhf export RUN DEST --merge merges an adapter"),
        ("evaluate", "did you mean eval?"),
    ],
)
def test_commands(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "r.yaml"]) == 2
    assert capsys.readouterr().err == f"error: rlhf {word}: no such command. {hint}\n"


@pytest.mark.parametrize(
    "given", ["objective.eta=null", "reward=null", "ptx=null", "value=null", "objective.gamma=1", "objective.lambda=0.1"]
)
def test_nothing_is_never_without_effect(given: str, tmp_path: Path) -> None:
    """A key that says null, or what it says by default under another kind, asks for nothing."""
    (tmp_path / "r.yaml").write_text(PLAIN)
    assert load_recipe("dpo", tmp_path / "r.yaml", [given]).recipe.stage == "dpo"
