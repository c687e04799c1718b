"""What `rlhf eval` computes: the figures of training again, log-probabilities by another route, pairs that are paired."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.data.sources import read_data
from rlhf_cli.data.trees import Tree
from rlhf_cli.evaluation import measure, responses
from rlhf_cli.models import placement
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.rollout.experience import Rollout
from rlhf_cli.stages.prepare import row_request
from tests.data.tiny_tokenizer import ZEPHYR, tiny_tokenizer
from tests.models.tiny_backbone import plain_logps
from tests.ranks import two_ranks
from tests.stages.tiny_runs import (
    HELD_OUT,
    LETTERS,
    MODEL,
    PROMPTS,
    RUNS,
    WAVE,
    lines,
    make_home,
    notes,
    result,
    write_eval,
)
from tests.tiny import make_base, rlhf, write_recipe

DRAWN: dict[str, Any] = {
    "prompts": PROMPTS,
    "rollout": {"max_new_tokens": 6, "missing_eos_penalty": 0.5},
    "reward": [MODEL],
    "gold": [LETTERS],
}
COMPARED: dict[str, Any] = DRAWN | {"reference": "sft", "winrate": {"baseline": "sft", "judge": "gold"}}
TWICE = {"max_new_tokens": 6, "responses_per_prompt": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("evaluated"), *RUNS)


@pytest.fixture(scope="module")
def trees() -> dict[str, list[Tree]]:
    """Of every model of `whole`, what it drew, token by token."""
    return {}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory, trees: dict[str, list[Tree]]) -> Path:
    """An evaluation with every section."""
    original = responses._samples

    def noting(model: str, rollout: Rollout, *others: Any) -> Iterator[Any]:
        trees[model] = rollout.trees
        return original(model, rollout, *others)

    sections = COMPARED | {
        "models": {
            "sft": "HOME/sft",
            "dpo": "HOME/dpo",
            "ipo": "HOME/ipo",
            "ppo": "HOME/ppo",
            "pushed": "HOME/ppo/checkpoints/*",
            "full": "HOME/ppo-full",
            "rm": "HOME/rm",
        },
        "preferences": PROMPTS,
        "text": {"path": "HOME/rows.jsonl", "holdout": HELD_OUT},
        "best_of_n": [2, 4],
    }
    path = write_eval(tmp_path_factory.mktemp("whole") / "ev.yaml", home, **sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses, "_samples", noting)
        assert rlhf("eval", path) == 0
    return path.with_suffix("")


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Callable[..., Path]:
    """Evaluates, and returns the folder; HOME in a recipe's texts is where the models are."""
    count = [0]

    def evaluated(*words: str, code: int = 0, **sections: Any) -> Path:
        count[0] += 1
        path = write_eval(tmp_path / f"ev{count[0]}.yaml", home, **sections)
        assert rlhf("eval", path, *words) == code
        return path.with_suffix("")

    return evaluated


def last_held_out(run: Path) -> dict[str, float]:
    own: dict[str, float] = [line for line in lines(run / "metrics.jsonl") if line["split"] == "eval"][-1]
    return own


def samples_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Model → its lines, without its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines(folder / "samples.jsonl"):
        found.setdefault(line.pop("model"), []).append(line)
    return found


def test_a_reward_models_card_is_its_agreement(home: Path, whole: Path) -> None:
    """Under its name among the models, and as a term of the reward."""
    card = json.loads((home / "rm" / "manifest.json").read_text())["reward_model"]
    assert card["pairs"] == 13 and 0.5 < card["accuracy"] < 1
    for name in ("rm", "reward/rm"):
        own = result(whole)["preferences"][name]
        assert own["kind"] == "reward model" and own["beta"] is None
        assert (own["pairs"], own["prompts"]) == (card["pairs"], card["prompts"])
        for key, recorded in {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}.items():
            assert own[key] == pytest.approx(card[recorded], abs=1e-6)
        assert own["ece"] == pytest.approx(card["ece"], abs=1e-6)
        assert own["confidence"] == pytest.approx(card["confidence"], abs=1e-6)
        assert own["margins"]["mean"] == pytest.approx(card["margins"]["mean"], abs=1e-5)
        assert own["length_baseline"] == card["length_baseline"]


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_policys_implicit_rewards_agree_as_while_it_was_trained(name: str, home: Path, whole: Path) -> None:
    held_out, own = last_held_out(home / name), result(whole)["preferences"][name]
    assert own["kind"] == "policy" and own["ties"] == 0
    assert own["accuracy"] == pytest.approx(held_out["rewards/accuracies"], abs=1e-9)
    assert own["margins"]["mean"] == pytest.approx(held_out["rewards/margins"], abs=1e-4)
    assert abs(own["margins"]["mean"]) > 0.1


