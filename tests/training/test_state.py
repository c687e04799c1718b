"""What state.json says of a run."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_cli.training.checkpoint import STATE, LogSizes, State, Usage, load_state, write_state
from rlhf_cli.training.watch import Watched


def test_it_comes_back_and_its_groups_lie_flat_in_the_file(tmp_path: Path) -> None:
    state = State(
        planned=9,
        budget=40,
        asked=80,
        step=3,
        evaluated=2,
        usage=Usage(tokens=7, seconds=0.1, sampling_seconds=0.05, peak_memory=1.5),
        logs=LogSizes(metrics_bytes=11, samples_bytes=12, metrics_hash="a", samples_hash="b"),
        watched=Watched(best={"train/loss": 0.5}, best_step=2, stopped_by="loss 2 is above 1"),
        memory={"kl_coef": 0.3},
    )
    write_state(tmp_path / STATE, state)
    assert load_state(tmp_path) == state
    assert json.loads((tmp_path / STATE).read_text()) == {
        **{"planned": 9, "budget": 40, "asked": 80, "step": 3, "evaluated": 2, "memory": {"kl_coef": 0.3}},
        **{"tokens": 7, "seconds": 0.1, "sampling_seconds": 0.05, "peak_memory": 1.5, "metrics_bytes": 11, "samples_bytes": 12},
        **{"metrics_hash": "a", "samples_hash": "b"},
        **{"best": {"train/loss": 0.5}, "best_step": 2, "stopped_by": "loss 2 is above 1"},
    }
