"""How much memory a step takes, from the configuration alone, and the packing budget that fits."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.logps import chunk_elements
from rlhf_cli.models.targets import BALANCE, find_targets

CPU_ACTIVATIONS = 3 * 2**28
"""Bytes that `tokens_per_device: auto` lets the activations of a pass take on a CPU; longer passes were not faster there."""

SECOND_ROLE = 2.0
"""By how much a value that is trained beside the policy shortens the passes: its activations find the heap in the pieces that
those of the policy left. Measured with a 135 M model: 257 tokens instead of 514 take a tenth more time and 0.6 GiB less."""

LONG_PASS = 384
"""Tokens of a pass behind which freed memory is given back before another role's activations come: it takes some per cent of the
time, and 0.4 GiB less at 514 tokens of a 135 M model. Shorter passes need it less."""

KEPT = {(True, 4): 12, (False, 4): 12, (True, 2): 14, (False, 2): 17}
"""Hidden vectors that a layer keeps of a token for backward, by LoRA or not and bytes of a number, beside 3 intermediate ones.

Another gate than SiLU keeps its own output too, and so do experts. In half precision LoRA keeps the input of each adapter once
more, and training all weights the casts of a stream that is float32.
"""
TRANSIENT = 9
"""Bytes that come and go for each intermediate number of a token, in a layer's forward or backward: gradients, float32 copies."""
QUANTISED = {"4bit": 4.127 / 8, "8bit": 1.0}
"""Bytes of a weight, the scales of its blocks included."""
STATE = {"adamw": 8, "adamw_8bit": 2, "sgd": 0}
"""Bytes that an optimiser remembers of a parameter."""
FITS = 0.85
"""Share of a GPU's free memory that is planned with: the estimate errs by up to 15 %, and blocks leave gaps."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device."""

    weights: int  # of these at all times; of a sharded model its share
    trained: int  # parameters, those of other devices included
    per_token: int  # activations of a forward pass that are kept for backward
    notices: tuple[str, ...] = ()  # what to say of weights that `all-linear` does not adapt, or of routers that train
    whole: float = 0  # weights of all devices
    moments: tuple[tuple[Parts, Parts], ...] = (({}, {}),)  # what each has in memory at once: at any length, and of a token
    most: Parts = field(default_factory=dict)  # on CUDA, of parts that do not grow beyond it

    def parts(self, tokens: int) -> Parts:
        """What is in memory when it is fullest, in a pass of so many tokens."""
        full = [{part: fixed.get(part, 0) + each.get(part, 0) * tokens for part in fixed | each} for fixed, each in self.moments]
        full = [{part: min(size, self.most.get(part, size)) for part, size in parts.items()} for parts in full]
        return max(full, key=lambda parts: sum(parts.values()))

    def total(self, tokens: int) -> float:
        return sum(self.parts(tokens).values())


class _Counts(NamedTuple):
    linear: list[torch.Size]  # shapes of the weights that LoRA adapts
    in_place: list[torch.Size]  # of those where they lie
    layers: list[int]  # parameters of each
    outside: int  # parameters that are in none
    head: int
    left_out: list[str]


def _count(config: Any, trust_remote_code: bool) -> _Counts:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UsageError(f"model.path: this is no causal language model: {str(error).splitlines()[0]}") from error
    targets, weights = find_targets(model), dict(model.named_parameters())
    sizes: Counter[str] = Counter()
    for name, weight in weights.items():
        sizes[((number := re.search(r"\.(\d+)\.", name)) and number[1]) or ""] += weight.numel()
    outside = sizes.pop("", 0)
    left_out = targets.left_out.items()
    said = [f"lora: {len(names)} weights have no adapter, the first is {names[0]} ({why})" for why, names in left_out]
    linear = [weights[f"{name}.weight"].shape for name in targets.modules]
    in_place = [weights[name].shape for name in targets.parameters]
    return _Counts(linear, in_place, list(sizes.values()), outside, model.get_output_embeddings().weight.numel(), said)


