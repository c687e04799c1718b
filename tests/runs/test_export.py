"""An exported folder is what plain transformers or PEFT loads, gives the run's numbers, and is refused if it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf_cli.runs import export as module
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.models.tiny_backbone import make
from tests.tiny import make_model, rlhf, write_pairs, write_recipe

LOADER = {"sft": AutoModelForCausalLM, "train-rm": AutoModelForSequenceClassification}
LORA = {"lora": {"r": 4, "alpha": 8}, "full": None}
RUNS = [(stage, kind) for stage in LOADER for kind in LORA]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a policy and of a reward model, with LoRA and without, at rates that move them far."""
    folder = tmp_path_factory.mktemp("export")
    make_model(folder / "base", initializer_range=0.2)
    rows = write_pairs(folder / "rows.jsonl", 16)
    for stage, kind in RUNS:
        run = folder / f"{stage}-{kind}"
        train = {"learning_rate": 0.02, "steps": 3, "save_every": None}
        recipe = write_recipe(run.with_suffix(".yaml"), folder / "base", rows, run, lora=LORA[kind], train=train)
        assert rlhf(stage, recipe) == 0
    return folder


@torch.no_grad()
def figures(model: Any, tokenizer: Any) -> torch.Tensor:
    """Next-token logits, or the score, of one text that ends as responses do; the head is on the last token in both."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red fish"}, {"role": "assistant", "content": "old sun"}], tokenize=False
    )
    ids = tokenizer(text.rstrip(), return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0, -1] == tokenizer.eos_token_id
    logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits[0, -1] if logits.dim() == 3 else logits[0]


def plain(home: Path, stage: str, folder: Path) -> Any:
    """The folder's model as somebody without this package loads it; the base of an adapter is told what a card tells."""
    if not (folder / "adapter_config.json").exists():
        return LOADER[stage].from_pretrained(folder)
    run = json.loads((home / f"{stage}-lora" / "manifest.json").read_text())
    options = {"num_labels": 1, "pad_token_id": run["pad_token_id"]} if stage == "train-rm" else {}
    return PeftModel.from_pretrained(LOADER[stage].from_pretrained(home / "base", **options), folder)


