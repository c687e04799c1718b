"""A stage starts from exactly what its parent ended with, and plain PEFT or transformers load exactly what a stage trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from rlhf_cli import sections
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.policy import load_trained
from rlhf_cli.runs.parents import resolve_start
from rlhf_cli.stages import direct, train_rm
from tests.models.tiny_backbone import draw_trees, packed_logps, plain_logps, sequences
from tests.tiny import make_model, read_lines, rlhf, write_pairs, write_recipe, write_rows

TREES = draw_trees(4, branches=2)
LORA, OTHER = sections.Lora(r=4, alpha=8), sections.Lora(r=2, alpha=8, merge_parent=True)
OWN = {"lora": LORA, "full": None, "merged": sections.Lora(r=2, alpha=8)}
SECTIONS: dict[str, Any] = {"lora": {"r": 4, "alpha": 8}, "full": None, "merged": {"r": 2, "alpha": 8, "merge_parent": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with large weights, rows to train and to evaluate on, and two trained parents: runs/lora and runs/full."""
    folder = tmp_path_factory.mktemp("parents")
    make_model(folder / "base", initializer_range=0.2)
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "eval.jsonl", 8, seed=1)
    write_pairs(folder / "pairs.jsonl", 12)
    for kind in ("lora", "full"):
        assert _train(folder, folder / "base", kind, folder / kind) == 0
    return folder


def _train(home: Path, start: Path, kind: str, output: Path) -> int:
    data = {"eval": str(home / "eval.jsonl")}
    train = {"learning_rate": 0.02, "eval_every": 1, "save_every": None}
    recipe = home / f"{output.name}.yaml"
    return rlhf("sft", write_recipe(recipe, start, home / "rows.jsonl", output, lora=SECTIONS[kind], data=data, train=train))


