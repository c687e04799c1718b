"""A causal language model in a forward pass: the attention kernel and the rule of its logits that give its own numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from rlhf_cli.data.trees import Batch, Tree, build_batch, plan_passes
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.attention import KERNELS, LAYER_TYPES, PLAIN, Kernel, find_candidates
from rlhf_cli.models.fused import BROKEN, fuse
from rlhf_cli.models.logps import PLAIN_LOGITS, Head, LogitRule, find_rule
from rlhf_cli.models.sharding import Shards, find_layers
from rlhf_cli.ranks import collective

T = TypeVar("T")

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a token's packed and separate hidden states, relative to their norm."""

HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest difference between the model's logits and what its rule makes of head · hidden, relative to the largest logit."""

MEASURED_LAYERS = 2  # that are run where attention kernels are measured: activations of more might not fit


class Body:
    """A causal language model, frozen, whose batches are packed."""

    def __init__(self, model: Any, compute_dtype: torch.dtype, attention: str, headless: bool, shards: Shards | None) -> None:
        """As `Backbone`'s."""
        self.model = model
        self.shards = shards
        self.compute_dtype = compute_dtype
        self.device: torch.device = model.device
        model.config.use_cache = False
        text = model.config.get_text_config().to_dict()
        self.window: int | None = text.get("sliding_window") if text.get("use_sliding_window", True) else None
        self.layer_types = tuple(dict.fromkeys(text.get("layer_types") or ()))
        self._plain: str = model.config._attn_implementation
        self.rule: LogitRule = PLAIN_LOGITS
        fuse(model)
        self.kernel = self._choose_kernel(attention, headless)
        model.requires_grad_(False)

    @property
    def body(self) -> Any:
        """The model without its output head."""
        inner = self.model.base_model
        # Llama 4's text model calls it otherwise than its class says; then transformers takes the whole model for the body.
        return inner if inner is not self.model else self.model.model

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own logits of last hidden states (…, D): (…, V) float32."""
        with self.autocast():
            return self.rule.logits(self.model.get_output_embeddings()(states.to(self.compute_dtype)).float())

    @property
    def home(self) -> torch.device:
        """Where batches and the numbers of their tokens are: objectives compute in float64, which Apple's MPS lacks."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def run(self, forward: Callable[..., T], *arguments: Any) -> T:
        """A forward pass of the body, or of more than it, with the weights that it needs at hand."""
        return forward(*arguments) if self.shards is None else self.shards.run(forward, *arguments)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, each rank forwards what it likes, without gradients. All ranks must come in, and out."""
        with self.shards.whole() if self.shards is not None else contextlib.nullcontext():
            yield

    def rest(self) -> None:
        """Nothing that was gathered for a pass is needed any more, whether it came to its end or not."""
        if self.shards is not None:
            self.shards.settle()

    def states(self, batch: Batch) -> torch.Tensor:
        """Last hidden states, (R·L, D), of a batch that is on the model's device, of whichever weights are active."""
        arguments = self.kernel.arguments(batch, self.layer_types, self.window, self.compute_dtype)
        with self.autocast():
            out = self.body(input_ids=batch.ids, use_cache=False, **arguments)
        return torch.flatten(out.last_hidden_state, 0, 1)

    def head(self, temperature: float = 1.0) -> Head:
        """What makes logits, divided by the temperature, of hidden states in the dtype that is computed in."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)  # where tokens are trained, PEFT's layer has none
        bias = None if bias is None else bias.to(self.compute_dtype)
        return Head(head.weight.to(self.compute_dtype), bias, self.rule.at(temperature))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        # No cache: a pass uses every weight once, and casts that are kept would be a second copy of all weights that train.
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=False)

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[Any]:
        """The model as transformers knows it, for `generate` and other callers that bring their own masks."""
        self._use(KERNELS["alone"])
        try:
            yield self.model
        finally:
            self._use(self.kernel)
            if self.shards is not None:
                self.shards.rest()

    def _use(self, kernel: Kernel) -> None:
        self.model.set_attn_implementation(self._plain if kernel.name == PLAIN else kernel.name)

    def _choose_kernel(self, setting: str, headless: bool) -> Kernel:
        """The first candidate that gives the same hidden states packed as alone, by a probe with two branches."""
        random = np.random.default_rng(0)
        ids = [random.integers(0, self.model.config.get_text_config().vocab_size, n).astype(np.int32) for n in (7, 5, 6, 4, 3)]
        trees = [Tree(ids[0], np.zeros(7, bool), (ids[1], ids[2]), 0), Tree(ids[3], np.zeros(4, bool), (ids[4],), 1)]
        self.kernel = KERNELS["alone"]
        wanted = self._probe(trees)
        if not headless:
            self.rule = self._find_rule(trees)
        candidates = find_candidates(setting, self.device.type)
        if not LAYER_TYPES.issuperset(self.layer_types):
            candidates = tuple(name for name in candidates if KERNELS[name].layout == "alone")
        elif setting == "auto" and self.device.type == "cuda" and self.shards is None:
            candidates = self._by_speed(candidates)
        for name in candidates:
            self.rest()  # the candidate before it may have broken off a pass
            self.kernel = KERNELS[name]
            with contextlib.suppress(*BROKEN):
                self._use(self.kernel)
                found = self._probe(trees)
                if ((found - wanted).norm(dim=-1) <= PROBE_TOLERANCE[self.compute_dtype] * wanted.norm(dim=-1)).all():
                    return self.kernel
        raise UsageError(f"model.attention: {setting} does not work with this model here; leave it at auto")

    def _by_speed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Kernels by their seconds on the slowest rank, so that all ranks choose alike; those that do not work come last."""
        text = self.model.config.get_text_config()
        length = min(340, getattr(text, "max_position_embeddings", 340)) // 2
        ids = np.random.default_rng(0).integers(0, text.vocab_size, (8, 3, length)).astype(np.int32)
        trees = [Tree(own[0], np.zeros(length, bool), (own[1], own[2]), number) for number, own in enumerate(ids)]
        self.model.requires_grad_(False)
        seconds = [math.inf] * len(names)
        for number, name in enumerate(names):
            self.kernel = KERNELS[name]
            with contextlib.suppress(*BROKEN):
                self._use(self.kernel)
                (rows,) = plan_passes(trees, 1, 8192, self.kernel.layout)[0]
                seconds[number] = self._seconds(build_batch(trees, rows).to(self.device))
        if dist.is_initialized():
            found = torch.tensor(seconds, device=self.device)
            with collective():
                dist.all_reduce(found, dist.ReduceOp.MAX)
            seconds = found.tolist()
        return tuple(sorted(names, key=lambda name: (name == "alone", seconds[names.index(name)])))

    def _seconds(self, batch: Batch) -> float:
        """Of forward and backward through the first layers, the fastest of three times; the masks are there before."""
        arguments = self.kernel.arguments(batch, self.layer_types, self.window, self.compute_dtype)
        layers, found = find_layers(self.model), list[float]()
        rest = layers[MEASURED_LAYERS:]
        del layers[MEASURED_LAYERS:]
        try:
            for _ in range(3):
                begun = perf_counter()
                first = self.model.get_input_embeddings()(batch.ids).requires_grad_()
                with self.autocast():
                    states = self.body(inputs_embeds=first, use_cache=False, **arguments).last_hidden_state
                float(torch.autograd.grad(states.float().sum(), first)[0].float().sum())  # waits for the device
                found.append(perf_counter() - begun)
        finally:
            layers.extend(rest)
        return min(found)

    @torch.no_grad()
    def _probe(self, trees: list[Tree]) -> torch.Tensor:
        """Hidden states before every supervised token, (N, D), in the order of tree and response."""
        self.model.eval()
        found: dict[tuple[int, int], torch.Tensor] = {}
        for rows in plan_passes(trees, 1, 256, self.kernel.layout)[0]:
            batch = build_batch(trees, rows).to(self.device)
            states = self.run(self.states, batch)[batch.source]
            names = [(piece.tree, b) for row in rows for piece in row for b in piece.branches]
            found |= {name: states[batch.owner == number].float() for number, name in enumerate(names)}
        return torch.cat([found[name] for name in sorted(found)])

    @torch.no_grad()
    def _find_rule(self, trees: list[Tree]) -> LogitRule:
        """What makes the model's own logits of its head's numbers. UsageError: nothing that is known here does."""
        own, heads = [], []

        def of_head(ids: torch.Tensor) -> torch.Tensor:
            numbers: torch.Tensor = self.model.get_output_embeddings()(
                self.body(input_ids=ids, use_cache=False).last_hidden_state
            )
            return numbers[0].float()

        for tree in trees:
            ids = torch.from_numpy(np.concatenate((tree.prompt, *tree.responses)).astype(np.int64)).to(self.device)[None]
            with self.autocast():
                own.append(self.model(input_ids=ids, use_cache=False).logits[0].float())
                heads.append(self.run(of_head, ids))
        logits = torch.cat(own)
        if not torch.isfinite(logits).all():
            raise NumberError("the model's logits are not finite before any training: its weights are damaged")
        rule, difference = find_rule(self.model.config.get_text_config().to_dict(), torch.cat(heads), logits)
        if difference > HEAD_TOLERANCE[self.compute_dtype]:
            raise UsageError(
                f"the model's logits are not its head times its hidden states, scaled or soft-capped as its config says (they "
                f"differ by {difference:.2%}): this model is not supported"
            )
        return rule
