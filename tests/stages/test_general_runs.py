"""`rlhf train-rm` with `kind: general`: a circle is learned, kept, exported and resumed, and its probabilities are a reward."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import choose_template
from rlhf_cli.models.heads import pair_scores
from rlhf_cli.models.load import load_tokenizer
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.rollout.rewards import Answers, PolicyText
from rlhf_cli.runs.card import load_lines
from rlhf_cli.runs.export import export
from tests.tiny import WORDS, make_base, read_lines, rlhf, split_lines, write_pairs, write_recipe

CIRCLE = ("red", "blue", "green")
"""Each beats the next one, and the last one beats the first."""


def write_circle(path: Path, count: int, seed: int) -> Path:
    """Prompts of two words, and two responses, which are words of the circle."""
    draw = np.random.default_rng(seed)
    rows = []
    for k in range(count):
        pair = {"chosen": CIRCLE[k % 3], "rejected": CIRCLE[(k + 1) % 3]}
        rows.append(json.dumps({"prompt": " ".join(draw.choice(WORDS, 2)), **pair}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs of the circle, and general models of it, with LoRA and without; prompts of other stages."""
    folder = tmp_path_factory.mktemp("general")
    make_base(folder / "base")
    write_circle(folder / "circle.jsonl", 400, 0)
    write_circle(folder / "unseen.jsonl", 60, 1)
    write_pairs(folder / "pairs.jsonl", 12)
    (folder / "wins.py").write_text(WINS)
    for name, lora in {"full": None, "lora": {"r": 4}}.items():
        assert train(folder, name, {"kind": "general", "width": 4}, lora=lora) == 0
    return folder


def train(home: Path, name: str, objective: dict[str, Any], *words: str | Path, **sections: Any) -> int:
    train = {"steps": 40, "batch_size": 16, "learning_rate": 0.002, "save_every": 10, "keep_checkpoints": 9}
    data = {"eval": str(home / "unseen.jsonl")}
    parts = home / f"{name}.yaml", home / "base", home / "circle.jsonl", home / name
    return rlhf("train-rm", write_recipe(*parts, objective=objective, train=train, data=data, **sections), *words)