def test_a_function_agrees_with_preferences(home: Path, whole: Path) -> None:
    """Of the held-out pairs those whose chosen response has more letters; equal ones count half."""
    recipe = load_recipe("dpo", home / "dpo.yaml").recipe
    assert isinstance(recipe, recipes.DpoRecipe)
    held_out = read_data(recipe.data, row_request(recipe, str)).held_out
    gains = [len(record.responses[0]) - len(record.responses[1]) for record in held_out]
    own = result(whole)["preferences"]["gold/letters"]
    assert own["kind"] == "term" and own["pairs"] == len(gains) == 13
    assert own["accuracy"] == pytest.approx(np.mean([(gain > 0) + (gain == 0) / 2 for gain in gains]))
    assert own["ties"] == gains.count(0) and own["margins"]["mean"] == pytest.approx(np.mean(gains) / 10)


def test_beta_scales_implicit_rewards(whole: Path, run: Callable[..., Path]) -> None:
    """A policy whose training had no β is measured with 0.1."""
    models = {"sft": "HOME/sft", "dpo": "HOME/dpo", "ppo": "HOME/ppo"}
    known = result(whole)["preferences"]
    assert known["dpo"]["beta"] == known["ppo"]["beta"] == 0.1
    found = result(run(models=models, reference="sft", preferences=PROMPTS, beta=0.3))["preferences"]
    assert set(found) == {"dpo", "ppo"}
    for name, own in found.items():
        assert own["beta"] == 0.3 and own["accuracy"] == known[name]["accuracy"]
        assert own["margins"]["mean"] == pytest.approx(3 * known[name]["margins"]["mean"], rel=1e-5)