def _plain(home: Path, run: Path) -> Any:
    """The trained policy, as somebody without this package loads it."""
    if not (run / "model" / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    manifest = json.loads((run / "manifest.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(manifest["base_model"]["path"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "model")


def _policy(run: Path, lora: sections.Lora | None, merged: Path) -> Backbone:
    start = resolve_start(str(run), None, "model.path")
    device = torch.device("cpu")
    settings = sections.Model(path=str(run), dtype="float32")
    return load_trained(settings, lora, start, device=device, seeds={"policy": 0}, merged=merged)[0]


@pytest.mark.parametrize(
    ("parent", "lora"),
    [("lora", LORA), ("full", LORA), ("lora", None), ("full", None), ("lora", OTHER)],
    ids=["lora-lora", "full-lora", "lora-full", "full-full", "lora-merged-lora"],
)
def test_a_child_starts_as_its_parent(parent: str, lora: sections.Lora | None, home: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        base = plain_logps(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32), TREES)
        wanted = plain_logps(_plain(home, home / parent).eval(), TREES)
        found = packed_logps(_policy(home / parent, lora, tmp_path / "base"), TREES, 60)
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((found - base).abs().max()) > 0.1


@pytest.mark.parametrize(("parent", "kind"), [("lora", "lora"), ("full", "lora"), ("lora", "full"), ("lora", "merged")])
def test_a_run_goes_on_where_its_parent_ended(parent: str, kind: str, home: Path, tmp_path: Path) -> None:
    """Held-out loss: the child's before step 1 is the parent's after its last; and what is saved is what was measured."""
    child = tmp_path / "child"
    assert _train(home, home / parent, kind, child) == 0
    evals = {
        run: [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "eval"] for run in (home / parent, child)
    }
    assert evals[child][0]["step"] == 0
    assert evals[child][0]["loss"] == pytest.approx(evals[home / parent][-1]["loss"], abs=1e-5)
    assert evals[child][-1]["loss"] < evals[child][0]["loss"] - 0.01

    with torch.no_grad():
        trained = plain_logps(_plain(home, child).eval(), TREES)
        reloaded = packed_logps(_policy(child, OWN[kind], tmp_path / "base"), TREES, 60)
    assert float((trained - reloaded).abs().max()) < 1e-5
    with torch.no_grad():
        before = plain_logps(_plain(home, home / parent).eval(), TREES)
    assert float((trained - before).abs().max()) > 0.01


def test_a_checkpoint_is_a_parent_too(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "lora", run)
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))
    with torch.no_grad():
        wanted = plain_logps(_plain(home, home / "lora").eval(), TREES)
        assert float((packed_logps(_policy(checkpoint, LORA, tmp_path / "base"), TREES, 60) - wanted).abs().max()) < 1e-5


def test_a_checkpoint_remembers_a_template_that_its_tokenizer_does_not(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer without a chat template is saved with none; what it is trained with then would be the built-in one."""
    rows = home / "rows.jsonl"
    path = write_recipe(
        tmp_path / "x.yaml", home / "base", rows, tmp_path / "plain", model={"chat_template": "none"}, train={"steps": 1}
    )
    assert rlhf("sft", path) == 0
    (checkpoint,) = (tmp_path / "plain" / "checkpoints").glob("step-*")
    again = ["sft", path, "--output", tmp_path / "again", "--set", f"model.path={checkpoint}"]
    assert rlhf(*again, "--check") == 0
    capsys.readouterr()
    assert rlhf(*again, "--check", "--set", "model.chat_template=null") == 2
    assert "was trained with another chat template than" in capsys.readouterr().err


def test_the_base_is_never_touched(home: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32).state_dict()
    make_model(home / "again", initializer_range=0.2)
    again = AutoModelForCausalLM.from_pretrained(home / "again", dtype=torch.float32).state_dict()
    assert all(torch.equal(base[name], again[name]) for name in again)


ROLES = {"train-rm": "reward", "dpo": "policy", "kto": "policy"}
CHANGES = [("lora", "lora"), ("full", "lora"), ("lora", "full"), ("lora", "merged")]
"""The parent, and what its child trains."""

IDS = [ids for tree in TREES for ids, _ in sequences(tree)]


class Made:
    """Runs of preference stages, each made once: the model before step 1 and after the last, as the stage held it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.before: dict[Path, torch.Tensor] = {}
        self.heads: dict[Path, torch.Tensor] = {}
        self.trained: dict[Path, list[torch.Tensor]] = {}

    def __call__(self, stage: str, parent: str, kind: str) -> Path:
        run = self.home / f"{stage}-{parent.replace('/', '-')}-{kind}"
        if run not in self.trained:
            with pytest.MonkeyPatch.context() as patch:
                self._watch(patch, direct if stage != "train-rm" else train_rm, run, ROLES[stage])
                assert make(self.home, stage, self.home / parent, run, kind) == 0
        return run

    def _watch(self, patch: pytest.MonkeyPatch, module: Any, run: Path, role: str) -> None:
        train = module.train_job

        def watched(job: Any, folder: Any, backbone: Backbone, **settings: Any) -> Any:
            self.before[run] = hidden(backbone, role)
            if role in backbone.heads:
                self.heads[run] = backbone.heads[role].weight.detach().clone()
            fit = train(job, folder, backbone, **settings)
            self.trained[run] = outputs(backbone, role)
            return fit

        patch.setattr(module, "train_job", watched)


def make(home: Path, stage: str, start: Path, run: Path, kind: str, **sections: Any) -> int:
    train = {"learning_rate": 0.02, "steps": 2, "save_every": None}
    path, rows = run.with_suffix(".yaml"), home / "pairs.jsonl"
    return rlhf(stage, write_recipe(path, start, rows, run, lora=SECTIONS[kind], train=train, **sections))


@torch.no_grad()
def hidden(backbone: Backbone, role: str) -> torch.Tensor:
    """The last hidden state of every response, (N, D), as the stage computes it: packed."""
    (batch,) = backbone.batches(TREES, 10_000)
    names = [(tree, k) for tree, count in zip(batch.trees, batch.counts, strict=True) for k in range(count)]
    order = sorted(range(len(names)), key=names.__getitem__)
    return backbone.hidden(role, batch)[batch.last][order]


@torch.no_grad()
def plain_hidden(model: Any) -> torch.Tensor:
    last = [model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1] for ids in IDS]
    return torch.stack(last)


@torch.no_grad()
def outputs(backbone: Backbone, role: str) -> list[torch.Tensor]:
    """Of every response the logits after its last token, or its score, (1,)."""
    backbone.activate(role)
    with backbone.plain_attention() as model:
        if role == "policy":
            return [model(input_ids=ids).logits[0, -1] for ids in IDS]
        states = [model.base_model(input_ids=ids).last_hidden_state[0, -1] for ids in IDS]
        return [backbone.heads[role].weight @ state for state in states]


@pytest.fixture(scope="module")
def made(home: Path) -> Made:
    return Made(home)


@pytest.mark.parametrize(
    ("stage", "parent", "kind"),
    [
        pytest.param(stage, parent, kind, marks=[] if stage == "dpo" or kind == "lora" == parent else pytest.mark.slow)
        for stage in ROLES
        for parent, kind in CHANGES
    ],
)
def test_a_stage_starts_with_its_parents_hidden_states(stage: str, parent: str, kind: str, home: Path, made: Made) -> None:
    run = made(stage, parent, kind)
    wanted = plain_hidden(_plain(home, home / parent).eval())
    base = plain_hidden(AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32))
    assert float((made.before[run] - wanted).abs().max()) < 1e-4
    assert float((made.before[run] - base).abs().max()) > 0.1
    recorded = json.loads((run / "manifest.json").read_text())["parents"]
    assert [entry["path"] for entry in recorded] == [str(home / parent)]


def fresh(home: Path, runs: list[Path]) -> dict[str, Any]:
    """What plain.py finds in a new process."""
    asked = {run.name: {"run": str(run), "rows": [ids[0].tolist() for ids in IDS]} for run in runs}
    (home / "asked.json").write_text(json.dumps(asked))
    words = [sys.executable, str(Path(__file__).with_name("plain.py")), str(home / "asked.json"), str(home / "found.json")]
    subprocess.run(words, check=True, timeout=120, capture_output=True, cwd=home)
    return dict(json.loads((home / "found.json").read_text()))


