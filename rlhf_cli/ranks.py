"""The processes of a run: who prints, what is summed over whom."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.signals import stopping

LAYERS = "TRANSFORMER_BASED_WRAP"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

GRADIENT_BUCKET = 2**24
"""Elements of one gradient reduction: 64 MiB."""


@dataclass
class Sharding:
    """How a launch shards models, and what its ranks have exchanged since `begin`.

    All ranks issue the same collectives in the same order. One whose memory runs out in the middle goes through what is left
    with idle passes (`finish`), so that the others, which wait for it, come to the end and hear of it.
    """

    mesh: DeviceMesh
    reshard: bool = True  # let go of a layer between its forward and its backward
    layer: str | None = None  # the class of the layers, where the launch names one
    exchanged: int = 0
    skipped: int = 0  # the first so many are not issued again
    agreed: dict[int, int] = field(default_factory=dict)  # number of an exchange → what the ranks agreed on
    idle: bool = False  # passes are idle ones

    def begin(self) -> None:
        """What follows is gone through again from here, should memory run out in it."""
        self.exchanged, self.skipped = 0, 0
        self.agreed.clear()

    def finish(self, work: Callable[[], Any]) -> None:
        """Take part in the rest of `work`, which was begun and broken off."""
        self.exchanged, self.skipped, self.idle = 0, self.exchanged, True
        try:
            work()
        finally:
            self.skipped, self.idle = 0, False

    def is_due(self) -> bool:
        """Count an exchange; False: it has been issued before."""
        self.exchanged += 1
        return self.exchanged > self.skipped

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.is_due():
            found = torch.tensor([number], device=self.mesh.device_type)
            with collective():
                dist.all_reduce(found, dist.ReduceOp.MAX, self.mesh.get_group())
            self.agreed[self.exchanged] = int(found)
        return self.agreed[self.exchanged]


class Ranks:
    """This process among the others that `accelerate launch` or `torchrun` started; alone it is rank 0 of 1.

    Gradients are summed once per optimiser step by plain all-reduces, after all passes and roles: no wrapper has to guess
    which parameters a pass uses, and losses are divided by global counts alone.
    """

    def __init__(self, *, expected: bool = True) -> None:
        """`expected` False: this process does its work alone, whatever started it."""
        plugin = _fsdp()
        self.rank, self.size = 0, 1
        self.sharding: Sharding | None = None
        launched = "RANK" in os.environ
        # PartialState does not look at ACCELERATE_USE_CPU by itself, and without a GPU would take each rank for the only one.
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not launched else "cpu"
        self.device = torch.device("cpu" if on_cpu else gpu)
        if not expected:
            return
        more = {"timeout": timedelta(hours=2)} if launched else {}
        with _signals_end_at_once():
            self._state: Any = PartialState(cpu=self.device.type == "cpu", **more)
        self.rank = self._state.process_index
        self.size = self._state.num_processes
        self.device = self._state.device
        if plugin is not None and self.size > 1:
            layers = plugin.transformer_cls_names_to_wrap
            mesh = init_device_mesh(self.device.type, (self.size,))
            self.sharding = Sharding(mesh, plugin.reshard_after_forward, layers and ",".join(layers))

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def words(self) -> str:
        return f"{self.size} × {self.device.type}" + (", weights in shards" if self.sharding else "")

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        return self._reduce(tensor, dist.ReduceOp.SUM).tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def min(self, value: int) -> int:
        return int(self._reduce(torch.tensor([value]), dist.ReduceOp.MIN))

    def gather(self, value: Any) -> list[Any]:
        """One picklable value of each rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with collective():
            dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a rank without a pass contributes zeros."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue  # its gradient was summed in backward
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= GRADIENT_BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[torch.Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        with collective():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        with collective():
            dist.all_reduce(tensor, operation)
        return tensor.cpu()

    def barrier(self) -> None:
        if self.size > 1:
            with collective():
                self._state.wait_for_everyone()

    def close(self) -> None:
        """Destroy the process group; left open, some runs hang at their end."""
        if self.size > 1:
            self._state.destroy_process_group()


CONFIG = "configs/fsdp2.yaml is a config that works"


def _fsdp() -> Any:
    """The settings of FSDP2 that `accelerate launch` hands on; None: models are not sharded.

    UsageError: the launch asks for what is not done here, each with the line of its config that is to change.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
            raise UsageError(f"accelerate config: {name} is not supported: models are sharded by FSDP2 alone; {CONFIG}")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(f"accelerate config: fsdp_version: 1 is not supported; set fsdp_version: 2. {CONFIG}")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers would read the weights on rank 0 alone
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"accelerate config: {error}") from error
    for key, wrong, remedy in (
        ("fsdp_offload_params", os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true", "set it to false"),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, "the recipe says model.gradient_checkpointing: true"),
        ("fsdp_ignored_modules", plugin.ignored_modules, "leave it out"),
        (
            "fsdp_auto_wrap_policy",
            os.environ.get("FSDP_AUTO_WRAP_POLICY", LAYERS) != LAYERS,
            f"set it to {LAYERS}, or leave it out",
        ),
    ):
        if wrong:
            raise UsageError(f"accelerate config: {key} is not supported; {remedy}. {CONFIG}")
    return plugin


def check_precision(dtype: torch.dtype, where: str) -> None:
    """UsageError: the launch asks for another mixed precision than the run's dtype; `where` its setting is."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no" and PRECISIONS.get(asked) != dtype:
        own = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"accelerate config: mixed_precision: {asked}, but this run computes in {own} ({where}); set mixed_precision: 'no', "
            "for the recipe alone decides, or the same in both"
        )


@contextlib.contextmanager
def _signals_end_at_once() -> Iterator[None]:
    """While ranks wait for each other inside a library, which would not let a handler of ours run: nothing is held yet."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """What ranks do together fails when another rank is gone; that rank has said why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0].split("] ", 1)[-1][:120]
        raise MachineError(f"another rank ended or cannot be reached ({reason}); continue with --resume") from error
