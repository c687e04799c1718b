"""What `rlhf export --push` sends to a hub: it loads from there, has a whole card, and a token is nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.hub import upload
from tests.hub.conftest import start_again
from tests.hub.server import READER, WRITER, Hub
from tests.tiny import make_model, rlhf, write_pairs, write_recipe

TOKENS = READER, WRITER, STALE = READER, WRITER, "hf_stale"
LORA = {"r": 4, "alpha": 8}
CARD = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE.md\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("tiny") / "model", initializer_range=0.2)
    (folder / "README.md").write_text(CARD)
    return folder


def train(stage: str, folder: Path, start: Path | str, lora: dict[str, Any] | None, data: str = "org/rows") -> Path:
    run = folder / f"{stage}-{'lora' if lora else 'full'}"
    train = {"learning_rate": 0.02, "steps": 2, "save_every": None}
    more = {"data": {"holdout": 0.25, "train": data}, "lora": lora, "train": train}
    assert rlhf(stage, write_recipe(run.with_suffix(".yaml"), Path(start), Path(data), run, **more)) == 0
    return run


@pytest.fixture
def home(hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub.add("model", "org/tiny", tiny)
    hub.add("dataset", "org/rows", {"data/train.jsonl": write_pairs(tmp_path / "pairs.jsonl", 24).read_bytes()})
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return tmp_path


@torch.no_grad()
def figures(model: Any) -> torch.Tensor:
    ids = torch.tensor([[3, 7, 20, 41, 12]])
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def loaded(card: str) -> Any:
    """What the card's own lines load, in a process to which the hub is new."""
    start_again()
    found: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], found)
    return found["model"]


def plain(stage: str, run: Path) -> Any:
    """The run's model, from its folder."""
    loader: Any = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    options = {} if stage == "sft" else {"num_labels": 1}
    if not (run / "model" / "adapter_config.json").exists():
        return loader.from_pretrained(run / "model")
    pad = {} if stage == "sft" else {"pad_token_id": json.loads((run / "manifest.json").read_text())["pad_token_id"]}
    return PeftModel.from_pretrained(loader.from_pretrained("org/tiny", **options, **pad), run / "model")


@pytest.mark.parametrize("stage", ["sft", "train-rm"])
@pytest.mark.parametrize("kind", ["lora", "merged", "full"])
def test_what_arrives_loads_from_there(stage: str, kind: str, hub: Hub, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, repo = train(stage, home, "org/tiny", None if kind == "full" else LORA), f"me/{stage}-{kind}"
    capsys.readouterr()
    merge = ["--merge"] if kind == "merged" else []
    assert rlhf("export", run, home / "out", *merge, "--push", repo) == 0
    said = capsys.readouterr().out
    assert f"pushing {home / 'out'} to {repo} (" in said
    assert said.endswith(f"pushed to {hub.endpoint}/{repo}, which is private: its settings on the hub make it public\n")
    repository = hub.repositories["model", repo]
    files = repository.commits[repository.refs["main"]]
    assert repository.private
    assert {name: files[name] for name in files if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (home / "out").iterdir()
    }
    card = files["README.md"].decode()
    found = loaded(card)
    assert isinstance(found, PeftModel) == (kind == "lora")
    assert torch.allclose(figures(found), figures(plain(stage, run)), atol=1e-5)
    assert ModelCard(card).data.to_dict() == {
        "base_model": "org/tiny",
        "library_name": "peft" if kind == "lora" else "transformers",
        "pipeline_tag": "text-generation" if stage == "sft" else "text-classification",
        "license": "other",
        "license_name": "tiny-1",
        "license_link": "https://huggingface.co/org/tiny/blob/main/LICENSE.md",
        "datasets": ["org/rows"],
        "tags": ["rlhf", stage, *(["bradley_terry"] if stage == "train-rm" else []), *(["lora"] if kind != "full" else [])],
    }


def test_a_card_tells_where_it_comes_from(hub: Hub, home: Path) -> None:
    """A second stage on a run and a file: both data sets by fingerprint, the run, the base's licence and all figures."""
    first = train("sft", home, "org/tiny", LORA)
    run = train("dpo", home, first, LORA, str(home / "pairs.jsonl"))
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (first, run)]
    card = (run / "model" / "README.md").read_text()
    assert str(home) not in card
    for text in (
        "A language model. Made by `rlhf dpo` (direct preference optimisation), objective `dpo` (",
        "beta 0.1",
        "a LoRA adapter of rank 4.",
        f"- base model `org/tiny`, weights `{manifests[0]['base_model']['weights_hash']}`",
        f"- the run `sft-lora`: `rlhf sft` (supervised fine-tuning), objective `sft`, "
        f"on `org/rows` (`{manifests[0]['data']['org/rows']}`)\n",
        f"- `pairs.jsonl`: `{manifests[1]['data'][str(home / 'pairs.jsonl')]}`",
        f"| accuracy of the implicit reward | {manifests[1]['final_metrics']['eval']['rewards/accuracies']:.4g} |",
        f"| loss | {manifests[1]['final_metrics']['eval']['loss']:.4g} |",
        "The licence of the base model is `other`, as its own files say.",
    ):
        assert text in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/tiny"
    assert rlhf("dpo", run / "recipe.yaml", "--resume", "--output", run) == 0  # the card is no change of the run
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert rlhf("export", checkpoint, home / "out", "--merge") == 0
    merged = (home / "out" / "README.md").read_text()
    assert "rank 4, merged." in merged and "library_name: transformers" in merged
    assert card.partition("## Data")[2].partition("## How")[0] == merged.partition("## Data")[2].partition("## How")[0]


