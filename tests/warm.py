"""What every command needs, imported and run once: the process that ranks are forked from imports this first."""

from __future__ import annotations

import contextlib
import gc
import io
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from accelerate import PartialState

from rlhf_cli.recipe.stages import STAGES
from tests.brief import be_brief
from tests.tiny import make_base, rlhf, write_pairs, write_recipe

for stage in STAGES.values():
    import_module(stage.module)
for module in ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict"):
    import_module(module)
be_brief(pytest.MonkeyPatch())


def run() -> None:
    """A step of an adapter: regular expressions are compiled and kernels chosen, which takes as long again as the step."""
    with TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folder = Path(place)
        make_base(folder / "base")
        write_pairs(folder / "pairs.jsonl", 2)
        parts = folder / "base", folder / "pairs.jsonl", folder / "run"
        assert rlhf("dpo", write_recipe(folder / "dpo.yaml", *parts, lora={"r": 2}, train={"steps": 1, "batch_size": 2})) == 0
    PartialState._reset_state()  # which took this process for the only one


run()
gc.collect()
gc.freeze()  # what is here is here for good: no process looks at it again, and copies its pages by that
