"""`rlhf train-rm` with `kind: steps`: steps are learned, kept, exported and resumed, and what they are worth is a reward."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import choose_template
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.models.load import load_tokenizer
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.reward_models import RewardModel, RewardModelScorer, StepScorer
from rlhf_cli.rollout.rewards import Answers, DenseScorer, PolicyText
from rlhf_cli.runs.card import load_lines
from rlhf_cli.runs.export import export
from tests.data.tiny_tokenizer import encode_prompt
from tests.ranks import two_ranks
from tests.tiny import (
    forget_functions,
    make_base,
    make_model,
    read_lines,
    rlhf,
    split_lines,
    write_pairs,
    write_recipe,
    write_steps,
)

STEPS = {"kind": "steps"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, steps that end in "sun" or "sea", and process reward models of them, with LoRA and without."""
    folder = tmp_path_factory.mktemp("steps")
    make_model(folder / "base", initializer_range=0.2)
    make_base(folder / "policy", seed=3)
    write_steps(folder / "steps.jsonl", 160)
    write_steps(folder / "unseen.jsonl", 60, seed=1)
    write_pairs(folder / "pairs.jsonl", 12)
    for name, lora in {"full": None, "lora": {"r": 4}}.items():
        assert train(folder, name, lora=lora) == 0
    return folder


def train(home: Path, name: str, *words: str | Path, **changes: Any) -> int:
    train = {"steps": 30, "batch_size": 16, "learning_rate": 0.003, "save_every": 10, "keep_checkpoints": 9}
    settings: dict[str, Any] = {"objective": STEPS, "train": train, "data": {"eval": str(home / "unseen.jsonl")}} | changes
    return rlhf(
        "train-rm", write_recipe(home / f"{name}.yaml", home / "base", home / "steps.jsonl", home / name, **settings), *words
    )


def card(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["reward_model"]
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_steps_are_learned(kind: str, home: Path) -> None:
    """Far better than calling all steps right, which has their share, and than their lengths, which say nothing."""
    own, labels = card(home / kind), [label for row in rows(home / "unseen.jsonl") for label in row["labels"]]
    assert own["constant"] == pytest.approx(np.mean(labels)) and 0.6 < own["constant"] < 0.8
    assert own["accuracy"] >= 0.95 and own["accuracy_low"] > 0.85
    assert own["length_baseline"]["accuracy"] < 0.8 < own["first_error"] <= 1
    assert own["length_baseline"]["of_steps"].startswith("calling steps of ")
    assert (own["pairs"], own["unit"], own["warning"]) == (len(labels), "step", None)
    last = split_lines(home / kind, "eval")[-1]
    assert last["accuracy"] == pytest.approx(own["accuracy"])
    assert own["ece"] < 0.1
    report = (home / kind / "report.md").read_text()
    for said in (
        f"Of {len(labels)} held-out steps of 60 prompts",
        "calling every step right",
        "first wrong step",
        "| confidence | steps |",
    ):
        assert said in report
    assert json.loads((home / kind / "model" / "steps.json").read_text()) == {"separator": "\n\n"}
    counted = json.loads((home / kind / "data.json").read_text())
    assert counted["eval"]["steps"] == {"kept": len(labels), "cut": 0, "right": sum(labels)}


PROMPT, TEXTS = "one two", ["red sun\n\nblue sea\n\nold one sun", "big sea", "moon\n\n\n\ntwo sun\n\n"]
COUNTS = [3, 1, 2]

ELSEWHERE = """
import json, sys
import torch
{lines}
found = []
for ids in {ids!r}:
    with torch.no_grad():
        found.append(float(model.eval()(input_ids=torch.tensor([ids])).logits[0, 0]))
print(json.dumps(found))
"""


def elsewhere(ids: list[list[int]], *loads: list[str]) -> list[list[float]]:
    """What plain transformers gives these texts in another process, loaded by each of these lines."""
    code = "".join(ELSEWHERE.format(lines="\n".join(lines), ids=ids) for lines in loads)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()[-len(loads) :]]


