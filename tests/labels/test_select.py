"""Which pairs are asked about: the measures by expected values and by hand, and whole runs with ensembles."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.judges import asking
from rlhf_cli.labels.questions import Row
from rlhf_cli.labels.select import bounds, choose, duels, order, variances
from rlhf_cli.recipe.labels import Select
from rlhf_cli.rollout.ensembles import centred
from tests.judges.server import Serve, longer, serve
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe

__all__ = ["serve"]
GOLDEN = json.loads((Path(__file__).parent / "acquisition.json").read_text())
SCORES = [np.array(own).T for own in GOLDEN["inputs"]["reward[prompt][member][response]"]]  # (responses, members)
EXPECTED = GOLDEN["expected"]


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(asking, "BACKOFF", 0.0)


def test_expected_variances_bounds_and_favourites() -> None:
    pairs = [tuple(pair) for pair in GOLDEN["inputs"]["pairs"]]
    for at, scores in enumerate(SCORES):
        found = variances(scores)
        assert [found[pair] for pair in pairs] == pytest.approx(EXPECTED["variance"][at], abs=1e-9)
        ordered = order(np.array([found[pair] for pair in pairs]), "uncertainty", 0)
        assert [*pairs[ordered[0]]] == EXPECTED["top pair"][at]
        for k in (1, 2):
            assert bounds(scores, k) == pytest.approx(EXPECTED[f"upper bound k={k}"][at], abs=1e-9)
            assert bounds(scores, k).argmax() == EXPECTED[f"chosen by upper bound k={k}"][at]
        favourites = EXPECTED["favourite of each member"][at]
        # Of all ordered pairs of members, those whose favourites are i and j.
        drawn = [{a, b} for a in favourites for b in favourites]
        assert [duels(scores)[pair] for pair in pairs] == pytest.approx([drawn.count({*pair}) / 16 for pair in pairs])


ROWS = [Row(10 + n, f"p{n}", tuple("abcde"), labels=None) for n in range(len(SCORES))]


def chosen(by: Any, n: int, scores: Any = SCORES, seed: int = 0, k: float = 1.0) -> list[tuple[int, tuple[int, ...], float]]:
    found = choose(ROWS, scores, Select(by=by, ensemble=["x"], n=n, k=k), seed)
    return [(each["row"], tuple(each["pair"]), each["value"]) for each in found]


def best_of_each_first(every: list[tuple[float, int, tuple[int, int]]]) -> list[tuple[float, int, tuple[int, int]]]:
    """The best pair of each row, the largest of them first, then the second best ones, and so on."""
    left, found = sorted(every, reverse=True), []
    while left:
        turn = [next(each for each in left if each[1] == row) for row in dict.fromkeys(each[1] for each in left)]
        found += turn
        left = [each for each in left if each not in turn]
    return found


def test_uncertainty_and_optimism_take_the_largest_but_no_second_pair_of_a_prompt_before_all_have_one() -> None:
    every = [
        (v, 10 + at, pair) for at, own in enumerate(SCORES[:3]) for pair, v in _variances(own).items()
    ]  # they agree on row 13
    largest, found = best_of_each_first(every)[:7], [each for each in chosen("uncertainty", 9) if each[0] != 13]
    assert len({row for _, row, _ in largest[:3]}) == 3 and largest[3][0] > largest[2][0]  # a second one beats another's first
    assert [(row, pair) for row, pair, _ in found] == [(row, pair) for _, row, pair in largest]
    assert [value for *_, value in found] == pytest.approx([value for value, *_ in largest])
    own = [each - each.mean(0) for each in SCORES]  # centred, so that a member's constant is nothing
    both = [
        (upper[i] + upper[j], 10 + at, (i, j))
        for at, each in enumerate(own)
        for upper in [[np.mean(r) + 2 * np.std(r) for r in each]]
        for i, j in combinations(range(5), 2)
    ]
    assert [(row, pair) for row, pair, _ in chosen("optimism", 7, own, k=2)] == [
        (row, pair) for _, row, pair in best_of_each_first(both)[:7]
    ]


def test_labels_that_exist_are_not_asked_for_again_and_their_prompts_come_last() -> None:
    first = [each[:2] for each in chosen("uncertainty", 40)]
    (row, (i, j)), other = first[0], first[4]
    # The same texts in another order and another row's number; a pair of a prompt that nobody asks about says nothing.
    known = [Row(0, f"p{row - 10}", ("abcde"[j], f" {'abcde'[i]}")), Row(1, "p99", ("a", "b"))]
    for by, scores in (("uncertainty", SCORES), ("random", None)):
        found = [each["row"] for each in choose(ROWS, scores, Select(by=by, ensemble=["x"], n=40), 0, known)]  # type: ignore[arg-type]
        assert len(found) == 39 and row not in found[:3] and row in found[3:7]
    left = choose(ROWS, SCORES, Select(by="uncertainty", ensemble=["x"], n=40), 0, known)
    assert (row, [i, j]) not in [(each["row"], each["pair"]) for each in left]
    assert other in [(each["row"], tuple(each["pair"])) for each in left]


def _variances(scores: np.ndarray) -> dict[tuple[int, int], float]:
    """Member by member."""
    differences = {(i, j): [a - b for a, b in zip(scores[i], scores[j], strict=True)] for i, j in combinations(range(5), 2)}
    return {pair: float(np.var(own)) for pair, own in differences.items()}


def test_a_members_constant_changes_no_centred_choice() -> None:
    """Bradley–Terry leaves one free for each prompt; without centring the upper bounds would follow it."""
    moved = [own + np.array([3.0, -7.0, 0.5, 100.0]) for own in SCORES]
    tables = [[centred(each.T, [5]) for each in own] for own in (SCORES, moved)]
    for by in ("optimism", "uncertainty", "thompson"):
        # Of row 13 all members say the same, and rounding alone tells its pairs apart.
        one, other = ([each[:2] for each in chosen(by, 10, own) if each[0] != 13] for own in tables)
        assert one == other and len(one) >= 7


def test_duels_are_drawn_as_often_as_members_have_them() -> None:
    """First draws over seeds against the probabilities; where all members agree there is no duel; no pair comes twice."""
    weights = {(10 + at, pair): duels(own)[pair] for at, own in enumerate(SCORES) for pair in combinations(range(5), 2)}
    total = sum(weights.values())
    first = [chosen("thompson", 1, seed=seed)[0][:2] for seed in range(2000)]
    for pair, weight in weights.items():
        share = weight / total
        assert first.count(pair) / 2000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000) + 1e-9)
    every = [each[:2] for each in chosen("thompson", 1000)]
    assert len(every) == len(set(every)) == sum(weight > 0 for weight in weights.values())
    assert not any(row == 13 for row, _ in every)


def test_random_pairs() -> None:
    assert chosen("random", 6, None) == chosen("random", 6, None)
    assert chosen("random", 6, None) != chosen("random", 6, None, seed=1)
    first = [chosen("random", 1, None, seed=seed)[0][:2] for seed in range(1200)]
    assert max(first.count(pair) for pair in set(first)) < 60 and len(set(first)) == 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reward models on one base, one with two members, and rows with three responses."""
    folder = tmp_path_factory.mktemp("select")
    make_model(folder / "base", initializer_range=0.2)
    write_pairs(folder / "pairs.jsonl", 16)
    for name, own in {"rm1": {"seed": 1}, "rm2": {"seed": 2}, "both": {"objective": {"members": 2}}}.items():
        settings: dict[str, Any] = {"lora": {"r": 4}, "train": {"steps": 3, "save_every": 3, "learning_rate": 0.02}, **own}
        words = write_recipe(folder / f"{name}.yaml", folder / "base", folder / "pairs.jsonl", folder / name, **settings)
        assert rlhf("train-rm", words) == 0
    rows = [{"prompt": f"red fish {n}", "responses": [f"blue sun {n}", f"old sea {n} tree", "new"]} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plain_score(run: Path, member: str, prompt: str, response: str) -> float:
    """By plain transformers and PEFT, less the mean and over the deviation that the run recorded."""
    manifest = json.loads((run / "manifest.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "model" / member)
    base = AutoModelForSequenceClassification.from_pretrained(manifest["base_model"]["path"], num_labels=1)
    model = PeftModel.from_pretrained(base, run / "model" / member).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
    ).rstrip("\n")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model.config.pad_token_id = model.base_model.config.pad_token_id = len(tokenizer) - 1
    with torch.no_grad():
        score = float(model(ids).logits[0, 0])
    card = manifest["reward_model"]
    card = card["members"][int(member[-1])] if member else card
    return (score - card["score_mean"]) / card["score_std"]


def label(home: Path, out: Path, url: str, *options: str, **select: Any) -> int:
    recipe = {
        "rows": str(home / "rows.jsonl"),
        "judge": {"endpoint": url, "model": "m", "retries": 0},
        "select": {"by": "uncertainty", "ensemble": [str(home / "rm1"), str(home / "rm2")], "n": 5, **select},
        "output": str(out),
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return rlhf("label", path, *options)


def expected_variances(home: Path, members: list[tuple[str, str]]) -> dict[tuple[int, int, int], float]:
    """(row, i, j) → the variance of the difference, of every pair."""
    found = {}
    for number, row in enumerate(read_lines(home / "rows.jsonl")):
        own = [[plain_score(home / run, name, row["prompt"], text) for run, name in members] for text in row["responses"]]
        found |= {(number, i, j): float(np.var(np.subtract(own[i], own[j]))) for i, j in combinations(range(3), 2)}
    return found


def test_the_members_of_one_run_are_an_ensemble(serve: Serve, home: Path, tmp_path: Path) -> None:
    assert label(home, tmp_path / "out", serve(longer).url, ensemble=[str(home / "both")], n=18) == 0
    expected = expected_variances(home, [("both", "member-0"), ("both", "member-1")])
    found = {(each["row"], *each["pair"]): each["value"] for each in read_lines(tmp_path / "out" / "selected.jsonl")}
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(found.values()) > 1e-3


def test_only_the_chosen_pairs_are_asked_about_and_a_resumed_run_keeps_them(serve: Serve, home: Path, tmp_path: Path) -> None:
    model = serve(longer)
    assert label(home, tmp_path / "out", model.url) == 0
    picked = read_lines(tmp_path / "out" / "selected.jsonl")
    expected = expected_variances(home, [("rm1", ""), ("rm2", "")])
    best = sorted((max(expected[row, i, j] for i, j in combinations(range(3), 2)) for row in range(6)), reverse=True)
    assert [each["value"] for each in picked] == pytest.approx(best[:5], abs=1e-4)
    assert all(each["value"] == pytest.approx(expected[each["row"], *each["pair"]], abs=1e-4) for each in picked)
    parents = json.loads((tmp_path / "out" / "manifest.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [str(home / "rm1"), str(home / "rm2")]
    assert len(model.asked) == 10 and len(read_lines(tmp_path / "out" / "preferences.jsonl")) == 5
    # What was chosen is not chosen again: here it is another choice that is found on the disk.
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "verdicts.jsonl").unlink()
    (tmp_path / "out" / "selected.jsonl").write_text(json.dumps(picked[4]) + "\n")
    assert label(home, tmp_path / "out", model.url, "--resume") == 0
    (kept,) = read_lines(tmp_path / "out" / "verdicts.jsonl")
    assert (kept["row"], sorted(kept["order"])) == (picked[4]["row"], picked[4]["pair"])


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"by": "random"}, "select.ensemble: has no effect with by: random"),
        ({"ensemble": []}, "select.ensemble: uncertainty is that of reward models"),
        ({"k": 2.0}, "select.k: has no effect with by: uncertainty"),
        ({"ensemble": ["HOME/rm1"]}, "one reward model, and nobody disagrees"),
        ({"ensemble": ["HOME/base", "HOME/rm1"]}, "is a language model, a policy and not a reward model"),
    ],
)
def test_what_selects_nothing(
    select: dict[str, Any], words: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = {k: [each.replace("HOME", str(home)) for each in v] if isinstance(v, list) else v for k, v in select.items()}
    assert label(home, tmp_path / "out", "http://127.0.0.1:9/v1", "--check", **select) == 2
    assert words in " ".join(capsys.readouterr().err.split())
