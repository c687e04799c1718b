"""The processes of a run: who prints, what is summed over whom."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.signals import stopping

GRADIENT_BUCKET = 2**24
"""Elements of one gradient reduction: 64 MiB."""


class Ranks:
    """This process among the others that `accelerate launch` or `torchrun` started; alone it is rank 0 of 1.

    Gradients are summed once per optimiser step by plain all-reduces, after all passes and roles: no wrapper has to guess
    which parameters a pass uses, and losses are divided by global counts alone.
    """

    def __init__(self, *, expected: bool = True) -> None:
        """`expected` False: this process does its work alone, whatever started it."""
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise UsageError("sharded launches (FSDP, DeepSpeed) are not supported yet; use accelerate launch --multi_gpu")
        self.rank, self.size = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not expected:
            return
        launched = "RANK" in os.environ
        # PartialState does not look at ACCELERATE_USE_CPU by itself, and without a GPU would take each rank for the only one.
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
        with _signals_end_at_once():
            self._state: Any = PartialState(cpu=on_cpu, **({"timeout": timedelta(hours=2)} if launched else {}))
        self.rank = self._state.process_index
        self.size = self._state.num_processes
        self.device = self._state.device

    @property
    def main(self) -> bool:
        return self.rank == 0

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
        with _together():
            dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a rank without a pass contributes zeros."""
        if self.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter in parameters:
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
        with _together():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.to(self.device)
        with _together():
            dist.all_reduce(tensor, operation)
        return tensor.cpu()

    def barrier(self) -> None:
        if self.size > 1:
            with _together():
                self._state.wait_for_everyone()

    def close(self) -> None:
        """Destroy the process group; left open, some runs hang at their end."""
        if self.size > 1:
            self._state.destroy_process_group()


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
def _together() -> Iterator[None]:
    """A collective fails when another rank is gone; that rank has said why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0].split("] ", 1)[-1][:120]
        raise MachineError(f"another rank ended or cannot be reached ({reason}); continue with --resume") from error
