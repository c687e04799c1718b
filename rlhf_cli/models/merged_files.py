"""An adapter folded into a model file by file, so that no more than one file's weights are in memory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf_cli.files import read_json, write_json
from rlhf_cli.models.load import Adapter

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def merge_files(source: Path, adapter: Adapter, target: Path) -> bool:
    """Write the model of `source` with W + scaling · B A for each weight that the adapter changes, in float32.

    False, and nothing is written: the adapter changes more than linear layers whose weights have their names in the files.
    """
    config, layers = adapter.config, dict[str, dict[str, torch.Tensor]]()
    if config.use_dora or config.lora_bias or config.rank_pattern or config.alpha_pattern or config.fan_in_fan_out:
        return False
    for name, tensor in adapter.state.items():
        if (part := PART.fullmatch(name)) is None:
            return False
        layers.setdefault(f"{part[1]}.weight", {})[part[2]] = tensor.float()
    index = read_json(source / INDEX) if (source / INDEX).exists() else {"weight_map": {"": WHOLE}}
    files = [source / name for name in sorted({*index["weight_map"].values()})]
    shapes: dict[str, list[int]] = {}
    for path in files:
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    if any(shapes.get(name) != [len(own["B"]), own["A"].shape[1]] for name, own in layers.items()):
        return False
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    target.mkdir(parents=True)
    for path in files:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
        for key in weights.keys() & layers.keys():
            weights[key] = weights[key] + layers[key]["B"] @ layers[key]["A"] * scaling
        save_file(weights, target / path.name, metadata={"format": "pt"})
    settings = {key: value for key, value in read_json(source / "config.json").items() if key != "torch_dtype"}
    write_json(target / "config.json", settings | {"dtype": "float32"})
    for name in (INDEX, "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    return True
