"""Discriminator-guided dpo (D2PO, Singhal et al. 2024) on the quickstart: what is a gold label worth, and which ones?

    python scripts/rounds.py [--by uncertainty random at-once] [--labels N …] [--seeds N] [--rounds N] [--folder DIR]

A budget of labels is spent in rounds. Each of them runs recipes/quickstart/rounds-label.yaml (some pairs of the policy's own
samples are judged by gold), rounds-rm.yaml (reward models of all labels so far) and rounds-dpo.yaml (the policy goes on, judged
by these). Which pairs are judged is chosen by what the reward models of the round before disagree about, or at random. Or all
labels are spent at once, in the first round, and the policy goes on in as many rounds with the same reward models. The first
round has random pairs in any case. It needs what `make quickstart` makes first, the data and the run of sft.

A stage that is finished is not run again, unless its recipe, or a run that it comes from, is newer. The table has gold of each
policy on prompts that no stage trains on: the mean over seeds and prompts, and with more than one seed a 95 % interval whose
half is √(a² + b²), a that of the seeds' means and b that of the prompts' means, each by Student's t. Differences are taken
seed by seed and prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from rlhf_cli.evaluation.intervals import student

RECIPES, SFT = Path("recipes/quickstart"), Path("runs/quickstart/sft")
AT_ONCE, RANDOM = "at-once", "random"


def made(path: Path) -> float:
    """When a file was written; 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def stage(command: str, recipe: str, output: Path, settings: dict[str, object], since: float) -> float:
    """Run a stage, or go on with it, unless it is finished and no older than its recipe and `since`; when it was finished."""
    manifest = output / "manifest.json"
    if made(manifest) < max(made(RECIPES / recipe), since):
        words = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
        how = "--force" if manifest.exists() else "--resume"
        call = [sys.executable, "-m", "rlhf_cli", command, str(RECIPES / recipe), how, "--output", str(output), *words]
        print(f"{output}: rlhf {command}", flush=True)
        with (output.parent / f"{output.name}.log").open("a") as log:
            subprocess.run(call, stdout=log, stderr=log, check=True)
    return made(manifest)


def run_arm(folder: Path, by: str, labels: int, seed: int, rounds: int) -> list[Path]:
    """The rounds of a policy, so many labels in each, or all of them in the first; the folder of its run in each."""
    policy, found, known, since = SFT, list[Path](), list[str](), made(SFT / "manifest.json")
    for number in range(1, rounds + 1):
        own, before = folder / by / f"round-{number}", folder / by / f"round-{number - 1}"
        if number == 1 and by not in (AT_ONCE, RANDOM) and not own.exists():
            # There is nothing to choose by yet: it is the first round at random.
            (folder / RANDOM / "round-1").mkdir(parents=True, exist_ok=True)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.symlink_to(Path("..") / RANDOM / "round-1")
        own.mkdir(parents=True, exist_ok=True)
        seeded, reward = {"seed": 100 * seed + number}, (folder / by / "round-1" if by == AT_ONCE else own) / "rm"
        if number == 1 or by != AT_ONCE:
            chosen: dict[str, object] = {"n": labels * rounds if by == AT_ONCE else labels, "by": RANDOM}
            chosen |= {"by": by, "ensemble": [str(before / "rm")]} if number > 1 and by != RANDOM else {}
            chosen |= {"labelled": known} if known else {}
            asked = seeded | {"models": {"policy": policy}, "select": chosen}
            since = stage("label", "rounds-label.yaml", own / "labels", asked, since)
            known.append(str(own / "labels" / "preferences.jsonl"))
            since = stage("train-rm", "rounds-rm.yaml", own / "rm", seeded | {"data.train": known}, since)
        since = stage("dpo", "rounds-dpo.yaml", own / "dpo", seeded | {"model.path": policy, "reward.0.model": reward}, since)
        policy = own / "dpo"
        found.append(policy)
    return found


def measure(folder: Path, policies: dict[str, Path]) -> dict[str, np.ndarray]:
    """(P,) gold of each policy, prompt by prompt."""
    named = {"sft": SFT, **policies}
    since = max(made(path / "manifest.json") for path in policies.values())
    stage("eval", "rounds-eval.yaml", folder / "eval", {"models": named}, since)
    own: dict[str, dict[int, list[float]]] = {name: {} for name in named}
    for line in (folder / "eval" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        own[sample["model"]].setdefault(sample["row"], []).append(sample["terms"]["gold/gold"])
    return {name: np.array([np.mean(golds[row]) for row in sorted(golds)]) for name, golds in own.items()}


def shown(table: np.ndarray) -> str:
    """Mean and interval; `table`: (seeds, prompts)."""
    seeds, prompts = table.shape
    if seeds == 1:
        return f"{table.mean():.3f}"
    of_seeds = student(seeds - 1) * table.mean(1).std(ddof=1) / seeds**0.5
    reach = np.hypot(of_seeds, student(prompts - 1) * table.mean(0).std(ddof=1) / prompts**0.5)
    return f"{table.mean():.3f} ({table.mean() - reach:.3f} to {table.mean() + reach:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", nargs="+", default=["uncertainty", RANDOM, AT_ONCE])
    parser.add_argument("--labels", nargs="+", type=int, default=[90])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart/rounds"))
    given = parser.parse_args()
    golds: dict[int, list[dict[str, np.ndarray]]] = {labels: [] for labels in given.labels}
    for seed in range(given.seeds):
        for labels in given.labels:
            folder = given.folder / f"{labels}-labels-seed-{seed}"
            policies = {
                f"{by}-{number}": path
                for by in given.by
                for number, path in enumerate(run_arm(folder, by, labels // given.rounds, seed, given.rounds), 1)
            }
            golds[labels].append(measure(folder, policies))
    first = given.by[0]
    titles = ["labels", "round", "labels spent", *given.by, *(f"{first} less {by}" for by in given.by[1:])]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for labels, own in golds.items():
        for number in range(1, given.rounds + 1):
            tables = {by: np.stack([each[f"{by}-{number}"] for each in own]) for by in given.by}
            cells = [shown(tables[by]) for by in given.by] + [shown(tables[first] - tables[by]) for by in given.by[1:]]
            print(f"| {labels} | {number} | {labels * number // given.rounds} | {' | '.join(cells)} |")
    sft = [each["sft"] for own in golds.values() for each in own]
    print(f"sft: {np.mean(sft):.3f}; {given.seeds} seeds")


if __name__ == "__main__":
    main()