def answers(home: Path, policy: str = "base") -> Answers:
    """TEXTS as the policy's tokens; the last of them was cut off."""
    tokenizer = load_tokenizer(str(home / policy), None, False)
    prompt = np.array(encode_prompt(tokenizer, choose_template(tokenizer, None), PROMPT), np.int32)
    ended = [True, True, False]
    ids = [tokenizer(text + "<|im_end|>" * end)["input_ids"] for text, end in zip(TEXTS, ended, strict=True)]
    tree = Tree(prompt, np.zeros(len(prompt), bool), tuple(np.array(own, np.int32) for own in ids), 0)
    return Answers([tree], [Record(PROMPT, (), "x:1")], [TEXTS], [ended], [[len(own) for own in ids]])


def term(home: Path, model: Path, template: str | None = None, budget: int = 4096, **keys: Any) -> RewardModelScorer:
    tokenizer = load_tokenizer(str(home / "base"), None, False)
    text = PolicyText(tokenizer, choose_template(tokenizer, template), trust_remote_code=False, check=False)
    found = RewardModel.find(sections.Reward(model=str(model), **keys), "prm", "here", text)
    settings = sections.Model(path="", dtype="float32")
    scorer = found.load(FrozenModels(settings, torch.float32, torch.device("cpu")), "reward", budget)
    assert isinstance(scorer, RewardModelScorer)
    return scorer


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-np.array(z)))


def beginnings(home: Path) -> list[list[int]]:
    """Prompt and response up to the end of each step, found by searching the texts of ever longer beginnings."""
    (tree,), found = answers(home).trees, []
    tokenizer = load_tokenizer(str(home / "base"), None, False)
    for response, text in zip(tree.responses, TEXTS, strict=True):
        for step in (part.strip() for part in text.split("\n\n") if part.strip()):
            end = text.index(step) + len(step)
            count = next(k for k in range(1, len(response) + 1) if len(tokenizer.decode(response[:k].tolist())) >= end)
            found.append([*tree.prompt.tolist(), *response[:count].tolist()])
    return found


def test_another_process_has_the_same_scores(home: Path, tmp_path: Path) -> None:
    """Plain transformers on each beginning of a response alone, by the manifest's lines and of a merged export.

    A step is judged in packed rows, with other responses to the prompt beside it, as it is alone.
    """
    run = home / "lora"
    steps = [value for own in term(home, run).of_steps(answers(home).trees, None) for value in own]
    assert float(np.ptp(steps)) > 0.5
    export(run, tmp_path / "out", merge=True)
    lines = json.loads((run / "manifest.json").read_text())["load"]
    for logits in elsewhere(beginnings(home), lines, load_lines(str(tmp_path / "out"), None, None, 0)):
        assert steps == pytest.approx(sigmoid(logits), abs=1e-5)
    for model in (tmp_path / "out", run / "checkpoints" / "step-00000030", run / "model"):
        for budget in (4096, 1):
            found = term(home, model, budget=budget).of_steps(answers(home).trees, None)
            assert [len(own) for own in found] == COUNTS
            assert [value for own in found for value in own] == pytest.approx(steps, abs=1e-5)
    assert "A process reward model: σ of its score at the last token of a step" in (tmp_path / "out" / "README.md").read_text()


def test_one_number_of_several_steps(home: Path) -> None:
    steps = term(home, home / "lora").of_steps(answers(home).trees, None)
    wanted = {"min": min, "prod": np.prod, "last": lambda own: own[-1], "mean": np.mean}
    for how, rule in wanted.items():
        scorer = term(home, home / "lora", aggregate=how)
        assert scorer.score(answers(home)) == pytest.approx([rule(own) for own in steps], abs=1e-12)
        (found,) = scorer.score_rows(answers(home), None)  # type: ignore[arg-type]
        assert found == pytest.approx([rule(own) for own in steps], abs=1e-12)
    assert term(home, home / "lora").score(answers(home)) == pytest.approx([min(own) for own in steps], abs=1e-12)


