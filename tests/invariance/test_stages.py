"""Every stage, through the command line: the same weights for any cut into passes, for one process and two, cached or not.

What trains on responses of the policy's own is in test_rollouts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.invariance.agreement import agree, steps_of
from tests.ranks import two_ranks
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_ranked, write_recipe, write_rows, write_steps

STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "rows", {"lora": "auto"}),
    "train-rm": ("train-rm", "pairs", {}),
    "train-rm K-wise": ("train-rm", "ranked", {"objective": {"kind": "plackett_luce"}}),
    "train-rm members": ("train-rm", "ranked", {"objective": {"kind": "pairs", "members": 3}}),
    "train-rm general": ("train-rm", "ranked", {"objective": {"kind": "general", "width": 4}}),
    "train-rm steps": ("train-rm", "steps", {"objective": {"kind": "steps"}}),
    "dpo": ("dpo", "pairs", {"objective": {"sft_weight": 0.1}}),
    "dpo bco": ("dpo", "pairs", {"objective": {"kind": "bco"}}),
    "dpo simpo": ("dpo", "pairs", {"objective": {"kind": "simpo"}}),
    "dpo K-wise": ("dpo", "ranked", {"objective": {"kind": "plackett_luce"}}),
    "dpo wpo": ("dpo", "pairs", {"objective": {"kind": "wpo"}}),
    "dpo tdpo2": ("dpo", "pairs", {"objective": {"kind": "tdpo2"}}),
    "dpo aot": ("dpo", "ranked", {"objective": {"kind": "aot"}}),
    "dpo aot unpaired": ("dpo", "pairs", {"objective": {"kind": "aot", "pairing": "unpaired"}}),
    "ipo": ("ipo", "pairs", {"objective": {"normalize": "token_mean"}}),
    "kto": ("kto", "pairs", {}),
    "kto bco": ("kto", "pairs", {"objective": {"kind": "bco"}}),
}
"""Name → command, rows, and what its recipe says beside the common keys."""

SOME = ("train-rm K-wise", "train-rm steps", "dpo", "kto")
LINES = steps_of(4, 2)
ROUNDING = ("rewards/", "logratio/", "margin/")
"""Before the first step implicit rewards are rounding and nothing else, so are the accuracies that follow from them."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_model(folder / "base", initializer_range=0.2, num_hidden_layers=2)
    for name, write in {"rows": write_rows, "pairs": write_pairs, "ranked": write_ranked, "steps": write_steps}.items():
        write(folder / f"{name}.jsonl", 15)
        write(folder / f"{name}-eval.jsonl", 5, seed=1)
    return folder


def recipe(home: Path, name: str, output: Path, **train: Any) -> list[str | Path]:
    """The command line of a stage of 4 steps of 5 rows, with batches and shares that do not come out even."""
    command, rows, sections = STAGES[name]
    settings: dict[str, Any] = {
        "lora": {"r": 4},
        "data": {"eval": str(home / f"{rows}-eval.jsonl")},
        "train": {"steps": 4, "batch_size": 5, "save_every": None, "eval_every": 2, "learning_rate": 1e-3} | train,
        **sections,
    }
    return [command, write_recipe(output.with_suffix(".yaml"), home / "base", home / f"{rows}.jsonl", output, **settings)]


Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(home: Path) -> Whole:
    """The run of a stage in one process with the largest budget, made once; settings are words of its command line."""

    def find(name: str, *settings: str) -> Path:
        output = home / "-".join((name, *settings)).replace("/", " ")
        if not output.exists():
            assert rlhf(*recipe(home, name, output, tokens_per_device=4096), *settings) == 0
        return output

    return find


def same(a: Path, b: Path) -> None:
    agree(a, b, LINES, rounding=ROUNDING)
    if json.loads((a / "manifest.json").read_text())["stage"] == "sft":
        losses = [[line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (a, b)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("sft", 1), ("sft", 40), *((name, 30) for name in (*SOME, "dpo aot", "dpo tdpo2"))],
)
def test_tokens_per_device_changes_nothing(name: str, budget: int, home: Path, whole: Whole, tmp_path: Path) -> None:
    assert rlhf(*recipe(home, name, tmp_path / "cut", tokens_per_device=budget)) == 0
    same(whole(name), tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("layout", ["alone", "packed"])
def test_neither_packing_nor_shared_prefixes_change_anything(
    name: str, layout: str, home: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alone`: every response in a row of its own, its prompt repeated; `packed`: rows of several trees under a dense mask."""
    from rlhf_cli.models import attention

    usual = whole(name)
    candidates = {"alone": ("alone",), "packed": ("sdpa",)}[layout]
    monkeypatch.setattr(attention, "CANDIDATES", {"sdpa": candidates})
    words = recipe(home, name, tmp_path / "other", tokens_per_device=200)
    assert rlhf(*words, "--set", "model.attention=sdpa") == 0
    same(usual, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_are_one(name: str, home: Path, whole: Whole, tmp_path: Path) -> None:
    """Batches of 5 rows, so that the shares differ; the evaluation batch is odd too. Each share is cut into several passes."""
    two_ranks(*recipe(home, name, tmp_path / "two", tokens_per_device=30))
    same(whole(name), tmp_path / "two")


@pytest.mark.slow
def test_a_rank_without_a_row_takes_part(home: Path, tmp_path: Path) -> None:
    assert rlhf(*recipe(home, "sft", tmp_path / "one", batch_size=1)) == 0
    two_ranks(*recipe(home, "sft", tmp_path / "two", batch_size=1))
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("lora", ["{r: 4}", "null"], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_that_is_computed_in_the_step_gives_the_same(
    name: str, lora: str, home: Path, whole: Whole, tmp_path: Path
) -> None:
    """LoRA: the bare base under the adapter; all weights: a second, frozen model."""
    settings = () if lora == "{r: 4}" else ("--set", f"lora={lora}")
    assert rlhf(*recipe(home, name, tmp_path / "computed"), *settings, "--set", "reference.cache=false") == 0
    same(whole(name, *settings), tmp_path / "computed")


@pytest.mark.slow
def test_the_start_is_its_own_reference(home: Path, tmp_path: Path) -> None:
    """Continuing a LoRA run, `start` is its frozen adapter, `base` the bare base and a path that run."""
    assert rlhf(*recipe(home, "dpo", tmp_path / "parent", learning_rate=0.02)) == 0
    losses = {}
    for name, reference in {"start": "start", "live": "start", "path": str(tmp_path / "parent"), "base": "base"}.items():
        words = recipe(home, "dpo", tmp_path / name)
        cache = "false" if name == "live" else "true"
        settings = [f"model.path={tmp_path / 'parent'}", "lora=auto", f"reference.model={reference}", f"reference.cache={cache}"]
        settings += ["objective.sft_weight=0"]
        assert rlhf(*words, *(word for setting in settings for word in ("--set", setting))) == 0
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses["start"][0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses["live"] == pytest.approx(losses["start"], rel=1e-5)
    assert losses["path"] == pytest.approx(losses["start"], rel=1e-5)
    assert losses["base"][0] < 0.68  # the parent has learned something since it left the base
