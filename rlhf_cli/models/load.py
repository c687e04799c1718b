"""Loading tokenizers and causal language models: safetensors only, nothing initialised at random, no foreign code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rlhf_cli.errors import MachineError, NumberError, UsageError
from rlhf_cli.recipe import schema

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, else float32."""
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a model.

    Raises:
        UsageError: the folder has none, or only a slow one.
        MachineError: a hub id that cannot be reached.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, path, "tokenizer", revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UsageError(
            f"{path}: the tokenizer has no fast version (tokenizer.json), which the loss mask needs; convert it first"
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{path}: the tokenizer names no EOS token; a model could never learn to stop")
    return tokenizer


def load_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The model's configuration with every dropout of the base off: only `lora.dropout` may make a step random."""
    config = _load(AutoConfig.from_pretrained, path, "model", revision=revision, trust_remote_code=trust_remote_code)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(config, name, 0.0)
    return config


def load_model(settings: schema.Model, path: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model of a folder or hub id, its weights in `dtype`.

    Raises:
        UsageError: weights are missing (they would be random), or exist as pickles only.
        MachineError: the hub or the quantisation library is out of reach.
    """
    options: dict[str, Any] = {}
    if settings.attention == "eager":
        options["attn_implementation"] = "eager"
    if settings.quantize:
        options["quantization_config"] = _quantization(settings.quantize, dtype)
    model, info = _load(
        AutoModelForCausalLM.from_pretrained,
        path,
        "model",
        config=load_config(path, revision, settings.trust_remote_code),
        revision=revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UsageError(
            f"{path}: {len(names)} weights are missing, the first is {names[0]}; they would be random. Is it a causal LM?"
        )
    return model if settings.quantize else model.to(device)


def save_adapter(folder: Path, state: dict[str, torch.Tensor], config: Any) -> None:
    """adapter_model.safetensors and adapter_config.json, as plain PEFT reads them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The LoraConfig and the tensors of an adapter folder.

    Raises:
        UsageError: the folder holds no safetensors adapter, or one that is not LoRA.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"{folder}: no adapter_model.safetensors (pickled adapters are not loaded)")
    kind = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{folder}: the adapter is {kind}, only LoRA is supported; merge it into its base first")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise UsageError(f"{weights} is damaged: {_first_line(error)}") from error
    if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise NumberError(f"{weights}: {broken[0]} is not finite; the adapter is damaged")
    return LoraConfig.from_pretrained(str(folder)), state


def _load(loader: Any, path: str, what: str, **options: Any) -> Any:
    try:
        return loader(path, **options)
    except ImportError as error:
        raise MachineError(f"{path}: a library is missing: {_first_line(error)}") from error
    except SafetensorError as error:
        raise UsageError(f"{path}: the weights are damaged: {_first_line(error)}; fetch them again") from error
    except (OSError, ValueError) as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            raise UsageError(f"{path}: the {what} brings its own code; to run it: --set model.trust_remote_code=true") from error
        if Path(path).exists():
            raise UsageError(f"{path}: no {what} can be read here: {text}") from error
        raise MachineError(f"{path}: this hub {what} could not be fetched, and it is not in the cache: {text}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _quantization(setting: str, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MachineError("model.quantize needs bitsandbytes: pip install 'rlhf-cli[quant]'") from error
    if setting == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
