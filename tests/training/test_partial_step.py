"""What was under way when a run was stopped comes back bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.batches import StepBatches
from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Recorded, Tree
from rlhf_cli.training.partial_step import PartialStep, load_partial_step, save_partial_step
from rlhf_cli.training.step import Sums

THIRD, TINY = 1 / 3, 5e-324
"""Numbers that lose something in fewer than 17 digits."""


def _tree(row: int, lengths: tuple[int, ...], **known: Any) -> Tree:
    random = np.random.default_rng(row)
    prompt = random.integers(0, 2**31 - 1, 3 + row).astype(np.int32)
    responses = tuple(random.integers(0, 2**31 - 1, n).astype(np.int32) for n in lengths)
    return Tree(prompt, random.random(len(prompt)) < 0.5, responses, row, **known)


def _floats(lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random ones, with a NaN, an infinity and the smallest among them."""
    random = np.random.default_rng([len(lengths), seed])
    found = tuple(random.standard_normal(n).astype(np.float32) for n in lengths)
    found[0][:3] = np.nan, -np.inf, np.float32(1e-45)
    return found


def _recorded(lengths: tuple[int, ...]) -> tuple[Recorded[np.ndarray], ...]:
    return tuple(Recorded(*known) for known in zip(*(_floats(lengths, seed) for seed in range(5)), strict=True))


ROLLOUT = [
    _tree(0, (4, 1), recorded=_recorded((4, 1))),
    _tree(7, (3,), recorded=_recorded((3,))),
    _tree(12, (2,)),  # a ptx row
]
RANKED = [
    _tree(1, (3, 5, 2), reference=_floats((3, 5, 2)), facts=Facts(ranks=(0.0, 1.0, 1.0), scores=(THIRD, -TINY, 1e300))),
    _tree(2, (3, 4), reference=_floats((3, 4)), facts=Facts(ranks=(0.0, 0.0), scores=(0.1, 0.1))),
]
JUDGED = [
    _tree(3, (3, 1), reference=_floats((3, 1)), facts=Facts(label=True, subset="harmless")),
    _tree(4, (6, 2), facts=Facts(label=False, probability=THIRD, margin=-0.0)),
]

CASES = {
    "ppo between two updates": PartialStep(
        StepBatches(
            5,
            (ROLLOUT,),
            (["a.jsonl:3", "a.jsonl:1", "ptx é.jsonl:9"],),
            {"kl_coef": 0.1 + 0.2, "baseline": -TINY},
            {"temperature": 0.7, "k3_coef": THIRD},
            {"objective/kl": math.pi, "kl_coef": 0.3},
        ),
        3,
        Sums(
            {("loss", "tokens"): THIRD, ("loss", "valued"): -1e-17, ("loss/ptx", "ptx_tokens"): 1e22}, {"tokens": 24, "valued": 0}
        ),
        {"policy/ratio": 1 - 2**-53},
        0.1,
    ),
    "preferences of two steps": PartialStep(StepBatches(2, (RANKED, RANKED[:1]), (["x:1", "x:2"], ["x:1"]), {}, {}, {"a": 0.1})),
    "judged responses": PartialStep(StepBatches(9, (JUDGED, JUDGED[::-1], []), (["y:1", "y:2"], ["y:2", "y:1"], []), {}, {}, {})),
}


def same(a: Any, b: Any) -> bool:
    """The same types and the same bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (PartialStep, StepBatches, Sums)):
        return same(vars(a), vars(b))
    return repr(a) == repr(b)


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    save_partial_step(tmp_path, CASES[name])
    found = load_partial_step(tmp_path)
    assert found is not None
    assert same(found, CASES[name])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["underway.json", "underway.npz"]


def test_the_comparison_sees_a_single_bit() -> None:
    case = CASES["preferences of two steps"]
    other = np.nextafter(RANKED[0].responses[0].astype(np.float64), 0)
    assert same(RANKED[0], RANKED[0]._replace()) and not same(RANKED[0], RANKED[0]._replace(responses=(other,)))
    assert not same(-0.0, 0.0) and not same((1,), [1]) and not same(case, PartialStep(case.batches, 1))


def test_a_checkpoint_between_steps_holds_nothing(tmp_path: Path) -> None:
    assert load_partial_step(tmp_path) is None


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    save_partial_step(tmp_path, CASES["judged responses"])
    with np.load(tmp_path / "underway.npz", allow_pickle=False) as arrays:
        assert {array.dtype.kind for array in arrays.values()} == {"i", "b", "f"}
    np.savez(tmp_path / "underway.npz", **{"0": np.array([{"a": 1}], dtype=object)})  # type: ignore[arg-type]
    numbers = json.loads((tmp_path / "underway.json").read_text())
    (tmp_path / "underway.json").write_text(json.dumps(numbers | {"batches": [numbers["batches"][0][:1]]}))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded when allow_pickle=False"):
        load_partial_step(tmp_path)
