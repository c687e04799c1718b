"""Experiment trackers, through accelerate; the offline files are written whether or not there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.recipe.dump import flatten
from rlhf_cli.sections import Tracker

NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "comet_ml": "experiment_name", "swanlab": "experiment_name"}
"""Tracker → what it calls the name of a run, where it takes one."""


def check_trackers(names: Sequence[str] | Mapping[str, Tracker]) -> None:
    """Raises UsageError for a tracker that accelerate does not know, MachineError for one that is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"trackers: {name} is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if isinstance(names, Mapping):
        if unnamed := [name for name, own in names.items() if own.name is not None and name not in NAMES]:
            raise UsageError(f"trackers.{unnamed[0]}.name: {unnamed[0]} takes no name of a run; remove it")
        if len({own.project for own in names.values()}) > 1:
            raise UsageError("trackers: all of them get one project; give each the same")
    if missing := [name for name in names if not filter_trackers([name], logging_dir=".")]:
        raise MachineError(f"trackers: {', '.join(missing)} is not installed\npip install {' '.join(missing)}, or take it out")


def start_trackers(recipe: Any, folder: Path) -> Any:
    """An accelerator that logs to the recipe's trackers, with the recipe's values as their configuration; None without any."""
    if not recipe.trackers:
        return None
    from accelerate import Accelerator

    settings: dict[str, Tracker] = recipe.trackers if isinstance(recipe.trackers, dict) else {}
    accelerator = Accelerator(log_with=list(recipe.trackers), project_dir=str(folder))
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in flatten(recipe).items()}
    project = next((own.project for own in settings.values()), Tracker().project)
    named = {tracker: {NAMES[tracker]: own.name} for tracker, own in settings.items() if own.name is not None}
    accelerator.init_trackers(project, config=config, init_kwargs=named)
    return accelerator
