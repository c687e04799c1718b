"""What the stages ask of rows."""

from __future__ import annotations

from typing import Any

from rlhf_cli.data.formats import Purpose
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.recipe.stages import ROW_USES


def purpose_of(stage: str) -> Purpose:
    return Purpose(stage, ROW_USES[stage], ROW_USES)


def request_of(stage: str, seed: int = 0, **asked: Any) -> RowRequest:
    return RowRequest(purpose_of(stage), seed, **asked)
