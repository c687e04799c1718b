"""Models in shards over ranks: the runs of one process that holds them whole, in every stage, with any number of ranks."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.load import Weights, load_model
from rlhf_cli.models.memory import return_freed
from rlhf_cli.models.passes import Passes
from rlhf_cli.models.policy import load_trained
from rlhf_cli.models.sharding import Shards, full
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.ranks import Ranks
from rlhf_cli.stages.training import refuse_apart
from rlhf_cli.training.optim import build_optimizer
from rlhf_cli.training.step import Update, optimise
from tests.invariance.agreement import agree, steps_of
from tests.models.tiny_backbone import MODELS, SHAPE, draw_trees, make
from tests.ranks import SHARDED, in_shards, launch, wait_for
from tests.tiny import make_base, make_model, read_lines, rlhf, write_pairs, write_recipe, write_rows

SGD = {"optimizer": "sgd", "learning_rate": 0.02}
ONLINE: dict[str, Any] = {"reward": [{"model": "HOME/rm"}], "rollout": {"max_new_tokens": 6}, "data": {"max_length": 80}}
TWICE: dict[str, Any] = {"objective": {"epochs": 2}}
DISTIL: dict[str, Any] = {"kind": "distil", "teacher": "HOME/sft"}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "base", {"lora": {"r": 4}}),
    "sft full": ("sft", "base", {"lora": None, "train": SGD}),
    "distil": ("sft", "base", {"lora": {"r": 4}, "objective": {**DISTIL, "divergence": "jsd"}}),
    "distil full": ("sft", "sft", {"lora": None, "objective": DISTIL, "rollout": {"max_new_tokens": 6}, "train": SGD}),
    "sft full tied": ("sft", "tied", {"lora": None}),
    "train-rm": ("train-rm", "tied", {"lora": {"r": 4}}),
    "train-rm members": ("train-rm", "base", {"lora": {"r": 4}, "objective": {"members": 2}}),
    "train-rm full": ("train-rm", "base", {"lora": None}),
    "dpo recomputed": (
        "dpo",
        "sft",
        {"lora": "auto", "reference": {"cache": False}, "model": {"gradient_checkpointing": True}, "train": SGD},
    ),
    "dpo K-wise": ("dpo", "base", {"lora": {"r": 4}, "objective": {"kind": "plackett_luce"}}),
    "dpo tdpo2": ("dpo", "sft", {"lora": "auto", "objective": {"kind": "tdpo2"}}),
    "dpo tdpo2 full": ("dpo", "tied", {"lora": None, "objective": {"kind": "tdpo2"}, "train": SGD}),
    "dpo merged": ("dpo", "sft", {"lora": {"r": 2, "merge_parent": True}}),
    "dpo full": ("dpo", "base", {"lora": None, "reference": {"cache": False}}),
    "ipo": ("ipo", "base", {"lora": {"r": 4}, "objective": {"normalize": "token_mean"}}),
    "kto full": ("kto", "tied", {"lora": None}),
    "ppo": ("ppo", "sft", {"lora": "auto", **ONLINE, **TWICE}),
    "ppo full": ("ppo", "sft", {"lora": None, **ONLINE, **TWICE, "train": SGD, "seed": 1}),
    "online dpo": ("dpo", "sft", {"lora": "auto", **ONLINE, "rollout": {"max_new_tokens": 6, "refresh": 2}}),
}
"""Name → command, start, and what its recipe says beside the common keys."""
FOUR = ("sft full tied", "ppo")
"""Those that four ranks share as well: five rows leave some of them without one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one whose embeddings are its head, a policy, a reward model, and rows."""
    folder = tmp_path_factory.mktemp("sharded")
    make_base(folder / "base", num_hidden_layers=2)
    make_model(folder / "tied", tied=True, initializer_range=0.2, num_hidden_layers=2)
    write_pairs(folder / "pairs.jsonl", 14)
    write_pairs(folder / "pairs-eval.jsonl", 3, seed=1)
    write_rows(folder / "rows.jsonl", 14)
    write_rows(folder / "rows-eval.jsonl", 3, seed=1)
    train = {"steps": 3, "learning_rate": 0.02, "save_every": None}
    for name, stage in {"sft": "sft", "rm": "train-rm"}.items():
        parts = folder / "base", folder / "pairs.jsonl", folder / name
        assert rlhf(stage, write_recipe(folder / f"{name}.yaml", *parts, lora={"r": 4}, train=train)) == 0
    return folder


def command(home: Path, name: str, output: Path, **train: Any) -> list[str | Path]:
    """4 steps of 5 rows: shares and batches that do not come out even."""
    stage, start, given = RUNS[name]
    given = json.loads(json.dumps(given).replace("HOME", str(home)))
    rows = "rows" if stage in ("sft", "ppo") else "pairs"
    given["train"] = (
        {"batch_size": 5, "steps": 4, "eval_every": 2, "save_every": None, "tokens_per_device": 90}
        | given.get("train", {})
        | train
    )
    given["data"] = {"eval": str(home / f"{rows}-eval.jsonl")} | given.get("data", {})
    return [stage, write_recipe(output.with_suffix(".yaml"), home / start, home / f"{rows}.jsonl", output, **given)]


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(home: Path) -> Whole:
    """The run of a name in one process, made once."""

    def find(name: str) -> Path:
        output = home / f"whole {name}"
        if not output.exists():
            assert rlhf(*command(home, name, output)) == 0
        return output

    return find


def same(a: Path, b: Path, *, samples: bool = True) -> None:
    """Figures, weights and samples; before the first step implicit rewards are rounding and nothing else."""
    sgd = "optimizer: sgd" in (a / "recipe.yaml").read_text()
    agree(a, b, steps_of(4, 2), rounding=("rewards/", "logratio/", "margin/"), figures=1e-5, weights=1e-6 if sgd else 1e-5)
    if samples and (a / "samples.jsonl").exists():
        first, last = ([line for line in read_lines(run / "samples.jsonl") if line["step"] in (0, 4)] for run in (a, b))
        assert first == last


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in RUNS), *((name, 4) for name in FOUR)])
def test_ranks_that_share_every_model_are_one(name: str, ranks: int, home: Path, whole: Whole, tmp_path: Path) -> None:
    in_shards(*command(home, name, tmp_path / "shards"), ranks=ranks)
    same(whole(name), tmp_path / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft full", "ppo full"])
def test_the_number_of_ranks_may_change(name: str, home: Path, tmp_path: Path) -> None:
    """Two ranks are stopped by a signal, four by another, and one process ends the run; its checkpoints are plain files."""
    words = command(home, name, tmp_path / "run", steps=6, save_every=1, keep_checkpoints=6)
    checkpoints = tmp_path / "run" / "checkpoints"
    for ranks in (2, 4):
        done = len([*checkpoints.glob("step-*")])
        launched = launch(*words, *(["--resume"] if done else []), ranks=ranks, settings=SHARDED)
        wait_for(checkpoints / f"step-{done + 1:08d}", launched)
        launched.send_signal(signal.SIGTERM)
        assert re.search(r"stopped after step \d of 6; continue with --resume", launched.wait()[1]), launched.errors
    assert rlhf(*words, "--resume") == 0
    assert rlhf(*command(home, name, tmp_path / "whole", steps=6)) == 0
    agree(tmp_path / "whole", tmp_path / "run", steps_of(6, 2), rounding=("rewards/",), figures=1e-5, weights=1e-6)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_in_words(home: Path, tmp_path: Path) -> None:
    words = command(home, "sft full", tmp_path / "run", steps=4000, save_every=1, eval_every=None)
    launched = launch(*words, ranks=2, settings=SHARDED)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000002", launched)
    os.kill(launched.pids[1], signal.SIGKILL)
    launched.wait(60)
    assert launched.processes[0].exitcode == 4
    assert "another rank ended or cannot be reached" in launched.errors and "continue with --resume" in launched.errors
    assert "Traceback" not in launched.errors


BATCHES = [draw_trees(6, seed) for seed in range(3)]


def _shards(model: Any, ranks: Ranks) -> Shards:
    assert ranks.sharding is not None
    return Shards(model, ranks.sharding)


class Broken(torch.nn.Module):
    """Passes its input on, and runs out of memory where a pass has more than so many tokens: forward, or on the way back."""

    def __init__(self, limit: int, backward: bool) -> None:
        super().__init__()
        self.limit, self.backward = limit, backward

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.shape[0] * states.shape[1] <= self.limit:
            return states
        if not self.backward:
            raise torch.OutOfMemoryError("no more memory")
        if states.requires_grad:
            states.register_hook(self._fail)
        return states

    def _fail(self, _: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no more memory")


def short_of_memory(folder: str, kind: str, backward: str) -> int:
    """A rank that trains for three steps; on the last one passes of more than 30 tokens fail, in the middle of the model."""
    ranks = Ranks()
    model = make("llama", tie_word_embeddings=True)
    backbone = Backbone(model, torch.float32, shards=_shards(model, ranks))
    if backward != "never" and ranks.rank == ranks.size - 1:
        model.model.layers[1].mlp.register_forward_pre_hook(
            lambda _, given, broken=Broken(30, backward == "backward"): (broken(given[0]),)
        )
    if kind == "full":
        backbone.train_all_weights()
    else:
        torch.manual_seed(0)
        backbone.add_lora("policy", lora_config(sections.Lora(r=4), "", None), None, trained=True)
    optimizer, budget, told = build_optimizer(backbone.trained_roles, sections.Train()), 160, []
    for step, trees in enumerate(BATCHES, 1):
        result = optimise(Passes(backbone, budget, ranks), Sft(), optimizer, Update(step, trees, {"policy": 0.01}, 0.5, seed=0))
        budget = result.budget
        told.append([result.metrics["loss"], result.metrics["grad_norm"], budget])
    weights = {name: full(p).detach().clone() for name, p in backbone.trained_parameters().items()}
    if ranks.main:
        torch.save((told, weights), Path(folder) / f"{kind}-{backward}-{ranks.size}.pt")
    ranks.close()
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_memory_that_runs_out_on_one_rank_is_replayed_on_all(kind: str, tmp_path: Path) -> None:
    """In the middle of a pass, where the others wait for its shards: they come to the end, and all begin anew."""
    found = {}
    for backward in ("never", "forward", "backward"):
        code, errors = launch(tmp_path, kind, backward, ranks=2, function=short_of_memory, settings=SHARDED).wait()
        assert code == 0, errors
        found[backward] = torch.load(tmp_path / f"{kind}-{backward}-2.pt")
    wanted, weights = found["never"]
    assert [budget for _, _, budget in wanted] == [160] * 3
    for backward in ("forward", "backward"):
        told, own = found[backward]
        assert told[-1][2] < 160
        assert [line[:2] for line in told] == [pytest.approx(line[:2], abs=1e-5) for line in wanted]
        assert max(float((own[name] - weights[name]).abs().max()) for name in weights) < 1e-5


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def build(kind: str) -> Any:
    """ "llama", "llama tied", "mixtral" with four experts, …"""
    name, _, more = kind.partition(" ")
    if name == "mixtral":
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **MIXTURE)).eval()
    return make(name, **({"tie_word_embeddings": True} if "tied" in more else {}))


KINDS = [*MODELS, "llama lora", "llama lora tokens", "llama tied lora tokens", "mixtral", "mixtral lora"]
"""Models, and what is trained of them: all weights, an adapter, or one and the embeddings of two tokens."""


def train_kinds(folder: str) -> int:
    """Two steps of each kind by SGD: what was logged, and the weights."""
    ranks, found = Ranks(), {}
    for kind in KINDS:
        model = build(kind)
        backbone = Backbone(model, torch.float32, shards=None if ranks.sharding is None else _shards(model, ranks))
        torch.manual_seed(0)
        if "lora" in kind:
            tokens = (3, 7) if "tokens" in kind else ()
            backbone.add_lora("policy", lora_config(sections.Lora(r=4, train_tokens=tokens), "", None), None, trained=True)
        else:
            backbone.train_all_weights()
        optimizer, told = build_optimizer(backbone.trained_roles, sections.Train(optimizer="sgd")), []
        for step, trees in enumerate(BATCHES[:2], 1):
            update = Update(step, trees, {"policy": 0.1}, 0.5, seed=0)
            metrics = optimise(Passes(backbone, 40, ranks), Sft(), optimizer, update).metrics
            told += [metrics["loss"], metrics["grad_norm"]]
        weights = backbone.trained_parameters()
        assert ranks.size == 1 or "lora" in kind or all(type(p).__name__ == "DTensor" for p in weights.values())
        found[kind] = torch.tensor(told), {name: full(p).detach().clone() for name, p in weights.items()}
    if ranks.main:
        torch.save(found, Path(folder) / f"{ranks.size}.pt")
    ranks.close()
    return 0


@pytest.mark.slow
def test_families_in_shards_learn_the_same(tmp_path: Path) -> None:
    for ranks in (1, 2):
        code, errors = launch(tmp_path, ranks=ranks, function=train_kinds, settings=SHARDED).wait()
        assert code == 0, errors
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    for kind in KINDS:
        assert float((one[kind][0] - two[kind][0]).abs().max()) < 5e-6, kind
        assert max(float((value - two[kind][1][name]).abs().max()) for name, value in one[kind][1].items()) < 1e-6, kind


def load_shards(folder: str) -> int:
    """What a rank's own memory grows by while it takes its shards of a model, as a share of the model's weights."""
    ranks = Ranks()
    settings = sections.Model(path="", dtype="float32")
    model = load_model(settings, f"{folder}/large", None, torch.float32, torch.device("cpu"))
    before, size = _own_memory(), sum(p.numel() * 4 for p in model.parameters())
    shards = _shards(model, ranks)
    gc.collect()
    return_freed()
    (Path(folder) / f"{ranks.rank}.txt").write_text(str((_own_memory() - before) / size))
    assert shards.model is model
    ranks.close()
    return 0


def _own_memory() -> int:
    """Bytes that no file stands for."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is looked up in /proc")
