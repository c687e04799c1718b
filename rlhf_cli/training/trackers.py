"""Experiment trackers, through accelerate; the offline files are written whether or not there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.recipe.dump import flatten


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker that accelerate does not know, MachineError for one that is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"trackers: {name} is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if missing := [name for name in names if not filter_trackers([name], logging_dir=".")]:
        raise MachineError(f"trackers: {', '.join(missing)} is not installed\npip install {' '.join(missing)}, or take it out")


def start_trackers(recipe: Any, folder: Path) -> Any:
    """An accelerator that logs to the recipe's trackers, with the recipe's values as their configuration; None without any."""
    if not recipe.trackers:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.trackers), project_dir=str(folder))
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flatten(recipe).items()}
    accelerator.init_trackers("rlhf", config=config)
    return accelerator
