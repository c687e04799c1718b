"""The path that a mistyped one most likely stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.data.hub import read_hub
from rlhf_cli.errors import UsageError
from rlhf_cli.sections import Rows
from rlhf_cli.suggest import closest_path
from tests.tiny import rlhf, write_recipe, write_rows


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-base").mkdir(parents=True)
    write_rows(tmp_path / "answers.jsonl", 5)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("models/tiny-bas", "models/tiny-base"),
        ("model/tiny_base", "models/tiny-base"),
        ("tiny-base", None),
        ("Qwen/Qwen2.5-0.5B", None),
        ("answer.jsonl", "answers.jsonl"),
        ("./answers", "answers.jsonl"),
    ],
)
def test_every_part_of_a_path_may_be_mistyped(path: str, near: str | None, tmp_path: Path) -> None:
    assert closest_path(path) == near
    assert closest_path(str(tmp_path / path)) == (near and str(tmp_path / near))


def test_a_mistyped_folder_is_no_hub_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start, rows, said in (
        (
            "model/tiny-base",
            "answers.jsonl",
            "model.path: model/tiny-base is not in the cache, or not whole, and HF_HUB_OFFLINE is set",
        ),
        ("models/tiny-bsae", "answers.jsonl", "x.yaml:5: model.path: there is no folder models/tiny-bsae"),
    ):
        recipe = write_recipe(tmp_path / "x.yaml", Path(start), Path(rows), tmp_path / "run")
        assert rlhf("sft", recipe) == 2
        errors = capsys.readouterr().err
        assert said in errors and "did you mean models/tiny-base?" in errors


def test_a_mistyped_folder_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "answers" / "rows").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"^data.train: answrs/rows is not in the cache, .* did you mean answers/rows\?$"):
        list(read_hub(Rows("answrs/rows"), "data.train"))
