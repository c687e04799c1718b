"""`rlhf sft`: supervised fine-tuning, read from the top as it happens."""

from __future__ import annotations

from rlhf_cli.recipe.load import Loaded
from rlhf_cli.stages.prepare import prepare_job
from rlhf_cli.stages.training import finish_job, load_job, open_job, train_job


def run(loaded: Loaded, *, check: bool, resume: bool, force: bool) -> None:
    """Train the recipe's policy on the responses of its data.

    RunError: with its exit code; with exit code 2 nothing was trained or changed.
    """
    job = prepare_job(loaded, check=check, resume=resume)
    with open_job(job, check=check, resume=resume, force=force) as folder:
        if folder is None:
            return
        backbone, base = load_job(job)
        trainer = train_job(job, folder, backbone)
        finish_job(job, folder, trainer, base)