def estimate(
    config: Any,
    model: sections.Model,
    *,
    rank: int | None,
    dtype: torch.dtype,
    devices: int = 1,
    roles: int = 1,
    row: int = 0,
    optimizer: str = "adamw",
) -> Memory:
    """The step's memory; `rank` is the LoRA rank on all linear layers and experts, None for full training.

    devices: over which the model is sharded, layer by layer; 1: it is whole. roles: adapters that train. row: tokens of a row
    that has a dense attention mask. Weights that PEFT adapts where they lie, as experts, are there twice during a pass: as they
    are, and with B A added.
    """
    of, text, full = _count(config, model.trust_remote_code), config.get_text_config(), rank is None
    linear, in_place, outside, layers = of.linear, of.in_place, of.outside, text.num_hidden_layers
    parameters, size = sum(of.layers) + outside, dtype.itemsize
    held = 4 if full else size
    whole = held * parameters - (size - QUANTISED.get(model.quantize or "", size)) * sum(map(math.prod, linear))
    adapted = [math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in (*linear, *in_place)]
    trained = parameters if rank is None else roles * rank * sum(adapted)
    twice = 0 if full else size * sum(map(math.prod, in_place)) // (layers if model.gradient_checkpointing else 1)
    weights = int(whole / devices + twice + (0 if full else 4 * trained))

    wide = max([shape[-2] for shape in (*linear, *in_place)] or [4 * text.hidden_size])
    gated = text.to_dict().get("hidden_act") == "silu" and not in_place
    layer = size * (KEPT[not full, size] * text.hidden_size + (4 - gated) * wide)
    pair = size + (size + 4) * text.num_attention_heads * (model.attention == "eager")  # of two tokens of a row, in a layer
    kept, again = layers * (layer + pair * row), 0.0
    if model.gradient_checkpointing:
        kept, again = layers * held * text.hidden_size, layer + pair * row
    passing = {"activations": kept + row + 12 * text.hidden_size, "temporaries": TRANSIENT * wide}
    backward = passing | {"activations": passing["activations"] + again}

    head, root = of.head * full, held * outside * (devices > 1)
    block = max(0, whole - held * outside) / max(1, len(of.layers)) * (devices > 1)
    cast = size * full * (size < held)  # bytes of a trained weight's copy in half precision
    inside = cast * (parameters - outside)
    copies, one = ({}, inside / layers) if model.gradient_checkpointing else ({"casts of weights": inside}, 0.0)
    logit = 4 + size * (size < 4)  # bytes: in float32, and in the dtype that is computed in
    own, gathered = trained / (devices if full else 1), {"gathered weights": root + block}
    always = {"weights": weights, "optimiser": STATE[optimizer] * own, "gradients": 4 * own}
    moments: list[tuple[Parts, Parts]] = [
        (gathered | {"all-gather buffers": root + block}, {}),
        (gathered | {"all-gather buffers": block, "temporaries": one} | copies, passing),
        # The gradient of a head that trains is summed in float32, beside a product in half precision.
        (
            {"gathered weights": float(root), "temporaries": (4 + size + cast) * head} | copies,
            {**passing, "temporaries": 0, "logits": logit * text.vocab_size},
        ),
        (gathered | {"all-gather buffers": block * (1 + full), "temporaries": one + 4 * head * (devices > 1)} | copies, backward),
        ({"temporaries": 2 * root * full}, {}),
    ]
    balanced = all(text.to_dict().get(key) for key in ("output_router_logits", "router_aux_loss_coef"))
    said = [BALANCE] * balanced if full else of.left_out
    shown, most = tuple((always | f, each) for f, each in moments), {"logits": float(logit * chunk_elements("cuda"))}
    return Memory(weights, trained, int(kept + again), tuple(said), whole, shown, most)


def auto_budget(
    memory: Memory, longest: int, device: torch.device, *, values: bool = False, capacity: float | None = None
) -> int:
    """`tokens_per_device: auto`: what fits beside weights, optimiser and (`values`) a value, at least the longest tree.

    capacity: bytes of a GPU that is not at hand.
    """
    if capacity is None and device.type == "cpu":
        return max(longest, min(int(CPU_ACTIVATIONS / memory.per_token / (SECOND_ROLE if values else 1)), 4096))
    room = FITS * (gpu_memory(device)[0] if capacity is None else capacity)
    return max(longest, bisect.bisect_right(range(2**17 + 1), room, key=memory.total) - 1)


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