def card(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["reward_model"]
    return found


def test_the_circle_is_learned(home: Path) -> None:
    """Of held-out pairs: almost all by the general model, at most two thirds by scores."""
    assert train(home, "scores", {"kind": "bradley_terry"}, lora=None) == 0
    assert card(home / "full")["accuracy"] >= 0.95
    assert card(home / "scores")["accuracy"] <= 2 / 3 < card(home / "full")["accuracy_low"]
    report = (home / "full" / "report.md").read_text()
    assert "triples of responses to a prompt it puts" in report
    assert card(home / "scores")["triples"] is None


def test_the_rows_of_a_prompt_make_triples(home: Path, tmp_path: Path) -> None:
    """All three pairs of each prompt are held out: every triple is a circle."""
    rows = [
        json.dumps({"prompt": f"{word} one", "chosen": CIRCLE[k], "rejected": CIRCLE[(k + 1) % 3]})
        for word, k in product(WORDS, range(3))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    words = write_recipe(
        tmp_path / "more.yaml",
        home / "full",
        home / "circle.jsonl",
        tmp_path / "more",
        lora=None,
        objective={"kind": "general", "width": 4},
        data={"eval": str(tmp_path / "rows.jsonl")},
        train={"steps": 1, "learning_rate": 1e-6},
    )
    assert rlhf("train-rm", words) == 0
    assert (card(tmp_path / "more")["cyclic"], card(tmp_path / "more")["triples"]) == (16, 16)
    assert "Of 16 triples of responses to a prompt it puts 16 in a circle" in (tmp_path / "more" / "report.md").read_text()


TEXTS = [("one two", text) for text in (*CIRCLE, "red sea", "big", "old one")]

ELSEWHERE = """
import json, sys
from pathlib import Path
import torch
{lines}
chat = lambda x, y: [{{"role": "user", "content": x}}, {{"role": "assistant", "content": y}}]
texts = [tokenizer.apply_chat_template(chat(*pair), tokenize=False).rstrip() for pair in {texts!r}]
ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]
with torch.no_grad():
    print(json.dumps([model.eval()(input_ids=each).logits[0].tolist() for each in ids]))
"""


def elsewhere(*loads: list[str]) -> np.ndarray:
    """What plain transformers gives in another process, loaded by each of these lines, (models, 6, width)."""
    code = "".join(ELSEWHERE.format(lines="\n".join(lines), texts=TEXTS) for lines in loads)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return np.array([json.loads(line) for line in found.stdout.splitlines()[-len(loads) :]])


def probabilities_of_term(home: Path, model: Path) -> np.ndarray:
    """(6, 6) probabilities that the model gives as a term of a reward; it reads the texts of a policy with another template."""
    tokenizer = load_tokenizer(str(home / "base"), None, False)
    text = PolicyText(tokenizer, choose_template(tokenizer, "none"), trust_remote_code=False, check=False)
    term = RewardModel.find(sections.Reward(model=str(model)), "gpm", "here", text)
    settings = sections.Model(path="", dtype="float32")
    scorer = term.load(FrozenModels(settings, torch.float32, torch.device("cpu")), "reward", 4096)
    pairs = list(product([text for _, text in TEXTS], repeat=2))
    record = Record(TEXTS[0][0], (), "here")
    found = scorer.score(Answers([], [record] * 36, [list(pair) for pair in pairs], [[True, True]] * 36))[::2].reshape(6, 6)
    each = scorer.score(Answers([], [record], [[text for _, text in TEXTS]], [[True] * 6]))
    assert each == pytest.approx((found.sum(1) - 0.5) / 5, abs=1e-6), "a mean over the others"
    return found


def test_another_process_has_the_same_probabilities(home: Path, tmp_path: Path) -> None:
    """Plain transformers on the adapter by its manifest's lines, and on a merged export, which is a term of a reward too."""
    wanted = probabilities_of_term(home, home / "lora")
    assert float(np.ptp(wanted)) > 0.5 and wanted.diagonal().tolist() == [0.5] * 6
    lines = json.loads((home / "lora" / "manifest.json").read_text())["load"]
    export(home / "lora", tmp_path / "out", merge=True)
    merged = load_lines(str(tmp_path / "out"), None, None, 0)
    for vectors in elsewhere(lines, merged):
        assert vectors.shape == (6, 4)
        found = 1 / (1 + np.exp(-pair_scores(vectors[:, None], vectors[None], 0.1)))
        assert float(np.abs(found - wanted).max()) < 1e-4
    assert float(np.abs(probabilities_of_term(home, tmp_path / "out") - wanted).max()) < 1e-4
    assert float(np.abs(probabilities_of_term(home, home / "lora" / "checkpoints" / "step-00000040") - wanted).max()) < 1e-6
    assert "A general preference model: the first of two responses" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    again = tmp_path / "lora"
    shutil.copytree(home / "lora", again)
    (again / "manifest.json").unlink()
    for step in (30, 40):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    assert train(home, "lora", {"kind": "general", "width": 4}, "--output", again, "--resume", lora={"r": 4}) == 0
    assert read_lines(again / "metrics.jsonl") == read_lines(home / "lora" / "metrics.jsonl")
    one, two = (run / "model" / "adapter_model.safetensors" for run in (home / "lora", again))
    assert one.read_bytes() == two.read_bytes()


WINS = """
def scores(prompts, responses):
    return [float(len(text)) for text in responses]
"""

REWARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"rollout": {"max_new_tokens": 4, "responses_per_prompt": 3}}),
    "sppo": ("dpo", {"objective": {"kind": "sppo"}, "rollout": {"max_new_tokens": 4, "responses_per_prompt": 3}}),
    "dno": ("dpo", {"objective": {"kind": "dno"}, "rollout": {"max_new_tokens": 4, "responses_per_prompt": 2}}),
    "grpo": ("ppo", {"objective": {"kind": "grpo"}, "rollout": {"max_new_tokens": 4, "responses_per_prompt": 3}}),
    "ppo": ("ppo", {"rollout": {"max_new_tokens": 4, "responses_per_prompt": 2}}),
}


def rewarded(home: Path, name: str, output: Path, **more: Any) -> list[str | Path]:
    stage, sections = REWARDED[name]
    settings: dict[str, Any] = {
        "data": {"holdout": 0.3},
        "train": {"steps": 2, "batch_size": 3, "save_every": None, "eval_every": None},
        "lora": {"r": 4},
        "reward": [{"model": str(home / "lora")}],
        **sections,
    }
    for key, own in more.items():
        settings[key] = {**settings.get(key, {}), **own} if isinstance(own, dict) else own
    return [stage, write_recipe(output.with_suffix(".yaml"), home / "base", home / "pairs.jsonl", output, **settings)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("sppo", "dno"))) for name in REWARDED])
