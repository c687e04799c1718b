"""The recipe of an evaluation: its defaults and spellings, what its keys must agree on, and the exact words of each refusal."""

# ruff: noqa: E501  (a refusal is one line)

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_cli import cli
from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.dump import dump_recipe, one_line, refuse_changes
from rlhf_cli.recipe.evaluations import EvalRecipe, Winrate
from rlhf_cli.recipe.help import key_table
from rlhf_cli.recipe.keys import keys_of, walk
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.sections import EvalSampling, EvalSource, Judge, PolicySampling, Reward, Sampling

ROOT = Path(__file__).parents[2]
MODELS = "output: runs/e\nmodels: {sft: runs/sft, dpo: runs/dpo}\n"
PAIRWISE = "reward: [{model: rm}, {judge: {path: m, mode: pairwise}}]\nrollout: {responses_per_prompt: 2}\n"
HALF = "compares the responses of one model with each other (mode: pairwise), so that every model has ½. name that judge here, {endpoint: …} or {path: …}, or set its mode: score"
GOOD = MODELS + "prompts: p.jsonl\n"
SCORED = GOOD + "reward: [{model: runs/rm}]\n"
JUDGED = SCORED + "gold: [{function: 'g.py:true'}]\n"
FULL = """\
models: {sft: runs/sft, ppo: runs/ppo/checkpoints/*}
reference: sft
prompts: [a.jsonl, {path: b.jsonl, limit: 3}]
preferences: {path: c.jsonl, holdout: 0.1, columns: {prompt: 'yes'}}
text: d.jsonl
rollout: {max_new_tokens: 48, temperature: 0.7, responses_per_prompt: 4, missing_eos_penalty: 1}
reward: [{model: runs/rm}, {function: 'g.py:brevity', weight: 0.5}]
reward_combine: min
gold: [{function: 'g.py:true'}]
winrate: {baseline: sft, judge: {endpoint: 'http://localhost:8000/v1', model: 'm: #1', retries: 0}}
best_of_n: [1, 4, 16]
beta: 1e-5
dump_pairs: "a: #1 'b'.jsonl"
dtype: float32
tokens_per_device: 4096
seed: 7
output: runs/e
"""


def load(folder: Path, *overrides: str, text: str = GOOD, stage: str = "eval") -> Loaded:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(stage, path, overrides)


def recipe(folder: Path, *overrides: str, text: str = GOOD) -> EvalRecipe:
    found = load(folder, *overrides, text=text).recipe
    assert isinstance(found, EvalRecipe)
    return found


def refused(folder: Path, *overrides: str, text: str = GOOD, stage: str = "eval") -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(folder, *overrides, text=text, stage=stage)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_defaults(tmp_path: Path) -> None:
    assert vars(recipe(tmp_path)) == {
        "seed": 0,
        "output": "runs/e",
        "env": {},
        "models": {"sft": "runs/sft", "dpo": "runs/dpo"},
        "reference": None,
        "prompts": [EvalSource("p.jsonl", name=None, split="train", format="auto", columns={}, limit=None, holdout=0.0)],
        "preferences": None,
        "text": None,
        "rollout": EvalSampling(max_new_tokens=128, temperature=1.0, responses_per_prompt=1, missing_eos_penalty=0.0),
        "reward": None,
        "reward_combine": "sum",
        "gold": None,
        "winrate": None,
        "best_of_n": [],
        "vote": None,
        "compare_at_kl": None,
        "beta": None,
        "dump_pairs": None,
        "dtype": "auto",
        "attention": "auto",
        "chat_template": None,
        "template_options": {},
        "empty_think": "prompt",
        "trust_remote_code": False,
        "max_length": 1024,
        "overlong": "drop",
        "control_tokens": "reject",
        "max_lost": 0.05,
        "tokens_per_device": "auto",
    }
    judged = recipe(tmp_path, "winrate.baseline=sft", "winrate.judge={endpoint: 'http://x', model: m}")
    assert judged.winrate == Winrate("sft", Judge("http://x", "m", prompt=None, timeout=60.0, retries=4, parallel=4))
    assert recipe(tmp_path, "winrate.baseline=sft", text=SCORED).winrate == Winrate("sft", "reward")


SPELLINGS = {
    "p.jsonl": [EvalSource("p.jsonl")],
    "[a, b]": [EvalSource("a"), EvalSource("b")],
    "{path: a, holdout: 0.1}": [EvalSource("a", holdout=0.1)],
    "[a, {path: b, limit: 3}]": [EvalSource("a"), EvalSource("b", limit=3)],
    "null": None,
}


