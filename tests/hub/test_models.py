"""Models of a hub as a policy, an adapter or a reward: found, refused before their weights are fetched, and trained."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.hub import model_folder
from rlhf_cli.runs.parents import resolve_start
from tests.hub.conftest import start_again
from tests.hub.server import GRANTED, READER, Hub
from tests.tiny import make_model, read_lines, rlhf, spawn, write_recipe, write_rows

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 12)


def files_of(folder: Path, *without: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


def recipe_of(folder: Path, path: str, rows: str, **sections: Any) -> Path:
    train = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    model = {"dtype": "float32", **sections.pop("model", {})}
    return write_recipe(folder / "r.yaml", Path(path), Path(rows), folder / "run", model=model, train=train, **sections)


def fetched(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET") and request.endswith((".safetensors", ".bin"))]


def test_trained_as_from_folders(hub: Hub, tiny: Path, rows: Path, tmp_path: Path) -> None:
    """Two steps in a process of its own, which knows the hub from its environment alone, are those from local files."""
    first = hub.add("model", "org/tiny", tiny)
    first.commit(files_of(tiny), "v1")
    first.commit({"config.json": "{}", WEIGHTS: b""}, "main")
    hub.add("dataset", "org/rows", {"data/train.jsonl": rows.read_bytes()})
    process = spawn("sft", recipe_of(tmp_path, "org/tiny", "org/rows", model={"revision": "v1"}))
    (tmp_path / "local").mkdir()
    assert rlhf("sft", recipe_of(tmp_path / "local", str(tiny), str(rows))) == 0
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert f"fetching org/tiny ({(tiny / WEIGHTS).stat().st_size / 1e6:.1f} MB)\n" in out
    assert "fetching org/rows\n" in out
    ours, theirs = (read_lines(tmp_path / run / "metrics.jsonl", "memory") for run in ("run", "local/run"))
    assert len(ours) == 2 and ours == theirs
    base, local = (json.loads((tmp_path / run / "manifest.json").read_text())["base_model"] for run in ("run", "local/run"))
    assert base == {**local, "path": "org/tiny", "revision": "v1"}
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", "v1")
    # As PEFT would ask at every checkpoint, of whatever is the newest.
    assert not [request for request in hub.requests if request.startswith("HEAD /org/tiny/resolve/main")]


def test_check_fetches_no_weights(hub: Hub, tiny: Path, rows: Path, tmp_path: Path) -> None:
    hub.add("model", "org/tiny", tiny)
    assert rlhf("sft", recipe_of(tmp_path, "org/tiny", str(rows)), "--check") == 0
    assert fetched(hub) == []


def test_what_a_check_refuses(
    hub: Hub, tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = files_of(tiny, WEIGHTS)
    config = json.loads((tiny / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    classifier = json.dumps(config | {"id2label": {"0": "score"}})
    hub.add("model", "org/gated", tiny, gated=True)
    hub.add("model", "org/private", tiny, private=True)
    hub.add("model", "org/pickled", bare | {"pytorch_model.bin": b"\x80"})
    hub.add("model", "org/inner", bare | {"onnx/model.safetensors": b"0"})
    hub.add("model", "org/reward", files_of(tiny) | {"config.json": classifier.encode()})
    hub.add("model", "org/words", {"config.json": (tiny / "config.json").read_bytes(), WEIGHTS: b"0"})
    hub.add("model", "org/tiny", tiny).commit(files_of(tiny), "v1.0")
    unset, page = "set HF_TOKEN to a token that may read it", f"\n  accept its conditions at {hub.endpoint}/org/gated, and "
    absent = "there is no model org/{}, neither here nor on the hub. mend the name, or if it is private "
    pickles = " has no model.safetensors, and pickled weights are not read. name another model or revision"
    monkeypatch.chdir(tmp_path)
    for name, code, said, settings in (
        ("org/gated", 4, f"the model org/gated is gated{page}{unset}", {}),
        ("org/private", 2, absent.format("private") + unset, {}),
        ("org/missing", 2, absent.format("missing") + unset, {}),
        ("org/pickled", 2, f"org/pickled{pickles}", {}),
        ("org/inner", 2, f"org/inner{pickles}", {}),
        ("org/reward", 2, "org/reward is a reward model, not a policy; name a language model", {}),
        ("org/tiny", 2, "the model org/tiny has no revision v1.1. did you mean v1.0?", {"revision": "v1.1"}),
        ("no one/tiny", 2, "there is no model no one/tiny, neither here nor on the hub. ", {}),
    ):
        assert rlhf("sft", recipe_of(tmp_path, name, str(rows), model=settings), "--check") == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and f": model.path: {said}" in error and error.count("\n") <= 2
    assert rlhf("sft", recipe_of(tmp_path, "org/words", str(rows)), "--check") == 2
    assert "error: org/words: no tokenizer can be read here: " in capsys.readouterr().err
    assert fetched(hub) == []


def test_who_may_read(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("model", "org/gated", tiny, gated=True)
    hub.add("model", "org/private", tiny, private=True)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert (model_folder("org/private", None) / WEIGHTS).read_bytes() == (tiny / WEIGHTS).read_bytes()
    with pytest.raises(MachineError, match=r"is gated\n.* and use a token that may read it"):
        model_folder("org/gated", None)
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    assert (model_folder("org/gated", None) / WEIGHTS).is_file()


def test_only_what_is_loaded_is_fetched(hub: Hub, tiny: Path) -> None:
    again = {
        name: b"0" for name in ("consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin", "original/x.json")
    }
    hub.add("model", "org/tiny", files_of(tiny) | again)
    found = {path.name for path in model_folder("org/tiny", None).iterdir()}
    assert found == {path.name for path in tiny.iterdir()}
    assert len(fetched(hub)) == 1


def test_a_download_goes_on_where_it_broke_off(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.add("model", "org/tiny", tiny)
    faults = ["cut"]
    hub.fault = lambda request: faults.pop() if faults and request.startswith("GET /cdn") else None
    assert (model_folder("org/tiny", None) / WEIGHTS).read_bytes() == (tiny / WEIGHTS).read_bytes()
    assert len(fetched(hub)) == 2
    hub.add("model", "org/never", tiny)
    down = "Server error '503 Service Unavailable'"
    for what, fault, said in (("/org/never", 503, down), ("/cdn", "cut", "peer closed connection"), ("/cdn", 503, down)):
        hub.fault = partial(lambda what, fault, request: fault if request.split()[1].startswith(what) else None, what, fault)
        start_again()
        with pytest.raises(
            MachineError, match=f"org/never could not be fetched: {said}.*\n  start again: files that have arrived"
        ):
            model_folder("org/never", None)


class TestCache:
    def test_a_second_run_needs_no_hub(
        self, hub: Hub, tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add("model", "org/tiny", tiny)
        recipe = recipe_of(tmp_path, "org/tiny", str(rows), lora={"r": 2})
        assert rlhf("sft", recipe, "--check") == 0
        hub.shutdown()
        hub.socket.close()
        start_again()
        capsys.readouterr()
        started, gone = time.monotonic(), f"{hub.endpoint} cannot be reached"
        assert rlhf("sft", recipe) == 4
        said = f"error: org/tiny is not in the cache, or not whole, and {gone}\n"
        assert capsys.readouterr().err == f"warning: {gone}: org/tiny is taken from the cache\n{said}"
        assert time.monotonic() - started < 5
        with pytest.raises(MachineError, match=f"^model.path: org/other is not in the cache, or not whole, and {gone}$"):
            resolve_start("org/other", None, "model.path")
        with pytest.raises(MachineError, match=f"revision v1 of org/tiny is not in the cache, or not whole, and {gone}$"):
            model_folder("org/tiny", "v1")

    def test_of_settings_alone(self, hub: Hub, tiny: Path) -> None:
        """What another program fetched, which keeps no list of what is missing."""
        hub.add("model", "org/tiny", tiny)
        hf_hub_download("org/tiny", "config.json")
        hub.fault = lambda request: 503
        assert model_folder("org/tiny", None, weights=False).is_dir()
        with pytest.raises(MachineError, match=f"^org/tiny is not in the cache, or not whole, and {hub.endpoint} answers 503$"):
            model_folder("org/tiny", None)

    def test_of_a_hub_that_fails(
        self, hub: Hub, tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.add("model", "org/tiny", tiny)
        recipe, started = recipe_of(tmp_path, "org/tiny", str(rows), lora={"r": 2}), time.monotonic()
        model_folder("org/tiny", None)
        hub.fault = lambda request: 503
        start_again()
        capsys.readouterr()
        assert rlhf("sft", recipe) == 0
        assert capsys.readouterr().err == f"warning: {hub.endpoint} answers 503: org/tiny is taken from the cache\n"
        assert rlhf("export", tmp_path / "run", tmp_path / "merged", "--merge") == 0
        assert (tmp_path / "merged" / WEIGHTS).is_file()
        assert rlhf("export", tmp_path / "run", tmp_path / "adapter") == 0
        exported = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert exported["base_model_name_or_path"] == "org/tiny"
        assert time.monotonic() - started < 15


def test_an_adapter(hub: Hub, tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on from a repository, on the base that it names there; the adapter alone is fetched by --check."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path="org/tiny")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    model.peft_config["default"].base_model_name_or_path = "org/tiny"
    model.save_pretrained(tmp_path / "adapter")
    hub.add("model", "org/adapter", tmp_path / "adapter")
    said = "the base of the adapter org/adapter: there is no model org/tiny, neither here nor on the hub"
    with pytest.raises(UsageError, match=f"^model.path: {said}"):
        resolve_start("org/adapter", None, "model.path")
    hub.add("model", "org/tiny", tiny)
    recipe = recipe_of(tmp_path, "org/adapter", str(rows), lora="auto")
    assert rlhf("sft", recipe, "--check") == 0
    assert [request.rsplit("/")[-1] for request in fetched(hub)] == ["adapter_model.safetensors"]
    assert rlhf("sft", recipe) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["base_model"]["path"] == "org/tiny"


def test_a_reward_model(hub: Hub, tiny: Path, rows: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_labels, config.pad_token_id = 1, config.eos_token_id
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    hub.add("model", "org/rm", files_of(tiny, WEIGHTS, "config.json") | files_of(tmp_path / "rm")).commit({}, "empty")
    hub.add("model", "org/tiny", tiny)
    drawn = {"rollout": {"max_new_tokens": 4}, "lora": {"r": 2}, "value": {"init": "policy"}}
    recipe = recipe_of(tmp_path, "org/tiny", str(rows), reward=[{"model": "org/rm"}], **drawn)
    assert rlhf("ppo", recipe, "--check") == 0
    assert fetched(hub) == []
    assert rlhf("ppo", recipe) == 0
    assert len(fetched(hub)) == 2
