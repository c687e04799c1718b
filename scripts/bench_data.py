"""What reading, checking and tokenising many rows costs: the first time, and when the same file was read before.

    python scripts/bench_data.py --model FOLDER [--rows 1000000] [--out bench-out]

Makes a file of conversations of 13 to 50 words, about 60 tokens with the template, and runs `rlhf sft --check` on it twice: with
an empty cache, and with the one that the first run left. FOLDER is a transformers folder, whose tokenizer and chat template are
used. Prints CPU seconds and the peak of resident memory of each whole command; both count all its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "her",
    "all",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "more",
    "no",
    "if",
    "out",
    "so",
    "said",
    "what",
    "up",
    "its",
    "about",
    "into",
    "than",
    "them",
    "can",
    "only",
    "other",
    "new",
    "some",
    "could",
    "time",
    "these",
    "two",
    "may",
    "then",
    "do",
    "first",
    "any",
    "my",
    "now",
    "such",
    "like",
    "our",
    "over",
    "man",
    "me",
    "even",
    "most",
    "made",
    "after",
    "also",
    "did",
    "many",
    "before",
    "must",
    "through",
    "back",
    "years",
    "where",
    "much",
    "your",
    "way",
    "well",
    "down",
    "should",
    "because",
    "each",
    "just",
    "those",
    "people",
    "how",
    "too",
    "little",
    "state",
    "good",
]
HELD_OUT = 0.01


def write_rows(path: Path, count: int) -> None:
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked, said = (
                " ".join(WORDS[k] for k in random.integers(0, len(WORDS), random.integers(8, top))) for top in (31, 51)
            )
            turns = [{"role": "user", "content": f"{asked} {i}?"}, {"role": "assistant", "content": f"{said.capitalize()}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def check(recipe: Path, cache: Path) -> dict[str, float]:
    """CPU seconds, seconds and peak memory (MiB) of one `--check`."""
    started = time.monotonic()
    environment = os.environ | {"RLHF_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rlhf_cli", "sft", str(recipe), "--check"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit {os.waitstatus_to_exitcode(status)}")
    spent = used.ru_utime + used.ru_stime
    return {"cpu_s": round(spent, 1), "s": round(time.monotonic() - started, 1), "peak_mib": round(used.ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_rows(home / "rows.jsonl", options.rows)
        data = {"train": str(home / "rows.jsonl"), "holdout": HELD_OUT, "max_length": 512}
        recipe = {"model": {"path": options.model}, "data": data, "output": str(home / "run")}
        (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        found = {name: check(home / "recipe.yaml", home / "cache") for name in ("first", "again")}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "data.json").write_text(json.dumps({"rows": options.rows, **found}, indent=2) + "\n")
    print(f"| {options.rows:,} rows | CPU s | s | peak MiB |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {values['cpu_s']} | {values['s']} | {values['peak_mib']:,} |")


if __name__ == "__main__":
    main()
