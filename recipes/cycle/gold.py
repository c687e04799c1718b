"""The preferences of the cycle: of two responses people take the one that is better in two of three respects: nothing is best.

People ask for a fruit, a tool or a bird, and look at three things:

brevity  the fewer words the better
warmth   how many kind words there are
detail   how many words describe the thing

The data have three styles, (3, 2, 1), (1, 3, 2) and (2, 1, 3) in these, 3 being best: a warm response is preferred to a brief
one, an exact one to a warm one, and a brief one to an exact one. Rock, paper, scissors. Nobody minds which thing is named.
"""

from __future__ import annotations

from itertools import groupby

KIND = {"dear", "friend", "please", "love"}
DESCRIBING = {"ripe", "fresh", "small", "big", "old", "new", "red", "green", "fine", "strong"}
SURE = 0.9
"""How often people take the response that is better in more respects; else they take the other one."""


def respects(response: str) -> tuple[int, int, int]:
    """Brevity, warmth and detail, more being better."""
    words = [word.strip(".,:;!?").lower() for word in response.split()]
    return -len(words), sum(word in KIND for word in words), sum(word in DESCRIBING for word in words)


def chance(one: str, other: str) -> float:
    """The probability that the one is preferred to the other; ½ where each is better in as many respects."""
    lead = sum((a > b) - (a < b) for a, b in zip(respects(one), respects(other), strict=True))
    return 0.5 if lead == 0 else SURE if lead > 0 else 1 - SURE


def beats(prompts: list[str], responses: list[str]) -> list[float]:
    """Of every response the mean probability to be preferred to the others of its prompt, which stand beside each other."""
    found = []
    for _, places in groupby(range(len(prompts)), lambda at: prompts[at]):
        own = [responses[at] for at in places]
        found += [
            sum(chance(each, other) for k, other in enumerate(own) if k != at) / (len(own) - 1) for at, each in enumerate(own)
        ]
    return found


def style(response: str) -> str | None:
    """Which of the three styles it has, as the data's do; None: another."""
    brevity, warmth, detail = respects(response)
    return {(-2, 1, 0): "brief", (-5, 2, 1): "warm", (-4, 0, 2): "exact"}.get((brevity, warmth, detail))
