"""A tiny random model on disk, rows to train it on, and the command line in this process or in another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.cli import main
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer

WORDS = (
    "red",
    "blue",
    "green",
    "fish",
    "bird",
    "tree",
    "sun",
    "moon",
    "sea",
    "one",
    "two",
    "three",
    "big",
    "small",
    "old",
    "new",
)


def make_model(folder: Path, seed: int = 0, *, tied: bool = False, **changes: Any) -> Path:
    """A Llama of 1 layer and 32 dimensions with a ChatML tokenizer. What has several is in tests/models, and where it matters."""
    tokenizer = tiny_tokenizer(eos="<|im_end|>", template=CHATML)
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id, **(settings | changes)
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_base(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model whose responses often end."""
    make_model(folder, seed, initializer_range=0.2, **changes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(60))}))
    return folder


def _words(seed: int) -> Callable[[], str]:
    """Draws texts of 1 to 6 words."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> str:
        count = int(torch.randint(1, 7, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))

    return draw


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompt-completion rows of 1 to 6 words each."""
    draw = _words(seed)
    return _write(path, [{"prompt": f"{draw()} {i}", "completion": draw()} for i in range(count)])


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Preference rows of 1 to 6 words each; a chosen response ends in "sun", a rejected one in "sea"."""
    draw = _words(seed)
    return _write(
        path, [{"prompt": f"{draw()} {i}", "chosen": f"{draw()} sun", "rejected": f"{draw()} sea"} for i in range(count)]
    )


def write_ranked(path: Path, count: int, seed: int = 0) -> Path:
    """Rankings of 2 to 4 responses with scores, the best first."""
    draw = _words(seed)
    rows = []
    for i in range(count):
        size = 2 + i % 3
        responses = [f"{draw()} {k}" for k in range(size)]
        rows.append({"prompt": f"{draw()} {i}", "responses": responses, "scores": [float(size - k) for k in range(size)]})
    return _write(path, rows)


def write_steps(path: Path, count: int, seed: int = 0) -> Path:
    """Responses of 1 to 4 steps; a right one ends in "sun", a wrong one in "sea"."""
    draw, generator = _words(seed), torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        labels = [bool(own) for own in torch.rand(1 + i % 4, generator=generator) < 0.7]
        rows.append(
            {"prompt": f"{draw()} {i}", "steps": [f"{draw()} {'sun' if own else 'sea'}" for own in labels], "labels": labels}
        )
    return _write(path, rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, start: Path, rows: Path, folder: Path, **sections: Any) -> Path:
    """A recipe of 6 steps of 4 rows, for any training stage; sections are merged key by key."""
    recipe: dict[str, Any] = {
        "model": {"path": str(start)},
        "data": {"train": str(rows), "max_length": 160},
        "train": {"batch_size": 4, "steps": 6, "learning_rate": 1e-3, "save_every": 1},
        "output": str(folder),
    }
    for name, section in sections.items():
        recipe[name] = (
            {**recipe.get(name, {}), **section} if isinstance(section, dict) and isinstance(recipe.get(name), dict) else section
        )
    path.write_text(yaml.safe_dump(recipe))
    return path


@contextmanager
def own_signals() -> Iterator[None]:
    """Inside, signals may be handled in another way; afterwards they are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rlhf(*arguments: str | Path) -> int:
    """The exit code of a command run in this process."""
    with own_signals():
        return main([str(a) for a in arguments])


def spawn(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command in a process of its own, with one thread. `tests.ranks` is quicker."""
    command = [sys.executable, "-m", "rlhf_cli", *map(str, arguments)]
    settings = os.environ | {"ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def children(process: int) -> list[int]:
    """The ids of the processes that one started."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def gone(pids: list[int], seconds: float) -> bool:
    """Do all of them end within so many seconds?"""
    deadline = time.monotonic() + seconds
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()  # noqa: E731
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def read_lines(path: Path, *without: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file of strict JSON, without the keys that differ between equal runs."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path}: {name}")

    dropped = {"time", "tokens_per_second", "time/rollout", "time/score", "time/update", *without}
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in dropped} for line in lines]


def split_lines(run: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one split, whole."""
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["split"] == split]


def forget_functions() -> None:
    """Each `rlhf` imports a file of functions anew; from now on so does this process."""
    for name in [name for name in sys.modules if name.startswith("rlhf_reward_")]:
        del sys.modules[name]
