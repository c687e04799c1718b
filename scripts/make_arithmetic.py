"""Make the arithmetic task's data and its untrained model: everything that `rlhf sft recipes/arithmetic/sft.yaml` needs.

    python scripts/make_arithmetic.py [--seed N] [--data DIR] [--model DIR]

The prompts are all 10,000 sums of four digits, such as 7+0+9+4. The same seed gives the same bytes.

sft.jsonl           sums with their results; few enough that a model learns what an answer looks like, and roughly how large it is
prompts.jsonl       sums with the right result in the column `answer`, for rewards that compare
eval_prompts.jsonl  the same, of sums that occur nowhere else
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from make_quickstart import published, write_jsonl

VOCABULARY = 5 + 256  # control tokens and bytes: no merges, so that each digit is a token


class Sizes(NamedTuple):
    """Rows per file."""

    sft: int = 4000
    prompts: int = 3000
    eval_prompts: int = 256


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write the three files; each has its own random stream, so that one's size does not change another's rows."""
    sums = list(itertools.product(range(10), repeat=4))
    Random(f"{seed}/sums").shuffle(sums)
    held, rest = sums[: sizes.eval_prompts], sums[sizes.eval_prompts :]

    def rows(own: list[tuple[int, ...]], answer: str, kind: type) -> list[dict[str, Any]]:
        return [{"prompt": "+".join(map(str, digits)), answer: kind(sum(digits))} for digits in own]

    write_jsonl(folder / "sft.jsonl", rows(Random(f"{seed}/sft").sample(rest, sizes.sft), "completion", str))
    write_jsonl(folder / "prompts.jsonl", rows(Random(f"{seed}/prompts").sample(rest, sizes.prompts), "answer", int))
    write_jsonl(folder / "eval_prompts.jsonl", rows(held, "answer", int))


def main() -> None:
    """Parse the command line and make both folders."""
    parser = argparse.ArgumentParser(description="Make the arithmetic task's data and its untrained model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/arithmetic"))
    parser.add_argument("--model", type=Path, default=Path("models/arithmetic-base"))
    options = parser.parse_args()
    with published(options.data) as work:
        make_data(work, options.seed, Sizes())
    from quickstart_model import make_model  # torch loads here, so that --help is quick

    with published(options.model) as work:
        make_model(work, options.data, options.seed, VOCABULARY, hidden=96, inner=256, layers=3, heads=3)
    print(f"{options.data}: " + ", ".join(sorted(path.name for path in options.data.iterdir())))
    print(f"{options.model}: an untrained Llama and its tokenizer")


if __name__ == "__main__":
    main()
