"""Experiment trackers, through accelerate; the offline files are written whether or not there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.recipe.dump import flatten


class Trackers:
    """The recipe's trackers on rank 0, none elsewhere."""

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._accelerator is not None:
            self._accelerator.log(metrics, step=step)

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a tracker that accelerate does not know, MachineError for one that is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import LoggerType

    known = {
        str(kind.value): kind for kind in LoggerType if kind in LOGGER_TYPE_TO_CLASS or str(kind.value) in LOGGER_TYPE_TO_CLASS
    }
    for name in names:
        if name not in known:
            raise UsageError(f"trackers: {name} is not one of {', '.join(sorted(known))}")
    from accelerate.tracking import filter_trackers

    if missing := [name for name in names if not filter_trackers([name], logging_dir=".")]:
        raise MachineError(f"trackers: {', '.join(missing)} is not installed\npip install {' '.join(missing)}, or take it out")


def start_trackers(recipe: Any, folder: Path, main: bool) -> Trackers:
    """Start the recipe's trackers with the recipe's values as their configuration."""
    if not recipe.trackers or not main:
        return Trackers()
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.trackers), project_dir=str(folder))
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flatten(recipe).items()}
    accelerator.init_trackers("rlhf", config=config)
    return Trackers(accelerator)
