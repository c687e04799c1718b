"""Tiny runs of every kind that can be evaluated, and recipes to evaluate them with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.rollout import generate
from rlhf_cli.rollout.generate import TransformersEngine
from tests.tiny import make_base, rlhf, write_pairs, write_recipe, write_rows

FUNCTIONS = """from math import sin

def letters(prompts, responses):
    return [len(response) / 10 for response in responses]

def wave(prompts, responses):
    return [sin(3 * len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]
"""

HELD_OUT, SPLIT = 0.4, 18  # 13 of the 24 prompts
MODEL, LETTERS, WAVE = {"model": "HOME/rm"}, {"function": "HOME/functions.py:letters"}, {"function": "HOME/functions.py:wave"}
PROMPTS = {"path": "HOME/pairs.jsonl", "holdout": HELD_OUT, "holdout_seed": SPLIT}

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "base", {"data": {"train": "HOME/rows.jsonl"}}),
    "rm": ("train-rm", "base", {}),
    "dpo": ("dpo", "sft", {}),
    "ipo": ("ipo", "sft", {}),
    "ppo": ("ppo", "sft", {"train": {"save_every": 1, "keep_checkpoints": 5, "steps": 4}}),
    "ppo-full": ("ppo", "base", {"lora": None, "train": {"save_every": 1, "keep_checkpoints": 5, "learning_rate": 0.002}}),
}
"""Name → command, the model that it starts from, and what its recipe says beside the common keys."""

DRAWN: dict[str, Any] = {
    "rollout": {"max_new_tokens": 6, "missing_eos_penalty": 0.5},
    "reward": [MODEL],
    "gold": [LETTERS],
    "objective": {"epochs": 1},
}


TRAINED = "may have been trained on rows of"
"""In the note on models that are measured on rows which their training has not held out."""


def notes(folder: Path) -> list[str]:
    """Those of an evaluation, but for the one on rows that training has seen."""
    return [note for note in result(folder)["about"]["notes"] if TRAINED not in note]


def make_home(folder: Path, *names: str, layers: int = 1) -> Path:
    """`base`, rows of every kind, `functions.py`, and those of RUNS that are named."""
    make_base(folder / "base", num_hidden_layers=layers)
    write_pairs(folder / "pairs.jsonl", 24)
    write_rows(folder / "rows.jsonl", 24)
    (folder / "functions.py").write_text(FUNCTIONS)
    for name in names:
        command, start, sections = RUNS[name]
        sections = (DRAWN if command == "ppo" else {}) | sections
        sections["data"] = {"holdout": HELD_OUT, "holdout_seed": SPLIT, "max_length": 96} | sections.get("data", {})
        common = {"steps": 3, "save_every": None, "eval_every": 3, "learning_rate": 0.02}
        sections["train"] = common | sections.get("train", {})
        sections = placed({"lora": {"r": 4}} | sections, folder)
        path = write_recipe(folder / f"{name}.yaml", folder / start, folder / "pairs.jsonl", folder / name, **sections)
        assert rlhf(command, path) == 0, name
    return folder


def placed(value: Any, home: Path) -> Any:
    """HOME in its texts stands for the folder."""
    return json.loads(json.dumps(value).replace("HOME", str(home)))


def write_eval(path: Path, home: Path, **sections: Any) -> Path:
    """A recipe of `rlhf eval` whose output is the path without its ending."""
    common = {"dtype": "float32", "max_length": 96, "output": str(path.with_suffix(""))}
    path.write_text(yaml.safe_dump(placed(common | sections, home), sort_keys=False))
    return path


def result(folder: Path) -> dict[str, Any]:
    """eval.json, which must be strict JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{folder}: {name}")

    found: dict[str, Any] = json.loads((folder / "eval.json").read_text(), parse_constant=refuse)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def note_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every call of the engine from now on, the responses that were asked for."""
    found: list[int] = []
    original = TransformersEngine.generate

    def noting(self: TransformersEngine, request: Any, *others: Any) -> Any:
        found.append(len(request.prompts) * request.samples)
        return original(self, request, *others)

    monkeypatch.setattr(TransformersEngine, "generate", noting)
    return found


def signal_while_drawing(monkeypatch: pytest.MonkeyPatch, number: int, call: int) -> None:
    """The signal arrives at the third token that the `call`-th call of the engine from now on draws."""
    original, choose, calls, tokens = TransformersEngine.generate, generate.choose, [0], [0]

    def counting(self: TransformersEngine, request: Any, *others: Any) -> Any:
        calls[0], tokens[0] = calls[0] + 1, 0
        return original(self, request, *others)

    def signalled(*arguments: Any) -> Any:
        tokens[0] += 1
        if (calls[0], tokens[0]) == (call, 3):
            signal.raise_signal(number)
        return choose(*arguments)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    monkeypatch.setattr(generate, "choose", signalled)
