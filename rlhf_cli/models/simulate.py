"""A step on devices that one does not have: the code of a run on tensors without numbers, its collectives without others."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from rlhf_cli import sections
from rlhf_cli.data.trees import Batch, Piece, Tree, build_batch
from rlhf_cli.models import logps
from rlhf_cli.models.attention import KERNELS, Kernel
from rlhf_cli.models.backbone import Backbone, lora_config
from rlhf_cli.models.memory import Parts
from rlhf_cli.models.sharding import Shards
from rlhf_cli.ranks import Sharding

FEW = (4, 8)
"""Layers that are simulated of a deeper model: each further one adds what the second four added."""

NAMES = {
    **dict.fromkeys(("Parameter", "Sharded Param", "Buffer", "Inputs"), "weights"),
    "Unsharded Param": "gathered weights",
    **dict.fromkeys(("All Gather", "Reduce Scatter"), "all-gather buffers"),
    **dict.fromkeys(("Gradient", "Sharded Grad", "Unsharded Grad"), "gradients"),
    **dict.fromkeys(("Optstate", "OptState"), "optimiser"),
    "Activation": "activations",
    **dict.fromkeys(("Temp", "Other"), "temporaries"),
}
"""The trackers' names of what memory is used for, and ours; the inputs that it is told of are adapters."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step's memory depends on beside the model's configuration."""

    model: sections.Model
    lora: sections.Lora | None
    dtype: torch.dtype
    devices: int
    tokens: int  # of a pass
    row: int  # of these, in a row
    roles: Sequence[str] = ("policy",)  # that train, each forward and backward before the next


def simulate(config: Any, step: Step, few: tuple[int, int] | None = FEW) -> Parts:
    """Bytes on one device when memory is fullest, by what for.

    few: numbers of layers that stand for those of a deeper model; None: all are simulated. A layer is as large as the last one
    of these; the moment that is fullest may be another one in the whole model, so each is continued by itself.
    """
    layers = config.get_text_config().num_hidden_layers
    if few is None or layers <= few[1]:
        return max(_moments(config, step, layers), key=_total)
    first, second = (_moments(config, step, count) for count in few)
    more = (layers - few[1]) / (few[1] - few[0])
    names = list(dict.fromkeys(NAMES.values()))
    whole = [
        {name: b.get(name, 0) + more * (b.get(name, 0) - a.get(name, 0)) for name in names}
        for a, b in zip(first, second, strict=True)
    ]
    return max(whole, key=_total)


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _moments(config: Any, step: Step, layers: int) -> list[Parts]:
    """Of the forward and the backward of each role, and of the update: what is in memory when that is fullest."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    rows = max(1, round(step.tokens / step.row))
    tree = Tree(np.zeros(1, np.int32), np.zeros(1, bool), (np.zeros(min(step.row, step.tokens) - 1, np.int32),), 0)
    batch = build_batch([tree] * rows, [[Piece(number, (0,))] for number in range(rows)])
    with _alone_of(step.devices) as mesh, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {name: mode.from_tensor(value) for name, value in vars(batch).items() if torch.is_tensor(value)}
        return _run(_build(config, step, mesh), step, Batch(**(vars(batch) | tensors)))


@contextlib.contextmanager
def _alone_of(devices: int) -> Iterator[Any]:
    """A mesh of so many devices whose others do not answer; None where there is one."""
    move, logits = torch.nn.Module.to, logps.CHUNK_ELEMENTS
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]  # without numbers none can move
    logps.CHUNK_ELEMENTS = logps.chunk_elements("cuda")
    try:
        if devices > 1:
            dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
        yield init_device_mesh("cpu", (devices,)) if devices > 1 else None
    finally:
        torch.nn.Module.to, logps.CHUNK_ELEMENTS = move, logits  # type: ignore[method-assign]
        if devices > 1:
            dist.destroy_process_group()


class _Imagined(Backbone):
    """With the kernel of a GPU; the model's own forward is its body's, which is what the tracker watches."""

    def _choose_kernel(self, setting: str, headless: bool) -> Kernel:
        self.model.forward = self.model.base_model.forward
        kernel = KERNELS["eager" if setting == "eager" else "alone" if setting in ("flash", "flex") else "sdpa"]
        self._use(kernel)
        return kernel

    @property
    def body(self) -> Any:
        return self.model

    def run(self, forward: Any, *arguments: Any) -> Any:
        return forward(*arguments)


def _build(config: Any, step: Step, mesh: Any) -> Backbone:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if step.lora is None else step.dtype,
            trust_remote_code=step.model.trust_remote_code,
        )
    shards = None if mesh is None else Shards(model, Sharding(mesh))
    backbone = _Imagined(model, step.dtype, step.model.attention, shards=shards)
    for role in step.roles:
        if role != "policy":
            backbone.add_head(role, None)
        if step.lora is None:
            backbone.train_all_weights(role)
        else:
            backbone.add_lora(role, lora_config(step.lora, "", None), None, trained=True)
    if step.model.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    backbone.train(True)
    return backbone


class _Tracker(MemTracker):  # type: ignore[no-untyped-call]
    """Of one device; frozen weights take no hooks."""

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def _run(backbone: Backbone, step: Step, batch: Batch) -> list[Parts]:
    """The second of two passes: the first leaves gradients and the optimiser's state, as most passes of a run find them."""
    optimizer = torch.optim.AdamW(backbone.trained_parameters().values(), fused=True)
    if step.devices > 1:
        tracker: Any = FSDPMemTracker(backbone.model, optimizer)
        tracker.track_inputs(tuple(p for p in backbone.trained_parameters().values() if not isinstance(p, DTensor)))
    else:
        tracker = _Tracker()
        tracker.track_external(backbone.model, optimizer)
    found: list[Parts] = []
    with tracker:
        for _ in range(2):
            found.clear()
            for role in step.roles:
                with _peak(tracker, found):
                    out = backbone.logps(role, batch)[0] if role == "policy" else backbone.scores(role, batch)
                with _peak(tracker, found):
                    out.sum().backward()  # type: ignore[no-untyped-call]
                    del out
                tracker.reset_mod_stats()
            with _peak(tracker, found):
                optimizer.step()
    return found


@contextlib.contextmanager
def _peak(tracker: Any, found: list[Parts]) -> Iterator[None]:
    tracker._peak_mem_snap = tracker.get_tracker_snapshot()
    tracker._peak_mem = {device: parts["Total"] for device, parts in tracker._peak_mem_snap.items()}
    yield
    parts: Parts = {}
    for own in tracker.get_tracker_snapshot("peak").values():
        for kind, value in own.items():
            if kind != "Total":
                parts[NAMES[kind.value]] = parts.get(NAMES[kind.value], 0) + value
    found.append(parts)
