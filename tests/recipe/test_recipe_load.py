"""Recipes that load, recipes that do not, and the exact words of each refusal."""

# ruff: noqa: E501  (a refusal is one line)

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.dump import dump_recipe
from rlhf_cli.recipe.load import Loaded, load_recipe
from rlhf_cli.sections import KeepBest, Lora, Source, StopRule

GOOD = "model: {path: m}\noutput: runs/a\ndata: {train: x.jsonl}\n"
KEYS = "keys here: model, lora, data, train, objective, rollout, seed, output, env, trackers"


def load(folder: Path, text: str | bytes, *overrides: str, output: str | None = None) -> Loaded:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("sft", path, overrides, output)


def refused(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The lines of the refusal, the folder's name left out."""
    with pytest.raises(UsageError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# what is added to GOOD, which has three lines, → the one line of the refusal
BAD_RECIPES = {
    # names
    "sed: 1": "r.yaml:4: sed: unknown key. did you mean seed?",
    "learning_rate: 1e-5": "r.yaml:4: learning_rate: unknown key. did you mean train.learning_rate?",
    "lr: 1e-5": "r.yaml:4: lr: unknown key. did you mean train.learning_rate?",
    "weight: 2": "r.yaml:4: weight: unknown key. did you mean data.train.weight?",
    "zzzzzz: 2": f"r.yaml:4: zzzzzz: unknown key. {KEYS}",
    "train:\n  schedul: linear": "r.yaml:5: train.schedul: unknown key. did you mean train.schedule?",
    "train: {Batch-Size: 4}": "r.yaml:4: train.Batch-Size: unknown key. did you mean train.batch_size?",
    "train: {keep_best: {metric: loss, mod: min}}": "r.yaml:4: train.keep_best.mod: unknown key. did you mean train.keep_best.mode?",
    "rollout: {temperature: 1.0}": "r.yaml:4: rollout: kind: sft learns from the responses of its data. "
    "remove it, or write kind: distil with a teacher",
    "reference: {model: start}": "r.yaml:4: reference: has no effect in sft. remove it",
    "reference: {modle: start}": "r.yaml:4: reference: has no effect in sft. remove it",
    "objective: {beta: 0.1}": "r.yaml:4: objective.beta: has no effect with kind: sft (it belongs to distil). remove it",
    "objective: {zzzz: 0.1}": "r.yaml:4: objective.zzzz: unknown key. sft takes kind",
    "objective: {kind: dpo}": "r.yaml:4: objective.kind: expected sft | distil, found the text 'dpo'. dpo is a kind of rlhf dpo",
    "objective: {kind: stf}": "r.yaml:4: objective.kind: expected sft | distil, found the text 'stf'. did you mean sft?",
    # types
    "seed: x": "r.yaml:4: seed: expected a whole number, found the text 'x'. the default is 0",
    "seed: 1.5": "r.yaml:4: seed: expected a whole number, found 1.5. the default is 0",
    "seed: true": "r.yaml:4: seed: expected a whole number, found true. the default is 0",
    "seed: null": "r.yaml:4: seed: expected a whole number, found null. remove the key for its default, 0",
    "seed:": "r.yaml:4: seed: expected a whole number, found nothing. remove the key for its default, 0",
    "seed: [1]": "r.yaml:4: seed: expected a whole number, found a list. the default is 0",
    "seed: {a: 1}": "r.yaml:4: seed: expected a whole number, found keys with values. the default is 0",
    "train: {batch_size: '8'}": "r.yaml:4: train.batch_size: expected a whole number, found the text '8'. remove the quotes",
    "train: {batch_size: 1_000}": "r.yaml:4: train.batch_size: expected a whole number, found the text '1_000'. write 1000",
    "train: {batch_size: 1e3}": "r.yaml:4: train.batch_size: expected a whole number, found 1e3. write 1000",
    "train: {learning_rate: fast}": "r.yaml:4: train.learning_rate: expected a number or null, found the text 'fast'. "
    "it is: default per stage and per LoRA or full",
    "train: {learning_rate: '1e-5'}": "r.yaml:4: train.learning_rate: expected a number or null, found the text '1e-5'. remove the quotes",
    "train: [1]": "r.yaml:4: train: expected keys (epochs, steps, batch_size, …), found a list. write keys below it",
    "train: {betas: [0.9]}": "r.yaml:4: train.betas: expected a list of 2 numbers, found 1",
    "train: {betas: [0.9, x]}": "r.yaml:4: train.betas.1: expected a number, found the text 'x'. the default is [0.9, 0.999]",
    "train: {tokens_per_device: atuo}": "r.yaml:4: train.tokens_per_device: expected a whole number or auto, found the text 'atuo'. "
    "did you mean auto?",
    "train: {schedule: cosin}": "r.yaml:4: train.schedule: expected cosine | linear | constant, found the text 'cosin'. did you mean cosine?",
    "lora: {merge_parent: yes}": "r.yaml:4: lora.merge_parent: expected true or false, found the text 'yes'. write true",
    "lora: {merge_parent: off}": "r.yaml:4: lora.merge_parent: expected true or false, found the text 'off'. write false",
    "lora: none": "r.yaml:4: lora: expected keys (r, alpha, dropout, …) or auto or null, found the text 'none'. the default is auto",
    "lora: {target_modules: [q_proj, 3]}": "r.yaml:4: lora.target_modules.1: expected text, found 3. put it in quotes: '3'",
    "trackers: wandb": "r.yaml:4: trackers: expected a list or keys with values, found the text 'wandb'. write [wandb]",
    # bounds
    "train: {batch_size: 0}": "r.yaml:4: train.batch_size: expected at least 1, found 0",
    "lora: {dropout: 1.5}": "r.yaml:4: lora.dropout: expected at most 0.99, found 1.5",
    "seed: -1": "r.yaml:4: seed: expected at least 0, found -1",
    "train: {learning_rate: .inf}": "r.yaml:4: train.learning_rate: .inf is not a finite number. give a finite one",
    "train: {weight_decay: .nan}": "r.yaml:4: train.weight_decay: .nan is not a finite number. give a finite one",
    "train: {learning_rate: 1e999}": "r.yaml:4: train.learning_rate: 1e999 is not a finite number. give a finite one",
    "train: {betas: [0.9, 1.0]}": "r.yaml:4: train.betas.1: expected at most 0.99999, found 1.0",
    # keys that must agree
    "train: {steps: 5, epochs: 2}": "r.yaml:4: train.epochs: has no effect beside train.steps. keep one of the two",
    "train: {epochs: 0}": "r.yaml:4: train.epochs: expected more than 0, found 0. use --check to train nothing",
    "train: {eval_every: 10}": "r.yaml:4: train.eval_every: has no effect without data.eval or data.holdout. set one of them, or remove it",
    "train: {save_every: 0}": "r.yaml:4: train.save_every: 0 is no interval. write null for the end alone",
    "train: {save_every: 2.5}": "r.yaml:4: train.save_every: 2.5 is neither a share below 1 nor a whole number of steps. write 2",
    "train: {warmup: 10.4}": "r.yaml:4: train.warmup: 10.4 is neither a share below 1 nor a whole number of steps. write 10",
    "train: {optimizer: sgd, betas: [0.8, 0.9]}": "r.yaml:4: train.betas: has no effect with optimizer: sgd. remove it",
    "train: {max_grad_norm: 0}": "r.yaml:4: train.max_grad_norm: 0 would erase every gradient. give a large number to clip nothing",
    "train: {keep_best: {metric: loss, mode: min}}": "r.yaml:4: train.keep_best: needs an evaluation. set data.eval or data.holdout",
    "train: {stop_if: {los: {above: 3}}}": "r.yaml:4: train.stop_if.los: no metric is named los. did you mean loss?",
    "train: {stop_if: {loss: {}}}": "r.yaml:4: train.stop_if.loss: expected exactly one of above, below, falls; found none. keep one",
    "train: {stop_if: {loss: {above: 3, falls: 0.1}}}": "r.yaml:4: train.stop_if.loss: expected exactly one of above, below, falls; "
    "found above and falls. keep one",
    # YAML
    "seed: 1\nseed: 2": "r.yaml:5: seed: written twice, first in line 4. keep one",
    "train:\n\tsteps: 4": "r.yaml:5: a tab where YAML wants spaces. indent with spaces",
    "seed: *a": "r.yaml:4: seed: aliases are not read. write out what *a stands for, or quote the text",
    "train:\n  <<: *a": "r.yaml:5: train.<<: aliases are not read. write out what *a stands for, or quote the text",
    "seed: !!python/object/apply:os.system ['exit']": "r.yaml:4: seed: tags such as !!python/object/apply:os.system are not read. remove it",
    "seed: !!int 4": "r.yaml:4: seed: tags such as !!int are not read. remove it",
    "---\nseed: 1": "r.yaml:4: a second document starts here. keep one document in a file",
    "seed": "r.yaml:4: no colon after this key. write `key: value`",
    "seed: a: 1": "r.yaml:4: a colon where none can be. check the indentation, or quote text that contains ': '",
    "trackers: [a": "r.yaml:4: not valid YAML: expected ',' or ']', but got '<stream end>'. check brackets, quotes and indentation",
    "? [a]\n: 1": "r.yaml:4: a key must be a plain word. quote values that start with [, { or *",
    'seed: "\\UFFFFFFFF"': "r.yaml:1: a quoted text has an escape that is no character. remove it",
    'seed: "\\uD800"': "r.yaml:4: seed: a quoted text has an escape that is no character. remove it",
    '"a\\n\\e[31m": 1': f"r.yaml:4: a\\n\\x1b[31m: unknown key. {KEYS}",
}


@pytest.mark.parametrize("added", BAD_RECIPES)
def test_one_fault_one_line(tmp_path: Path, added: str) -> None:
    assert refused(tmp_path, GOOD + added + "\n") == [BAD_RECIPES[added]]


SOURCES = {
    "[]": "data.train: the list is empty. name a path",
    "5": "data.train: expected a path or a list of sources, found 5. put it in quotes: '5'",
    "''": "data.train: expected a path, found empty text. name one",
    "~/x.jsonl": "data.train: ~ is not expanded. write ${HOME}/x.jsonl",
    "${RLHF_TEST_UNSET}/x.jsonl": "data.train: the environment variable RLHF_TEST_UNSET is not set. set it, or write it out",
    "{path: x.jsonl, weight: 2}": "data.train.weight: has no effect with one source. remove it",
    "{path: x.jsonl, splt: a}": "data.train.splt: unknown key. did you mean data.train.split?",
    "{path: x.jsonl, split: test}": "data.train.split: has no effect on a local file, it chooses a split. remove it",
    "{path: x.csv, revision: v1}": "data.train.revision: has no effect on a local file, it chooses a hub revision. remove it",
    "{path: x.csv, name: en}": "data.train.name: has no effect on a local file, it chooses a hub configuration. remove it",
    "{path: x.jsonl, limit: 0}": "data.train.limit: expected at least 1, found 0",
    "{path: x.jsonl, columns: {prompt: 3}}": "data.train.columns.prompt: expected text, found 3. put it in quotes: '3'",
    "{path: x.jsonl, format: prefrence}": "data.train.format: expected auto | messages | sharegpt | prompt-completion | alpaca | text"
    " | preference | hh | choice | ranked | scored | unpaired | tree | steps | prompt, found the text 'prefrence'. did you mean preference?",
    "[a.jsonl, {paht: b}]": "data.train.1.paht: unknown key. did you mean data.train.1.path?",
    "[{path: a}, {path: b, weight: 0}]": "data.train.1.weight: 0 never draws from b. remove the source",
    "{path: a, weight: 0}": "data.train.weight: 0 never draws from a. remove the source",
}


def test_a_weight_of_held_out_rows_has_no_effect(tmp_path: Path) -> None:
    text = "model: {path: m}\noutput: o\ndata:\n  train: a.jsonl\n  eval: [{path: b}, {path: c, weight: 2}]\n"
    what = "data.eval.1.weight: has no effect on held-out rows: each counts once. remove it"
    assert refused(tmp_path, text) == [f"r.yaml:5: {what}"]


@pytest.mark.parametrize("value", SOURCES)
def test_faults_of_sources(tmp_path: Path, value: str) -> None:
    text = f"model: {{path: m}}\noutput: o\ndata:\n  train: {value}\n"
    what = SOURCES[value].replace("data.train: ", "data.train.path: ") if value[:1] in "'~$" else SOURCES[value]
    assert refused(tmp_path, text) == [f"r.yaml:4: {what}"]


def test_faults_of_eval_and_holdout(tmp_path: Path) -> None:
    text = "model: {path: m, quantize: 4bit}\noutput: o\nlora: null\ndata: {train: x.jsonl, eval: y.jsonl, holdout: 0.1}\n"
    assert refused(tmp_path, text) == [
        "r.yaml:1: model.quantize: quantised weights cannot be trained, and lora is null. remove one of the two",
        "r.yaml:4: data.holdout: has no effect beside data.eval. keep one of the two",
    ]


def test_all_faults_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "seed: x\nmodel:\n  dtype: bf16\ndata: {max_lenght: 9}\ntrain:\n  steps: 2\n  epochs: 3\n  warmpu: 1\n"
    assert refused(tmp_path, text, "train.batch_size=none") == [
        "r.yaml:1: seed: expected a whole number, found the text 'x'. the default is 0",
        "r.yaml:1: output: missing. add it: the run folder",
        "r.yaml:2: model.path: missing. add it: hub id, transformers folder, or the folder of an earlier run",
        "r.yaml:3: model.dtype: expected auto | float32 | bfloat16 | float16, found the text 'bf16'. write bfloat16",
        "r.yaml:4: data.max_lenght: unknown key. did you mean data.max_length?",
        "r.yaml:4: data.train: missing. add it: a path, or a list of sources",
        "r.yaml:7: train.epochs: has no effect beside train.steps. keep one of the two",
        "r.yaml:8: train.warmpu: unknown key. did you mean train.warmup?",
        "--set train.batch_size: expected a whole number, found the text 'none'. the default is 32",
    ]


def test_a_mistyped_required_key_is_one_fault_not_two(tmp_path: Path) -> None:
    assert refused(tmp_path, "modle: {path: m}\noutput: o\ndata: {train: x}\n") == [
        "r.yaml:1: modle: unknown key. did you mean model?"
    ]
    text = "model: {path: m}\noutput: o\ndata: {train: x, evl: y}\ntrain: {keep_best: {metric: loss, mode: min}}\n"
    assert refused(tmp_path, text) == ["r.yaml:3: data.evl: unknown key. did you mean data.eval?"]


WHOLE_FILES = {
    "empty": (b"", "r.yaml:1: the file is empty. a recipe needs model.path, data.train and output"),
    "comments": (b"# nothing\n\n", "r.yaml:1: the file is empty. a recipe needs model.path, data.train and output"),
    "list": (b"\n- a\n", "r.yaml:2: expected keys such as model: and data:, found a list. write `model:` at the start of a line"),
    "text": (b"hello\n", "r.yaml:1: expected keys such as model: and data:, found text. write `model:` at the start of a line"),
    "latin-1": (b"seed: 1\noutput: caf\xe9\n", "r.yaml:2: byte 0xe9 is not UTF-8. save the file as UTF-8"),
    "nul": (b"seed: 1\noutput: a\0\n", "r.yaml:2: the character U+0000 is not allowed. remove it"),
    "large": (b"#" * 1_000_001, "r.yaml: larger than 1 MB, which no recipe is. is it a data file? a recipe names those"),
    "deep": (b"seed: " + b"[" * 5000, f"r.yaml:1: seed{'.0' * 20}: too deep or too large for a recipe. put data in data files"),
    "many": (b"seed: [" + b"1," * 9000 + b"]", "r.yaml:1: seed.4998: too deep or too large for a recipe. put data in data files"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_files_that_are_no_recipes(tmp_path: Path, name: str) -> None:
    data, line = WHOLE_FILES[name]
    assert refused(tmp_path, data) == [line]


def test_many_faults_are_cut_off(tmp_path: Path) -> None:
    lines = refused(tmp_path, GOOD + "".join(f"zzzz{index}: 1\n" for index in range(4000)))
    assert len(lines) == 101
    assert lines[-1] == "r.yaml: and 3900 more like these"


def test_an_alias_bomb_is_not_expanded(tmp_path: Path) -> None:
    bomb = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9) if n else 1}]\n" for n in range(9))
    lines = refused(tmp_path, bomb)
    assert sum("aliases are not read" in line for line in lines) == 72


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(UsageError) as caught:
            load_recipe("sft", tmp_path / name)
        return str(caught.value).replace(str(tmp_path), "T")

    (tmp_path / "quick.yaml").write_text(GOOD)
    (tmp_path / "run").mkdir()
    assert message("run") == "T/run: is a folder. name the recipe in it"
    (tmp_path / "run" / "recipe.yaml").write_text(GOOD)
    assert message("run") == "T/run: is a folder. did you mean T/run/recipe.yaml?"
    assert message("quick.yml") == "T/quick.yml: no such file. did you mean T/quick.yaml?"
    assert message("quick") == "T/quick: no such file. did you mean T/quick.yaml?"
    assert message("qiuck.yaml") == "T/qiuck.yaml: no such file. did you mean T/quick.yaml?"
    assert message("other.yaml") == "T/other.yaml: no such file. recipes there: quick.yaml"
    assert message("no/x.yaml") == "T/no/x.yaml: no such file. there is no folder T/no either"
    assert message("quick.yaml/x") == "T/quick.yaml/x: cannot be read: Not a directory. check the path"
    assert message("a" * 300) == f"T/{'a' * 300}: cannot be read: File name too long. check the path"


SPELLINGS = {
    "train: a.jsonl": [Source("a.jsonl")],
    "train: {path: a.jsonl, limit: 3}": [Source("a.jsonl", limit=3)],
    "train: [a.jsonl]": [Source("a.jsonl")],
    "train:\n    - a.jsonl\n    - {path: b, weight: 2, columns: {prompt: question}}": [
        Source("a.jsonl"),
        Source("b", weight=2.0, columns={"prompt": "question"}),
    ],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings_of_sources(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"model: {{path: m}}\noutput: o\ndata:\n  {text}\n").recipe.data.train == SPELLINGS[text]


NUMBERS = {"1e-5": 1e-5, "1E5": 1e5, "010": 10.0, "0o10": 8.0, "0x10": 16.0, "+3": 3.0, ".5": 0.5, "2.": 2.0, "1.5e+3": 1500.0}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_of_yaml_1_2(tmp_path: Path, text: str) -> None:
    value = load(tmp_path, f"{GOOD}train: {{weight_decay: {text}}}\n").recipe.train.weight_decay
    assert (value, type(value)) == (NUMBERS[text], float)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "1_000", "12:30", "2026-01-01", "0b1", "'1e-5'", '"null"', "'true'"])
