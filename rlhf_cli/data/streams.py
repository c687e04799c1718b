"""Every random stream of a run. What is random in a step depends on the seed and the step alone, so there is no state to save."""

from __future__ import annotations

import hashlib
from enum import Enum, IntEnum


class Stream(Enum):
    """What draws random numbers while a run trains, and how many numbers tell its draws apart beside the run's seed."""

    DROPOUT = "dropout", 3  # step, update of the step, rank
    UPDATES = "updates", 1  # step: how its batch is dealt to its updates
    ROLLOUT = "rollout", 1  # the step that responses are drawn before
    REDRAW = "redraw", 2  # that step, and the round: prompts that replace those whose responses all score alike
    EXPLORE = "explore", 1  # the step before which the reference draws responses
    MISMATCHES = "mismatches", 2  # that step, and the one that learns from them: responses that KTO compares
    HELD_OUT = "held-out", 0
    PROBE = "probe", 0  # responses that the start is checked with

    def encode(self, seed: int, *numbers: int) -> bytes:
        """None begins another one, of the same stream or of another."""
        name, count = self.value
        if len(numbers) != count:
            raise ValueError(f"the stream {name} is told apart by {count} numbers, not {len(numbers)}")
        return f"{name}:{','.join(map(str, (seed, *numbers)))};".encode()

    def seed(self, seed: int, *numbers: int) -> int:
        """63 bits. `seed`: the run's."""
        digest = hashlib.blake2b(self.encode(seed, *numbers), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class DataStream(IntEnum):
    """What draws random numbers while data are read: the second number, after the run's seed, of a numpy generator's seed."""

    EPOCH = 1  # then the epoch: the order of its rows
    SOURCE = 2  # then the source and how often it was gone through
    MISMATCHES = 3
    MEMBER = 4  # of an ensemble, then which: its seed
    BOOTSTRAP = 5  # the prompts that a member of an ensemble learns from