@pytest.mark.parametrize("template", [None, "none"], ids=["tokens", "text"])
def test_each_step_where_it_ends(template: str | None, home: Path) -> None:
    """At the last token of the step in the policy's tokens, whether the model reads these or, of another template, the text."""
    scorer, own = term(home, home / "lora", template, per_step=True), answers(home)
    assert isinstance(scorer, StepScorer)
    tokenizer = load_tokenizer(str(home / "base"), None, False)
    placed, sizes = scorer.spread(own, tokenizer), [len(response) for response in own.trees[0].responses]
    lengths = [len(ids) - len(own.trees[0].prompt) for ids in beginnings(home)]
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), COUNTS)
    assert np.flatnonzero(placed).tolist() == [int(start) + n - 1 for start, n in zip(starts, lengths, strict=True)]
    steps = np.concatenate(scorer.parts(own))
    assert placed[placed != 0] == pytest.approx(steps, abs=1e-12)
    assert scorer.score(own) == pytest.approx(np.add.reduceat(placed, np.cumsum([0, *sizes[:-1]])))


class Given(DenseScorer):
    """What was said of steps."""

    name, separator = "given", "\n\n"

    def __init__(self, *values: list[float]) -> None:
        self.values = [np.array(own) for own in values]

    def parts(self, answers: Answers) -> list[np.ndarray]:
        return self.values


def test_as_many_steps_as_were_judged(home: Path) -> None:
    """A NaN alone, of which nothing is said, is on every token."""
    tokenizer, own = load_tokenizer(str(home / "base"), None, False), answers(home)
    first, *rest = ([1.0] * count for count in COUNTS)
    sizes = [len(response) for response in own.trees[0].responses]
    placed = Given([np.nan], *rest).spread(own, tokenizer)
    assert np.isnan(placed).tolist() == [True] * sizes[0] + [False] * sum(sizes[1:])
    with pytest.raises(UsageError, match=f"reward given: the policy's tokens have {len(first)} steps, and {len(first) + 1} were"):
        Given([1.0, *first], *rest).spread(own, tokenizer)


def test_a_resumed_run_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    again = tmp_path / "lora"
    shutil.copytree(home / "lora", again)
    (again / "manifest.json").unlink()
    for step in (20, 30):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    assert train(home, "lora", "--output", again, "--resume", lora={"r": 4}) == 0
    assert read_lines(again / "metrics.jsonl") == read_lines(home / "lora" / "metrics.jsonl")
    one, two = (run / "model" / "adapter_model.safetensors" for run in (home / "lora", again))
    assert one.read_bytes() == two.read_bytes()


def test_another_separator_is_another_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(home, "lora", "--resume", "objective.separator=\\n", lora={"r": 4}) == 2
    assert "objective.separator" in capsys.readouterr().err


def test_a_row_that_is_cut_loses_its_steps_and_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step counts if another one begins after it within 45 tokens of prompt and response."""
    data = {"max_length": 45, "overlong": "truncate-response", "max_lost": 1.0, "holdout": 0.2, "eval": None}
    assert train(home, "cut", data=data, lora={"r": 4}, train={"steps": 1}) == 0
    counted = json.loads((home / "cut" / "data.json").read_text())
    said = capsys.readouterr()
    steps = counted["train"]["steps"]
    assert steps["cut"] > 20 and steps["kept"] > 20
    assert counted["train"]["kept"] + sum(counted["train"]["dropped"].values()) + counted["eval"]["read"] == 160
    assert "steps are not learned: data.max_length cuts their rows before they end" in said.out + said.err
    assert counted["train"]["dropped"].get("no step of it is left, or its tokens have other steps than the row", 0) > 0


REWARD: dict[str, Any] = {"model": "HOME/lora", "per_step": True}
FUNCTIONS = """
def late(prompts, responses):
    return [len(r) / 7 for r in responses]

def placed(prompts, responses, tokens):
    return [[0.0] * (len(own) - 1) + [len(r) / 7] for r, own in zip(responses, tokens)]

def letters(responses, tokens):
    return [[0.1 * len(token) for token in own] for own in tokens]