def test_text_stays_text(tmp_path: Path, word: str) -> None:
    assert load(
        tmp_path, f"model: {{path: m, revision: {word}}}\noutput: o\ndata: {{train: x}}\n"
    ).recipe.model.revision == word.strip("'\"")


@pytest.mark.parametrize("text", [GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, f"%YAML 1.2\n---\n{GOOD}...\n", GOOD.rstrip("\n")])
def test_harmless_wrappings(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).recipe.output == "runs/a"


def test_unions_and_sections(tmp_path: Path) -> None:
    text = GOOD + "lora: null\ntrain:\n  stop_if: {grad_norm: {above: 20}}\n  betas: [0, 0.95]\n  eval_every: null\n"
    recipe = load(
        tmp_path, text, "data.holdout=0.1", "train.keep_best={metric: loss, mode: min}", "train.tokens_per_device=512"
    ).recipe
    assert recipe.lora is None
    assert recipe.train.stop_if == {"grad_norm": StopRule(above=20.0)}
    assert recipe.train.betas == (0.0, 0.95)
    assert recipe.train.eval_every is None
    assert recipe.train.keep_best == KeepBest("loss", "min")
    assert recipe.train.tokens_per_device == 512
    assert load(tmp_path, GOOD + "lora: {r: 4, target_modules: [a, b]}\n").recipe.lora == Lora(r=4, target_modules=["a", "b"])
    assert load(tmp_path, GOOD + "train:\n  # all commented out\n").recipe.train.batch_size == 32