@pytest.mark.parametrize("recipe", [None, "model: 3\ndata: {train: [3]}\nlora: x\n", "a: [", ""])
def test_a_base_without_a_licence(recipe: str | None, tiny: Path, home: Path) -> None:
    """And of a run whose recipe and metrics are gone or damaged, with a parent whose folder is gone."""
    base = make_model(home / "base")
    run = train("sft", home, base, LORA, str(home / "pairs.jsonl"))
    (run / "recipe.yaml").unlink() if recipe is None else (run / "recipe.yaml").write_text(recipe)
    (run / "metrics.jsonl").write_text("x\n")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["parents"] = [{"path": str(home / "gone"), "manifest_hash": "abc"}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert rlhf("export", run, home / "out", "--merge") == 0
    card = (home / "out" / "README.md").read_text()
    assert "license: unknown" in card and "base_model" not in card
    assert "The licence of the base model is unknown" in card
    assert "- the run `gone`, whose files are gone (manifest `abc`)" in card


def test_what_is_refused_before_work(
    hub: Hub, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("sft", home, tiny, LORA)
    capsys.readouterr()

    def refused(code: int, text: str, repo: str = "me/mine", *more: str) -> None:
        start_again()
        assert rlhf("export", run, home / "out", "--push", repo, *more, "--debug") == code
        err = capsys.readouterr().err
        assert text in err
        assert not any(token in err for token in TOKENS)
        assert not (home / "out").exists()

    for name in ("a/b/c", "me/..", "two words", ""):
        refused(2, f"--push {name}: no repository can have this name. write OWNER/NAME", name)
    refused(2, f"the adapter sits on {tiny}, which nobody else has. add --merge")
    monkeypatch.setenv("HF_TOKEN", STALE)
    refused(4, f"--push me/mine: {hub.endpoint} answers 401, the token is not valid\n")
    monkeypatch.delenv("HF_TOKEN")
    refused(4, "there is no token. set HF_TOKEN to one that may write, or run `hf auth login`")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(4, "--push me/mine: http://127.0.0.1:9 cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(4, "--push me/mine: HF_HUB_OFFLINE is set")


def test_a_refusal_of_the_hub(
    hub: Hub, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each after the export, which stays; the token is in no message, traceback, log or file."""
    run = train("sft", home, tiny, LORA)

    def failed(text: str, repo: str = "me/mine") -> None:
        (home / "out").exists() and (home / "out").rename(home / f"out-{len(list(home.iterdir()))}")
        assert rlhf("export", run, home / "out", "--merge", "--push", repo, "--debug") == 4
        out, err = capsys.readouterr()
        assert text in err and f"{home / 'out'} is whole; to try again: hf upload {repo} {home / 'out'}" in err
        assert not any(token in out + err for token in TOKENS)
        assert (home / "out" / "model.safetensors").exists()

    failed(f"{hub.endpoint} answers 404, there is no such owner, no organisation of …", "them/mine")
    for place, status, text in (
        ("/api/repos/create", 500, "answers 500"),
        ("/preupload/main", 403, "answers 403, the token may not write there"),
        ("/objects/batch", 401, "answers 401, the token is not valid"),
        ("/storage/", 403, "answers 403, the token may not write there"),
        ("/commit/main", 400, "answers 400"),
    ):
        hub.fault = lambda request, place=place, status=status: status if place in request else None  # type: ignore[misc]
        failed(text)
    hub.fault = lambda request: "cut" if "/api/repos/create" in request else None
    failed(f"--push me/mine: {hub.endpoint}: ")
    monkeypatch.setenv("HF_TOKEN", READER)
    hub.fault = lambda request: None
    failed("answers 403, the token may not write there, … may not write")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert upload(home / "out", "me/mine").startswith(f"pushed to {hub.endpoint}/me/mine, which is private")
    written = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    stored = [own for repo in hub.repositories.values() for files in repo.commits.values() for own in files.values()]
    assert not [content for content in (*written, *stored) if any(token.encode() in content for token in TOKENS)]


def test_a_second_push_leaves_no_other_weights(hub: Hub, home: Path) -> None:
    """A merged model into the repository of an adapter, which a loader would prefer; it stays public, and own files stay."""
    run = train("sft", home, "org/tiny", LORA)
    repository = hub.add("model", "me/mine", {"NOTES.md": "mine", "docs/config.json": "{}"})
    assert rlhf("export", run, home / "adapter", "--push", "mine") == 0
    assert "adapter_config.json" in repository.commits[repository.refs["main"]]
    assert rlhf("export", run, home / "merged", "--merge", "--push", "mine") == 0
    files = repository.commits[repository.refs["main"]]
    kept = {"NOTES.md", "docs/config.json"}
    assert set(files) == {path.name for path in (home / "merged").iterdir()} | kept
    assert not repository.private