def of_steps(prompts, responses, steps):
    return [None if r == "" else [float(len(step)) for step in own] for r, own in zip(responses, steps)]

def constant(prompts, responses):
    return [0.5 for _ in responses]

def short(prompts, responses):
    return [[1.0] for _ in responses]

async def alone(prompts, responses, steps):
    return [[float(len(step)) for step in steps[0]]]
"""


def rewarded(home: Path, output: Path, *terms: dict[str, Any], **more: Any) -> list[str | Path]:
    (home / "functions.py").write_text(FUNCTIONS)
    settings: dict[str, Any] = {
        "data": {"holdout": 0.3, "max_length": 96},
        "train": {"steps": 2, "batch_size": 4, "save_every": None, "eval_every": None, "learning_rate": 0.01},
        "lora": {"r": 4},
        "rollout": {"max_new_tokens": 8, "responses_per_prompt": 2},
        "reward": json.loads(json.dumps(terms).replace("HOME", str(home))),
    }
    for key, own in more.items():
        settings[key] = {**settings.get(key, {}), **own} if isinstance(own, dict) else own
    return [write_recipe(output.with_suffix(".yaml"), home / "policy", home / "pairs.jsonl", output, **settings)]


@pytest.mark.parametrize(
    "kind", ["ppo", pytest.param("rloo", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow)]
)
def test_a_number_a_token_at_the_end_gives_the_weights_of_one_a_response(kind: str, home: Path, tmp_path: Path) -> None:
    """To the bit, and in every figure."""
    forget_functions()
    for name, more in (("late", {}), ("placed", {"per": "token"})):
        reward = {"function": "HOME/functions.py:" + name, "name": "own", **more}
        assert rlhf("ppo", *rewarded(home, tmp_path / name, reward, objective={"kind": kind})) == 0
    one, other = (tmp_path / name for name in ("late", "placed"))
    assert read_lines(one / "metrics.jsonl") == read_lines(other / "metrics.jsonl")
    assert (
        one.joinpath("model/adapter_model.safetensors").read_bytes()
        == other.joinpath("model/adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_steps_as_a_reward(stage: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a response gets is the sum over its steps, gold or not; a function is asked about the same ones."""
    forget_functions()
    function = {"function": "HOME/functions.py:of_steps", "per": "step", "weight": 0.5}
    more: dict[str, Any] = {"gold": [{"function": str(home / "functions.py:alone"), "per": "step"}]}
    assert rlhf(stage, *rewarded(home, tmp_path / "run", REWARD, function, **more)) == 0
    (line, *_) = split_lines(tmp_path / "run", "train")
    assert 0 < line["reward/lora"] < 2
    assert line["objective/scores"] == pytest.approx(
        line["reward/lora"] + 0.5 * line["reward/of_steps"] * (1 - line.get("reward/of_steps/na", 0))
    )
    assert line["gold/alone"] == pytest.approx(line["reward/of_steps"] * (1 - line.get("reward/of_steps/na", 0)))
    own = json.loads((tmp_path / "run" / "manifest.json").read_text())["reward"]
    assert (own[0]["separator"], own[0]["aggregate"], own[1]["per"]) == ("\n\n", "sum", "step")
    assert "the probabilities that steps are right: each where its step ends" in capsys.readouterr().out


