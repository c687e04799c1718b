"""A causal language model in a forward pass: the attention kernel and the rule of its logits that give its own numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf_cli.data.trees import Batch, Tree, build_batch, plan_passes
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.attention import CANDIDATES, KERNELS, LAYER_TYPES, PLAIN, Kernel
from rlhf_cli.models.logps import PLAIN_LOGITS, Head, LogitRule, find_rule
from rlhf_cli.models.sharding import Shards

T = TypeVar("T")

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a token's packed and separate hidden states, relative to their norm."""

HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest difference between the model's logits and what its rule makes of head · hidden, relative to the largest logit."""


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
        candidates = ("trees",) * (setting == "auto" and self.device.type == "cpu") + CANDIDATES[setting]
        if not LAYER_TYPES.issuperset(self.layer_types):
            candidates = tuple(name for name in candidates if KERNELS[name].layout == "alone")
        for name in candidates:
            self.kernel = KERNELS[name]
            self.rest()  # the candidate before it may have broken off a pass
            # What a model does with a mask or a keyword that it does not know is its own affair: any of these errors.
            with contextlib.suppress(NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, ImportError):
                self._use(self.kernel)
                found = self._probe(trees)
                if ((found - wanted).norm(dim=-1) <= PROBE_TOLERANCE[self.compute_dtype] * wanted.norm(dim=-1)).all():
                    return self.kernel
        raise UsageError(f"model.attention: {setting} does not work with this model here; leave it at auto")

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
