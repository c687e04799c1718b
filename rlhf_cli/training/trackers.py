"""Experiment trackers, through accelerate; the offline files are written whether or not there are any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError
from rlhf_cli.recipe.dump import flatten

Track = Callable[[dict[str, float], int], None]


def start_trackers(recipe: Any, folder: Path, main: bool) -> Track:
    """A function that logs metrics at a step to every tracker of the recipe.

    Raises:
        MachineError: a tracker is unknown or not installed.
    """
    if not recipe.trackers or not main:
        return lambda metrics, step: None
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=list(recipe.trackers), project_dir=str(folder))
        accelerator.init_trackers(
            "rlhf", config={k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(recipe).items()}
        )
    except (ValueError, ImportError) as error:
        raise MachineError(
            f"trackers: {str(error).splitlines()[0]}\ninstall it, e.g. pip install 'rlhf-cli[tensorboard]'"
        ) from error
    started = {str(t.name) for t in accelerator.trackers}
    if missing := set(recipe.trackers) - started:
        raise MachineError(
            f"trackers: {', '.join(sorted(missing))} cannot be started; is it installed? pip install 'rlhf-cli[tensorboard]'"
        )

    def track(metrics: dict[str, float], step: int) -> None:
        accelerator.log(metrics, step=step)

    return track