def test_dense_rewards_change_ppo_and_are_added_up_elsewhere(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_functions()
    reward = {"function": "HOME/functions.py:letters", "per": "token"}
    assert rlhf("ppo", *rewarded(home, tmp_path / "rloo", reward, objective={"kind": "rloo"})) == 0
    assert "kind: rloo has one return for a response: what letters gives its parts is added up" in capsys.readouterr().out
    assert rlhf("ppo", *rewarded(home, tmp_path / "ppo", reward)) == 0
    assert "is added up" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_are_one(home: Path, tmp_path: Path) -> None:
    """Steps of a model, of which each rank judges its own responses, and of a function, which one rank asks about all."""
    forget_functions()
    function = {"function": "HOME/functions.py:letters", "per": "token", "weight": 0.5}
    runs = []
    for name, start in {"one": rlhf, "two": two_ranks}.items():
        words = ["ppo", *rewarded(home, tmp_path / name, REWARD, function, train={"batch_size": 3})]
        start(*words)
        runs.append(split_lines(tmp_path / name, "train"))
    for one, two in zip(*runs, strict=True):
        for key in ("reward/lora", "reward/letters", "objective/scores", "loss", "value/explained_variance"):
            assert one[key] == pytest.approx(two[key], abs=1e-5), key


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"model": "HOME/rm", "aggregate": "min"}, {}, "scores no steps, so aggregate and per_step have no effect. remove them"),
    ({"model": "HOME/rm", "per_step": True}, {}, "scores no steps, so aggregate and per_step have no effect. remove them"),
    (REWARD | {"normalize": True}, {}, "which gives probabilities. remove it"),
    (REWARD | {"aggregate": "prod"}, {}, "reward.0.aggregate: has no effect with per_step: true. remove it"),
    (REWARD | {"per": "step"}, {}, "reward.0.per: has no effect on a reward model, it is for functions. remove it"),
    (
        {"function": "HOME/functions.py:late", "separator": "x"},
        {},
        "reward.0.separator: has no effect without per: step. remove it",
    ),
    (
        {"function": "HOME/functions.py:late", "per_step": True},
        {},
        "per_step: has no effect on a function, it is for reward models",
    ),
    ({"function": "HOME/functions.py:short", "per": "token"}, {}, "short returned 1 numbers for "),
    ({"function": "HOME/functions.py:short"}, {}, "for a response, expected a number"),
]


@pytest.mark.parametrize(("reward", "more", "message"), REFUSED)
def test_refused(
    reward: dict[str, Any], more: dict[str, Any], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_functions()
    if not (home / "rm").exists():
        path = write_recipe(home / "rm.yaml", home / "base", home / "pairs.jsonl", home / "rm", lora={"r": 4}, train={"steps": 1})
        assert rlhf("train-rm", path) == 0
    assert rlhf("ppo", *rewarded(home, tmp_path / "run", reward, **more)) == 2
    assert message in capsys.readouterr().err


def test_a_minimum_over_terms_takes_one_number_a_response(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms = REWARD, {"function": "HOME/functions.py:late"}
    assert rlhf("ppo", *rewarded(home, tmp_path / "run", *terms, reward_combine="min")) == 2
    assert "reward_combine: min takes one number a response, and a term gives several. use sum" in capsys.readouterr().err


def test_an_evaluation_has_it_as_a_term_and_not_as_one_of_its_models(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_functions()
    (home / "functions.py").write_text(FUNCTIONS)
    recipe: dict[str, Any] = {
        "models": {"policy": str(home / "policy")},
        "prompts": str(home / "pairs.jsonl"),
        "preferences": str(home / "pairs.jsonl"),
        "rollout": {"max_new_tokens": 6},
        "reward": [
            {"model": str(home / "lora"), "aggregate": "mean", "name": "mean"},
            {"model": str(home / "lora"), "per_step": True, "name": "sum"},
            {"function": str(home / "functions.py:letters"), "per": "token"},
            {"function": str(home / "functions.py:of_steps"), "per": "step"},
        ],
        "output": str(tmp_path / "eval"),
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(recipe))
    assert rlhf("eval", tmp_path / "eval.yaml") == 0
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert result["preferences"]["reward/mean"]["pairs"] == 12
    for line in rows(tmp_path / "eval" / "samples.jsonl"):
        assert 0 < line["terms"]["reward/mean"] < 1
        assert line["terms"]["reward/letters"] >= 0.1 * len(line["response"]) - 1e-9
        assert line["terms"]["reward/of_steps"] == (None if line["response"] == "" else len(line["response"].strip()))
    recipe["models"]["prm"] = str(home / "lora")
    (tmp_path / "eval.yaml").write_text(json.dumps(recipe))
    assert rlhf("eval", tmp_path / "eval.yaml", "--force") == 2
    assert "scores steps. name it as a term: reward: [{model: " in capsys.readouterr().err