@pytest.mark.parametrize("section", ["prompts", "preferences", "text"])
@pytest.mark.parametrize("written", SPELLINGS)
def test_spellings_of_sources(tmp_path: Path, section: str, written: str) -> None:
    other = "text" if section == "prompts" else "prompts"
    found = recipe(tmp_path, text=f"{MODELS}{other}: x\n{section}: {written}\n")
    assert vars(found)[section] == SPELLINGS[written]


def test_overrides_reach_into_every_section(tmp_path: Path) -> None:
    changed = recipe(
        tmp_path,
        *("models.dpo=other", "models.ppo=runs/ppo/checkpoints/*", "prompts.0.limit=3", "preferences.0.path=q.jsonl"),
        *("reward.0.weight=2", "winrate.judge.endpoint=https://y/v1", "best_of_n=[2]", "reference=sft"),
        text=SCORED + "winrate: {baseline: sft, judge: {endpoint: 'http://x', model: m}}\n",
    )
    assert changed.models == {"sft": "runs/sft", "dpo": "other", "ppo": "runs/ppo/checkpoints/*"}
    assert changed.prompts == [EvalSource("p.jsonl", limit=3)]
    assert changed.preferences == [EvalSource("q.jsonl")]
    assert changed.reward == [Reward("runs/rm", weight=2.0)]
    assert changed.winrate == Winrate("sft", Judge("https://y/v1", "m"))
    assert changed.best_of_n == [2]
    assert changed.terms == ([Reward("runs/rm", weight=2.0)], [])


