"""What the terms of a reward are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cli.sections import Reward


def default_name(reward: Reward) -> str:
    """Under which a term without a name of its own is logged: its model's folder, or its function.

    `runs/quickstart/rm` and `runs/quickstart/rm/model` are rm, its `checkpoints/step-00000100` is rm-step-00000100, the hub's
    `owner/judge` is judge, `my_rewards.py:brevity` is brevity.
    """
    if reward.model is None:
        return (reward.function or "").rpartition(":")[2]
    parts = PurePath(reward.model).parts
    match parts[:-1] if parts[-1:] == ("model",) else parts:
        case [*_, run, "checkpoints", step]:
            return f"{run}-{step}"
        case [*_, folder]:
            return folder
    return "model"


def name_of(reward: Reward) -> str:
    """The name under which a term is logged."""
    return reward.name if reward.name is not None else default_name(reward)


def term_names(rewards: Sequence[Reward]) -> list[str]:
    """The names of all terms, in their order."""
    return [name_of(reward) for reward in rewards]