def test_a_rank_reads_no_more_than_its_shards(tmp_path: Path) -> None:
    """Of 40 MiB of weights a half each; the files are mapped, and read where a shard is taken from them."""
    make_model(tmp_path / "large", hidden_size=512, intermediate_size=1024, num_hidden_layers=5)
    code, errors = launch(tmp_path, ranks=2, function=load_shards, settings=SHARDED).wait()
    assert code == 0, errors
    shares = [float((tmp_path / f"{rank}.txt").read_text()) for rank in (0, 1)]
    assert all(0.4 < share < 0.65 for share in shares), shares


def train_quantised(folder: str) -> int:
    """Three steps of an adapter on a base of 4 bits."""
    ranks = Ranks()
    settings, start = sections.Model(path="", dtype="float32", quantize="4bit"), Weights(f"{folder}/base", None, None)
    backbone, _ = load_trained(
        settings, sections.Lora(r=4), start, device=ranks.device, seeds={"policy": 0}, merged=Path(), ranks=ranks
    )
    optimizer = build_optimizer(backbone.trained_roles, sections.Train(optimizer="sgd"))
    told = [
        optimise(Passes(backbone, 40, ranks), Sft(), optimizer, Update(step, trees, {"policy": 0.1}, 0.5, seed=0)).metrics["loss"]
        for step, trees in enumerate(BATCHES, 1)
    ]
    if ranks.main:
        torch.save(told, Path(folder) / f"{ranks.size}.pt")
    ranks.close()
    return 0


