"""Reward models that are trained as one run: each as if it were alone, saved as plain models, and used together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli import sections
from rlhf_cli.data.batches import DatasetSource, EnsembleSource, member_seed
from rlhf_cli.data.flat import flatten
from rlhf_cli.data.records import Record
from rlhf_cli.data.sources import prompt_share
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.reward_models import RewardModel, RewardModelScorer, centred_scores
from tests.rollout.test_reward_models import IN_CHATML, drawn, find, plain_scores
from tests.stages.tiny_runs import result, write_eval
from tests.tiny import make_base, rlhf, split_lines, write_pairs, write_recipe, write_rows

K, SEED = 3, 7
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "steps": 5, "save_every": None, "eval_every": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an ensemble on it, of rows that share prompts."""
    folder = tmp_path_factory.mktemp("ensembles")
    make_base(folder / "base")
    rows = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl", 14).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = rows[number % 9]["prompt"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_pairs(folder / "eval.jsonl", 6, seed=1)
    assert rlhf("train-rm", recipe(folder, folder / "ens", objective={"members": K}, seed=SEED)) == 0
    return folder


def recipe(home: Path, output: Path, rows: str = "pairs.jsonl", **more: Any) -> Path:
    common = {"lora": {"r": 4}, "data": {"eval": str(home / "eval.jsonl")}, "train": SGD}
    return write_recipe(output.with_suffix(".yaml"), home / "base", home / rows, output, **common | more)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def member(home: Path, number: int) -> Path:
    return home / "ens" / "model" / f"member-{number}"


def card(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "ens" / "manifest.json").read_text())["reward_model"]
    return found


@pytest.mark.parametrize("number", range(K))
def test_a_member_is_the_run_that_learns_its_sample_alone(number: int, home: Path, tmp_path: Path) -> None:
    """The rows of its sample in a file, its seed, and no members: the same weights and figures."""
    rows = (home / "pairs.jsonl").read_text().splitlines()
    prompts = np.array([prompt_share(Record(json.loads(row)["prompt"], (), ""), 0) for row in rows])
    source = DatasetSource(flatten([], []), (len(rows),), (1.0,), 4, SEED, True)
    sample = EnsembleSource.draw(source, K, prompts).members[number].sample
    assert sample is not None and len(set(sample.tolist())) < len(rows)
    (home / "sample.jsonl").write_text("".join(rows[i] + "\n" for i in sample))
    seed = member_seed(SEED, number)
    assert rlhf("train-rm", recipe(home, tmp_path / "alone", "sample.jsonl", seed=seed)) == 0
    alone, together = adapter(tmp_path / "alone" / "model"), adapter(member(home, number))
    assert alone.keys() == together.keys()
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-6
    own = card(home)["members"][number]
    assert own["seed"] == seed
    only = json.loads((tmp_path / "alone" / "manifest.json").read_text())["reward_model"]
    assert own["rate"]["accuracy"] == only["accuracy"]


def test_the_figures_are_means_over_the_members(home: Path) -> None:
    """The first step's of each member alone are another run's; the last look's are those of the card."""
    (last,) = (line for line in split_lines(home / "ens", "eval") if line["step"] == 5)
    assert last["accuracy"] == pytest.approx(np.mean([own["rate"]["accuracy"] for own in card(home)["members"]]))
    (first, *_) = split_lines(home / "ens", "train")
    assert 0.2 < first["loss"] < 2 and {"grad_norm", "grad_norm/reward/1", "learning_rate/reward/2"} <= first.keys()
    starts = [adapter(member(home, number))["base_model.model.score.weight"] for number in range(K)]
    assert min(float((starts[i] - starts[i - 1]).abs().max()) for i in range(K)) > 0.05


