"""One language model, several roles: each is a LoRA adapter on the shared base or the base's own weights, some with a head."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from rlhf_cli import sections
from rlhf_cli.data.templates import Template, read_chat_format
from rlhf_cli.data.trees import Batch, Tree, build_batch, idle_batch, plan_passes
from rlhf_cli.errors import UsageError
from rlhf_cli.files import from_anywhere
from rlhf_cli.models.body import Body, T
from rlhf_cli.models.divergences import Divergence, token_divergences
from rlhf_cli.models.fused import fuse_lora
from rlhf_cli.models.heads import SCORE, save_full_reward
from rlhf_cli.models.load import read_adapter, read_tensors, save_adapter
from rlhf_cli.models.logps import Head, token_logps
from rlhf_cli.models.sharding import Shards, on_main, shard_like
from rlhf_cli.models.targets import adapter_state, foreign_tokens, with_targets, without_output_tokens

BASE = "base"  # the role of the bare base model, whatever adapters sit on it

ADAPTER_PART = re.compile(r"\.(?:lora_|trainable_tokens_)")
"""What begins the names of an adapter's parameters, behind a layer's."""

SWITCHED = ("_active_adapter", "_disable_adapters")
"""What peft sets of its layers to have an adapter forward, or none."""


class Backbone(Body):
    """A causal language model whose roles share one base.

    `lora: null` gives the role "policy" the model's own weights. A role is active from its forward to the end of its backward:
    under gradient checkpointing a layer that is recomputed under another adapter yields wrong gradients without a word.
    """

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype,
        attention: str = "auto",
        headless: bool = False,
        shards: Shards | None = None,
    ) -> None:
        """`headless`: the output head is not part of the model's weights, so its logits mean nothing and are not checked.

        `shards`: of the model, where this rank holds no more of it.
        """
        super().__init__(model, compute_dtype, attention, headless, shards)
        self.held: dict[str, torch.Tensor] = {}  # what was in shards, whole while it is saved
        self.peft: Any = None
        self.active: str | None = None  # None, too, where layers or roles are others than when it was last set
        self.switches: dict[str, dict[torch.nn.Module, dict[str, Any]]] = {}  # role → layer → what makes the role forward
        self.trained: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
        self.heads: dict[str, torch.nn.Linear] = {}
        self.alias: dict[str, str] = {}  # roles that are another role's weights, e.g. reference → base
        self.elsewhere: dict[str, Backbone] = {}  # roles whose frozen weights are another model's
        self.pad_id: int | None = None  # what a saved reward model's config names as padding

    def add_lora(self, role: str, config: LoraConfig, state: dict[str, torch.Tensor] | None, *, trained: bool) -> None:
        """Give `role` an adapter of its own: fresh (B = 0), or with the tensors of `state`. A frozen one has no dropout.

        Raises UsageError if the tensors do not fit the adapter, or it would change the output head.
        """
        if state is None:
            config = with_targets(config, self.model)
        if role in self.heads:
            config, state = without_output_tokens(config, state, self.model)
        if not trained:
            config = dataclasses.replace(config, lora_dropout=0.0)  # it may run while the policy's dropout is on
        try:
            with self.shards.embeddings() if self.shards is not None else contextlib.nullcontext():
                if self.peft is None:
                    self.peft = get_peft_model(self.model, config, adapter_name=role)
                else:
                    self.peft.add_adapter(role, config)
            fuse_lora(self.model)
            self.model.train(self.model.training)  # new layers would have dropout on
        except ValueError as error:
            raise UsageError(f"lora: {str(error).splitlines()[0]}") from error
        if state is not None:
            self._set_adapter_weights(role, state)
        if trained:
            # Only behind the name of an adapter's part: a layer of the base may have the role's name.
            parts = {n: ADAPTER_PART.split(n, 1)[1:] for n, _ in self.model.named_parameters()}
            self.trained[role] |= {n for n, part in parts.items() if part and role in part[0].split(".")}
        self.active = None
        self.activate(role)
        if any(n.startswith("lora_") for n, _ in self.model.get_output_embeddings().named_parameters()):
            raise UsageError("lora.target_modules: the output head cannot have an adapter; use all-linear or name inner layers")
        tied = self.model.config.get_text_config().tie_word_embeddings
        if tied and any(n.startswith("lora_") for n, _ in self.model.get_input_embeddings().named_parameters()):
            raise UsageError(
                "lora.target_modules: the embeddings of this model are its output head too (tie_word_embeddings): an adapter on "
                "one of the two could not be merged. leave them out"
            )

    def train_all_weights(self, role: str = "policy") -> None:
        """Make the model's own weights the trained weights of `role`; of a role with a scalar head, all but the output head."""
        unused = set()
        if role in self.heads and not self.model.config.get_text_config().tie_word_embeddings:
            head = self.model.get_output_embeddings()
            unused = {name for name, p in self.model.named_parameters() if any(p is q for q in head.parameters())}
        self.trained[role] |= {name for name, _ in self.model.named_parameters() if name not in unused}
        self.active = None
        self.activate(role)

    def add_head(
        self, role: str, weight: torch.Tensor | None, bias: float | None = None, *, trained: bool = True, labels: int = 1
    ) -> None:
        """Give `role` a head in float32: `weight`, or small random numbers (labels, D); without bias where `bias` is None.

        Their standard deviation is 1/√(D + 1) (Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B).
        """
        width = self.model.get_output_embeddings().weight.shape[1]  # some models narrow their last states
        labels = labels if weight is None else len(weight)
        head = torch.nn.Linear(width, labels, bias=bias is not None, device=self.device, dtype=torch.float32)
        with torch.no_grad():
            head.weight.copy_(torch.randn(labels, width) * (width + 1) ** -0.5 if weight is None else weight)
            if bias is not None:
                head.bias.fill_(bias)
        self.heads[role] = head.requires_grad_(trained)
        if trained:
            self.trained[role] |= {f"{role}.score.{name}" for name, _ in head.named_parameters()}

    def remove(self, role: str) -> None:
        """Take away a frozen role: its adapter, its head, or its name for the base."""
        self.heads.pop(role, None)
        if self.alias.pop(role, None) is None:
            self.peft.delete_adapter(role)
        self.active = None

    def stop_ids(self, tokenizer: Any, template: Template) -> list[int]:
        """The ids that end a response of this model under a template."""
        return end_ids(self.model, read_chat_format(tokenizer, template).end_ids[-1], tokenizer.eos_token_id)

    def enable_gradient_checkpointing(self) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def activate(self, role: str) -> None:
        """Make `role` the one that forwards; every trained role keeps its requires_grad, which peft would flip."""
        role = self.alias.get(role, role)
        if role == self.active:
            return
        if self.active is None:
            self.switches.clear()
        if role in self.switches:
            for layer, state in self.switches[role].items():
                vars(layer).update(state)
        else:  # peft goes through all of the model, and several times
            if self.peft is not None and role == BASE:
                self.peft.base_model.disable_adapter_layers()
            elif self.peft is not None:
                if self.active in (None, BASE):
                    self.peft.base_model.enable_adapter_layers()
                self.peft.base_model.set_adapter(role)
            trained = frozenset().union(*self.trained.values())
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trained)
            layers = [layer for layer in self.model.modules() if all(hasattr(layer, name) for name in SWITCHED)]
            self.switches[role] = {layer: {name: getattr(layer, name) for name in SWITCHED} for layer in layers}
        self.active = role

    def at(self, role: str) -> Backbone:
        """The backbone that holds the weights of `role`: this one, or another frozen model's."""
        return self.elsewhere.get(role, self)

    @property
    def hosts(self) -> tuple[Backbone, ...]:
        """This backbone and those that hold other roles, each once."""
        return tuple({id(host): host for host in (self, *self.elsewhere.values())}.values())

    @property
    def trained_roles(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Trained role → name → parameter, in the model's order, wherever the role is."""
        found: dict[str, dict[str, torch.nn.Parameter]] = {}
        for host in self.hosts:
            heads = {f"{role}.score.{name}": p for role, head in host.heads.items() for name, p in head.named_parameters()}
            own = dict(host.model.named_parameters()) | heads
            found |= {role: {name: p for name, p in own.items() if name in names} for role, names in host.trained.items()}
        return found

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name → parameter of all trained roles."""
        return {name: p for own in self.trained_roles.values() for name, p in own.items()}

    def train(self, mode: bool) -> None:
        """Dropout on or off, in every model."""
        for host in self.hosts:
            if host.model.training != mode:
                host.model.train(mode)

    @property
    def has_dropout(self) -> bool:
        return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for host in self.hosts for m in host.model.modules())

    def hidden(self, role: str, batch: Batch) -> torch.Tensor:
        """Last hidden states, (R·L, D), of a batch that is on the backbone's device."""
        self.activate(role)
        return self.states(batch)

    def logps(self, role: str, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (N,) of the batch's supervised tokens, float32, and whether each is the most likely one (N,)."""
        (logps,), hits = self.tempered_logps(role, batch, (temperature,))
        return logps, hits

    def tempered_logps(
        self, role: str, batch: Batch, temperatures: Sequence[float]
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """`logps` at several temperatures from one forward pass; the head runs on the N states that predict something."""
        host = self.at(role)
        host.activate(role)
        batch = batch.to(host.device)

        def forward() -> dict[float, tuple[torch.Tensor, torch.Tensor]]:
            states = host.hidden(role, batch)[batch.source].to(host.compute_dtype)
            return {temperature: token_logps(states, host.head(temperature), batch.target) for temperature in temperatures}

        found = host.run(forward)
        return tuple(found[each][0].to(self.home) for each in temperatures), found[temperatures[0]][1].to(self.home)

    def divergences(
        self, role: str, other: str, batch: Batch, kind: Divergence, beta: float = 0.5
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far a role's distribution is from a frozen one's at each supervised token, (N,); see `token_divergences`.

        And whether both have the same most likely token, (N,).
        """
        found, hits = self._beside(role, other, batch, partial(token_divergences, kind=kind, beta=beta))
        return found.to(self.home), hits.to(self.home)

    def logps_and_kl(self, role: str, other: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A role's log-probabilities of the batch's supervised tokens, a frozen one's, and KL(frozen ‖ role) there, (N,) each."""

        def compare(own: torch.Tensor, head: Head, known: torch.Tensor, frozen: Head) -> tuple[torch.Tensor, ...]:
            target = batch.target.to(own.device)
            with torch.no_grad():
                before, _ = token_logps(known, frozen, target)
            return token_logps(own, head, target)[0], before, token_divergences(own, head, known, frozen, "forward")[0]

        logps, before, kl = self._beside(role, other, batch, compare)
        return logps.to(self.home), before.to(self.home), kl.to(self.home)

    def _beside(self, role: str, other: str, batch: Batch, read: Callable[[torch.Tensor, Head, torch.Tensor, Head], T]) -> T:
        """What `read` makes of a role's states before the N supervised tokens and its head, and of a frozen role's two."""
        frozen, host = self.at(other), self.at(role)
        own, batch = batch.to(frozen.device), batch.to(host.device)

        def forward() -> T:
            frozen.activate(other)
            with torch.no_grad():
                known = frozen.hidden(other, own)[own.source].to(frozen.compute_dtype).to(host.device)
            known_head = frozen.head()  # of tokens that an adapter trains, while it is active
            host.activate(role)
            states = host.hidden(role, batch)[batch.source].to(host.compute_dtype)
            return read(states, host.head(), known, known_head)

        # Both heads are needed at once, also in backward.
        return host.run(forward) if frozen is host else frozen.run(host.run, forward)

    def scores(self, role: str, batch: Batch) -> torch.Tensor:
        """The role's scalar head at the last token of every response of the pass, (M,) float32."""
        return self.vectors(role, batch)[:, 0]

    def vectors(self, role: str, batch: Batch) -> torch.Tensor:
        """All numbers of the role's head there, (M, labels) float32."""
        return self._head_at(role, batch, "last")

    def values(self, role: str, batch: Batch) -> torch.Tensor:
        """The role's scalar head at the state before every supervised token, (N,) float32."""
        return self._head_at(role, batch, "source")[:, 0]

    def _head_at(self, role: str, batch: Batch, places: Literal["last", "source"]) -> torch.Tensor:
        host = self.at(role)
        host.activate(role)
        batch = batch.to(host.device)
        states = host.run(host.hidden, role, batch)[getattr(batch, places)].float()
        with torch.autocast(self.device.type, enabled=False):
            found: torch.Tensor = host.heads[role](states)
        return found.to(self.home)

    def load(self, role: str, folder: Path) -> None:
        """Put back what `save` wrote, bit for bit. Raises UsageError if the folder's tensors are not those of this model."""
        found = read_tensors(folder)
        own = {SCORE: self.heads[role].weight} if role in self.heads else {}
        if self._has_adapter(role):
            _, state, head = read_adapter(folder)
            self._set_adapter_weights(role, state)
            found = {} if head is None else {SCORE: head}
        else:
            own |= {name: p for name, p in self.model.named_parameters() if name in self.trained[role]}
        if missing := sorted(own.keys() - found.keys()):
            raise UsageError(f"{folder}: {len(missing)} weights of this model are not in it, the first is {missing[0]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(shard_like(found[name], parameter))

    def _has_adapter(self, role: str) -> bool:
        return self.peft is not None and role in self.peft.peft_config

    def _set_adapter_weights(self, role: str, state: dict[str, torch.Tensor]) -> None:
        own = adapter_state(self.peft, role)
        wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
        if wrong:
            raise UsageError(f"the adapter does not fit the base model: {len(wrong)} tensors differ, the first is {wrong[0]}")
        foreign = dict.fromkeys(foreign_tokens(self.peft, role), torch.empty(0))
        set_peft_model_state_dict(self.peft, state | foreign, adapter_name=role)

    def save(self, role: str, folder: Path) -> None:
        """Write what plain PEFT (an adapter) or transformers (all weights) loads. Of shards, what is held whole is written."""
        head = self.heads[role].weight if role in self.heads else None
        if self._has_adapter(role):
            config, state = self.peft.peft_config[role], adapter_state(self.peft, role)
            if head is not None:  # as a sequence classifier's
                state |= {f"base_model.model.{SCORE}": head}
                config = dataclasses.replace(config, task_type="SEQ_CLS", modules_to_save=["score"], inference_mode=True)
            save_adapter(folder, state, config)
        elif head is None:
            self.model.save_pretrained(str(folder), state_dict=self.held or None)
        else:
            save_full_reward(self.model, head, self.pad_id, folder, self.held)

    @contextlib.contextmanager
    def gathered(self, keep: bool) -> Iterator[None]:
        """Inside, a rank that is to `keep` what is in shards may save it. All ranks must come in."""
        if self.shards is not None and not self.peft:
            self.held = on_main(self.model.state_dict(keep_vars=True), keep)
        try:
            yield
        finally:
            self.held = {}

    def batches(self, trees: Sequence[Tree], budget: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """The forward passes of this rank for a global batch, at `home`; of shards as many on each rank, some idle."""
        own, idle = plan_passes(trees, ranks, budget, self.kernel.layout)[rank], 0
        if self.shards is not None:
            number = self.shards.sharding.most(len(own))
            own = [] if self.shards.sharding.idle else own
            idle = number - len(own)
        for rows in own:
            yield build_batch(trees, rows).to(self.home)
        for _ in range(idle):
            yield idle_batch(trees).to(self.home)
        for host in self.hosts:
            host.rest()


def end_ids(model: Any, *more: int) -> list[int]:
    """The ids that end a response: those of the model's generation config, which may be a list, and `more`.

    UsageError: what the config names are no ids.
    """
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own] if own is not None else []
    if not all(type(each) is int for each in named):
        raise UsageError(f"{model.name_or_path}: eos_token_id in generation_config.json is no id and no list of ids: {own!r:.40}")
    return sorted({*named, *more})


def lora_config(settings: sections.Lora, base: str, revision: str | None, parent: LoraConfig | None = None) -> LoraConfig:
    """The recipe's section as PEFT's config; of a `parent` that goes on, only the dropout is the recipe's."""
    named = {"base_model_name_or_path": from_anywhere(base), "revision": revision}
    if parent is not None:
        return dataclasses.replace(parent, lora_dropout=settings.dropout, inference_mode=False, **named)
    modules = settings.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        trainable_token_indices=list(settings.train_tokens) or None,
        **named,
    )
