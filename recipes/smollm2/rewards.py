"""Two plain rewards for responses, as examples of `reward: [{function: recipes/smollm2/rewards.py:politeness}]`.

A reward function takes the prompts and the responses as two lists and returns a number for each response. A prompt is a text, or
the turns of a dialogue as a list of {"role", "content"}; neither of these looks at it.
"""

from __future__ import annotations

import re
from typing import Any

KIND = frozenset(("please", "thank", "thanks", "sorry", "welcome", "glad", "happy", "appreciate"))
RUDE = frozenset(("stupid", "idiot", "dumb", "shut", "hate", "ugly", "moron", "loser"))
ENOUGH = 2
"""Kind words that count; more of them are no politer."""
SHORT = 20
"""Words that are short enough."""


def politeness(prompts: list[Any], responses: list[str]) -> list[float]:
    """Half a point for each of up to two different kind words, less one for each rude word; −1 … 1."""
    return [_politeness(set(re.findall(r"[a-z]+", response.lower()))) for response in responses]


def _politeness(words: set[str]) -> float:
    return max(-1.0, min(len(words & KIND), ENOUGH) / ENOUGH - len(words & RUDE))


def brevity(prompts: list[Any], responses: list[str]) -> list[float]:
    """1 for a response of up to 20 words, less 0.05 for each word more; 0 for an empty one."""
    counts = [len(response.split()) for response in responses]
    return [max(0.0, 1.0 - 0.05 * max(0, count - SHORT)) if count else 0.0 for count in counts]
