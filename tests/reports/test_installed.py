"""What is built of the package has what its pages are made of."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_template_and_the_style_are_in_a_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "rlhf_cli", source / "rlhf_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        named = set(built.namelist())
        own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_cli").rglob("*.*") if "__pycache__" not in path.parts}
        assert {"rlhf_cli/reports/page.html.jinja", "rlhf_cli/reports/page.css"} <= own <= named
