"""Small files and tensors of models and runs that are damaged: exit code 2, and the file or the tensor by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.deaths import die_before
from tests.tiny import make_model, rlhf, write_pairs, write_recipe, write_rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run that started from it, one that is half done, and the rows of both."""
    home = tmp_path_factory.mktemp("damaged")
    model, rows = make_model(home / "model"), write_rows(home / "rows.jsonl", 15)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    write_pairs(home / "pairs.jsonl", 15)
    recipe = write_recipe(home / "sft.yaml", model, rows, home / "sft", lora={"r": 4}, train={"steps": 2})
    assert rlhf("sft", recipe) == 0
    with pytest.MonkeyPatch.context() as patch:
        die_before(patch, "optimise", 2)
        assert rlhf("sft", recipe, "--output", home / "half") == 130
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage. Paths in it are still those of the original, but for the ones that the test writes."""
    shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def learn_from(start: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what `rlhf dpo` says, with nothing trained."""
    capsys.readouterr()
    code = rlhf("dpo", write_recipe(Path("dpo.yaml"), Path(start), Path("pairs.jsonl"), Path("dpo")))
    assert not Path("dpo/metrics.jsonl").exists()
    return code, capsys.readouterr().err


SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("content", [b"{garbage", b"", b"[]", b"null", b"7", b"\xff\xfe\x00"])
@pytest.mark.parametrize("file", [*(f"model/{name}" for name in SMALL), "sft/model/adapter_config.json"])
def test_a_settings_file_that_holds_no_object(home: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (home / file).write_bytes(content)
    code, errors = learn_from(str(Path(file).parent), capsys)
    assert code == 2 and f"{file} is damaged" in errors


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model/config.json", {"model_type": "llama", "dtype": "x"}, "model: no tokenizer can be read here: AttributeError"),
        ("model/generation_config.json", {"eos_token_id": "x"}, "model: eos_token_id in generation_config.json is no id"),
        ("model/tokenizer.json", {}, "model: no tokenizer can be read here: "),
        ("sft/model/adapter_config.json", {}, "adapter_config.json does not name the adapter's base_model_name_or_path"),
    ],
)
def test_a_settings_file_that_holds_nonsense(
    home: Path, file: str, content: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / file).write_text(json.dumps(content))
    code, errors = learn_from(str(Path(file).parent), capsys)
    assert code == 2 and said in errors


def change(file: Path, name: str, value: torch.Tensor) -> None:
    save_file(load_file(file) | {name: value}, file, metadata={"format": "pt"})


def test_tensors_of_another_shape(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(home / "model" / "model.safetensors", "model.norm.weight", torch.zeros(7))
    assert "model: model.norm.weight has the shape (7,), config.json asks for (32,)" in learn_from("model", capsys)[1]
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    change(home / "sft" / "model" / "adapter_model.safetensors", name, torch.zeros(3, 5))
    code, errors = learn_from("sft/model", capsys)
    assert code == 2 and f"the adapter does not fit the base model: 1 tensors differ, the first is {name}" in errors


@pytest.mark.parametrize("content", [b"no tensors", b"\x08\0\0\0\0\0\0\0notjson!"])
@pytest.mark.parametrize("file", ["model/model.safetensors", "sft/model/adapter_model.safetensors"])
def test_a_file_of_tensors_that_is_none_is_found_by_check(
    home: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / file).write_bytes(content)
    recipe = write_recipe(Path("dpo.yaml"), Path(file).parent, Path("pairs.jsonl"), Path("dpo"))
    assert rlhf("dpo", recipe, "--check") == 2
    assert f"{file} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.yaml", "inputs.json"])
@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_parent_that_does_not_tell_what_it_held_out(
    home: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "sft" / name).unlink()
    if content is not None:
        (home / "sft" / name).write_bytes(content)
    recipe = write_recipe(Path("dpo.yaml"), Path("sft"), Path("pairs.jsonl"), Path("dpo"))
    assert rlhf("dpo", recipe, "--check") == 0
    assert "warning: sft: what it was trained on and what it held out is not known" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{garbage", "[]", "null", "model: 1", ""])
def test_a_recorded_recipe_that_says_something_else(home: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "half" / "recipe.yaml").write_text(content)
    assert rlhf("sft", "sft.yaml", "--output", "half", "--resume") == 2
    assert "half/recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{garbage", "[]", "null", "7"])
def test_recorded_inputs_that_are_damaged(home: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "half" / "inputs.json").write_text(content)
    assert rlhf("sft", "sft.yaml", "--output", "half", "--resume") == 2
    assert "half/inputs.json is damaged" in capsys.readouterr().err
