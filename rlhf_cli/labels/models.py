"""Which responses are better, by a language model: every pair in both orders."""

from __future__ import annotations

import time
from collections.abc import Callable

from rlhf_cli.data.records import prompt_lines, spoken
from rlhf_cli.judges.asking import UPDATES
from rlhf_cli.judges.judge import Judge, compare
from rlhf_cli.judges.question import Question
from rlhf_cli.labels.verdicts import Judging, Verdict, now
from rlhf_cli.models.load import load_config, resolve_dtype
from rlhf_cli.models.memory import auto_budget, estimate
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.labels import LabelRecipe
from rlhf_cli.runs.parents import Start
from rlhf_cli.sections import Model

TOGETHER = 64
"""Pairs that are asked about before their verdicts are written; an endpoint's answers are kept one by one beside them."""
VERDICTS = {1.0: "a", 0.5: "tie", 0.0: "b"}


def judge_by_model(judging: Judging, name: str, judge: Judge, say: Callable[[int, int], None]) -> None:
    """Ask about the pairs that are open. RunError: there is no answer; what was said before is written down."""
    left = judging.left(name)
    for start in range(0, len(left), TOGETHER):
        some, since = left[start : start + TOGETHER], time.monotonic()
        questions = [
            Question(prompt_lines(row.prompt), *(spoken(row.responses[number]) for number in order)) for row, order in some
        ]
        found = compare(judge, questions)
        took = round((time.monotonic() - since) / len(some), 4)
        for at, (row, order) in enumerate(some):
            drawn = [each.principle for each in judge.wording.drawn(questions[at])] if judge.wording.principles else []
            line = Verdict(
                row=row.number,
                order=[*order],
                verdict=VERDICTS[float(found.outcomes[at])],
                p=float(found.probability[at]),
                annotator=name,
                seconds=took,
                time=now(),
                hash=row.hash,
                first=found.first[:, at].tolist(),
                principles=drawn,
            )
            judging.add(line)
        done = start + len(some)
        if done == len(left) or done * UPDATES // len(left) > start * UPDATES // len(left):
            say(done, len(left))


def budget(recipe: LabelRecipe, start: Start) -> int:
    """Tokens of one forward pass of a model."""
    if recipe.tokens_per_device != "auto":
        return recipe.tokens_per_device
    device, trust = Ranks(expected=False).device, recipe.trust_remote_code
    config, dtype = load_config(start.base, start.revision, trust), resolve_dtype(recipe.dtype, device)
    memory = estimate(config, Model("", trust_remote_code=trust), rank=1, dtype=dtype)
    return auto_budget(memory, 1, device)  # what is longer has a pass of its own
