"""Loading tokenizers and causal language models: safetensors only, nothing initialised at random, no foreign code."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig

from rlhf_cli import sections
from rlhf_cli.errors import MachineError, NumberError, UsageError
from rlhf_cli.files import SETTINGS, read_json, write_json
from rlhf_cli.hub import model_folder
from rlhf_cli.models.heads import SCORE
from rlhf_cli.models.memory import is_out_of_memory

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of the longest sequence in configurations
GENERAL = "general_preference.json"  # beside the weights of a model that compares, whose head gives vectors: {"tau"}
STEPS = "steps.json"  # beside those of a process reward model: {"separator"}, what stands between steps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_CPU = "run on the CPU (ACCELERATE_USE_CPU=1)"


@dataclass(frozen=True)
class Weights:
    """Where a model's weights lie."""

    base: str  # hub id or folder
    revision: str | None
    adapter: Path | None  # the LoRA adapter on it, if there is one

    @property
    def head(self) -> torch.Tensor:
        """A reward model's head (labels, D). Raises UsageError if there is none."""
        return read_head(self.adapter or model_folder(self.base, self.revision))

    @property
    def tau(self) -> float | None:
        """τ of a general preference model, whose head gives vectors and no scores; None: it is none."""
        file = (self.adapter or model_folder(self.base, self.revision, weights=False)) / GENERAL
        return float(read_json(file)["tau"]) if file.exists() else None

    @property
    def separator(self) -> str | None:
        """What stands between the steps that a process reward model scores; None: it is none."""
        file = (self.adapter or model_folder(self.base, self.revision, weights=False)) / STEPS
        return str(read_json(file)["separator"]) if file.exists() else None


class Adapter(NamedTuple):
    """What an adapter's folder holds."""

    config: Any  # a LoraConfig
    state: dict[str, torch.Tensor]
    head: torch.Tensor | None  # (labels, D) of a reward model


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on an NVIDIA GPU that has it, and does not merely emulate it as those before Ampere do, else float32.

    UsageError: Apple's MPS has no bfloat16 before macOS 14.
    """
    if setting == "bfloat16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UsageError(f"dtype: bfloat16: Apple's MPS has it from macOS 14 on. set float32, or {ON_CPU}")
    if setting != "auto":
        return DTYPES[setting]
    has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has else torch.float32


def refuse_on_mps(device: torch.device, **settings: str | None) -> None:
    """UsageError: one of these keys asks for what has no kernels on Apple's MPS."""
    lacking = ({"flash", "flex", "4bit", "8bit", "adamw_8bit"} if device.type == "mps" else set()) & {*settings.values()}
    for name, value in settings.items():
        if value in lacking:
            raise UsageError(f"{name}: {value}: there are no kernels for it on Apple's MPS. take it out, or {ON_CPU}")


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a model. Raises UsageError if it has none, MachineError if a hub id cannot be reached."""
    tokenizer = _load(AutoTokenizer.from_pretrained, path, "tokenizer", revision=revision, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UsageError(
            f"{path}: the tokenizer has no fast version (tokenizer.json), which the loss mask needs; convert it first"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UsageError(f"{path}/tokenizer_config.json: model_max_length is no number: {tokenizer.model_max_length!r:.40}")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{path}: the tokenizer names no EOS token, with which every response ends")
    return tokenizer


def load_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of a model of text, every dropout of the base off: only `lora.dropout` may make a step random."""
    config = _load(AutoConfig.from_pretrained, path, "model", revision=revision, trust_remote_code=trust_remote_code)
    if "text_config" in config.sub_configs and (more := sorted(config.sub_configs.keys() - {"text_config"})):
        raise UsageError(
            f"{path}: {config.model_type} takes more than text ({', '.join(more)}), and only models of text are trained; "
            "docs/models.md shows how to save its text part as a model of its own"
        )
    for name, value in config.to_dict().items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(config, name, 0.0)
    return config


def positions_of(config: Any) -> int | None:
    """Tokens of the longest sequence that a model can take; None where its configuration names no limit."""
    named = config.get_text_config().to_dict()
    return next((int(named[key]) for key in POSITION_KEYS if named.get(key)), None)


