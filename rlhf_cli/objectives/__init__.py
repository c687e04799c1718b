"""The losses, one file each."""

from __future__ import annotations

from rlhf_cli.objectives.bandit import Bandit
from rlhf_cli.objectives.base import Objective
from rlhf_cli.objectives.bco import Bco, UnpairedBco
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.cal_dpo import CalDpo
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.grpo import Grpo
from rlhf_cli.objectives.hinge import Hinge
from rlhf_cli.objectives.ipo import Ipo
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.odpo import Odpo
from rlhf_cli.objectives.orpo import Orpo
from rlhf_cli.objectives.pairs import AllPairs
from rlhf_cli.objectives.plackett_luce import PlackettLuce, PlackettLuceReward
from rlhf_cli.objectives.ppo import Ppo
from rlhf_cli.objectives.rebel import Rebel
from rlhf_cli.objectives.reinforce import Reinforce
from rlhf_cli.objectives.rloo import Rloo
from rlhf_cli.objectives.robust import Robust
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.objectives.simpo import Simpo
from rlhf_cli.objectives.slic import Slic
from rlhf_cli.objectives.squared import Squared

OBJECTIVES: dict[str, tuple[type[Objective], ...]] = {
    "sft": (Sft,),
    "train-rm": (BradleyTerry, PlackettLuceReward, AllPairs),
    "dpo": (Dpo, Robust, Hinge, Squared, Slic, Simpo, Orpo, Odpo, CalDpo, Rebel, Bco, PlackettLuce),
    "ipo": (Ipo,),
    "kto": (Kto, UnpairedBco),
    "ppo": (Ppo, Reinforce, Rloo, Grpo, Bandit),
}
"""Stage → its kinds, the default first."""
