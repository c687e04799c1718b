"""Make the arithmetic task's data and its untrained model: everything that `rlhf sft recipes/arithmetic/sft.yaml` needs.

    python scripts/make_arithmetic.py [--seed N] [--data DIR] [--model DIR]

The prompts are all 10,000 sums of four digits, such as 7+0+9+4. The same seed gives the same bytes.

sft.jsonl           sums with their results; few enough that a model learns what an answer looks like, and roughly how large it is
prompts.jsonl       sums with the right result in the column `answer`, for rewards that compare
eval_prompts.jsonl  the same, of sums that occur nowhere else
solver.jsonl        sums with their solutions, a line a step: 7+0=7, 7+9=16, 16+4=20
steps.jsonl         solutions with slips, and of each step whether it and all before it are those of the right solution
outcome.jsonl       the same solutions, each as one step that is right if its result is
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from make_quickstart import make_task, write_jsonl

VOCABULARY = 5 + 256  # control tokens and bytes: no merges, so that each digit is a token


class Sizes(NamedTuple):
    """Rows per file."""

    sft: int = 4000
    prompts: int = 3000
    eval_prompts: int = 256
    solver: int = 4000
    steps: int = 8000


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write the files; each has its own random stream, so that one's size does not change another's rows."""
    sums = list(itertools.product(range(10), repeat=4))
    Random(f"{seed}/sums").shuffle(sums)
    held, rest = sums[: sizes.eval_prompts], sums[sizes.eval_prompts :]

    def rows(own: list[tuple[int, ...]], answer: str, kind: type) -> list[dict[str, Any]]:
        return [{"prompt": "+".join(map(str, digits)), answer: kind(sum(digits))} for digits in own]

    write_jsonl(folder / "sft.jsonl", rows(Random(f"{seed}/sft").sample(rest, sizes.sft), "completion", str))
    write_jsonl(folder / "prompts.jsonl", rows(Random(f"{seed}/prompts").sample(rest, sizes.prompts), "answer", int))
    write_jsonl(folder / "eval_prompts.jsonl", rows(held, "answer", int))
    solved = [(digits, solution(digits)) for digits in Random(f"{seed}/solver").sample(rest, sizes.solver)]
    write_jsonl(folder / "solver.jsonl", [{"prompt": "+".join(map(str, d)), "completion": "\n".join(own)} for d, own in solved])
    random = Random(f"{seed}/steps")
    judged = [judge(digits, slipping(digits, random)) for digits in random.sample(rest, sizes.steps)]
    write_jsonl(folder / "steps.jsonl", [{name: row[name] for name in ("prompt", "steps", "labels")} for row in judged])
    whole = [{"prompt": row["prompt"], "steps": ["\n".join(row["steps"])], "labels": [row["right"]]} for row in judged]
    write_jsonl(folder / "outcome.jsonl", whole)


SLIPS = 0.2  # of the steps


def solution(digits: tuple[int, ...]) -> list[str]:
    """The right steps: each adds one digit to what there is."""
    sums = list(itertools.accumulate(digits))
    return [f"{before}+{digit}={after}" for before, digit, after in zip(sums, digits[1:], sums[1:], strict=False)]


def slipping(digits: tuple[int, ...], random: Random) -> list[str]:
    """Steps as somebody writes them who goes on from what is there, and now and then slips: a wild result, a near one, or another
    digit. What is wild is soonest told, and teaches to compare."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        after, shown = total + digit, digit
        if random.random() < SLIPS:
            kind = random.choice(("wild", "wild", "near", "digit"))
            if kind == "digit":
                shown = random.choice([other for other in range(10) if other != digit])
            near = [total + shown + by for by in (-10, -2, -1, 1, 2, 10) if total + shown + by >= 0]
            after = {"wild": random.randrange(37), "near": random.choice(near), "digit": total + shown}[kind]
        steps.append(f"{total}+{shown}={after}")
        total = after
    return steps


def judge(digits: tuple[int, ...], steps: list[str]) -> dict[str, Any]:
    """The steps with their labels, and whether the result is right, which two slips together may make it."""
    right = [own == other for own, other in zip(steps, solution(digits), strict=True)]
    labels = list(itertools.accumulate(right, lambda before, own: before and own))
    result = steps[-1].rpartition("=")[2] == str(sum(digits))
    return {"prompt": "+".join(map(str, digits)), "steps": steps, "labels": labels, "right": result}


def main() -> None:
    """Parse the command line and make both folders."""
    shape = {"hidden": 96, "inner": 256, "layers": 3, "heads": 3}
    make_task("arithmetic", lambda work, seed: make_data(work, seed, Sizes()), VOCABULARY, **shape)


if __name__ == "__main__":
    main()
