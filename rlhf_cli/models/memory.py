"""How much memory a step takes, from the configuration alone, and the packing budget that fits."""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_cli.errors import UsageError
from rlhf_cli.models.targets import BALANCE, find_targets

CPU_ACTIVATIONS = 3 * 2**28
"""Bytes that `tokens_per_device: auto` lets the activations of a pass take on a CPU; longer passes were not faster there."""

SECOND_ROLE = 2.0
"""By how much a value that is trained beside the policy shortens the passes: its activations find the heap in the pieces that
those of the policy left. Measured with a 135 M model: 257 tokens instead of 514 take a tenth more time and 0.6 GiB less."""

LONG_PASS = 384
"""Tokens of a pass behind which freed memory is given back before another role's activations come: it takes some per cent of the
time, and 0.4 GiB less at 514 tokens of a 135 M model. Shorter passes need it less."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device."""

    weights: int
    trained: int  # parameters
    per_token: int  # activations of a forward pass that are kept for backward
    notices: tuple[str, ...] = ()  # what to say of weights that `all-linear` does not adapt, or of routers that train

    def total(self, tokens: int) -> float:
        """With gradients and AdamW's two moments, in float32, and a pass of so many tokens."""
        return self.weights + 12 * self.trained + self.per_token * tokens


def estimate(config: Any, *, rank: int | None, dtype: torch.dtype, checkpointing: bool, trust_remote_code: bool) -> Memory:
    """The step's memory; `rank` is the LoRA rank on all linear layers and experts, None for full training.

    Weights that PEFT adapts where they lie, as experts, are there twice during a pass: as they are, and with B A added.
    Activations: 12 hidden and 4 intermediate vectors a layer and token, as was measured for Llama layers with LoRA in float32;
    with gradient checkpointing one hidden vector a layer, and one layer in full.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UsageError(f"model.path: this is no causal language model: {str(error).splitlines()[0]}") from error
    targets = find_targets(model)
    weights_of = dict(model.named_parameters())
    in_place = [weights_of[name].shape for name in targets.parameters]
    linear = [weights_of[f"{name}.weight"].shape for name in targets.modules]
    parameters = sum(p.numel() for p in model.parameters())
    adapted = [math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in (*linear, *in_place)]
    trained = parameters if rank is None else rank * sum(adapted)
    text = config.get_text_config()
    wide = max([shape[-2] for shape in (*linear, *in_place)] or [4 * text.hidden_size])
    layer = 12 * text.hidden_size + 4 * wide
    kept = text.hidden_size * text.num_hidden_layers + layer if checkpointing else layer * text.num_hidden_layers
    size = torch.finfo(dtype).bits // 8
    twice = sum(map(math.prod, in_place)) / (text.num_hidden_layers if checkpointing else 1)
    weights = 4 * parameters if rank is None else size * (parameters + int(twice)) + 4 * trained
    said = [
        f"lora: {len(names)} weights have no adapter, the first is {names[0]} ({why})" for why, names in targets.left_out.items()
    ]
    if rank is None:
        said = [BALANCE] * all(text.to_dict().get(key) for key in ("output_router_logits", "router_aux_loss_coef"))
    return Memory(weights, trained, kept * size, tuple(said))


def auto_budget(memory: Memory, longest: int, device: torch.device, *, values: bool = False) -> int:
    """`tokens_per_device: auto`: what fits beside weights, optimiser and (`values`) a value, at least the longest tree."""
    if device.type != "cpu":
        room, most = gpu_memory(device)[0] * 0.7 - memory.total(0), 2**17
    else:
        room, most = CPU_ACTIVATIONS, 4096
    return max(longest, min(int(room / memory.per_token / (SECOND_ROLE if values else 1)), most))


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of a GPU; of Apple's what the system recommends, since it shares the machine's."""
    if device.type == "mps":
        most = torch.mps.recommended_max_memory()
        return most - torch.mps.driver_allocated_memory(), most
    return torch.cuda.mem_get_info(device)


def empty_cache(device: torch.device) -> None:
    """Give a GPU what torch keeps of its freed memory."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def return_freed() -> None:
    """Give freed memory back to the system: the C library keeps it for blocks of the same size, which may not come."""
    with contextlib.suppress(AttributeError, OSError):  # not every C library can
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's out-of-memory, MPS's, Python's, and that of torch's allocator on a CPU."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    said = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    return known or any(each in str(error) for each in said)
