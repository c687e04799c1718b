"""What every command needs, imported once: the process that ranks are forked from imports this first."""

from __future__ import annotations

from importlib import import_module

import pytest

from rlhf_cli.recipe.stages import STAGES
from tests.brief import be_brief

for stage in STAGES.values():
    import_module(stage.module)
be_brief(pytest.MonkeyPatch())