def check_fresh(home: Path, made: Made, runs: list[Path]) -> None:
    found = fresh(home, runs)
    for run in runs:
        wanted = torch.stack(made.trained[run])
        if "logits" in found[run.name]:
            logits = torch.tensor(found[run.name]["logits"])
            assert float((logits - wanted).abs().max()) < 1e-5
            continue
        for how in ("alone", "padded"):
            assert float((torch.tensor(found[run.name][how])[:, None] - wanted).abs().max()) < 1e-5, (run.name, how)
        assert float(wanted.std()) > 0.01


@pytest.mark.slow
def test_a_new_process_has_the_trained_models(home: Path, made: Made) -> None:
    """Plain PEFT and transformers, and for reward models exactly the lines of their manifests."""
    policies = [made("dpo", parent, kind) for parent, kind in CHANGES]
    rewards = [made("train-rm", "lora", "lora")]
    check_fresh(home, made, [*policies, *rewards])


@pytest.mark.slow
def test_a_new_process_has_every_trained_model(home: Path, made: Made) -> None:
    runs = [made(stage, parent, kind) for stage in ("train-rm", "kto") for parent, kind in CHANGES]
    full = made("train-rm", "lora", "full")
    adapter = made("train-rm", full.name, "lora")
    # The base of its adapter is a reward model too; so is what is merged from it.
    runs += [adapter, *(made("train-rm", adapter.name, kind) for kind in ("lora", "full", "merged"))]
    check_fresh(home, made, runs)


@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(first, second, marks=() if first == second else pytest.mark.slow) for first, second in CHANGES[:3]],
)
def test_a_reward_model_goes_on_with_its_head(first: str, second: str, made: Made) -> None:
    parent = made("train-rm", "lora", first)
    child = made("train-rm", parent.name, second)
    (file,) = (parent / "model").glob("*.safetensors")
    (head,) = [value for name, value in load_file(file).items() if name.endswith("score.weight")]
    assert torch.equal(made.heads[child], head) and not torch.equal(head, made.heads[parent])
    assert float((made.before[child] @ head[0] - torch.cat(made.trained[parent])).abs().max()) < 1e-4


def reward_run(made: Made, folder: Path) -> tuple[Path, str]:
    run = made("train-rm", "lora", "lora")
    return run, f"{run} is a run of train-rm"


def reward_checkpoint(made: Made, folder: Path) -> tuple[Path, str]:
    (checkpoint,) = (made("train-rm", "lora", "lora") / "checkpoints").glob("step-*")
    return checkpoint, f"{checkpoint / 'model'} is a reward model"


def reward_adapter(made: Made, folder: Path) -> tuple[Path, str]:
    shutil.copytree(made("train-rm", "lora", "lora") / "model", folder)
    return folder, f"{folder} is a reward model"


def whole_reward_model(made: Made, folder: Path) -> tuple[Path, str]:
    shutil.copytree(made("train-rm", "lora", "full") / "model", folder)
    return folder, f"{folder} is a reward model"


@pytest.mark.parametrize("find", [reward_run, reward_checkpoint, reward_adapter, whole_reward_model])
@pytest.mark.parametrize("key", ["model.path", "reference.model"])
def test_a_reward_model_is_no_policy(
    find: Callable[[Made, Path], tuple[Path, str]],
    key: str,
    home: Path,
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, message = find(made, tmp_path / "start")
    sections = {"reference": {"model": str(start)}} if key == "reference.model" else {}
    assert make(home, "dpo", home / "lora" if sections else start, tmp_path / "run", "lora", **sections) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def change_head(start: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    (file,) = start.glob("*.safetensors")
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("score.weight")]
    new = change(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_without_its_head(
    kind: str, home: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run the hashes notice; in a plain folder nothing else would."""
    run = shutil.copytree(made("train-rm", "lora", kind), tmp_path / "rm")
    change_head(run / "model", lambda head: None)
    assert make(home, "train-rm", run, tmp_path / "run", kind) == 2
    (file,) = (run / "model").glob("*.safetensors")
    assert f"model/{file.name} has changed" in capsys.readouterr().err
    assert make(home, "train-rm", run / "model", tmp_path / "run", kind) == 2
    message = f"error: {run / 'model'}: no reward head (score.weight) is in it; is it a reward model?"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_several_labels(home: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sequence classifier with two labels, whole and as an adapter."""
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    shutil.copytree(home / "base", whole)
    config = AutoConfig.from_pretrained(whole)
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(whole)
    shutil.copytree(made("train-rm", "lora", "lora") / "model", adapter)
    change_head(adapter, lambda head: head.repeat(2, 1))
    for start in (whole, adapter):
        assert make(home, "train-rm", start, start.with_suffix(".run"), "lora") == 2
        message = f"error: {start}: a classifier with 2 labels is no reward model; one has a single label"
        assert capsys.readouterr().err.splitlines()[-1] == message