def test_what_it_reads(tmp_path: Path) -> None:
    """A pattern is no path: what it stands for is found when the evaluation begins."""
    assert recipe(tmp_path, text=FULL).paths == ["runs/sft", "runs/rm", "a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]


NO_MODEL = "no model is named {}. there are sft, dpo"
NO_TERM = "no term is named {}. there is {}; a server is {{endpoint: http://…, model: …}}"
PATTERN = "models: {sft: runs/sft, ppo: runs/ppo/*}\n"
ADD_REWARD = "there is no {0} in this recipe. add {0}: [{{model: …}}] or [{{function: file.py:name}}]"
WANTS_PATH = "a path to each name: runs, checkpoints (runs/ppo/checkpoints/*: all of that run), adapters, plain models"
FEW = "one response to a prompt is no ranking. set rollout.responses_per_prompt to 2 or more"
ALONE = "output: o\nprompts: p\nreward: [{model: rm}]\nmodels: {sft: m}\n"
TEXT_ONLY = MODELS + "text: t.jsonl\n"
KL_RUNS = "models: {sft: s, dpo: d, ppo: runs/ppo/*}\noutput: o\nprompts: p\nreference: sft\ngold: [{model: g}]\n"

# (the recipe before, the line that is added) → place and words of the one fault
FAULTS = {
    # models
    ("output: o\nprompts: p\n", "models: {}"): "3: models: there is none. add `name: path` for each",
    (
        "output: o\nprompts: p\n",
        "models: [runs/a, runs/b]",
    ): "3: models: expected keys with values, found a list. give each a name: {NAME: PATH, …}",
    (
        "output: o\nprompts: p\n",
        "models:\n  - a: x\n  - b: y",
    ): "3: models: expected keys with values, found a list. give each a name: {NAME: PATH, …}",
    (
        "output: o\nprompts: p\n",
        "models: runs/a",
    ): "3: models: expected keys with values, found the text 'runs/a'. write {NAME: runs/a}",
    ("output: o\nprompts: p\n", "models:"): f"3: models: expected keys with values, found nothing. it is: {WANTS_PATH}",
    ("output: o\nprompts: p\n", "models:\n  a: null"): f"4: models.a: expected text, found null. it is: {WANTS_PATH}",
    (
        "output: o\nprompts: p\n",
        "models:\n  a: {path: x}",
    ): f"4: models.a: expected text, found keys with values. it is: {WANTS_PATH}",
    ("output: o\nprompts: p\n", "models:\n  a: ''"): "4: models.a: expected a path, found empty text. name one",
    ("output: o\nprompts: p\n", "models:\n  a: 3"): "4: models.a: expected text, found 3. put it in quotes: '3'",
    ("output: o\nprompts: p\n", "models:\n  a: ~/x"): "4: models.a: ~ is not expanded. write ${HOME}/x",
    (
        "output: o\nprompts: p\n",
        "models:\n  a: ${RLHF_TEST_UNSET}/x",
    ): "4: models.a: the environment variable RLHF_TEST_UNSET is not set. set it, or write it out",
    (
        "output: o\nprompts: p\n",
        "models:\n  b: y\n  a/b: x",
    ): "5: models.a/b: 'a/b' is no name: one word without a slash. give it another one",
    (
        "output: o\nprompts: p\n",
        "models: {best of n: x}",
    ): "3: models.best of n: 'best of n' is no name: one word without a slash. give it another one",
    ("output: o\nprompts: p\n", "models: {'': x}"): "3: models.: '' is no name: one word without a slash. give it another one",
    ("output: o\nprompts: p\n", "models:\n  a: x\n  a: y"): "5: models.a: written twice, first in line 4. keep one",
    # reference
    (GOOD, "reference: base"): f"4: reference: {NO_MODEL.format('base')}",
    (GOOD, "reference: start"): f"4: reference: {NO_MODEL.format('start')}",
    (GOOD, "reference: stf"): "4: reference: no model is named stf. did you mean sft?",
    (
        GOOD,
        "reference: {model: start}",
    ): "4: reference: expected text or null, found keys with values. it is: the name of one of the models: KL and implicit rewards are measured against it",
    (
        PATTERN + "output: o\nprompts: p\n",
        "reference: ppo",
    ): "4: reference: ppo is several models, runs/ppo/*. give the one a name of its own in models",
    (
        PATTERN + "output: o\nprompts: p\n",
        "reference: ppo/step-00000010",
    ): "4: reference: ppo is several models, runs/ppo/*. give the one a name of its own in models",
    (TEXT_ONLY, "reference: sft"): "4: reference: has no effect without prompts or preferences. name some, or remove it",
    # rows
    (MODELS, "beta: null"): "1: prompts: there is nothing to evaluate on. name prompts, preferences or text",
    (GOOD, "preferences: []"): "4: preferences: the list is empty. name a path",
    (GOOD, "preferences: 3"): "4: preferences: expected a path or a list of sources or null, found 3. put it in quotes: '3'",
    (
        GOOD,
        "preferences: [{path: a, holdout: 0.1}, b]",
    ): "4: preferences.1.holdout: all sources of a list are split alike. give each the same holdout",
    (
        GOOD,
        "preferences: {path: a.jsonl, split: test}",
    ): "4: preferences.split: has no effect on a local file, it chooses a split. remove it",
    (
        GOOD,
        "text: {path: a.csv, name: en}",
    ): "4: text.name: has no effect on a local file, it chooses a hub configuration. remove it",
    (GOOD, "text: {path: a, holdout: 1}"): "4: text.holdout: expected at most 0.9, found 1",
    (GOOD, "text: {pth: a}"): "4: text.pth: unknown key. did you mean text.path?",
    (
        MODELS,
        "prompts:\n  - a.jsonl\n  - path: b.jsonl\n    split: test",
    ): "6: prompts.1.split: has no effect on a local file, it chooses a split. remove it",
    # what has no effect without prompts, or without a reward
    (TEXT_ONLY, "rollout: {temperature: 0.5}"): "4: rollout: has no effect without prompts. name some, or remove it",
    (TEXT_ONLY, "reward: [{model: rm}]"): "4: reward: has no effect without prompts or preferences. name some, or remove it",
    (TEXT_ONLY, "gold: [{model: rm}]"): "4: gold: has no effect without prompts or preferences. name some, or remove it",
    (TEXT_ONLY, "dump_pairs: a.jsonl"): "4: dump_pairs: has no effect without prompts. name some, or remove it",
    (
        MODELS + "preferences: a\nreward: [{model: rm}]\n",
        "winrate: {baseline: sft}",
    ): "5: winrate: has no effect without prompts. name some, or remove it",
    (
        MODELS + "preferences: a\nreward: [{model: rm}]\nreference: sft\n",
        "best_of_n: [2]",
    ): "6: best_of_n: has no effect without prompts. name some, or remove it",
    (GOOD, "reward_combine: min"): "4: reward_combine: has no effect without reward. add one, or remove it",
    (SCORED, "reward_combine: min"): "5: reward_combine: has no effect on one term. remove it, or add a term to reward",
    (
        GOOD,
        "rollout: {missing_eos_penalty: 1}",
    ): "4: rollout.missing_eos_penalty: has no effect without reward. add one, or remove it",
    (
        GOOD,
        "rollout: {max_new_tokens: 1024}",
    ): "4: rollout.max_new_tokens: leaves no room for a prompt in max_length (1024). lower it, or raise max_length",
    (
        GOOD + "rollout: {max_new_tokens: 2000}\n",
        "max_length: x",
    ): "5: max_length: expected a whole number, found the text 'x'. the default is 1024",
    # terms
    (GOOD, "reward: []"): "4: reward: the list is empty. name a term, such as {model: …} or {function: file.py:name}",
    (GOOD, "reward: runs/rm"): "4: reward: expected a list or null, found the text 'runs/rm'. write [{model: runs/rm}]",
    (GOOD, "gold: g.py:true"): "4: gold: expected a list or null, found the text 'g.py:true'. write [{function: g.py:true}]",
    (GOOD, "gold: [{model: g, weight: 2}]"): "4: gold.0.weight: has no effect on a term that is only measured. remove it",
    # win rates
    (
        SCORED,
        "winrate: sft",
    ): "5: winrate: expected keys (baseline, judge, all_pairs) or null, found the text 'sft'. write {baseline: sft}",
    (
        SCORED,
        "winrate: true",
    ): "5: winrate: expected keys (baseline, judge, all_pairs) or null, found true. it is: compare the models' responses one to one",
    (SCORED, "winrate: {judge: reward}"): "5: winrate.baseline: missing. add it: the name of one of the models",
    (SCORED, "winrate: {}"): "5: winrate.baseline: missing. add it: the name of one of the models",
    (SCORED, "winrate:\n  baseline: start"): f"6: winrate.baseline: {NO_MODEL.format('start')}",
    (
        PATTERN + "output: o\nprompts: p\nreward: [{model: rm}]\n",
        "winrate: {baseline: ppo}",
    ): "5: winrate.baseline: ppo is several models, runs/ppo/*. give the one a name of its own in models",
    (ALONE, "winrate: {baseline: sft}"): "5: winrate: there is no other model to compare with the baseline. add one to models",
    (GOOD, "winrate: {baseline: sft}"): f"4: winrate.judge: {ADD_REWARD.format('reward')}",
    (SCORED, "winrate:\n  baseline: sft\n  judge: gold"): f"7: winrate.judge: {ADD_REWARD.format('gold')}",
    (
        GOOD + "gold: [{function: 'g.py:reward'}]\n",
        "winrate: {baseline: sft}",
    ): f"5: winrate.judge: {ADD_REWARD.format('reward')}",
    (
        GOOD + "reward: [{model: runs/gold}]\n",
        "winrate: {baseline: sft, judge: gold}",
    ): f"5: winrate.judge: {ADD_REWARD.format('gold')}",
    (JUDGED, "winrate: {baseline: sft, judge: golden}"): "6: winrate.judge: no term is named golden. did you mean gold?",
    (GOOD, "winrate: {baseline: sft, judge: golden}"): "4: winrate.judge: no term is named golden. did you mean gold?",
    **{
        (f"{GOOD}{PAIRWISE}", f"winrate: {{baseline: sft, judge: {judge}}}"): f"6: winrate.judge: {judge} {HALF}"
        for judge in ("judge", "reward")
    },
    (JUDGED, "winrate: {baseline: sft, judge: treu}"): "6: winrate.judge: no term is named treu. did you mean true?",
    (JUDGED, "winrate: {baseline: sft, judge: gpt-4}"): f"6: winrate.judge: {NO_TERM.format('gpt-4', 'reward, gold, rm, true')}",
    (
        GOOD,
        "winrate: {baseline: sft, judge: 'http://x/v1'}",
    ): f"4: winrate.judge: {NO_TERM.format('http://x/v1', 'no reward and no gold to name')}",
    (
        GOOD,
        "winrate: {baseline: sft, judge: {endpoint: 'x:8000/v1', model: m}}",
    ): "4: winrate.judge: endpoint: expected a URL, found x:8000/v1. write http:// or https:// before it",
    (
        GOOD,
        "winrate: {baseline: sft, judge: {endpoint: 'http://x'}}",
    ): "4: winrate.judge: an endpoint has several models. name one: model",
    (
        GOOD,
        "winrate: {baseline: sft, judge: {model: m}}",
    ): "4: winrate.judge: expected one of endpoint and path. give one",
    (
        GOOD,
        "winrate: {baseline: sft, judge: {url: 'http://x', model: m}}",
    ): "4: winrate.judge.url: unknown key. did you mean winrate.judge.endpoint?",
    (
        GOOD,
        "winrate: {baseline: sft, judge: {endpoint: 'http://x', model: m, api_key: k}}",
    ): "4: winrate.judge.api_key: unknown key. keys here: endpoint, model, path, mode, prompt, principles, draws, timeout, retries, parallel",
    (
        JUDGED,
        "winrate: {baseline: sft, judge: [gold]}",
    ): "6: winrate.judge: expected text or keys (endpoint, model, path, …), found a list. the default is reward",
    (
        ALONE + "dump_pairs: a.jsonl\n",
        "winrate: {baseline: sft, judge: {endpoint: 'http://x', model: m}}",
    ): "6: winrate: there is no other model to compare with the baseline. add one to models",
    # best of n
    (SCORED + "reference: sft\n", "best_of_n: 8"): "6: best_of_n: expected a list, found 8. write [8]",
    (SCORED + "reference: sft\n", "best_of_n: 2, 4"): "6: best_of_n: expected a list, found the text '2, 4'. write [2, 4]",
    (
        SCORED + "reference: sft\n",
        "best_of_n: true",
    ): "6: best_of_n: expected a list, found true. it is: numbers n: over-optimisation of the reference by the best-scored response of n",
    (SCORED + "reference: sft\n", "best_of_n: [2, 0]"): "6: best_of_n.1: expected at least 1, found 0",
    (SCORED + "reference: sft\n", "best_of_n: [2, 4, 2]"): "6: best_of_n: a number is there twice. keep one of each",
    (
        SCORED + "reference: sft\n",
        "best_of_n: [2.5]",
    ): "6: best_of_n.0: expected a whole number, found 2.5. it is: numbers n: over-optimisation of the reference by the best-scored response of n",
    (SCORED, "best_of_n: [2]"): "5: best_of_n: chooses among the reference's responses. name a reference",
    (GOOD + "reference: sft\n", "best_of_n: [2]"): "5: best_of_n: chooses by the score. add a reward",
    # equal KL
    (
        KL_RUNS,
        "compare_at_kl: [dpo, ppo]",
    ): "6: compare_at_kl: expected keys (a, b) or null, found a list. it is: gold of two series of models, such as two runs' checkpoints, at equal KL",
    (KL_RUNS, "compare_at_kl: {a: [dpo]}"): "6: compare_at_kl.b: missing. add it: the same for the line that a is compared with",
    (KL_RUNS, "compare_at_kl: {a: dpo, b: [ppo]}"): "6: compare_at_kl.a: expected a list, found the text 'dpo'. write [dpo]",
    (KL_RUNS, "compare_at_kl: {a: [dpo], b: [ppu]}"): "6: compare_at_kl.b: no model is named ppu. did you mean ppo?",
    (
        KL_RUNS,
        "compare_at_kl: {a: [dpo], b: [ppo/step-00000010]}",
    ): "6: compare_at_kl.b: no model is named ppo/step-00000010. there are sft, dpo, ppo",
    (KL_RUNS, "compare_at_kl: {a: [dpo], b: [ppo, sft]}"): "6: compare_at_kl.b: sft is where both series begin. remove it",
    (KL_RUNS, "compare_at_kl: {a: [dpo, ppo], b: [ppo]}"): "6: compare_at_kl.b: ppo is there twice. remove it",
    (
        KL_RUNS,
        "compare_at_kl: {a: [], b: [ppo]}",
    ): "6: compare_at_kl.a: there is no model. name one, or one that stands for the checkpoints of a run",
    (
        JUDGED,
        "compare_at_kl: {a: [sft], b: [dpo]}",
    ): "6: compare_at_kl: measures KL from the policy that both series start from. name it as the reference",
    (
        KL_RUNS.replace("gold", "reward"),
        "compare_at_kl: {a: [dpo], b: [ppo]}",
    ): "6: compare_at_kl: compares gold, what people really want. add gold: [{function: file.py:name}] or [{model: …}]",
    (
        TEXT_ONLY,
        "compare_at_kl: {a: [sft], b: [dpo]}",
    ): "4: compare_at_kl: has no effect without prompts. name some, or remove it",
    # β
    (
        GOOD + "preferences: a\n",
        "beta: 0.1",
    ): "5: beta: scales implicit rewards, which need preferences and a reference. name both, or remove it",
    (
        GOOD + "reference: sft\n",
        "beta: 0.1",
    ): "5: beta: scales implicit rewards, which need preferences and a reference. name both, or remove it",
    (GOOD + "reference: sft\npreferences: a\n", "beta: 0"): "6: beta: expected at least 1e-09, found 0",
    # preference data
    (GOOD, "dump_pairs: a.jsonl"): "4: dump_pairs: needs a judge to rank the responses. add winrate or reward",
    (SCORED, "dump_pairs: a.json"): "5: dump_pairs: expected a .jsonl file, found a.json. rename it",
    (SCORED, "dump_pairs: ''"): "5: dump_pairs: expected a path, found empty text. name one",
    (SCORED, "dump_pairs: true"): "5: dump_pairs: expected text or null, found true. put it in quotes: 'true'",
    (ALONE, "dump_pairs: a.jsonl"): f"5: dump_pairs: {FEW}",
    (ALONE + "winrate: {baseline: sft}\n", "dump_pairs: a.jsonl"): f"6: dump_pairs: {FEW}",
    # values
    (
        GOOD,
        "overlong: truncate-response",
    ): "4: overlong: expected drop | error | truncate-prompt, found the text 'truncate-response'. did you mean truncate-prompt?",
    (
        GOOD,
        "dtype: bf16",
    ): "4: dtype: expected auto | float32 | bfloat16 | float16, found the text 'bf16'. write bfloat16",
    (
        GOOD,
        "trust_remote_code: true",
    ): "4: trust_remote_code: only the command line may allow this. remove it and add --set trust_remote_code=true",
    # keys of training
    (GOOD, "model: {path: m}"): "4: model: unknown key. did you mean models?",
    (GOOD, "rollout: {engine: vllm}"): "4: rollout.engine: has no effect in eval. remove it",
    (GOOD, "rollout: {refresh: 2}"): "4: rollout.refresh: has no effect in eval. remove it",
    (
        GOOD,
        "reference:\n  cache: true",
    ): "4: reference: expected text or null, found keys with values. it is: the name of one of the models: KL and implicit rewards are measured against it",
    **{
        (GOOD, f"{name}: {value}"): f"4: {name}: has no effect in eval. remove it"
        for name, value in {
            **{"data": "{train: x.jsonl}", "train": "{steps: 4}", "lora": "auto", "objective": "{kind: dpo}"},
            **{"kl": "{coef: 1}", "value": "{}", "ptx": "{data: x}", "trackers": "[wandb]"},
        }.items()
    },
    # names that people bring along
    (GOOD, "temperature: 1"): "4: temperature: unknown key. did you mean rollout.temperature?",
    (GOOD, "rollout: {max_tokens: 8}"): "4: rollout.max_tokens: unknown key. did you mean rollout.max_new_tokens?",
    (
        GOOD,
        "rollout: {num_return_sequences: 8}",
    ): "4: rollout.num_return_sequences: unknown key. did you mean rollout.responses_per_prompt?",
    (GOOD, "baseline: sft"): "4: baseline: unknown key. did you mean winrate.baseline?",
}


@pytest.mark.parametrize(("before", "added"), FAULTS)
def test_one_fault_one_line(tmp_path: Path, before: str, added: str) -> None:
    assert refused(tmp_path, text=f"{before}{added}\n") == [f"r.yaml:{FAULTS[before, added]}"]


FINE = [
    KL_RUNS + "compare_at_kl: {a: [dpo], b: [ppo]}\n",
    SCORED + "dump_pairs: a.jsonl\n",
    ALONE + "rollout: {responses_per_prompt: 2}\ndump_pairs: a.jsonl\n",
    ALONE + "rollout: {responses_per_prompt: 2}\nwinrate: {baseline: sft, judge: rm}\ndump_pairs: a.jsonl\n",
    ALONE.replace("{sft: m}", "{ppo: runs/ppo/checkpoints/*}") + "dump_pairs: a.jsonl\n",
    GOOD + "winrate: {baseline: sft, judge: {endpoint: 'http://x', model: m}}\ndump_pairs: a.jsonl\n",
    PATTERN + "output: o\nprompts: p\nreward: [{model: rm}]\nwinrate: {baseline: sft, judge: rm}\n",
    JUDGED + "winrate: {baseline: dpo, judge: gold}\n",
    JUDGED + "winrate: {baseline: dpo, judge: 'true'}\n",
    MODELS + "preferences: a\nreference: sft\nbeta: 0.3\n",
    MODELS + "preferences: {path: org/rows, split: test, name: en}\ngold: [{model: g}]\n",
    TEXT_ONLY + "rollout: {temperature: 1}\nbest_of_n: []\nwinrate: null\n",
    GOOD + "preferences: [{path: a, holdout: 0.1}, {path: b, holdout: 0.1}]\ntext: {path: c, holdout: 0.2}\n",
    GOOD + "trust_remote_code: false\n",
    FULL,
]


@pytest.mark.parametrize("text", FINE)
def test_what_agrees(tmp_path: Path, text: str) -> None:
    load(tmp_path, text=text)


def test_several_faults_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "winrate: {baseline: c, judge: rn}\nmodels: {a: x, b: y}\nbest_of_n: [4]\nreward: [{model: rm}]\ndump_pairs: f\nprompts: p\n"
    assert refused(tmp_path, "seed=x", text=text) == [
        "r.yaml:1: output: missing. add it: the run folder",
        "r.yaml:1: winrate.baseline: no model is named c. there are a, b",
        "r.yaml:1: winrate.judge: no term is named rn. did you mean rm?",
        "r.yaml:3: best_of_n: chooses among the reference's responses. name a reference",
        "r.yaml:5: dump_pairs: expected a .jsonl file, found f. rename it",
        "--set seed: expected a whole number, found the text 'x'. the default is 0",
    ]
    assert refused(tmp_path, text="output: o\nwinrate: {baseline: a}\nprompts: []\n") == [
        f"r.yaml:1: models: missing. add it: {WANTS_PATH}",
        "r.yaml:3: prompts: the list is empty. name a path",
    ]


WHOLE_FILES = {
    "": "r.yaml:1: the file is empty. a recipe needs models and output",
    "- a\n": "r.yaml:1: expected keys such as models: and output:, found a list. write `models:` at the start of a line",
}


@pytest.mark.parametrize("text", WHOLE_FILES)
def test_files_that_are_no_recipes(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text=text) == [WHOLE_FILES[text]]
    assert refused(tmp_path, text="", stage="ppo") == [
        "r.yaml:1: the file is empty. a recipe needs model.path, data.train, reward and output"
    ]


BAD_OVERRIDES = {
    "models.dpo=": f"models.dpo: expected text, found nothing. it is: {WANTS_PATH}",
    "models=runs/a": "models: expected keys with values, found the text 'runs/a'. write {NAME: runs/a}",
    "prompts.1.limit=3": "prompts.1: no such position: prompts has 1, counted from 0. use 0 to 0",
    "prompts.0.limt=3": "prompts.limt: unknown key. did you mean prompts.limit?",
    "best_of_n=8": "best_of_n: expected a list, found 8. write [8]",
    "reference=stf": "reference: no model is named stf. did you mean sft?",
    "model.path=x": "model: unknown key. did you mean models?",
    "train.steps=4": "train: has no effect in eval. remove it",
    "dump_pairs": "dump_pairs: expected KEY=VALUE. write e.g. --set seed=4",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert refused(tmp_path, override) == [f"--set {BAD_OVERRIDES[override]}"]


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ipo", "kto", "ppo"])
def test_keys_of_an_evaluation_while_training(tmp_path: Path, stage: str) -> None:
    training = "model: {path: m}\ndata: {train: x.jsonl}\noutput: o\n" + ("reward: [{model: rm}]\n" if stage == "ppo" else "")
    line = 1 + training.count("\n")
    for key in (
        "models: {a: x}",
        "prompts: a",
        "preferences: a",
        "text: a",
        "winrate: {baseline: a}",
        "best_of_n: [8]",
        "dump_pairs: a",
    ):
        what = f"r.yaml:{line}: {key.partition(':')[0]}: has no effect in {stage}. remove it"
        assert refused(tmp_path, text=f"{training}{key}\n", stage=stage) == [what]


def test_remote_code_needs_the_command_line(tmp_path: Path) -> None:
    assert recipe(tmp_path, "trust_remote_code=true").trust_remote_code is True
    assert recipe(tmp_path, "trust_remote_code=true", text=GOOD + "trust_remote_code: true\n").trust_remote_code is True


@pytest.mark.parametrize("text", [GOOD, JUDGED + "winrate: {baseline: sft, judge: gold}\n", FULL])
def test_round_trip(tmp_path: Path, text: str) -> None:
    loaded = recipe(tmp_path, text=text)
    dumped = dump_recipe(loaded, "eval")
    assert recipe(tmp_path, text=dumped) == loaded
    assert dump_recipe(recipe(tmp_path, text=dumped), "eval") == dumped
    assert dumped.startswith(
        "# every value in force; `rlhf eval THIS --output OTHER` repeats the run\nmodels:\n  sft: runs/sft\n"
    )
    assert [line.partition(":")[0] for line in dumped.splitlines()[1:] if line[0].isalpha()] == list(keys_of(EvalRecipe))


def test_environment_in_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_ROOT", "/big")
    text = GOOD.replace("runs/dpo", "'${RLHF_TEST_ROOT}/dpo/*'") + "dump_pairs: ${RLHF_TEST_ROOT}/a.jsonl\n"
    judge = "winrate: {baseline: sft, judge: {endpoint: 'http://x', model: '${RLHF_TEST_ROOT}', prompt: '${RLHF_TEST_ROOT}/q'}}\n"
    found = recipe(tmp_path, text=text + judge)
    assert found.models == {"sft": "runs/sft", "dpo": "/big/dpo/*"}
    assert found.dump_pairs == "/big/a.jsonl"
    assert found.winrate == Winrate("sft", Judge("http://x", "/big", prompt="/big/q"))


def test_the_judges_key_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-environment")
    text = FULL.replace("'m: #1'", "'${OPENAI_API_KEY}'")  # no path: it stays as it is
    dumped = dump_recipe(recipe(tmp_path, text=text), "eval")
    assert "sk-secret" not in dumped
    assert "    model: ${OPENAI_API_KEY}\n" in dumped


MAY = [
    *(
        "models.sft=other",
        "models.new=runs/new",
        "models={sft: a, b: c}",
        "winrate.baseline=ppo2",
        "winrate=null",
        "best_of_n=[2]",
    ),
    *(
        "preferences=null\nbeta=null",
        "preferences.0.limit=9",
        "text=null",
        "text=[x, y]",
        "beta=2",
        "dump_pairs=null",
        "tokens_per_device=9",
    ),
    *("output=elsewhere", "winrate.judge=gold", "winrate.judge.model=other"),
]
MAY_NOT = {
    "prompts.0.path=z.jsonl": "prompts.0.path  a.jsonl  z.jsonl",
    "prompts.1.limit=4": "prompts.1.limit  3    4",
    "rollout.temperature=0.5": "rollout.temperature  0.7  0.5",
    "rollout.responses_per_prompt=8": "rollout.responses_per_prompt  4    8",
    "reward.1.weight=2": "reward.1.weight  0.5  2.0",
    "reward_combine=sum": "reward_combine  min  sum",
    "gold.0.name=g": "gold.0.name  null  g",
    "reference=other": "reference  sft  other",
    "dtype=auto": "dtype  float32  auto",
    "max_length=99": "max_length  1024  99",
    "chat_template=none": "chat_template  null  none",
    "seed=8": "seed  7    8",
}


@pytest.mark.parametrize("override", MAY)
def test_what_a_resumed_evaluation_may_change(tmp_path: Path, override: str) -> None:
    old = dump_recipe(recipe(tmp_path, text=FULL), "eval")
    new = recipe(tmp_path, "models.ppo2=runs/ppo", *override.split("\n"), text=FULL)
    refuse_changes(old, new)


@pytest.mark.parametrize("override", MAY_NOT)
def test_what_a_resumed_evaluation_may_not_change(tmp_path: Path, override: str) -> None:
    old = dump_recipe(recipe(tmp_path, text=FULL), "eval")
    with pytest.raises(UsageError) as caught:
        refuse_changes(old, recipe(tmp_path, "models.other=runs/other", override, text=FULL), "runs/e/recipe.yaml")
    head, _, *rows = str(caught.value).splitlines()
    assert (
        head == "--resume: 1 value differs from runs/e/recipe.yaml and may not. put them back, or start another run with --output"
    )
    assert [row.split() for row in rows] == [MAY_NOT[override].split()]


ODD = [
    "a: b.jsonl",
    "#a.jsonl",
    "a #b.jsonl",
    "'a\".jsonl",
    "\\n.jsonl",
    " a.jsonl",
    "[a].jsonl",
    "*.jsonl",
    "1e5.jsonl",
    "é.jsonl",
    "=.jsonl",
]


@pytest.mark.parametrize("path", [*ODD, "😀.jsonl"])
def test_dump_pairs_of_the_command_line_wins_whatever_its_characters(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    module = ModuleType("rlhf_cli.stages.evaluate")
    module.run = lambda loaded, **flags: ran.append(loaded)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_cli.stages.evaluate", module)
    file = tmp_path / "r.yaml"
    file.write_text(SCORED + "dump_pairs: file.jsonl\n")
    assert cli.main(["eval", str(file), "--set", "dump_pairs=set.jsonl", "--dump-pairs", path]) == 0
    assert cli.main(["eval", str(file), "--set", "dump_pairs=set.jsonl"]) == 0
    assert cli.main(["eval", str(file)]) == 0
    assert [loaded.recipe.dump_pairs for loaded in ran] == [path, "set.jsonl", "file.jsonl"]
    assert ran[0].where("dump_pairs") == "--set dump_pairs"


@pytest.mark.parametrize("text", [*ODD, "😀.jsonl", "a\nb.jsonl", "\u2028\x85\x7f.jsonl", "yes", "null", "1e5", "", "$X"])
def test_one_line_reads_back(tmp_path: Path, text: str) -> None:
    written = one_line(text)
    assert "\n" not in written
    found: Any = load(tmp_path, f"reward.0.name={one_line(f'n{text}')}", f"reward.0.revision={written}", text=SCORED).recipe
    assert found.reward == [Reward("runs/rm", name=f"n{text}", revision=text)]


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--dump-pairs" in shown
    lines = key_table("eval").splitlines()
    assert all(f"  {line}".rstrip() in shown for line in lines)
    listed = {line.split(":")[0].strip() for line in lines[1:] if line[:30].strip()}
    assert listed == {dotted.rpartition(".")[2] for dotted, _ in walk(EvalRecipe)}
    assert max(map(len, lines)) <= 77
    text = " ".join(" ".join(lines).split())
    assert "models: * a path to each name" in text
    assert "best_of_n: [] numbers n" in text
    assert "judge: reward reward: the score" in text


def test_help_speaks_of_a_policys_training_in_training_alone() -> None:
    assert keys_of(Sampling).keys() | {"engine"} == keys_of(PolicySampling).keys()
    words = ("ppo kinds", "rloo")
    assert [word in " ".join(key_table("eval").split()) for word in words] == [False, False]
    assert [word in " ".join(key_table("ppo").split()) for word in words] == [True, True]


LIGHT = """
import contextlib, io, sys
from rlhf_cli.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [main(["eval", "--help"]), main(["eval", sys.argv[1]])]
print(codes, [name for name in ("torch", "transformers", "numpy", "datasets", "matplotlib", "rich") if name in sys.modules])
"""


def test_help_and_recipe_errors_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("modles: {}\n")
    command = [sys.executable, "-c", LIGHT, str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[0, 2] []\n", "")