def test_the_plan_counts_every_member(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("train-rm", recipe(home, tmp_path / "x", objective={"members": K}), "--check") == 0
    rows = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
    assert rows["batch"].strip() == "12 prompts with their responses a step, over all devices, 4 for each member"
    assert rows["trains"].strip() == "LoRA r 4, 3 times: each member has a bootstrap sample of the prompts"
    trained = sum(value.numel() for name, value in adapter(member(home, 0)).items() if "lora_" in name)
    assert rows["trained"].strip() == f"{K * trained:,} parameters"


def plain(home: Path, folder: Path) -> np.ndarray:
    """A member's scores, loaded by plain transformers and PEFT as the manifest says, with the member's folder in its place."""
    lines = "\n".join(json.loads((home / "ens" / "manifest.json").read_text())["load"])
    names: dict[str, Any] = {}
    exec(lines.replace(str(home / "ens" / "model"), str(folder)), names)
    return plain_scores(names["model"], IN_CHATML)


def scorer(home: Path, **keys: Any) -> tuple[RewardModel, RewardModelScorer]:
    found = find(home, home / "ens", **keys)
    return found, found.load(FrozenModels(sections.Model(path=""), torch.float32, torch.device("cpu")), "judge", 64)


def test_members_are_plain_classifiers_that_are_normalised_and_combined(home: Path) -> None:
    raw = np.stack([plain(home, member(home, number)) for number in range(K)])
    assert adapter(home / "ens" / "model").keys() == adapter(member(home, 0)).keys()
    assert np.array_equal(plain(home, home / "ens" / "model"), raw[0])
    means, stds = (np.array([own[key] for own in card(home)["members"]])[:, None] for key in ("score_mean", "score_std"))
    scores = (raw - means) / stds
    wanted = {"mean": scores.mean(0), "min": scores.min(0), None: scores.mean(0)}
    for how, combined in wanted.items():
        found, disagreement = scorer(home, combine=how)[1].score(drawn(home))
        assert np.abs(found - combined).max() < 1e-4
        assert np.abs(disagreement - scores.std(0)).max() < 1e-4 and disagreement.max() > 0.05
    term, judge = scorer(home, combine=sections.Bound(lcb=1.5))
    assert np.abs(judge.score(drawn(home))[0] - (scores.mean(0) - 1.5 * scores.std(0))).max() < 1e-4
    assert (
        term.words
        == "scores of 3 members, each less its own mean and over its deviation: their mean less 1.5 deviations; "
        + ("it reads the policy's tokens")
    )
    # Two prompts of two responses: as many members' columns as both models have.
    both = centred_scores([judge, judge], drawn(home))
    halves = scores.reshape(K, 2, 2)
    assert both.shape == (4, 2 * K)
    assert np.abs(both[:, :K].T - (halves - halves.mean(2, keepdims=True)).reshape(K, 4)).max() < 1e-4
    raw_scores = scorer(home, normalize=False)[1].of_members(drawn(home))
    assert np.abs(raw_scores - raw).max() < 1e-4


def test_the_card_is_of_the_mean(home: Path, tmp_path: Path) -> None:
    """An evaluation of the run, from the files, finds the accuracy of the card; a member by itself has its own."""
    members = {f"m{number}": str(member(home, number)) for number in range(K)}
    path = write_eval(tmp_path / "e.yaml", home, models={"all": "HOME/ens", **members}, preferences="HOME/eval.jsonl")
    assert rlhf("eval", path) == 0
    agreed = result(tmp_path / "e")["preferences"]
    assert agreed["all"]["accuracy"] == card(home)["accuracy"]
    assert agreed["all"]["margins"]["mean"] == pytest.approx(card(home)["margins"]["mean"], abs=1e-5)
    assert [agreed[f"m{number}"]["accuracy"] for number in range(K)] == [m["rate"]["accuracy"] for m in card(home)["members"]]
    assert 0 < card(home)["disagreement"] < 2
    assert "member 2" in (home / "ens" / "report.md").read_text()
    assert "The first of 3" in (home / "ens" / "model" / "README.md").read_text()


def test_a_policy_is_judged_by_the_bound_and_the_disagreement_is_logged(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(home / "rows.jsonl", 12)
    drawn_by = {"rollout": {"max_new_tokens": 6}, "reward": [{"model": str(home / "ens"), "combine": {"lcb": 1.0}}]}
    train = {"steps": 2, "save_every": None, "eval_every": 2}
    settings = {"data": {"eval": str(home / "eval.jsonl"), "max_length": 80}, "train": train, "lora": {"r": 4}}
    words = write_recipe(tmp_path / "ppo.yaml", home / "base", home / "rows.jsonl", tmp_path / "ppo", **settings, **drawn_by)
    assert rlhf("ppo", words) == 0
    assert "value: starts as the first member of the reward model ens" in capsys.readouterr().out
    lines = [*split_lines(tmp_path / "ppo", "train"), *split_lines(tmp_path / "ppo", "eval")]
    assert len(lines) == 4 and all(line["reward/ens/disagreement"] > 0 for line in lines)
    (term,) = json.loads((tmp_path / "ppo" / "manifest.json").read_text())["reward"]
    assert term["combine"] == {"lcb": 1.0, "ucb": None} and len(term["mean"]) == K
    path = write_eval(
        tmp_path / "e.yaml",
        home,
        models={"base": "HOME/base"},
        prompts="HOME/rows.jsonl",
        rollout={"max_new_tokens": 6, "responses_per_prompt": 2},
        reward=drawn_by["reward"],
    )
    assert rlhf("eval", path) == 0
    figures = result(tmp_path / "e")["models"]["base"]["reward/ens/disagreement"]
    assert 0 < figures["low"] <= figures["mean"] <= figures["high"]
    assert "Disagreement" in (tmp_path / "e" / "report.md").read_text()


REFUSED = {
    ("train-rm", "lora=null"): "objective.members: are adapters on one base, and with lora: null each would be a whole model",
    ("train-rm", "objective.members=1"): "objective.members: expected at least 2, found 1",
    ("train-rm", "model.path=HOME/ens"): "HOME/ens has 3 members; name one: HOME/ens/model/member-0",
    ("ppo", "reward=[{model: HOME/ens/model/member-1, combine: min}]"): "without members; remove combine",
    ("ppo", "reward=[{model: HOME/ens, combine: {lcb: 1, ucb: 1}}]"): "expected mean, min, or one of lcb and ucb. give one",
    ("ppo", "reward=[{format: a, combine: min}]"): "has no effect on a format, it is for reward models. remove it",
}


@pytest.mark.parametrize(("stage", "setting"), REFUSED)
def test_what_has_no_meaning_is_refused(
    stage: str, setting: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        {"objective": {"members": K}}
        if stage == "train-rm"
        else {"reward": [{"model": str(home / "ens")}], "rollout": {"max_new_tokens": 6}}
    )
    path = write_recipe(tmp_path / "x.yaml", home / "base", home / "pairs.jsonl", tmp_path / "x", **more)
    assert rlhf(stage, path, "--check", "--set", setting.replace("HOME", str(home))) == 2
    assert REFUSED[stage, setting].replace("HOME", str(home)) in " ".join(capsys.readouterr().err.split())


def test_an_export_has_all_members_and_no_merge(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf("export", home / "ens", tmp_path / "dest") == 0
    assert [adapter(tmp_path / "dest" / f"member-{k}").keys() for k in range(K)] == [adapter(member(home, 0)).keys()] * K
    capsys.readouterr()
    assert rlhf("export", home / "ens", tmp_path / "merged", "--merge") == 2
    assert "has 3 members, each of which would be a whole model" in capsys.readouterr().err