def test_overrides_win_and_take_every_path(tmp_path: Path) -> None:
    text = GOOD + "train: {learning_rate: 1, epochs: 3}\nlora: auto\n"
    loaded = load(
        tmp_path,
        text,
        "train.learning_rate=1e-5",
        "train.steps=4",
        "data.train.0.limit=7",
        "data.train.columns.prompt=question",
        "lora.r=8",
        "trackers=[wandb]",
        "train.steps=5",
        output="runs/b",
    )
    recipe = loaded.recipe
    assert (recipe.train.learning_rate, recipe.train.steps, recipe.train.epochs) == (1e-5, 5, 1.0)
    assert recipe.data.train == [Source("x.jsonl", limit=7, columns={"prompt": "question"})]
    assert (recipe.lora, recipe.trackers, recipe.output) == (Lora(r=8), ["wandb"], "runs/b")
    assert load(tmp_path, "model: {path: m}\noutput: o\n", "data.train.0.path=z").recipe.data.train == [Source("z")]


def test_a_rival_from_the_command_line_is_put_out_of_force(tmp_path: Path) -> None:
    held = GOOD.replace("x.jsonl", "x.jsonl, holdout: 0.1")
    recipe = load(tmp_path, held, "data.eval=y.jsonl").recipe
    assert (recipe.data.holdout, recipe.data.eval) == (0.0, [Source("y.jsonl")])
    assert load(tmp_path, GOOD + "train: {steps: 9}\n", "train.epochs=2").recipe.train.steps is None
    assert load(tmp_path, GOOD + "train: {epochs: 9}\n", "train.steps=null").recipe.train.epochs == 9.0
    assert refused(tmp_path, GOOD, "train.epochs=2", "train.steps=3") == [
        "--set train.epochs: has no effect beside train.steps. keep one of the two"
    ]


