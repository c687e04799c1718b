"""Weights in shards: every rank holds a part of each layer, and all gather a layer while they compute with it (FSDP2)."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.ranks import Sharding, collective

T = TypeVar("T")


def _collectives(sharding: Sharding) -> tuple[Any, Any]:
    """FSDP2's all-gather and reduce-scatter, counted, and left out where they have been issued before.

    MachineError: this torch has not what they need.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

        _ = FSDPModule.reset_iter_state
    except (ImportError, AttributeError) as error:
        raise MachineError(f"models in shards need a newer torch than {torch.__version__}: pip install 'torch>=2.13'") from error

    class AllGather(DefaultAllGather):
        def __call__(self, *tensors: Any, **settings: Any) -> Any:
            with collective():
                return super().__call__(*tensors, **settings) if sharding.is_due() else None

    class ReduceScatter(DefaultReduceScatter):
        def __call__(self, *tensors: Any, **settings: Any) -> Any:
            with collective():
                return super().__call__(*tensors, **settings) if sharding.is_due() else None

    return AllGather(), ReduceScatter()


def find_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's largest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=torch.nn.ModuleList())


class Shards:
    """A model in shards. Between two passes no rank holds more than its own, and a parameter is a DTensor.

    What is added later, as adapters, is whole on every rank. Gradients of shards are summed over ranks in backward.
    """

    def __init__(self, model: Any, sharding: Sharding, dtype: torch.dtype | None = None) -> None:
        """The model is on a CPU, on every rank; each moves its shards to its device, layer by layer, its weights in `dtype`.

        UsageError: the model's layers are not of the class that the launch names. MachineError: torch is too old.
        """
        self.model, self.sharding = model, sharding
        self._whole = False
        layers = find_layers(model)
        kinds = sorted({type(layer).__name__ for layer in layers})
        if sharding.layer is not None and not {*kinds} <= {*sharding.layer.split(",")}:
            raise UsageError(
                f"fsdp_transformer_layer_cls_to_wrap: {sharding.layer}: the layers of this model are {', '.join(kinds)}; "
                "leave the key out of the accelerate config"
            )

        def share(module: Any, reshard: bool) -> None:
            quantised = {name: vars(p) for name, p in module.named_parameters() if not p.is_floating_point()}
            for parameter in module.parameters():
                if dtype is not None and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(dtype)
            fully_shard(module, mesh=sharding.mesh, reshard_after_forward=reshard)
            for name, parameter in module.named_parameters():
                vars(parameter).update(quantised.get(name, {}))  # what PEFT asks of a 4-bit weight

        # Gradients are reduced in the dtype that trained weights have at the first pass. What is trained has one dtype.
        model.requires_grad_(dtype is not None or len({p.dtype for p in model.parameters()}) == 1)
        model.run = types.MethodType(lambda _, forward, *arguments: forward(*arguments), model)
        for layer in layers:
            share(layer, sharding.reshard)
        share(model, reshard=False)
        register_fsdp_forward_method(model, "run")
        gather, scatter = _collectives(sharding)
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # sums: losses are divided by global counts
            module.set_force_sum_reduction_for_comms(True)  # of other factors than the mean's, NCCL makes bfloat16 zeros
            module.set_reduce_scatter_unused_params(True)  # experts that no token of this rank went to
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)

    @property
    def _modules(self) -> list[FSDPModule]:
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    def run(self, forward: Callable[..., T], *arguments: Any) -> T:
        """`forward` with embeddings and head gathered; with gradients they stay until backward has ended."""
        if self._whole:
            return forward(*arguments)
        found: T = self.model.run(forward, *arguments)
        self.rest()
        return found

    def rest(self) -> None:
        """Let go of embeddings and head after a pass without gradients, which no backward follows."""
        if not self._whole and not torch.is_grad_enabled():
            self.model.reshard()

    def settle(self) -> None:
        """Between passes, or after one that was broken off: nothing is gathered or under way."""
        if not self._whole:
            self.model.reset_iter_state()

    @contextlib.contextmanager
    def embeddings(self) -> Iterator[None]:
        """Embeddings and head on every rank: PEFT copies the tokens that an adapter trains."""
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All weights on every rank: each computes without gradients and without the others."""
        if self._whole:
            yield
            return
        for module in self._modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            for module in self._modules:
                module.set_reshard_after_forward(self.sharding.reshard and module is not self.model, recurse=False)
            self.settle()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's whole value; of one in shards, which all ranks must ask for, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole value, which every rank has, laid out as another tensor of its shape is, on that one's device."""
    value = value.to(model.device)
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


def total_norm(gradients: list[torch.Tensor]) -> float:
    """The Euclidean norm of all gradients, of shards over all ranks; 0 without any."""
    norms = [full(torch.nn.utils.get_total_norm(some)) for some in alike(gradients)]
    return float(torch.stack(norms).norm()) if len(norms) > 1 else float(*norms)


def clip(gradients: list[torch.Tensor], most: float, norm: float) -> None:
    """Scale gradients of this norm down to `most`, by min(1, most / (norm + 1e-6)) in float32 as torch does."""
    multiply(gradients, float((most / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)))


def multiply(gradients: list[torch.Tensor], factor: float) -> None:
    for some in alike(gradients):
        torch._foreach_mul_(some, factor)


def alike(tensors: Iterable[T]) -> list[list[T]]:
    """Those in shards and the others: torch takes no lists of both."""
    kinds: tuple[list[T], list[T]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [some for some in kinds if some]


def on_main(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """The whole tensors in this process's memory where it is to keep them; all ranks must ask, and gather one by one.

    Names of one tensor name one again.
    """
    found: dict[int, torch.Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        value = full(tensor.detach())
        if keep:
            found[id(tensor)] = value.cpu()
    return {name: found[id(tensor)] for name, tensor in tensors.items() if keep}
