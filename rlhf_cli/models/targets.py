"""Which weights of a model LoRA adapts, and which it leaves out, and why."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import UsageError

State = dict[str, torch.Tensor] | None

ALL_LINEAR = "all-linear"
ROUTERS = re.compile(r"Router|Gating|MoE\w*Gate")
"""In the names of their classes in transformers."""

ROUTER = "routers stay as they are, and with them how evenly the experts are used"
MIXER = "in state-space layers fused kernels read them past an adapter"
SHARED = "several layers share them, and adapters on each could not be merged"
BALANCE = (
    "the model's config asks for a loss that keeps its experts evenly used (output_router_logits: true, router_aux_loss_coef): "
    "it is not added, and the routers follow the objective alone; with lora they stay as they are"
)
STACKED = "experts that are not stacked in three dimensions"


class Targets(NamedTuple):
    """What gets an adapter; names are those of the model without adapters."""

    modules: list[str]  # layers
    parameters: list[str]  # weights that PEFT adapts where they lie: stacks of experts; see `find_targets`
    left_out: dict[str, list[str]]  # why → layers


def find_targets(model: Any) -> Targets:
    """What `all-linear` means for a model, adapters on it or not: its linear layers and experts, but for the output head.

    Linear layers of mixtures of experts that PEFT would take for single experts of an older layout, by their names, are adapted
    as parameters: as layers they would lose their adapter without a word.
    """
    head, modules, experts = model.get_output_embeddings(), [], []
    left_out: dict[str, list[str]] = {}
    layers = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if not re.search(r"\.(lora_|token_adapter)", n)}
    uses = Counter(id(m.weight) for m in layers.values() if isinstance(m, torch.nn.Linear | Conv1D))
    for name, layer in layers.items():
        above = [layers[name[: dot.start()]] for dot in re.finditer(r"\.", name)]
        linear = isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head
        own = dict(above[-1].named_parameters(recurse=False)) if above else {}
        if any(ROUTERS.search(type(part).__name__) for part in (layer, *above)):
            if linear or "weight" in dict(layer.named_parameters(recurse=False)):
                left_out.setdefault(ROUTER, []).append(name)
        elif linear and {"A_log", "D"} <= own.keys() and not name.endswith(".in_proj"):
            left_out.setdefault(MIXER, []).append(name)
        elif linear and uses[id(layer.weight)] > 1:
            left_out.setdefault(SHARED, []).append(name)
        elif linear:
            modules.append(name)
        elif "Expert" in type(layer).__name__:
            weights = {n: p for n, p in layer.named_parameters(recurse=False) if p.dim() > 1 and "bias" not in n}
            experts += [f"{name}.{n}" for n, p in weights.items() if p.dim() == 3]
            if any(p.dim() == 2 for p in weights.values()):
                left_out.setdefault(STACKED, []).append(name)
    config = LoraConfig(target_modules=list(modules))
    convert_peft_config_for_transformers(config, model, None)
    experts += [f"{name}.weight" for name in modules if name not in config.target_modules]
    return Targets([name for name in modules if name in config.target_modules], experts, left_out)


def with_targets(config: LoraConfig, model: Any) -> LoraConfig:
    """The settings of a fresh adapter with its targets by name; of a list, names of linear layers, experts or other modules.

    Tokens that train do so in the embeddings and in the output head.
    UsageError: `lora.target_modules` names nothing that is there; or what is asked for is nothing that PEFT has.
    """
    if tokens := config.trainable_token_indices:
        head, ends = model.get_output_embeddings(), [model.get_input_embeddings()]
        if not model.config.get_text_config().tie_word_embeddings:
            ends.append(head)
        if getattr(head, "bias", None) is not None:
            raise UsageError("lora.train_tokens: this model's output head has a bias, which PEFT would lose; set lora: null")
        names_of = {module: name for name, module in model.named_modules()}
        config = dataclasses.replace(config, trainable_token_indices={names_of[end]: tokens for end in ends})
    asked, found = config.target_modules, find_targets(model)
    modules, parameters = found.modules, found.parameters
    if asked != ALL_LINEAR:
        if isinstance(asked, str):  # PEFT's own pattern
            return config
        names = {name.replace(".base_layer", "") for name, _ in (*model.named_modules(), *model.named_parameters())}
        if missing := [each for each in sorted(asked) if not any(_ends(name, each) for name in names)]:
            raise UsageError(f"lora.target_modules: {missing[0]} is the name of nothing in this model; use all-linear")
        parameters = [n for n in parameters if any(_ends(n, each) or _ends(n.removesuffix(".weight"), each) for each in asked)]
        layers = names - {name.removesuffix(".weight") for name in parameters}
        modules = [each for each in asked if any(_ends(name, each) for name in layers - set(parameters))]
    if config.lora_dropout and parameters:
        raise UsageError(f"lora.dropout: {parameters[0]} takes none; set it to 0, or name other layers in lora.target_modules")
    whole = {name.replace(".base_layer", ""): weight.is_floating_point() for name, weight in model.named_parameters()}
    if packed := [name for name in parameters if not whole[name]]:
        raise UsageError(f"model.quantize: {packed[0]} is quantised and cannot be adapted; name others in lora.target_modules")
    return dataclasses.replace(config, target_modules=modules, target_parameters=parameters or None)


def without_output_tokens(config: LoraConfig, state: State, model: Any) -> tuple[LoraConfig, State]:
    """An adapter without the tokens that it trains in the output head, which a classifier does not have."""
    if not isinstance(tokens := config.trainable_token_indices, dict):
        return config, state
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    kept = {name: ids for name, ids in tokens.items() if name != head}
    state = state and {name: tensor for name, tensor in state.items() if f".{head}.token_adapter." not in name}
    return dataclasses.replace(config, trainable_token_indices=kept), state


def adapter_state(peft: Any, role: str) -> dict[str, torch.Tensor]:
    """The tensors of one of several adapters, by the names under which PEFT saves them."""
    foreign = foreign_tokens(peft, role)
    whole = peft.state_dict() | {f"{name}.{role}": torch.empty(0) for name in foreign}
    modules = peft.peft_config[role].target_modules
    # "auto" would ask the hub every time whether the base has as many embeddings at its newest.
    embeddings = "auto" if isinstance(modules, str) else bool({*modules} & {*EMBEDDING_LAYER_NAMES})
    state = get_peft_model_state_dict(peft, whole, adapter_name=role, save_embedding_layers=embeddings)
    return {name: tensor for name, tensor in state.items() if name not in foreign}


def foreign_tokens(peft: Any, role: str) -> list[str]:
    """Names of the tensors of trained tokens that others have and `role` has not: PEFT looks for them all the same."""
    layers = {name: m for name, m in peft.named_modules() if isinstance(m, TrainableTokensLayer) and not m.tied_adapter}
    return [f"{name}.trainable_tokens_delta" for name, layer in layers.items() if role not in layer.token_indices]


def _ends(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")
