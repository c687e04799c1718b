"""Make the cycle's data and its untrained model: everything that `rlhf sft recipes/cycle/sft.yaml` needs.

    python scripts/make_cycle.py [--seed N] [--data DIR] [--model DIR]

Prompts ask for a thing; responses have one of three styles, and recipes/cycle/gold.py says what people prefer. The same seed
gives the same bytes.

sft.jsonl            responses of all three styles, brief ones being the most frequent and exact ones the least
brief.jsonl, warm.jsonl, exact.jsonl   responses of one style: who always answers so, to see what others lose against it
pairs.jsonl          two responses, drawn as those of sft.jsonl are, in the order that people said
prompts.jsonl        prompts alone; eval_prompts.jsonl: prompts that occur nowhere else
"""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from make_quickstart import make_task, write_jsonl

GOLD = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "cycle" / "gold.py"))
chance: Callable[[str, str], float] = GOLD["chance"]
DESCRIBING: list[str] = sorted(GOLD["DESCRIBING"])

THINGS = {
    "fruit": ("plum", "pear", "apple", "grape", "lemon", "peach", "cherry", "melon"),
    "tool": ("hammer", "saw", "drill", "spade", "rake", "axe", "file", "brush"),
    "bird": ("owl", "hen", "gull", "duck", "crow", "swan", "hawk", "dove"),
}
ASKING = ("Name a {}.", "I want a {}.", "Tell me a {}.", "A {}?", "Say a {}.", "Think of a {}.")
WHO = ("Ann", "Bo", "Carl", "Dora", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea", "Max", "Nora", "Otto", "Pia")
SHARES = {"brief": 0.5, "warm": 0.3, "exact": 0.2}
VOCABULARY = 512


class Sizes(NamedTuple):
    """Rows per file."""

    sft: int = 3000
    pure: int = 600
    pairs: int = 3000
    eval_prompts: int = 96


def answer(random: Random, kind: str, style: str) -> str:
    """A response about a thing of this kind."""
    thing, (one, other) = random.choice(THINGS[kind]), random.sample(DESCRIBING, 2)
    texts = {
        "brief": f"{thing.capitalize()}, dear.",
        "warm": f"{one.capitalize()} {thing}, my dear friend.",
        "exact": f"{one.capitalize()} {thing}, {other} thing.",
    }
    return texts[style]


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write all files; each has its own random stream, so that one's size does not change another's rows."""
    prompts = [(f"{who}: {asking.format(kind)}", kind) for who, asking, kind in itertools.product(WHO, ASKING, THINGS)]
    Random(f"{seed}/prompts").shuffle(prompts)
    held, rest = prompts[: sizes.eval_prompts], prompts[sizes.eval_prompts :]

    def drawn(random: Random, kind: str) -> str:
        return answer(random, kind, random.choices(list(SHARES), [*SHARES.values()])[0])

    def rows(name: str, count: int, make: Callable[[Random, str], dict[str, Any]]) -> None:
        random, found = Random(f"{seed}/{name}"), []
        for _ in range(count):
            prompt, kind = random.choice(rest)
            found.append({"prompt": prompt, **make(random, kind)})
        write_jsonl(folder / f"{name}.jsonl", found)

    def pair(random: Random, kind: str) -> dict[str, Any]:
        one, other = drawn(random, kind), drawn(random, kind)
        better, worse = (one, other) if random.random() < chance(one, other) else (other, one)
        return {"chosen": better, "rejected": worse}

    rows("sft", sizes.sft, lambda random, kind: {"completion": drawn(random, kind)})
    for style in SHARES:
        rows(style, sizes.pure, lambda random, kind, style=style: {"completion": answer(random, kind, style)})
    rows("pairs", sizes.pairs, pair)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in rest])
    write_jsonl(folder / "eval_prompts.jsonl", [{"prompt": prompt} for prompt, _ in held])


def main() -> None:
    """Parse the command line and make both folders."""
    shape = {"hidden": 96, "inner": 256, "layers": 3, "heads": 3}
    make_task("cycle", lambda work, seed: make_data(work, seed, Sizes()), VOCABULARY, **shape)


if __name__ == "__main__":
    main()
