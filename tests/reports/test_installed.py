"""What is built of the package is whole, and runs where nothing else of the project is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.tiny import write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "rlhf_cli", source / "rlhf_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as built:
        named = set(built.namelist())
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_cli").rglob("*.*") if "__pycache__" not in path.parts}
    assert {"rlhf_cli/reports/page.html.jinja", "rlhf_cli/reports/page.css", "rlhf_cli/importing/tables.yaml"} <= own <= named


@pytest.mark.slow
def test_a_wheel_installs_into_an_empty_environment_and_writes_a_recipe(wheel: Path, tmp_path: Path) -> None:
    """The libraries are those of this environment, lent when pip is done: they are too large to be installed for a test."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False)
    python, site = place / "bin/python", next(place.glob("lib/*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    rows = write_rows(tmp_path / "rows.jsonl", 40)

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(str(python), "-c", "import rlhf_cli; print(rlhf_cli.__file__)")
    assert Path(where.strip()).is_relative_to(place)
    run(str(place / "bin/rlhf"), "init", "sft", "mine.yaml", "--data", rows.name)
    assert "format: prompt-completion   # 40 rows" in (tmp_path / "mine.yaml").read_text()
