"""A GPU rehearsal without a GPU: tensors that say cuda:0, hold their numbers on the CPU, and refuse to meet a tensor of the CPU.

Kernels are counted as a GPU would launch them: one for every operation that computes or copies, none for views and for memory
that is only set aside. A sync is what makes the host wait for the device: a number that is read, a shape that depends on
numbers, a copy between the two, but for one to the device that is asked for as non-blocking.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
MEMORY = 2**30, 80 * 2**30
"""Free and all bytes: so little is free that passes are short."""

READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FACTORIES = {
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "zeros",
}


@dataclass
class Counts:
    """What was launched, and where the host waited."""

    kernels: Counter[str] = field(default_factory=Counter)  # operation → how often
    syncs: Counter[str] = field(default_factory=Counter)  # operation and the place in the package that asked for it → how often
    largest: int = 0  # elements of a tensor that an operation made, since it was last set to 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.kernels - other.kernels, self.syncs - other.syncs)

    def copy(self) -> Counts:
        return Counts(self.kernels.copy(), self.syncs.copy())


counts = Counts()
"""Of this process, from its first rehearsal on."""


def _place() -> str:
    """The package's line that runs, else another library's beside torch."""
    frame, other = sys._getframe(1), ""
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "/rlhf_cli/" in file:
            return f"{file.split('/rlhf_cli/')[1]}:{frame.f_code.co_name}:{frame.f_lineno}"
        if not other and "/torch/" not in file and not file.endswith("rehearsal.py"):
            other = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other


def _sync(name: str) -> None:
    counts.syncs[f"{name} {_place()}"] += 1


class _RmsNorm(torch.autograd.Function):
    """One kernel there, and one of its backward, where a CPU has several."""

    @staticmethod
    def forward(ctx: Any, func: Any, x: Gpu, shape: Any, weight: Gpu, eps: float) -> Gpu:
        counts.kernels["rms_norm"] += 1
        ctx.save_for_backward(x, weight)
        ctx.again = lambda *given: func(given[0], shape, weight=given[1], eps=eps)
        return Gpu(ctx.again(x.held, weight.held).detach())

    @staticmethod
    def backward(ctx: Any, grad: Gpu) -> Any:
        counts.kernels["rms_norm_backward"] += 1
        given = [one.held.detach().requires_grad_() for one in ctx.saved_tensors]
        with torch.enable_grad():
            of_x, of_weight = torch.autograd.grad(ctx.again(*given), given, grad.held)
        return None, Gpu(of_x), None, Gpu(of_weight) if ctx.needs_input_grad[3] else None, None


class Gpu(torch.Tensor):
    """A tensor whose numbers are those of `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Gpu:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        found: Gpu = torch.Tensor._make_wrapper_subclass(cls, held.size(), **shape, dtype=held.dtype, device="cpu")
        found.held = held
        return found

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, Gpu):
            raise RuntimeError(f"a tensor of the CPU as the data of one on cuda:0 ({_place()})")
        self.held = value.held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Gpu({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that one of its tensors on the device takes part in."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(leaf.held): leaf for leaf in tensors if isinstance(leaf, Gpu)}
    foreign = [leaf for leaf in tensors if not isinstance(leaf, Gpu) and leaf.dim() > 0 and leaf.numel()]
    if foreign and name == "copy_":
        blocking = not (isinstance(args[0], Gpu) and (kwargs.get("non_blocking") or args[2:] == (True,)))
        if blocking:
            _sync(name)
    elif foreign and name in INDEXED and isinstance(args[0], Gpu) and not any(leaf is x for leaf in foreign for x in args[2:]):
        _sync(name)  # indices are taken over
    elif foreign:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU meet ({_place()})")
    masks = name in INDEXED and any(getattr(index, "dtype", None) in (torch.bool, torch.uint8) for index in args[1])
    if name in READ or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _sync(name)
    if not func.is_view and name not in FREE:
        counts.kernels[name] += 1
    plain_args, plain_kwargs = tree_map_only(Gpu, lambda leaf: leaf.held, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if name == "copy_":
        return args[0]
    if not func.is_view:
        counts.largest = max(counts.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
    # What works in place returns the tensor that it was given.
    return tree_map_only(torch.Tensor, lambda x: there[id(x)] if id(x) in there else Gpu(x), out)


def _is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, torch.dtype) and torch.device(device).type == "cuda"


class _Rehearse(TorchFunctionMode):
    """What is made on the device, or moved between the two."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("to", "cpu", "cuda") and isinstance(first, torch.Tensor):
            return self._move(func, name, first, args[1:], kwargs)
        if name in ("numpy", "__array__") and isinstance(first, Gpu):
            raise TypeError(f"a tensor on cuda:0 cannot become one of numpy ({_place()})")
        if name == "tolist" and isinstance(first, Gpu):
            _sync(name)
            return first.held.tolist()
        if name == "new_tensor" and isinstance(first, Gpu):
            _sync(name)
            return Gpu(torch.tensor(args[1], dtype=kwargs.get("dtype") or first.dtype))
        if name in ("tensor", "as_tensor", *FACTORIES) and _is_gpu(kwargs.get("device")):
            if name in ("tensor", "as_tensor"):
                _sync(name)
            elif name not in FREE:
                counts.kernels[name] += 1
            found = func(*args, **kwargs | {"device": "cpu"})
            return found if isinstance(found, Gpu) else Gpu(found)
        if name == "rms_norm" and isinstance(first, Gpu):  # one kernel there, and here several
            counts.kernels["_to_copy"] += 2 * torch.is_autocast_enabled("cpu")  # CUDA's autocast has it in float32
            return _RmsNorm.apply(func, *args, kwargs["weight"], kwargs["eps"])
        return func(*args, **kwargs)

    @staticmethod
    def _move(func: Any, name: str, tensor: torch.Tensor, args: Any, kwargs: Any) -> Any:
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for each in args:
            if isinstance(each, torch.Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, str | torch.device):
                device = each
        device = {"cpu": "cpu", "cuda": "cuda"}.get(name, device)
        if device is not None and torch.device(device).type == "meta":
            return (tensor.held if isinstance(tensor, Gpu) else tensor).to(device, dtype)
        there = isinstance(tensor, Gpu)
        if device is None or _is_gpu(device) == there:
            return tensor if dtype is None else torch.Tensor.to(tensor, dtype=dtype)
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError("gradients between devices")
        if there or not kwargs.get("non_blocking"):
            _sync(name)
        return tensor.held.to(dtype, copy=True) if isinstance(tensor, Gpu) else Gpu(tensor.detach().to(dtype, copy=True))


FLASH = {torch.float16, torch.bfloat16}
"""Dtypes of torch's flash kernel."""


class _Flash(torch.autograd.Function):
    """One kernel forward and one backward there; here one dense softmax a sequence, whose tokens are the last of its keys."""

    @staticmethod
    def forward(ctx: Any, query: Gpu, key: Gpu, value: Gpu, queries: Gpu, keys: Gpu, scale: float, before: int) -> Any:
        counts.kernels["varlen_attn"] += 1
        inputs = [x.held.detach().float().requires_grad_() for x in (query, key, value)]
        found, groups = [], query.shape[1] // key.shape[1]
        with torch.enable_grad():
            for (a, b), (c, d) in zip(pairwise(queries.held.tolist()), pairwise(keys.held.tolist()), strict=True):
                k, v = (x[c:d].repeat_interleave(groups, 1) for x in inputs[1:])
                age = torch.arange(d - c - b + a, d - c)[:, None] - torch.arange(d - c)
                hidden = (age < 0) | (age > (before if before >= 0 else d))
                scores = torch.einsum("ihd,jhd->hij", inputs[0][a:b], k) * scale
                found.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
            ctx.found = torch.cat(found)
        ctx.inputs, ctx.dtype = inputs, query.dtype
        return Gpu(ctx.found.detach().to(query.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        counts.kernels["varlen_attn_backward"] += 1
        grads = torch.autograd.grad(ctx.found, ctx.inputs, grad.held.float())
        return *(Gpu(x.to(ctx.dtype)) for x in grads), None, None, None, None


def _flash(query: Gpu, key: Gpu, value: Gpu, queries: Gpu, keys: Gpu, longest: int, of: int, **more: Any) -> Any:
    """As torch.nn.attention.varlen's."""
    if not {query.dtype, key.dtype, value.dtype} <= FLASH:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    for begins, most in ((queries, longest), (keys, of)):
        assert begins.dtype == torch.int32 and int(begins.held.diff().max()) == most
    assert more["enable_gqa"] == (query.shape[1] != key.shape[1]) and more["window_size"][1] == 0
    scale = query.shape[-1] ** -0.5 if more["scale"] is None else more["scale"]
    return _Flash.apply(query, key, value, queries, keys, scale, more["window_size"][0])  # type: ignore[no-untyped-call]


def to_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and buffer; what modules share they share afterwards too."""
    moved: dict[int, torch.nn.Parameter] = {}
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None and not isinstance(p, Gpu):
                if id(p) not in moved:
                    moved[id(p)] = torch.nn.Parameter(Gpu(p.detach()), requires_grad=p.requires_grad)
                each._parameters[name] = moved[id(p)]
        for name, buffer in each._buffers.items():
            if buffer is not None and not isinstance(buffer, Gpu):
                each._buffers[name] = Gpu(buffer)
    return module


@contextmanager
def rehearsal() -> Iterator[Counts]:
    """Inside, processes find a GPU; yields `counts`."""
    import transformers

    from rlhf_cli.ranks import Ranks

    own = torch.nn.Module.to, torch.autocast.__init__, transformers.PreTrainedModel.save_pretrained, Ranks.__init__

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        places = [x for x in (*args, *kwargs.values()) if isinstance(x, str | torch.device)]
        if not any(map(_is_gpu, places)):
            return own[0](self, *args, **kwargs)
        dtypes = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        return to_gpu(own[0](self, *dtypes) if dtypes else self)

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        own[1](self, "cpu", *args, **kwargs)

    def save(self: Any, folder: Any, **kwargs: Any) -> None:
        _sync("save_pretrained")
        state = kwargs.pop("state_dict", None) or self.state_dict()
        own[2](self, folder, state_dict={name: p.held if isinstance(p, Gpu) else p for name, p in state.items()}, **kwargs)

    def start(self: Any, **kwargs: Any) -> None:
        own[3](self, **kwargs)
        self.device = CUDA

    with pytest.MonkeyPatch.context() as patch, _Rehearse():
        patch.setattr(torch.nn.Module, "to", to)
        patch.setattr(torch.autocast, "__init__", autocast)
        patch.setattr(varlen, "varlen_attn", _flash)
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", save)
        patch.setattr(Ranks, "__init__", start)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: MEMORY)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=MEMORY[1], major=9))
        yield counts
