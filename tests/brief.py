"""What takes longer than a tiny run and is no part of what is tested: pictures, long samples, options read anew, and disks."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import pytest
import typer.main


@dataclass(frozen=True)
class Drawing:
    name: str
    home: str
    caller: str


DRAWINGS = (
    Drawing("draw_training", "rlhf_cli.reports.plots_training", "rlhf_cli.reports.training"),
    Drawing("draw_evaluation", "rlhf_cli.reports.plots_evaluation", "rlhf_cli.reports.evaluation"),
)
"""The functions that draw: the module that has each, and the one that calls it."""

SAMPLES = {"stages.training.SHOWN_PROMPTS": 3, "stages.training.SHOWN_TOKENS": 3, "training.loop.SAMPLES_SHARE": 1.0}
"""How many samples a run writes while it trains, how long they get, and what share of its time: at every look."""


def be_brief(patch: pytest.MonkeyPatch) -> None:
    """From now on runs leave out pictures, say little in their samples, share what parses a command, and wait for no disk."""
    patch.setattr(os, "fsync", lambda handle: None)
    # A look at all objects takes a while, with torch and transformers among them, and finds little.
    gc.set_threshold(50_000, 20, 100)
    patch.setattr("typer.main.get_command", cache(typer.main.get_command))
    for drawing in DRAWINGS:
        patch.setattr(f"{drawing.caller}.{drawing.name}", lambda _: defaultdict(list))
    for name, few in SAMPLES.items():
        patch.setattr(f"rlhf_cli.{name}", few)


def draw_again(patch: pytest.MonkeyPatch) -> None:
    """From now on reports have their pictures."""
    for drawing in DRAWINGS:
        patch.setattr(f"{drawing.caller}.{drawing.name}", getattr(import_module(drawing.home), drawing.name))