def load_model(
    settings: sections.Model,
    path: str,
    revision: str | None,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    headless: bool = False,
) -> Any:
    """The causal language model of a folder or hub id, its weights in `dtype` (auto: as in its files).

    `headless`: its output head may be missing.

    Raises UsageError if weights are missing (they would be random) or exist as pickles only, MachineError if the hub or the
    quantisation library is out of reach.
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
        weights=True,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        **options,
    )
    model.name_or_path = path  # and not its folder in the hub's cache: adapters name it as their base
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise UsageError(f"{path}: {name} has the shape {tuple(found)}, config.json asks for {tuple(expected)}; is it damaged?")
    missing = set(info["missing_keys"])
    if headless:
        missing -= {name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight}
    if names := sorted(missing):
        raise UsageError(
            f"{path}: {len(names)} weights are missing, the first is {names[0]}; they would be random. Is it a causal LM?"
        )
    if settings.quantize == "4bit" and device.type == "cpu":
        _as_trained(model)
    return model if settings.quantize else model.to(device)


def _as_trained(model: Any) -> None:
    """Without gradients some CPUs would compute 4-bit layers in bfloat16, if their widths allow it: as with gradients instead."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def is_reward_model(path: str, revision: str | None) -> bool:
    """Is the adapter or the model of a folder or hub id a sequence classifier, as reward models are saved?

    Raises UsageError if it has more than one label, MachineError if a hub id cannot be reached.
    """
    adapter = Path(path) / "adapter_config.json"
    if adapter.exists():
        return bool(read_json(adapter).get("task_type") == "SEQ_CLS")
    config, _ = _load(PretrainedConfig.get_config_dict, path, "model", revision=revision)
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return False
    labels = len(config["id2label"]) if "id2label" in config else PretrainedConfig().num_labels
    if labels != 1 and not (model_folder(path, revision, weights=False) / GENERAL).exists():
        raise UsageError(f"{path}: a classifier with {labels} labels is no reward model; one has a single label")
    return True


def save_adapter(folder: Path, state: dict[str, torch.Tensor], config: Any) -> None:
    """adapter_model.safetensors and adapter_config.json, as plain PEFT reads them; what is a set there is sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    sets = [key for key, value in vars(config).items() if isinstance(value, set)]
    write_json(path, {key: sorted(value) if key in sets and value else value for key, value in read_json(path).items()})


def name_ends(folder: Path, ends: list[int], model: Any) -> None:
    """Write into a saved policy's folder where plain `generate` is to stop; an adapter's gets its base's settings."""
    generation = folder / "generation_config.json"
    if not generation.exists():
        model.generation_config.to_json_file(str(generation))
    for path in (generation, folder / "config.json"):
        if path.exists():
            write_json(path, read_json(path) | {"eos_token_id": ends})


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter, and the scalar head of a reward model. Raises UsageError if it is another one, or has lost its head."""
    from peft import LoraConfig

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"{folder}: no adapter_model.safetensors (pickled adapters are not loaded)")
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{folder}: the adapter is {kind}, only LoRA is supported; merge it into its base first")
    state = read_tensors(folder)
    if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise NumberError(f"{weights}: {broken[0]} is not finite; the adapter is damaged")
    head = state.pop(f"base_model.model.{SCORE}", None)
    config = LoraConfig.from_pretrained(str(folder))
    if head is None and config.task_type != "SEQ_CLS":
        return Adapter(config, state, None)
    config = dataclasses.replace(config, task_type="CAUSAL_LM", modules_to_save=None)
    return Adapter(config, state, _check_head(folder, head))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files. Raises UsageError if a file is damaged."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged: {_first_line(error)}") from error
    return found


def check_tensors(folder: Path) -> None:
    """UsageError for a file of the folder that is called .safetensors and is none, or is cut off; no tensor is read."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged: {_first_line(error)}; fetch it again") from error


def read_head(folder: Path) -> torch.Tensor:
    """The head (labels, D) of a reward model's folder. Raises UsageError if it has none, or one of several labels."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in (SCORE, f"base_model.model.{SCORE}"):
                if name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    return _check_head(folder, file.get_tensor(name)).float()
    return _check_head(folder, None)


def _check_head(folder: Path, head: torch.Tensor | None) -> torch.Tensor:
    if head is None:
        raise UsageError(f"{folder}: no reward head ({SCORE}) is in it; is it a reward model?")
    if len(head) != 1 and not (folder / GENERAL).exists():
        raise UsageError(f"{folder}: a classifier with {len(head)} labels is no reward model; one has a single label")
    return head


def _load(loader: Any, path: str, what: str, revision: str | None, weights: bool = False, **options: Any) -> Any:
    folder = str(model_folder(path, revision, weights))
    _check_settings(folder, ("config.json", "generation_config.json"))  # small ones: the library passes over much in them
    try:
        return loader(folder, **options)
    except ImportError as error:
        raise MachineError(f"{path}: a library is missing: {_first_line(error)}") from error
    except SafetensorError as error:
        raise UsageError(f"{path}: the weights are damaged: {_first_line(error)}; fetch them again") from error
    except Exception as error:  # whatever a library stumbles over: it was handed a folder, and nothing else of ours
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UsageError(f"{path}: the {what} brings its own code; to run it: --set model.trust_remote_code=true") from error
        _check_settings(folder, SETTINGS)
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{path}: no {what} can be read here: {kind}{_first_line(error)}") from error


def _check_settings(path: str, names: Sequence[str]) -> None:
    """UsageError for the first of these files of a folder that is damaged."""
    for file in (Path(path) / name for name in names):
        if file.is_file():
            read_json(file)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _quantization(setting: str, dtype: torch.dtype | Literal["auto"]) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MachineError("model.quantize needs bitsandbytes: pip install 'rlhf-cli[quant]'") from error
    if setting == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def quiet_libraries() -> None:
    """Libraries speak through our lines and errors, not through their own bars and warnings."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