def test_as_a_reward(name: str, home: Path, tmp_path: Path) -> None:
    """Every response's probability against the others of its prompt: their mean is ½, of the held-out ones too."""
    assert rlhf(*rewarded(home, name, tmp_path / "run")) == 0
    lines = [*split_lines(tmp_path / "run", "train"), *split_lines(tmp_path / "run", "eval")]
    assert [line["reward/lora"] for line in lines] == pytest.approx([0.5] * len(lines), abs=1e-9)
    (own,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["reward"]
    assert own["tau"] == 0.1 and "mean" not in own


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alone": ("ppo", {"rollout": {"responses_per_prompt": 1}}, "set rollout.responses_per_prompt to 2 or more"),
    "normalized": ("dpo", {"reward": [{"model": "HOME/lora", "normalize": True}]}, ", which gives probabilities. remove it"),
    "scored": ("sppo", {"reward": [{"length": {"max": 9}}]}, "gives scores, and kind sppo wants wins. name a general preference"),
    "a function that scores": ("dno", {"reward": [{"function": "HOME/wins.py:scores"}]}, "or a function with compares: true"),
    "no wins": (
        "dno",
        {"reward": [{"function": "HOME/wins.py:scores", "compares": True}]},
        "expected the probability to win, from 0 to 1",
    ),
    "watched": (
        "dno",
        {"train": {"keep_best": {"metric": "reward/lora", "mode": "max"}}},
        "train.keep_best.metric: the mean of reward/lora is always ½",
    ),
    "watched gold": (
        "dno",
        {
            "gold": [{"function": "HOME/wins.py:scores", "compares": True}],
            "train": {"stop_if": {"gold/scores": {"above": 0.9}}},
        },
        "the mean of gold/scores is always ½: it compares a prompt's responses with each other. watch another metric",
    ),
    "combined": ("dpo", {"reward": [{"model": "HOME/lora", "combine": "min"}]}, "without members; remove combine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_a_reward(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, sections, message = REFUSED[name]
    sections = json.loads(json.dumps(sections).replace("HOME", str(home)))
    assert rlhf(*rewarded(home, stage, tmp_path / "run", **sections)) == 2
    assert message in capsys.readouterr().err


def test_heads_do_not_change_their_kind(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither does a general model go on as scores, nor in another width; and an odd width is none."""
    for objective, message in (
        ({"kind": "bradley_terry"}, "its head gives 4 numbers a response, and this objective wants 1"),
        ({"kind": "general"}, "its head gives 4 numbers a response, and this objective wants 8"),
        ({"kind": "general", "width": 5}, "5 is odd, and the numbers are taken two by two. write an even one"),
    ):
        assert train(home, "again", objective, model={"path": str(home / "lora")}) == 2
        assert message in capsys.readouterr().err


def test_probabilities_disagree_with_nobody(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "label.yaml"
    recipe.write_text(
        f"rows: {home / 'pairs.jsonl'}\njudge: {{people: {{annotators: [ann]}}}}\noutput: {tmp_path / 'labels'}\n"
        f"select: {{by: uncertainty, n: 2, ensemble: [{home / 'lora'}, {home / 'full'}]}}\n"
    )
    assert rlhf("label", recipe, "--check") == 2
    assert "compares two responses, and has no scores that could disagree. name others" in capsys.readouterr().err


def test_an_evaluation_measures_it(home: Path, tmp_path: Path) -> None:
    """As one of the models and as a term: as often right as its card says, on the same rows."""
    recipe = tmp_path / "eval.yaml"
    models = {"sft": home / "base", "gpm": home / "lora"}
    recipe.write_text(
        json.dumps(
            {
                "models": {name: str(path) for name, path in models.items()},
                "preferences": str(home / "unseen.jsonl"),
                "reward": [{"model": str(home / "lora"), "name": "term"}],
                "output": str(tmp_path / "eval"),
            }
        )
    )
    assert rlhf("eval", recipe) == 0
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["preferences"]
    for name in ("gpm", "reward/term"):
        assert found[name]["accuracy"] == card(home / "lora")["accuracy"]
        assert found[name]["ece"] == pytest.approx(card(home / "lora")["ece"], abs=1e-6)
