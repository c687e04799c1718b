"""`rlhf import`: twelve configurations of three trainers, key by key, as texts, and as far as --check; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from rlhf_cli.data.convert import LABELS
from rlhf_cli.errors import UsageError
from rlhf_cli.importing.configuration import converted
from rlhf_cli.importing.job import TABLES, asks
from rlhf_cli.recipe.load import read_keys
from rlhf_cli.recipe.suggest import OTHER_VALUES
from rlhf_cli.recipe.yaml_reader import plain
from tests.tiny import make_model, rlhf

HERE = Path(__file__).parent / "imports"
STAGES = {"sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "train-rm"}
NAMES = [f"{tool}_{stage}" for tool in ("trl", "factory", "axolotl") for stage in STAGES]

BY_HAND: dict[str, dict[str, Any]] = {
    "trl_sft": {"lora": None, "train.batch_size": 16 * 2, "train.eval_every": 1 / 2, "train.save_every": None, "seed": 42},
    "trl_dpo": {
        "train.batch_size": 4 * 4,
        "objective.sft_weight": 0.2,
        "objective.beta": 0.01,
        "lora.alpha": 16,
        "model.quantize": "4bit",
    },
    "trl_kto": {"train.warmup": 0, "train.schedule": "constant", "lora.dropout": 0.05, "lora.r": 16, "objective.lambda_u": 1.33},
    "trl_rm": {"train.steps": 400, "train.schedule": "linear", "train.warmup": 0, "lora": None, "objective.center_coef": 0.01},
    "factory_sft": {"data.holdout": 8 / (16 + 24), "lora.alpha": 2 * 8, "train.warmup": 0.1, "train.batch_size": 1 * 8},
    "factory_dpo": {"objective.kind": "simpo", "objective.beta": 0.2, "objective.gamma": 0.8, "lora.r": 8, "lora.alpha": 16},
    "factory_kto": {"lora": None, "train.learning_rate": 5e-5, "train.schedule": "constant", "objective.lambda_u": 0.5},
    "factory_rm": {"lora.r": 4, "lora.alpha": 32, "train.epochs": 3, "train.schedule": "linear", "train.eval_every": 0.333333},
    "axolotl_sft": {
        "lora": None,
        "train.optimizer": "adamw_8bit",
        "train.eval_every": 1 / (2 * 2),
        "trackers.wandb.project": "example",
    },
    "axolotl_dpo": {"train.batch_size": 2 * 4, "train.eval_every": 1 / (4 * 4), "objective.beta": 0.3, "model.quantize": "8bit"},
    "axolotl_kto": {"train.save_every": None, "objective.lambda_d": 0.2, "lora.alpha": 64, "lora.target_modules": "all-linear"},
    "axolotl_rm": {"train.save_every": 1 / 4, "train.learning_rate": 2e-4, "lora": None, "data.max_length": 2048},
}
"""What a person reads in the files, and in the trainers' own defaults."""

AS_WITHOUT = {"model_revision": "main", "lora_r": 16, "save_strategy": "steps", "eval_strategy": "steps", "dataset_dir": "."}
AS_WITHOUT |= {"finetuning_type": "lora", "bf16": "auto", "torch_dtype": "bfloat16"}
AS_WITHOUT |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
"""Values that say what is so without their keys."""


def rows_for(stage: str, count: int = 40) -> list[dict[str, Any]]:
    answered = {"prompt": "red {n}", "completion": "blue {n}"}
    row = {"dpo": {"prompt": "red {n}", "chosen": "sun {n}", "rejected": "sea {n}"}, "kto": answered | {"label": "{n}"}}
    row["train-rm"] = row["dpo"]
    return [fill(row.get(stage, answered), n) for n in range(count)]