BAD_OVERRIDES = {
    "train.learning_rat=1": "--set train.learning_rat: unknown key. did you mean train.learning_rate?",
    "batch_size=4": "--set batch_size: unknown key. did you mean train.batch_size?",
    "seed": "--set seed: expected KEY=VALUE. write e.g. --set seed=4",
    "=4": "--set =4: expected KEY=VALUE. write e.g. --set seed=4",
    "train..steps=4": "--set train..steps=4: expected KEY=VALUE. write e.g. --set seed=4",
    "seed=x": "--set seed: expected a whole number, found the text 'x'. the default is 0",
    "seed=": "--set seed: expected a whole number, found nothing. remove the key for its default, 0",
    "seed.x=1": "--set seed: expected a whole number, found keys with values. the default is 0",
    "data.train.1.path=y": "--set data.train.1: no such position: data.train has 1, counted from 0. use 0 to 0",
    "trackers=[a": "--set trackers: not valid YAML: expected ',' or ']', but got '<stream end>'. check brackets, quotes and indentation",
    "data.train=*.jsonl": "--set data.train: not valid YAML: expected alphabetic or numeric character, but found '.'. "
    "quote text that starts with * & @ % or `",
    "lora={r: 1, r: 2}": "--set lora.r: written twice. keep one",
    "seed=!!int 3": "--set seed: tags such as !!int are not read. remove it",
    "train.eval_every=3": "--set train.eval_every: has no effect without data.eval or data.holdout. set one of them, or remove it",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert refused(tmp_path, GOOD, override) == [BAD_OVERRIDES[override]]


def test_remote_code_needs_the_command_line(tmp_path: Path) -> None:
    text = GOOD.replace("path: m", "path: m, trust_remote_code: true")
    assert refused(tmp_path, text) == [
        "r.yaml:1: model.trust_remote_code: only the command line may allow this. remove it and add --set model.trust_remote_code=true"
    ]
    assert load(tmp_path, text, "model.trust_remote_code=true").recipe.model.trust_remote_code is True
    assert load(tmp_path, text.replace("true", "false")).recipe.model.trust_remote_code is False


def test_environment_in_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_ROOT", "/big")
    text = "model: {path: '${RLHF_TEST_ROOT}/m', revision: '${RLHF_TEST_ROOT}'}\noutput: ${RLHF_TEST_ROOT}/o\n"
    recipe = load(tmp_path, text + "data: {train: ['${RLHF_TEST_ROOT}/${RLHF_TEST_ROOT}.jsonl', $HOME]}\n").recipe
    assert (recipe.model.path, recipe.model.revision, recipe.output) == ("/big/m", "/big", "/big/o")
    assert [source.path for source in recipe.data.train] == ["/big//big.jsonl", "$HOME"]


def test_where(tmp_path: Path) -> None:
    text = "model:\n  path: m\noutput: o\ndata:\n  train:\n    - x.jsonl\n    - path: y\n      limit: 3\n"
    loaded = load(tmp_path, text, "train.steps=3", "data.train.1.limit=4")
    assert loaded.lines["data.train.1.path"] == 7
    assert loaded.lines["train.steps"] == 0

    def at(key: str) -> str:
        return loaded.where(key).replace(f"{tmp_path}/", "")

    assert at("model.path") == "r.yaml:2"
    assert at("model.dtype") == "r.yaml:1"
    assert at("data.train.0.path") == "r.yaml:6"
    assert at("data.train.1.split") == "r.yaml:7"
    assert at("data.train.1.limit") == "--set data.train.1.limit"
    assert at("train.steps") == "--set train.steps"
    assert at("train.batch_size") == "r.yaml"
    bare = load(tmp_path, GOOD, output="z")
    assert bare.where("data.train.0.path").endswith("r.yaml:3")
    assert bare.where("output") == "--output"


DEBRIS = [
    "null",
    "[",
    "]",
    "{",
    "}",
    ":",
    "-",
    "\n",
    "&a",
    "*a",
    "!!int",
    "'",
    '"',
    "|",
    ">",
    "#",
    "1e-5",
    "true",
    "\t",
    "\x00",
    "?",
    "---",
    "...",
    "%",
    ".inf",
    "<<",
    "${X}",
    "~",
    ",",
    "0",
    "data",
    "train",
    "'\\U00110000'",
]


def test_damaged_recipes_are_refused_in_printable_lines_or_read_back_equal(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = (
        GOOD + "seed: 3\nlora: {r: 8}\ntrain:\n  betas: [0.9, 0.95]\n  stop_if: {grad_norm: {above: 20}}\n  learning_rate: 1e-5\n"
    )
    for _ in range(300):
        start = rng.randrange(len(whole))
        text = whole[:start] + rng.choice(DEBRIS) + whole[start + rng.choice([0, 1, 3, 10]) :]
        try:
            recipe = load(tmp_path, text).recipe
        except UsageError as error:
            assert all(line.isprintable() for line in str(error).splitlines())
        else:
            assert load(tmp_path, dump_recipe(recipe, "sft")).recipe == recipe


def test_options_of_a_chat_template(tmp_path: Path) -> None:
    text = "model: {path: m, template_options: {enable_thinking: false, effort: high}}\noutput: o\ndata: {train: x.jsonl}\n"
    assert load(tmp_path, text).recipe.model.template_options == {"enable_thinking": False, "effort": "high"}
    with pytest.raises(UsageError, match=r"model\.template_options\.tools: expected true or false"):
        load(tmp_path, text, "model.template_options.tools={a: 1}")
    with pytest.raises(UsageError, match=r"model\.template_options: has no effect with chat_template: none"):
        load(tmp_path, text, "model.chat_template=none")