@pytest.mark.parametrize("merge", [False, True], ids=["as it is", "merged"])
@pytest.mark.parametrize(("stage", "kind"), RUNS)
def test_gives_the_numbers_of_the_run(
    stage: str, kind: str, merge: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, dest = home / f"{stage}-{kind}", tmp_path / "out" / "model"
    capsys.readouterr()
    assert rlhf("export", run, dest, *(["--merge"] if merge else [])) == 0
    what, numbers = ("model", "adapter")[kind == "lora" and not merge], {"sft": "log-probabilities", "train-rm": "scores"}[stage]
    assert capsys.readouterr().out.startswith(f"{what} in {dest}: {numbers} within ")
    assert (dest / "adapter_config.json").exists() == (what == "adapter")
    tokenizer = AutoTokenizer.from_pretrained(dest)
    wanted, found = (figures(plain(home, stage, folder), tokenizer) for folder in (run / "model", dest))
    assert float((wanted - found).abs().max()) < 1e-5
    base = plain(home, stage, run / "model")
    if kind == "lora":
        with base.disable_adapter():
            assert float((figures(base, tokenizer) - wanted).abs().max()) > 0.05
    if stage == "train-rm" and what == "model":
        config = json.loads((dest / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert config["pad_token_id"] == json.loads((run / "manifest.json").read_text())["pad_token_id"]
    assert [path.name for path in dest.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", ["another head", "padding that ends responses"])
def test_a_tampered_merge_of_a_reward_model_is_refused(
    fault: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eos = AutoTokenizer.from_pretrained(home / "base").eos_token_id
    save = module.save_full_reward

    def tamper(model: Any, head: torch.Tensor, pad_id: int, folder: Path) -> None:
        save(model, *((head * 1.01, pad_id) if fault == "another head" else (head, eos)), folder)

    monkeypatch.setattr(module, "save_full_reward", tamper)
    assert rlhf("export", home / "train-rm-lora", tmp_path / "out", "--merge") == 3
    assert f"error: {tmp_path / 'out'}: scores differ from the run's by " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tampered_merge_of_a_policy_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = module.shutil.copy2

    def tamper(source: Path, target: Path) -> None:
        save(source, target)
        shutil.copy(home / "base" / "model.safetensors", target.parent)

    monkeypatch.setattr(module.shutil, "copy2", tamper)
    assert rlhf("export", home / "sft-lora", tmp_path / "out", "--merge") == 3
    assert "log-probabilities differ from the run's by " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on a base whose texts end in another token than its template's turns."""
    folder = tmp_path_factory.mktemp("ends")
    base = make_model(folder / "base")
    tokenizer = tiny_tokenizer(eos="</s>", template=CHATML)
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(settings | {"eos_token_id": tokenizer.eos_token_id}))
    rows = write_pairs(folder / "rows.jsonl", 16)
    for kind in LORA:
        recipe = write_recipe(folder / "r.yaml", base, rows, folder / kind, lora=LORA[kind], train={"steps": 1})
        assert rlhf("sft", recipe) == 0
    return folder


def stops_at(folder: Path) -> set[int]:
    """Where plain `generate` stops by the settings of a folder."""
    named: int | list[int] = GenerationConfig.from_pretrained(folder).eos_token_id
    return set(named if isinstance(named, list) else [named])


@pytest.mark.parametrize("merge", [(), ("--merge",)], ids=["as it is", "merged"])
@pytest.mark.parametrize("kind", LORA)
def test_generate_stops_where_responses_end(kind: str, merge: tuple[str, ...], ends: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ends / "base")
    wanted = set(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert stops_at(ends / "base") == {tokenizer.eos_token_id} < wanted
    assert rlhf("export", ends / kind, tmp_path / "out", *merge) == 0
    for folder in (ends / kind / "model", tmp_path / "out"):
        assert stops_at(folder) == wanted
        if (folder / "config.json").exists():
            assert set(json.loads((folder / "config.json").read_text())["eos_token_id"]) == wanted


def test_an_older_run_is_exported_with_its_ends(ends: Path, tmp_path: Path) -> None:
    """Its folder names the base's end alone; the hashes of its manifest are of such files."""
    run = shutil.copytree(ends / "lora", tmp_path / "old")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["model_files"]["generation_config.json"]
    (run / "model" / "generation_config.json").unlink()
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert rlhf("export", run, tmp_path / "out") == 0
    assert len(stops_at(tmp_path / "out")) == 2


@pytest.mark.parametrize("kind", LORA)
def test_one_that_does_not_stop_is_refused(
    kind: str, ends: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = module.name_ends
    monkeypatch.setattr(module, "name_ends", lambda folder, ends, model: write(folder, ends[:1], model))
    assert rlhf("export", ends / kind, tmp_path / "out", "--merge") == 3
    assert "generate() goes on after [" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_loads_from_everywhere(ends: Path) -> None:
    config = json.loads((ends / "lora" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((ends / "base").resolve())
    assert config["target_modules"] == sorted(config["target_modules"])
    report = (ends / "lora" / "report.md").read_text()
    code = report.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["model"].generation_config.eos_token_id) == 2


def test_what_cannot_be_exported(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (home / "train-rm-lora" / "checkpoints").glob("step-*")
    places = {
        home / "base": "is not a run: it has no model/",
        checkpoint: "only a finished run of a reward model can be exported",
    }
    for run, message in places.items():
        assert rlhf("export", run, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert rlhf("export", home / "train-rm-lora", home / "base") == 2
    assert "exists; export to a new folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_without_a_classifier(home: Path) -> None:
    start = module.resolve_start(str(home / "train-rm-lora"), None, "export", ["train-rm"])
    with pytest.raises(module.UsageError, match="transformers has no sequence classifier for mamba, so only rlhf can load it"):
        module._pad_id(Path("run"), start, make("mamba"))