def fill(value: Any, n: int) -> Any:
    """A row with its number in the place of {n}; a label is whether it is odd."""
    if isinstance(value, dict):
        return {key: LABELS[n % 2] if key == "label" else fill(inner, n) for key, inner in value.items()}
    return [fill(inner, n) for inner in value] if isinstance(value, list) else value.replace("{n}", str(n))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*texts: str, keys: tuple[str, str] = ("role", "content"), names: tuple[str, str] = ("user", "assistant")) -> Any:
    return [dict(zip(keys, (names[k % 2], text), strict=True)) for k, text in enumerate(texts)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The twelve files, and the rows that those name which name files."""
    monkeypatch.chdir(tmp_path)
    for path in (*HERE.glob("*.yaml"), HERE / "dataset_info.json"):
        shutil.copy(path, tmp_path)
    local = {
        "identity": {"turns": turns("red {n}", "blue {n}")},
        "questions": {"question": "fish {n}", "context": "sea", "answer": "tree {n}"},
        "pairs": {"task": "one {n}", "input": "two", "better": "sun {n}", "worse": "sea {n}"},
        "thumbs": {"prompt": "moon {n}", "completion": "bird {n}", "label": ""},
        "chats": {"conversations": turns("red {n}", "blue", keys=("from", "value"), names=("human", "gpt"))},
        "messages": {"conversation": turns("one {n}"), "chosen": turns("", "sun")[1], "rejected": turns("", "sea")[1]},
    }
    for name, row in local.items():
        write(tmp_path / f"{name}.jsonl", [fill(row, n) for n in range({"identity": 16}.get(name, 24))])
    return tmp_path


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, inner in value.items():
        found |= leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert rlhf("import", *words) == 2
    return capsys.readouterr().err


class TestTwelve:
    @pytest.mark.parametrize("name", NAMES)
    def test_recipe_and_report(self, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("import", f"{name}.yaml") == 0
        text = capsys.readouterr().out
        assert text == (HERE / "expected" / f"{name}.txt").read_text()
        found = leaves(yaml.safe_load(text))
        assert {key: found[key] for key in BY_HAND[name]} == BY_HAND[name]

    @pytest.mark.parametrize("name", NAMES)
    def test_no_key_is_lost(self, name: str, folder: Path) -> None:
        """Without any one of the keys that ask for something, another recipe or another report comes out."""
        given = plain(read_keys(Path(f"{name}.yaml")))

        def outcome(settings: dict[str, Any]) -> object:
            job = converted(Path(f"{name}.yaml"), settings, STAGES[name.split("_")[1]], 1)
            return job.values, job.assumed, job.told, job.left_out, job.refused

        asking = [key for key, value in given.items() if asks(value) and value not in (AS_WITHOUT.get(key), -1)]
        lost = [key for key in asking if outcome({other: given[other] for other in given if other != key}) == outcome(given)]
        assert set(lost) <= {"stage", "rl", "reward_model"}  # --stage says what these do

    @pytest.mark.parametrize("name", NAMES)
    def test_passes_check(self, name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With a tiny model and rows for those of the hub: nothing else is changed."""
        stage = STAGES[name.split("_")[1]]
        assert rlhf("import", f"{name}.yaml", "-o", "recipe.yaml") == 0
        recipe = yaml.safe_load(Path("recipe.yaml").read_text())
        rows, settings = write(folder / "rows.jsonl", rows_for(stage)), [f"model.path={model}"]
        for part in ("train", "eval"):
            for n, source in enumerate(recipe["data"].get(part, [])):
                local = "messages.jsonl" if source.get("columns") == {"prompt": "conversation"} else rows
                settings += [f"data.{part}.{n}.path={local}"] * (not Path(source["path"]).exists())
                settings += [f"data.{part}.{n}.split=train"] * ("split" in source)
        assert rlhf(stage, "recipe.yaml", "--check", *(word for setting in settings for word in ("--set", setting))) == 0
        assert f"{recipe['train']['learning_rate']:g}, {recipe['train'].get('schedule', 'cosine')}" in capsys.readouterr().out


class TestTools:
    def test_defaults_are_those_of_transformers(self) -> None:
        """TRL and LLaMA-Factory train with its Trainer; what they change of its defaults is said."""
        theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        ours = TABLES["defaults"]["LLaMA-Factory"]
        assert [ours[f"train.{name}"] for name in ("learning_rate", "epochs", "weight_decay", "max_grad_norm", "warmup")] == [
            theirs[name] for name in ("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "warmup_steps")
        ]
        assert (ours["seed"], ours["train.schedule"]) == (theirs["seed"], theirs["lr_scheduler_type"]) == (42, "linear")
        assert OTHER_VALUES["optimizer"]["adamw_torch_fused"] == ours["train.optimizer"]
        assert {"adamw_torch", "adamw_torch_fused"} >= {theirs["optim"]}
        different = {key: value for key, value in TABLES["defaults"]["TRL"].items() if value != ours[key]}
        assert different == {"train.learning_rate": 1e-6, "data.max_length": 1024}
        assert theirs["per_device_train_batch_size"] == 8

    def test_devices_multiply_the_batch(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("import", "trl_sft.yaml", "--gpus", "8") == 0
        text = capsys.readouterr().out
        assert "16 a device × 2 accumulated × 8 (--gpus) = 256" in text
        assert yaml.safe_load(text)["train"]["batch_size"] == 256

    def test_secrets_stay_where_they_are(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = (folder / "trl_dpo.yaml").read_text()
        (folder / "with.yaml").write_text(text + "wandb_api_key: hf_ThisIsNoRealToken\nunheard_of: hf_ThisIsNoRealToken\n")
        assert rlhf("import", "with.yaml") == 0
        out = capsys.readouterr().out
        assert "hub_token, wandb_api_key: a secret" in out
        assert "ThisIsNoRealToken" not in out

    def test_writes_once(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rlhf("import", "trl_rm.yaml", "-o", "recipe.yaml") == 0
        assert capsys.readouterr().out == "recipe.yaml: what differs stands at its top. next: rlhf train-rm recipe.yaml --check\n"
        assert refusal(capsys, "trl_rm.yaml", "-o", "recipe.yaml") == (
            "error: -o recipe.yaml: exists. give another name, or move it away\n"
        )

    @pytest.mark.parametrize(
        ("loss", "expected"),
        [
            ("sigmoid", {"kind": "dpo"}),
            ("hinge", {"kind": "hinge"}),
            ("robust", {"kind": "robust"}),
            ("bco_pair", {"kind": "bco", "decay": 1.0}),
            ("ipo", {"normalize": "token_mean"}),
            ("apo_zero", {"kind": "apo_zero"}),
            ("apo_down", {"kind": "apo_down"}),
            ("nca_pair", {"kind": "nca"}),
            ("exo_pair\nlabel_smoothing: 0.002", {"kind": "exo", "label_smoothing": 0.002}),
            ("discopop\ndiscopop_tau: 0.2", {"kind": "discopop", "tau": 0.2}),
            ("aot", {"kind": "aot"}),
            ("aot_pair", {"kind": "aot", "pairing": "unpaired"}),
            ("aot_unpaired", {"kind": "aot", "pairing": "unpaired"}),
            ("sigmoid\nuse_weighting: true", {"kind": "wpo"}),
            ("sigmoid\nuse_weighting: false", {"kind": "dpo"}),
            ("apo_zero_unpaired", {"kind": "apo_zero"}),
        ],
    )
    def test_losses(self, loss: str, expected: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = f"model_name_or_path: m\ndataset_name: a/b\noutput_dir: o\nbeta: 0.3\nloss_type: {loss}\n"
        Path("loss.yaml").write_text(lines)
        assert rlhf("import", "loss.yaml") == 0
        assert yaml.safe_load(capsys.readouterr().out)["objective"] == expected | {"beta": 0.3}

    def test_losses_that_are_not_quite_there(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """AOT with smoothed labels, weights of other losses than dpo's; and what is another weight of a pair."""
        lines = "model_name_or_path: m\ndataset_name: a/b\noutput_dir: o\n"
        for more, said in (
            ("loss_type: aot\nlabel_smoothing: 0.1\n", "label_smoothing: has no counterpart in aot"),
            ("loss_type: hinge\nuse_weighting: true\n", "'hinge with use_weighting'"),
            ("loss_type: ipo\nuse_weighting: true\n", "'ipo with use_weighting'"),
        ):
            Path("loss.yaml").write_text(lines + more)
            assert said in refusal(capsys, "loss.yaml", "--stage", "dpo")
        Path("axolotl.yaml").write_text(Path("axolotl_dpo.yaml").read_text() + "dpo_use_weighting: true\n")
        assert rlhf("import", "axolotl.yaml") == 0
        out = capsys.readouterr().out
        assert yaml.safe_load(out)["objective"]["kind"] == "wpo" and "weighs a pair by 1 at most" in out

    def test_preference_losses_without_a_reference(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """ORPO's beta there is λ of its odds ratio."""
        text = Path("factory_dpo.yaml").read_text().replace("pref_loss: simpo\nsimpo_gamma: 0.8", "pref_loss: orpo")
        Path("orpo.yaml").write_text(text)
        assert rlhf("import", "orpo.yaml") == 0
        assert yaml.safe_load(capsys.readouterr().out)["objective"] == {"kind": "orpo", "lambda": 0.2}
        Path("gkd.yaml").write_text(
            "model_name_or_path: a/student\nteacher_model_name_or_path: a/teacher\ndataset_name: a/b\noutput_dir: o\n"
            "beta: 0.3\nlmbda: 0.5\n"
        )
        assert rlhf("import", "gkd.yaml") == 0
        told = capsys.readouterr().out
        assert "left out:\n#   - lmbda\n" in told  # a mixture with the data's responses
        wanted = {"kind": "distil", "teacher": "a/teacher", "divergence": "jsd", "beta": 0.3}
        assert yaml.safe_load(told)["objective"] == wanted
        Path("simpo.yaml").write_text(Path("axolotl_dpo.yaml").read_text().replace("rl: dpo", "rl: simpo"))
        assert rlhf("import", "simpo.yaml") == 0
        assert yaml.safe_load(capsys.readouterr().out)["objective"] == {
            **{"kind": "simpo", "beta": 0.3, "gamma": 0.5},
            "sft_weight": 1.0,  # cpo_alpha is 1 there, unless the file says 0
        }

    def test_parts_of_sections_are_not_lost(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Keys inside a list of sources, of dataset_info.json, and a share of held-out rows that has a rival."""
        sources = {"datasets": [{"path": "a/b", "shards": 2}, {"id": "c/d", "config": "en"}], "seed": 1, "test_split_size": 0.1}
        Path("mix.yaml").write_text(yaml.safe_dump({"model_name_or_path": "m", "output_dir": "o", "dataset_mixture": sources}))
        assert rlhf("import", "mix.yaml", "--stage", "sft") == 0
        out = capsys.readouterr().out
        assert "Not understood, and left out:\n#   - dataset_mixture.seed, datasets.0.shards\n" in out
        assert yaml.safe_load(out)["data"]["train"] == [{"path": "a/b"}, {"path": "c/d", "name": "en"}]
        assert yaml.safe_load(out)["data"]["holdout"] == 0.1
        info = json.loads(Path("dataset_info.json").read_text())
        info["pairs"]["folder"] = "x"
        Path("dataset_info.json").write_text(json.dumps(info))
        Path("both.yaml").write_text(Path("factory_rm.yaml").read_text() + "val_size: 0.1\n")
        assert rlhf("import", "both.yaml") == 0
        out = capsys.readouterr().out
        assert "dataset_info.json: pairs: folder" in out
        assert "val_size: rows of data.eval are held out already" in out

    def test_what_gives_way_is_told(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        more = "warmup_steps: 5\nlogging_steps: 0.1\nreport_to: all\nmix_strategy: interleave_under\ninterleave_probs: 0.3,0.7\n"
        text = Path("factory_sft.yaml").read_text().replace("logging_steps: 10", "").replace("report_to: none", "")
        Path("more.yaml").write_text(text + more)
        assert rlhf("import", "more.yaml") == 0
        out = capsys.readouterr().out
        recipe = yaml.safe_load(out)
        assert recipe["train"]["warmup"] == 5
        assert [source["weight"] for source in recipe["data"]["train"]] == [0.3, 0.7]
        for line in (
            "warmup_ratio: warmup_steps goes before it",
            "logging_steps: train.log_every is a number of steps",
            "report_to: trackers are named, one by one",
            "mix_strategy: sources are mixed by the weights of data.train",
        ):
            assert f"#   - {line}\n" in out

    @pytest.mark.parametrize(
        ("entry", "stage", "columns"),
        [
            ({"columns": {"prompt": "raw"}}, "pt", {"text": "raw"}),
            ({"columns": {"prompt": "text"}}, "pt", None),
            ({"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}}, "kto", "prompt completion"),
            ({"columns": {"prompt": "question", "response": "answer", "system": "role"}}, "sft", "question answer role"),
            ({"formatting": "sharegpt"}, "sft", None),
            ({"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "thumb"}}, "kto", {"label": "thumb"}),
            ({}, "sft", None),
        ],
    )
    def test_dataset_info(
        self, entry: dict[str, Any], stage: str, columns: Any, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("dataset_info.json").write_text(json.dumps({"mine": {"hf_hub_url": "a/b", "subset": "en", **entry}}))
        lines = f"stage: {stage}\nmodel_name_or_path: m\ndataset: mine\noutput_dir: o\n"
        Path("mine.yaml").write_text(lines)
        assert rlhf("import", "mine.yaml") == 0
        (source,) = yaml.safe_load(capsys.readouterr().out)["data"]["train"]
        if isinstance(columns, str):
            columns = dict(zip(("instruction", "output", "system"), columns.split(), strict=False))
        assert source == {"path": "a/b", "name": "en"} | ({"columns": columns} if columns else {})

    def test_an_adapter_goes_on(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("on.yaml").write_text(Path("factory_rm.yaml").read_text() + "adapter_name_or_path: saves/sft\n")
        assert rlhf("import", "on.yaml") == 0
        out = capsys.readouterr().out
        recipe = yaml.safe_load(out)
        assert (recipe["model"]["path"], "lora" in recipe) == ("saves/sft", False)
        assert "lora_rank, lora_alpha, model_name_or_path: the adapter that it starts from goes on as it is" in out

    def test_dataset_may_be_a_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("file.yaml").write_text(Path("factory_dpo.yaml").read_text().replace("dataset: pairs", "dataset: pairs.jsonl"))
        assert rlhf("import", "file.yaml") == 0
        assert yaml.safe_load(capsys.readouterr().out)["data"]["train"] == [{"path": "pairs.jsonl"}]


class TestRefusals:
    def test_all_at_once(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        changed = (
            Path("factory_dpo.yaml").read_text().replace("dataset: pairs", "dataset: nowhere").replace("cosine", "polynomial")
        )
        changed = changed.replace("finetuning_type: lora", "finetuning_type: freeze").replace(
            "pref_loss: simpo", "pref_loss: kto_pair"
        )
        Path("bad.yaml").write_text(changed + "use_dora: true\nrope_scaling: linear\n")
        said = refusal(capsys, "bad.yaml").splitlines()
        assert [line.split(": ")[2] for line in said] == [
            "finetuning_type",
            "dataset",
            "use_dora",
            "rope_scaling",
            "lr_scheduler_type",
            "pref_loss",
        ]
        assert said[0] == "error: bad.yaml: finetuning_type: freeze has no counterpart. there are LoRA and all weights"
        assert "expected cosine | linear | constant, found the text 'polynomial'" in said[-2]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rate: 1\n", "no key tells which trainer it is for. expected some of TRL: dataset_name, dataset_config, "),
            (
                "dataset_name: a/b\nbase_model: m\n",
                "has keys of TRL (dataset_name) and of axolotl (base_model). keep those of one",
            ),
            ("model: {path: m}\ndata: {train: x}\n", "is a recipe already. train it: rlhf STAGE bad.yaml"),
            ("dataset_name: a/b\nbeta: 0.1\n", "no key tells its stage. add --stage sft, train-rm, dpo, ipo, kto, orpo or simpo"),
            ("dataset_name: a/b\npacking: true\ndesirable_weight: 1\n", "has keys of sft and kto. add --stage sft, "),
            (
                "reward_funcs: x\nnum_generations: 4\n",
                "grpo is not imported: its reward is code of its own. docs/importing.md says",
            ),
            ("dataset_name: [1]\npacking: true\n", "dataset_name: expected a text, found [1]"),
            ("stage: sft\ndataset: a/b\ntrain_on_prompt: true\n", "train_on_prompt: learns prompts as well"),
            ("- a\n- b\n", "expected keys such as model: and data:, found a list"),
        ],
    )
    def test_each(self, text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("bad.yaml").write_text(text)
        assert message in refusal(capsys, "bad.yaml")

    def test_a_stage_that_the_file_contradicts(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = refusal(capsys, "factory_kto.yaml", "--stage", "dpo")
        assert said == "error: factory_kto.yaml: has keys of kto, and --stage says dpo. remove one of the two\n"
        assert "--stage nonsense: is not imported" in refusal(capsys, "factory_kto.yaml", "--stage", "nonsense")

    @pytest.mark.parametrize("value", ["x", ["x"], {"x": 1}, True, 0, -1, 0.5, None, [], [[1]]])
    @pytest.mark.parametrize("name", ["trl_dpo", "factory_sft", "axolotl_sft"])
    def test_any_value_is_taken_or_refused(self, name: str, value: Any, folder: Path) -> None:
        """In the place of each key's own: an error is told as one."""
        given, refused = plain(read_keys(Path(f"{name}.yaml"))), 0
        for key in given:
            try:
                refused += bool(converted(Path(f"{name}.yaml"), {**given, key: value}, None, 1).refused)
            except UsageError:
                refused += 1
        assert refused < len(given)