@pytest.mark.slow
def test_a_base_of_four_bits_lies_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(tmp_path / "base")
    for ranks in (1, 2):
        code, errors = launch(tmp_path, ranks=ranks, function=train_quantised, settings=SHARDED).wait()
        assert code == 0, errors
    assert torch.load(tmp_path / "1.pt") == pytest.approx(torch.load(tmp_path / "2.pt"), abs=1e-6)


CONFIGS = Path(__file__).parents[2] / "configs"


def accelerate(config: str, *words: str | Path) -> subprocess.Popen[str]:
    """`accelerate launch` as a user would, without a GPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(CONFIGS.parent)}
    return subprocess.Popen([*launcher, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_the_shipped_configs_launch(home: Path, whole: Whole, tmp_path: Path) -> None:
    """Shards on one machine, in what accelerate makes of the file; and on two, for which two launchers on this one stand."""
    name, alone, apart, runs = "sft full tied", tmp_path / "alone", tmp_path / "apart", []
    asked = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "-m", "rlhf_cli"])
    asked, _, _ = _validate_launch_command(asked)
    settings = {key: own for key, own in prepare_multi_gpu_env(asked).items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    together = launch(*command(home, name, alone), ranks=asked.num_processes, settings=settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for machine in ("0", "1"):
        place = ["--num_processes", "2", "--machine_rank", machine, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        runs.append(accelerate("two-nodes.yaml", *place, "-m", "rlhf_cli", *command(home, name, apart)))
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert together.wait()[0] == 0, together.errors
    assert "2 × cpu, weights in shards" in together.said and "2 × cpu, weights in shards" in said[0]
    same(whole(name), alone, samples=False)
    same(whole(name), apart, samples=False)


def test_the_shipped_configs_are_accelerates(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.name: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    assert kinds == {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "two-nodes.yaml": "FSDP"}


def other_files(folder: str) -> int:
    """Rank 1 sees another folder, or other rows, than rank 0."""
    ranks = Ranks()
    for output, rows in ((Path(folder) / "nowhere" / str(ranks.rank), "1"), (Path(folder), str(ranks.rank))):
        if ranks.main:
            output.mkdir(parents=True, exist_ok=True)
        ranks.barrier()
        try:
            refuse_apart(ranks, output, {"base": "x", "rows.jsonl": rows})
        except UsageError as error:
            print(error)
    ranks.close()
    return 0


@pytest.mark.slow
def test_machines_that_see_other_files_are_told(tmp_path: Path) -> None:
    launched = launch(tmp_path, ranks=2, function=other_files)
    assert launched.wait()[0] == 0, launched.errors
    first, second = launched.said.splitlines()
    assert "rank 1 on" in first and "it must be a folder that all machines share" in first
    assert second.endswith("reads other files than rank 0 under the same paths: rows.jsonl differs; copy them anew")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1 is not supported; set fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported: models are sharded by FSDP2 alone"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported; set it to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "the recipe says model.gradient_checkpointing: true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16, but this run computes in float32"),
    ],
    ids=["fsdp1", "deepspeed", "offload", "checkpointing", "size-based", "precision"],
)
def test_what_a_launch_asks_for_and_is_not_done_is_refused(
    settings: dict[str, str], message: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in (SHARDED | settings).items():
        monkeypatch.setenv(name, value)
    assert rlhf(*command(home, "sft", tmp_path / "run"), "--check") == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.r=4", "model.quantize=8bit"], "model.quantize: weights of 8 bits cannot be shared out in shards"),
        (["lora=null", "train.optimizer=adamw_8bit"], "train.optimizer: adamw_8bit takes no weights in shards"),
    ],
    ids=["8bit", "adamw_8bit"],
)
def test_what_shards_cannot_hold_is_refused(words: list[str], message: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    """On devices that are only imagined too; on one device nothing is said."""
    check = [*command(home, "sft", tmp_path / "run"), *words, "--check", "--devices"]
    assert rlhf(*check, "2x80GB") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert rlhf(*check, "1x80GB") == 0