def test_the_beta_of_a_checkpoint_is_that_of_its_run(home: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    sections = {"objective": {"beta": 0.7}, "lora": {"r": 4}, "train": {"steps": 1, "save_every": 1}}
    assert rlhf("dpo", write_recipe(tmp_path / "x.yaml", home / "sft", home / "pairs.jsonl", tmp_path / "own", **sections)) == 0
    models = {"sft": "HOME/sft", "own": str(tmp_path / "own"), "steps": str(tmp_path / "own" / "checkpoints" / "*")}
    found = result(run(models=models, reference="sft", preferences=PROMPTS))["preferences"]
    assert {name: own["beta"] for name, own in found.items()} == {"own": 0.7, "steps/step-00000001": 0.7}
    assert found["own"]["margins"] == found["steps/step-00000001"]["margins"]


def test_held_out_responses_are_those_of_training(home: Path, whole: Path, run: Callable[..., Path]) -> None:
    """With LoRA, and where all weights are trained; the last checkpoint is the run."""
    full = run(models={"base": "HOME/base", "full": "HOME/ppo-full"}, reference="base", **DRAWN)
    for own, held_out in (
        (result(whole)["models"]["ppo"], last_held_out(home / "ppo")),
        (result(whole)["models"]["pushed/step-00000004"], last_held_out(home / "ppo")),
        (result(full)["models"]["full"], last_held_out(home / "ppo-full")),
    ):
        for name in (
            *("gold/letters", "reward/rm", "objective/scores", "objective/kl"),
            *("response/length", "response/eos_rate"),
        ):
            assert own[name]["mean"] == pytest.approx(held_out[name], abs=1e-5), name
        assert held_out["objective/kl"] > 0.1 and 0 < held_out["response/eos_rate"] < 1
    assert result(full)["about"]["prompts"] == 13


def test_all_rows_without_a_holdout(run: Callable[..., Path]) -> None:
    sections = DRAWN | {"prompts": "HOME/pairs.jsonl", "preferences": "HOME/pairs.jsonl"}
    folder = run(models={"sft": "HOME/sft"}, **sections)
    found = result(folder)
    assert found["about"]["prompts"] == 24 and found["preferences"]["gold/letters"]["pairs"] == 24
    assert found["preferences"]["gold/letters"]["length_baseline"]["prefers"] == "longer"


def test_texts_of_one_prompt_are_drawn_together(home: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """Every row written four times tells nothing new: the perplexity and its interval are those of each once."""
    text = (home / "rows.jsonl").read_text()
    (tmp_path / "four.jsonl").write_text(text * 4)
    (tmp_path / "one.jsonl").write_text(text)
    found = [run(models={"sft": "HOME/sft"}, text=str(tmp_path / f"{name}.jsonl")) for name in ("one", "four")]
    one, four = (result(folder)["models"]["sft"]["perplexity"] for folder in found)
    assert four == pytest.approx(one, rel=1e-6)


def test_perplexity_is_that_of_training(home: Path, whole: Path) -> None:
    assert result(whole)["models"]["sft"]["perplexity"]["mean"] == pytest.approx(
        last_held_out(home / "sft")["perplexity"], rel=1e-6
    )


def plain(home: Path, name: str) -> Any:
    """The model as plain transformers and PEFT load it."""
    adapter = home / name / "model"
    if not (adapter / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(adapter).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), adapter).eval()


def response_sums(model: Any, trees: list[Tree]) -> np.ndarray:
    """(responses,) Σ log π of every response, one by one."""
    alone = [tree._replace(responses=(ids,)) for tree in trees for ids in tree.responses]
    with torch.no_grad():
        return np.array([float(plain_logps(model, [tree]).double().sum()) for tree in alone])


@pytest.mark.parametrize("name", ["sft", "ppo", "full"])
def test_log_probabilities_are_those_of_plain_transformers(
    name: str, home: Path, whole: Path, trees: dict[str, list[Tree]]
) -> None:
    own = samples_of(whole)[name]
    folder = "ppo-full" if name == "full" else name
    logps, reference = response_sums(plain(home, folder), trees[name]), response_sums(plain(home, "sft"), trees[name])
    assert len(own) == len(logps) == (13 * 4 if name == "sft" else 13)
    assert np.abs([line["logp"] for line in own] - logps).max() < 1e-4
    assert np.abs([line["reference_logp"] for line in own] - reference).max() < 1e-4
    if name != "sft":
        assert result(whole)["models"][name]["objective/kl"]["mean"] == pytest.approx((logps - reference).mean(), abs=1e-4)
        tokens = [len(ids) for tree in trees[name] for ids in tree.responses]
        per_token = (logps - reference).sum() / sum(tokens)
        assert result(whole)["models"][name]["objective/kl_per_token"]["mean"] == pytest.approx(per_token, abs=1e-4)


def test_a_line_says_what_was_drawn(home: Path, whole: Path, trees: dict[str, list[Tree]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    rows = lines(home / "pairs.jsonl")
    own, ends = iter(samples_of(whole)["ppo"]), {*range(60), tokenizer.eos_token_id}
    for tree in trees["ppo"]:
        for number, ids in enumerate(tree.responses):
            line = next(own)
            place = int(line["where"].rpartition(":")[2])
            assert line["prompt"] == rows[place - 1]["prompt"] and line["number"] == number
            turn = [{"role": "user", "content": line["prompt"]}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            assert tree.prompt.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert line["tokens"] == len(ids) <= 6
            assert line["ended"] == (int(ids[-1]) in ends) and (line["ended"] or line["tokens"] == 6)
            assert not ends & set(ids[:-1].tolist())
            said = ids[:-1] if line["ended"] else ids
            assert line["response"] == tokenizer.decode(said, skip_special_tokens=True)
            assert line["terms"]["gold/letters"] == len(line["response"]) / 10
            assert line["score"] == pytest.approx(line["terms"]["reward/rm"] - 0.5 * (not line["ended"]), abs=1e-12)
    assert next(own, None) is None


def test_best_of_n_draws_more_of_the_reference_alone(whole: Path) -> None:
    found, samples = result(whole), samples_of(whole)
    assert {name: len(own) for name, own in samples.items()} == {name: 13 for name in samples} | {"sft": 52}
    score, gold = (
        np.array([read(line) for line in samples["sft"]]).reshape(13, 4)
        for read in (lambda line: line["score"], lambda line: line["terms"]["gold/letters"])
    )
    points = {point["n"]: point for point in found["overoptimisation"] if point["series"] == "best of n"}
    assert set(points) == {1, 2, 4}
    assert (points[1]["kl"], points[1]["model"]) == (0, "sft")
    assert points[1]["proxy"] == pytest.approx(score.mean()) and points[1]["gold"] == pytest.approx(gold.mean())
    assert points[4]["proxy"] == pytest.approx(score.max(1).mean())
    # Equal texts have scores that differ by rounding, and one gold.
    assert points[4]["gold"] == pytest.approx(np.mean([gold[i, score[i].argmax()] for i in range(13)]))
    pairs = [(i, j, k) for i in range(13) for j in range(4) for k in range(j)]
    assert points[2]["proxy"] == pytest.approx(np.mean([max(score[i, j], score[i, k]) for i, j, k in pairs]))
    # What stands among the models' figures is of as many responses as the others have.
    assert found["models"]["sft"]["objective/scores"]["mean"] == pytest.approx(score[:, 0].mean())


def test_without_best_of_more_the_first_point_is_the_reference(run: Callable[..., Path]) -> None:
    rollout = {"max_new_tokens": 6, "responses_per_prompt": 4}
    found = result(run(models={"sft": "HOME/sft"}, **DRAWN | {"reference": "sft", "rollout": rollout, "best_of_n": [1, 3]}))
    first, own = found["overoptimisation"][0], found["models"]["sft"]
    assert (first["n"], first["kl"]) == (1, 0)
    for name, metric in {"proxy": "objective/scores", "gold": "gold/letters"}.items():
        assert first[name] == pytest.approx(own[metric]["mean"], abs=1e-12)
        assert first["intervals"][name] == pytest.approx([own[metric]["low"], own[metric]["high"]], abs=1e-12)


def test_the_curve_of_a_run(home: Path, whole: Path) -> None:
    """The start by all its responses, those for best of n too, then its checkpoints as they are among the models."""
    found = result(whole)
    points = [point for point in found["overoptimisation"] if point["series"] == "pushed"]
    assert [(point["model"], point["step"]) for point in points] == [
        ("sft", 0),
        *((f"pushed/step-0000000{step}", step) for step in (1, 2, 3, 4)),
    ]
    assert points[0]["kl"] == 0
    drawn = samples_of(whole)["sft"]
    assert points[0]["proxy"] == pytest.approx(np.mean([line["score"] for line in drawn]))
    assert points[0]["gold"] == pytest.approx(np.mean([line["terms"]["gold/letters"] for line in drawn]))
    single = next(point for point in found["overoptimisation"] if point["n"] == 1)
    values = [points[0][key] for key in ("proxy", "gold", "kl")]
    assert [single[key] for key in ("proxy", "gold", "kl")] == pytest.approx(values, rel=1e-12)
    for point in points[1:]:
        own = found["models"][point["model"]]
        assert point["proxy"] == pytest.approx(own["objective/scores"]["mean"])
        assert point["gold"] == pytest.approx(own["gold/letters"]["mean"])
        assert point["kl"] == pytest.approx(own["objective/kl"]["mean"])
    assert found["models"]["pushed/step-00000004"] == found["models"]["ppo"]
    assert set(found["fits"]) == {"pushed", "best of n"}


def test_win_rates_are_counted(whole: Path) -> None:
    """By gold, from the lines: the share of prompts that a model wins, ties half; equal texts tie."""
    samples = samples_of(whole)
    base = [line for line in samples["sft"] if line["number"] == 0]
    for name, own in result(whole)["winrate"].items():
        gains = [
            mine["terms"]["gold/letters"] - theirs["terms"]["gold/letters"]
            for mine, theirs in zip(samples[name], base, strict=True)
        ]
        assert own["mean"] == pytest.approx(np.mean([(gain > 0) + (gain == 0) / 2 for gain in gains]))
        assert own["ties"] == pytest.approx(np.mean([gain == 0 for gain in gains])) and own["n"] == 13
        assert own["low"] <= own["mean"] <= own["high"]


def test_the_shape_of_a_result(whole: Path) -> None:
    found = result(whole)
    policies = ["sft", "dpo", "ipo", "ppo", *(f"pushed/step-0000000{step}" for step in (1, 2, 3, 4)), "full"]
    ours = ["about", "models", "winrate", "ratings", "pairwise", "exploitability", "preferences", "votes"]
    assert list(found) == [*ours, "overoptimisation", "fits", "at_kl", "agreement", "agreement_by_subset"]
    about = found["about"]
    assert {**about, "notes": ...} == {
        **{"reference": "sft", "baseline": "sft", "judge": "gold", "prompts": 13, "responses": 1, "temperature": 1.0},
        **{"max_new_tokens": 6, "seed": 0, "resamples": 2000, "notes": ..., "warping": {}},
    }
    assert list(found["models"]) == policies == list(found["ratings"])
    assert list(found["winrate"]) == policies[1:]
    assert set(found["preferences"]) == {*policies[1:], "rm", "reward/rm", "gold/letters"}
    common = {"gold/letters", "reward/rm", *(f"objective/{name}" for name in ("scores", "kl", "kl_per_token"))}
    common |= {f"response/{name}" for name in ("length", "eos_rate", "distinct_1", "duplicates")} | {"perplexity"}
    for own in found["models"].values():
        assert common <= set(own) <= common | {"response/distinct_2"}
        for interval in own.values():
            assert set(interval) == {"mean", "low", "high"} and interval["low"] <= interval["mean"] <= interval["high"]
    assert set(found["winrate"]["dpo"]) == {"mean", "low", "high", "ties", "n", "length_controlled"}
    assert set(found["winrate"]["dpo"]["length_controlled"]) == set(found["ratings"]["dpo"]) - {"elo"} | {"mean"}
    assert found["ratings"]["sft"] == {"elo": 1000.0, "low": 1000.0, "high": 1000.0}
    for point in found["overoptimisation"]:
        assert set(point) == {"series", "model", "step", "n", "kl", "proxy", "gold", "intervals"}


def test_what_was_not_asked_for_is_empty(run: Callable[..., Path]) -> None:
    found = result(run(models={"sft": "HOME/sft"}, text="HOME/rows.jsonl"))
    assert {name: value for name, value in found.items() if name not in ("about", "models")} == {
        **{name: {} for name in ("winrate", "ratings", "pairwise", "exploitability", "preferences", "votes", "fits")},
        **{"agreement": {}, "agreement_by_subset": {}},
        **{"overoptimisation": [], "at_kl": None},
    }
    assert list(found["models"]["sft"]) == ["perplexity"]


def test_responses_need_no_judge(run: Callable[..., Path]) -> None:
    folder = run(models={"sft": "HOME/sft", "dpo": "HOME/dpo"}, prompts=PROMPTS, rollout={"max_new_tokens": 6})
    own = result(folder)["models"]["dpo"]
    assert own["response/length"]["mean"] == np.mean([line["tokens"] for line in samples_of(folder)["dpo"]])
    assert not [name for name in own if not name.startswith("response/")]


def test_the_report_names_every_model(whole: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (whole / name).read_text()
        assert all(model in text for model in result(whole)["models"]), name
        assert "rm" in text and "Win rates" in text and "Preferences" in text
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("eval", "finished")
    assert {Path(parent["path"]).name for parent in manifest["parents"]} == {"sft", "dpo", "ipo", "ppo", "ppo-full", "rm"}


def test_the_terminal_has_the_table(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    models = {"sft": "HOME/sft", "dpo": "HOME/dpo", "rm": "HOME/rm"}
    folder = run(models=models, preferences=PROMPTS, **COMPARED)
    out = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(out) if line.startswith("model "))
    assert re.split(r"  +", out[head]) == ["model", "gold letters", "score", "win rate", "KL", "length", "Elo"]
    assert [line.split()[0] for line in out[head + 1 : head + 3]] == ["sft", "dpo"]
    wins = result(folder)["winrate"]["dpo"]
    assert f"  {wins['mean']:.3f} ({wins['low']:.3f} to {wins['high']:.3f})  " in out[head + 2]
    table = next(number for number, line in enumerate(out) if line.startswith("preferences "))
    accuracy = result(folder)["preferences"]["rm"]["accuracy"]
    assert [line.split()[:2] for line in out[table + 1 :] if line.startswith("rm ")] == [["rm", f"{accuracy:.3f}"]]
    assert out[-1].endswith(f"s: {folder / 'report.html'}")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(the folder whose model was loaded, how many are in memory then)."""
    found: list[tuple[str, int]] = []
    alive: list[weakref.ref[Any]] = []
    original = placement.load_model

    def noting(settings: Any, path: str, *others: Any) -> Any:
        model = original(settings, path, *others)
        alive.append(weakref.ref(model))
        found.append(
            (Path(path).parent.name if Path(path).name == "model" else Path(path).name, sum(r() is not None for r in alive))
        )
        return model

    monkeypatch.setattr(placement, "load_model", noting)
    return found


@pytest.mark.slow
def test_policies_on_one_base_cost_one_model(
    home: Path, run: Callable[..., Path], loads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six adapters visit it one by one, and are gone; its own bits are as they were."""
    hosts: list[FrozenModels] = []
    original = measure._load_frozen

    def noting(job: Any) -> FrozenModels:
        hosts.append(original(job))
        return hosts[-1]

    monkeypatch.setattr(measure, "_load_frozen", noting)
    models = {"sft": "HOME/sft", "dpo": "HOME/dpo", "pushed": "HOME/ppo/checkpoints/*", "bare": "HOME/base", "rm": "HOME/rm"}
    run(models=models, preferences=PROMPTS, **COMPARED)
    assert loads == [("base", 1)]
    (frozen,) = hosts
    assert frozen.hosts.keys() == {"reference", "reward"}
    host = frozen.hosts["reference"]
    assert frozen.hosts["reward"] is host and host.elsewhere == {}
    named = dict(host.model.named_parameters())
    roles = {match[1] for name in named if (match := re.search(r"\.lora_[AB]\.(\w+)\.", name))}
    assert roles == {"reference", "reward"} and set(host.heads) == {"reward"}
    own = {name.replace(".base_layer", ""): p for name, p in named.items() if ".lora_" not in name}
    base = load_file(home / "base" / "model.safetensors")
    assert own.keys() == base.keys() and all(torch.equal(own[name], base[name]) for name in base)


@pytest.mark.slow
def test_of_models_with_weights_of_their_own_one_is_in_memory(
    home: Path, tmp_path: Path, run: Callable[..., Path], loads: list[tuple[str, int]]
) -> None:
    """Beside the reference's base and the reward model's."""
    make_base(tmp_path / "other", seed=1)
    sections = {"lora": {"r": 4}, "train": {"steps": 1, "save_every": None}, "data": {"max_length": 96}}
    parts = tmp_path / "other", home / "pairs.jsonl", tmp_path / "judge"
    assert rlhf("train-rm", write_recipe(tmp_path / "x.yaml", *parts, **sections)) == 0
    loads.clear()
    gc.collect()
    reward = [{"model": str(tmp_path / "judge")}]
    models = {"sft": "HOME/sft", "full": "HOME/ppo-full/checkpoints/*", "again": "HOME/ppo-full", "dpo": "HOME/dpo"}
    run(models=models, **COMPARED | {"reward": reward})
    assert [name for name, _ in loads] == ["base", "other", *(f"step-0000000{k}" for k in (1, 2, 3)), "ppo-full"]
    assert max(count for _, count in loads) == 3


def test_a_model_named_twice(run: Callable[..., Path]) -> None:
    models = {"sft": "HOME/sft", "copy": "HOME/sft", "dpo": "HOME/dpo", "dpo-copy": "HOME/dpo"}
    folder = run(models=models, **COMPARED | {"rollout": TWICE, "winrate": {"baseline": "sft", "judge": "reward"}})
    samples, found = samples_of(folder), result(folder)
    assert samples["copy"] == samples["sft"] and samples["dpo-copy"] == samples["dpo"] != samples["sft"]
    assert len({(line["row"], line["number"]) for line in samples["copy"]}) == 26
    own = found["winrate"]["copy"]
    assert (own["mean"], own["ties"], own["n"]) == (0.5, 1.0, 26) and own["low"] < 0.5 < own["high"]
    assert found["winrate"]["dpo"] == found["winrate"]["dpo-copy"] != own
    assert found["ratings"]["copy"]["elo"] == pytest.approx(1000, abs=1e-6)
    assert found["ratings"]["dpo"]["elo"] == pytest.approx(found["ratings"]["dpo-copy"]["elo"], abs=1e-6)
    assert found["models"]["copy"] == found["models"]["sft"] and found["models"]["sft"]["objective/kl"]["mean"] == 0


def test_the_order_of_the_models_changes_no_sample(whole: Path, run: Callable[..., Path]) -> None:
    models = {"full": "HOME/ppo-full", "ppo": "HOME/ppo", "sft": "HOME/sft"}
    found = samples_of(run(models=models, **COMPARED))
    known = samples_of(whole)
    assert list(found) == list(models)
    for name, own in found.items():
        assert_close([line for line in known[name] if line["number"] == 0], own)


def test_two_responses_to_a_prompt_differ_and_the_first_stays(whole: Path, run: Callable[..., Path]) -> None:
    own = samples_of(
        run(models={"ppo": "HOME/ppo", "sft": "HOME/sft"}, **COMPARED | {"rollout": TWICE | {"missing_eos_penalty": 0.5}})
    )
    (first, second) = ([line for line in own["ppo"] if line["number"] == k] for k in (0, 1))
    known = samples_of(whole)["ppo"]
    assert [line["response"] for line in first] == [line["response"] for line in known]
    assert sum(a["response"] != b["response"] for a, b in zip(first, second, strict=True)) > 6


WORDY = "".join(
    [
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant with quite some more words\n' }}{% endif %}",
    ]
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`template`: the base's tokens with another template; `tokens`: another tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    for name, tokenizer in {
        "template": tiny_tokenizer(eos="<|im_end|>", template=ZEPHYR),
        "tokens": tiny_tokenizer(eos="</s>", metaspace=True, template=ZEPHYR),
    }.items():
        make_base(folder / name, seed=2)
        for file in folder.joinpath(name).glob("*token*"):
            file.unlink()
        tokenizer.save_pretrained(folder / name)
    return folder


def test_models_with_other_tokens_or_another_template(foreign: Path, whole: Path, run: Callable[..., Path]) -> None:
    """No KL and no implicit rewards, but scores and win rates; the others' figures stay."""
    models = {"sft": "HOME/sft", "template": f"{foreign}/template", "tokens": f"{foreign}/tokens", "ppo": "HOME/ppo"}
    folder = run(models=models, **COMPARED, preferences=PROMPTS, text="HOME/rows.jsonl")
    found = result(folder)
    assert notes(folder) == [
        "template, tokens: other tokens or another chat template than sft: no KL can be measured, and their lengths and "
        "perplexities are not comparable."
    ]
    for name in ("template", "tokens"):
        assert "objective/kl" not in found["models"][name] and "objective/scores" in found["models"][name]
        assert found["winrate"][name]["n"] == 13 and name in found["ratings"]
        assert {line["reference_logp"] for line in samples_of(folder)[name]} == {None}
    assert set(found["preferences"]) == {"ppo", "reward/rm", "gold/letters"}
    assert {k: v for k, v in found["models"]["ppo"].items() if k != "perplexity"} == {
        k: v for k, v in result(whole)["models"]["ppo"].items() if k != "perplexity"
    }
    assert found["preferences"]["reward/rm"] == result(whole)["preferences"]["reward/rm"]
    for name in ("report.md", "report.html"):
        assert "no KL can be measured" in (folder / name).read_text()


@pytest.mark.parametrize(
    ("name", "why"), [("template", "has other tokens or another chat template than sft"), ("rm", "is a reward model")]
)
def test_what_has_no_kl_is_refused(
    name: str, why: str, foreign: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded, alone or as one of several."""
    models = {"sft": "HOME/sft", "ppo": "HOME/ppo", "rm": "HOME/r[m]", "template": f"{foreign}/template"}
    run(models=models, **COMPARED, preferences=PROMPTS, compare_at_kl={"a": ["ppo"], "b": [name]}, code=2)
    own = "rm/rm" if name == "rm" else name
    assert f"compare_at_kl.b: {own} {why}: it has no KL. remove it" in capsys.readouterr().err


def test_gold_at_equal_kl(home: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run's checkpoints against two models, asked after the responses were drawn: points are means of the metrics."""
    models = {"sft": "HOME/sft", "ppo": "HOME/ppo/checkpoints/*", "dpo": "HOME/dpo", "full": "HOME/ppo-full"}
    folder = run(models=models, **COMPARED)
    before = result(folder)
    recipe = write_eval(
        folder.with_suffix(".yaml"), home, models=models, **COMPARED, compare_at_kl={"a": ["ppo"], "b": ["dpo", "full"]}
    )
    capsys.readouterr()
    assert rlhf("eval", recipe, "--resume") == 0
    found, said, report = result(folder), capsys.readouterr().out, (folder / "report.md").read_text()
    assert before["at_kl"] is None and before == found | {"at_kl": None}
    own, figures = found["at_kl"], found["models"]
    lines = []
    for series, names in ((own["a"], [name for name in figures if name.startswith("ppo/")]), (own["b"], ["dpo", "full"])):
        assert sorted(name for point in series["points"] for name in point["models"]) == sorted(["sft", *names])
        for point in series["points"]:
            for key, metric in (("kl", "objective/kl"), ("gold", "gold/letters")):
                mean = np.mean([figures[name][metric]["mean"] for name in point["models"]])
                assert point[key]["mean"] == pytest.approx(mean, abs=1e-6)
        lines.append([(max(point["kl"]["mean"], 0) ** 0.5, point["gold"]["mean"]) for point in series["points"]])
    assert (own["a"]["name"], own["b"]["name"]) == ("ppo", "dpo and full") and min(map(len, lines)) > 1
    across = np.linspace(0, min(line[-1][0] for line in lines), 5)[1:]
    a, b = (np.interp(across, *np.array(line).T) for line in lines)
    assert [at["kl"]["mean"] for at in own["matched"]] == pytest.approx(across**2)
    assert [at["difference"]["mean"] for at in own["matched"]] == pytest.approx(a - b)
    assert own["mean"]["low"] <= own["mean"]["mean"] <= own["mean"]["high"]
    assert "gold than dpo and full at equal KL: the difference is" in said
    assert "\n## Gold at equal KL\n" in report and "| KL, nats | ppo | dpo and full | ppo less dpo and full |" in report


def test_gold_that_says_nothing_of_some_is_not_compared_at_equal_kl(tmp_path: Path, run: Callable[..., Path]) -> None:
    (tmp_path / "some.py").write_text("def gold(prompts, responses):\n    return [None, *map(len, responses[1:])]\n")
    models = {"sft": "HOME/sft", "ppo": "HOME/ppo", "dpo": "HOME/dpo"}
    sections = {"prompts": PROMPTS, "rollout": {"max_new_tokens": 6}, "gold": [{"function": f"{tmp_path}/some.py:gold"}]}
    folder = run(models=models, reference="sft", compare_at_kl={"a": ["dpo"], "b": ["ppo"]}, **sections)
    assert result(folder)["at_kl"] is None
    assert notes(folder) == ["Gold says nothing of some responses, so that it is not compared at equal KL."]


def test_prompts_too_long_for_one_model_are_left_out_for_all(
    home: Path, tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wordy.jinja").write_text(WORDY)
    make_base(tmp_path / "wordy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "wordy")
    tokenizer.chat_template = WORDY
    tokenizer.save_pretrained(tmp_path / "wordy")
    rows = lines(home / "pairs.jsonl")
    lengths = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True)["input_ids"])
        for row in rows
    ]
    limit = sorted(lengths)[-8] - 1 + 6
    fits = [number for number, length in enumerate(lengths) if length + 6 <= limit]
    assert 10 < len(fits) < 20
    sections = COMPARED | {"prompts": "HOME/pairs.jsonl", "max_length": limit, "max_lost": 1.0, "reward": [WAVE]}
    folder = run(models={"sft": "HOME/sft", "wordy": str(tmp_path / "wordy")}, **sections)
    found = result(folder)
    assert found["about"]["prompts"] == len(fits) == found["winrate"]["wordy"]["n"]
    left = f"{24 - len(fits)} prompts do not fit the tokens of some model, and are left out for all."
    assert left in found["about"]["notes"]
    for own in samples_of(folder).values():
        assert [line["where"] for line in own] == [f"{home / 'pairs.jsonl'}:{number + 1}" for number in fits]


def test_a_prompt_in_several_rows_is_asked_once(home: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """It is one observation: counted twice it would make intervals narrower than they are."""
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    asked = list({row["prompt"]: row for row in rows}.values())[:5]
    (tmp_path / "once.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in asked))
    (tmp_path / "twice.jsonl").write_text(
        (tmp_path / "once.jsonl").read_text() + json.dumps({"prompt": asked[0]["prompt"]}) + "\n"
    )
    sections = {"models": {"sft": "HOME/sft"}, **DRAWN}
    once, twice = (run(**sections | {"prompts": str(tmp_path / f"{name}.jsonl")}) for name in ("once", "twice"))
    assert result(once)["models"] == result(twice)["models"] and result(twice)["about"]["prompts"] == 5
    assert notes(twice) == [*notes(once), "1 rows have the prompt of another row: each prompt is asked once."]


def test_another_distribution_is_said(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It changes what is drawn, and not of which policies log-probabilities are."""
    sections = COMPARED | {"rollout": {"max_new_tokens": 6, "temperature": 0.5, "top_p": 0.9}}
    folder = run(models={"sft": "HOME/sft", "ppo": "HOME/ppo"}, **sections)
    (note,) = notes(folder)
    assert note.startswith(
        "Responses were drawn at temperature 0.5, top_p 0.9, and log-probabilities are those of the whole policies"
    )
    assert "at temperature 0.5, top_p 0.9" in capsys.readouterr().out
    assert "drawn at temperature 0.5, top_p 0.9, at most 6 tokens" in (folder / "report.md").read_text()
    assert result(folder)["about"]["warping"] == {"top_p": 0.9}
    assert result(folder)["models"]["sft"]["objective/kl"]["mean"] == 0


def usable(response: str) -> bool:
    return bool(response.strip()) and "\0" not in response


def test_ranked_rows_are_what_dpo_reads(home: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """Of all models together, the best first; cut-off and empty responses, and repeated ones, are not there."""
    path = tmp_path / "new" / "ranked.jsonl"
    rollout = {"max_new_tokens": 6, "responses_per_prompt": 4}
    folder = run("--dump-pairs", str(path), models={"sft": "HOME/sft", "ppo": "HOME/ppo"}, **COMPARED | {"rollout": rollout})
    known = [line | {"model": name} for name, own in samples_of(folder).items() for line in own]
    rows = lines(path)
    assert len(rows) > 4
    for row in rows:
        assert list(row) == ["prompt", "responses", "scores", "models"]
        assert row["scores"] == sorted(row["scores"], reverse=True) and row["scores"][0] > row["scores"][-1]
        said = [line for line in known if line["prompt"] == row["prompt"] and line["ended"] and usable(line["response"])]
        own = list({line["response"].strip(): line for line in reversed(said)}.values())  # the first of those that say the same
        assert sorted(row["responses"]) == sorted(line["response"] for line in own)
        best = max(own, key=lambda line: line["terms"]["gold/letters"])
        assert row["scores"][0] == best["terms"]["gold/letters"] == len(row["responses"][0]) / 10
        for response, model in zip(row["responses"], row["models"], strict=True):
            assert (response, model) in {(line["response"], line["model"]) for line in own}
    cut = {(line["prompt"], line["response"]) for line in known if not line["ended"]}
    assert cut and not cut & {(row["prompt"], response) for row in rows for response in row["responses"]}
    checked = write_recipe(tmp_path / "dpo.yaml", home / "sft", path, tmp_path / "run", data={"max_length": 96})
    assert rlhf("dpo", checked, "--check", "--set", "data.max_lost=0") == 0


def test_the_dump_of_an_evaluation_without_a_difference(
    home: Path, tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tied.py").write_text("def tied(prompts, responses):\n    return [1.0 for _ in responses]\n")
    sections = COMPARED | {
        "reward": [{"function": f"{tmp_path / 'tied.py'}:tied"}],
        "winrate": {"baseline": "sft", "judge": "reward"},
    }
    path = tmp_path / "ranked.jsonl"
    run(models={"sft": "HOME/sft", "ppo": "HOME/ppo"}, **sections, dump_pairs=str(path))
    assert not path.exists()
    assert f"{path}: not written, since the judge sees no difference" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_are_one(home: Path, whole: Path, tmp_path: Path) -> None:
    """Samples and figures; 13 prompts are shared 7 and 6."""
    two_ranks("eval", whole / "recipe.yaml", "--output", tmp_path / "two")
    one, two = (lines(folder / "samples.jsonl") for folder in (whole, tmp_path / "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        terms = a.pop("terms"), b.pop("terms")
        assert terms[0] == pytest.approx(terms[1], abs=1e-5)
        for key in ("logp", "reference_logp", "score"):
            assert a.pop(key) == pytest.approx(b.pop(key), abs=1e-5)
        assert a == b
    assert_close(result(whole), result(tmp_path / "two"))


def assert_close(one: Any, two: Any, place: str = "") -> None:
    """Equal, but for rounding of numbers."""
    if isinstance(one, dict):
        assert list(one) == list(two), place
        for key in one:
            assert_close(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), place
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_close(a, b, f"{place}.{number}")
    elif isinstance(one, float):
        assert one == pytest.approx(two, abs=1e-5, rel=1e-5), place
    else:
        assert one == two, place
