"""`rlhf export`: a run as a plain transformers or PEFT folder, compared with the run before it is called done."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.load import read_adapter
from rlhf_cli.runs.files import disk_error
from rlhf_cli.runs.folder import RunFolder
from rlhf_cli.runs.parents import Start, resolve_start

TOLERANCE = 1e-3
"""Largest difference of log-probabilities in float32: merging B·A into W rounds every weight once."""

WEIGHTS = (".safetensors", ".safetensors.index.json")
MODEL_FILES = ("adapter_config.json", "config.json", "generation_config.json")


def export(run: Path, dest: Path, merge: bool) -> str:
    """Write the trained policy of `run` to `dest`: its adapter, or with `merge` (or after full training) a whole model; says so.

    Raises:
        UsageError: `run` is no finished run, or `dest` exists.
        NumberError: the exported model gives other log-probabilities than the run; nothing is left at `dest`.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if os.path.lexists(dest):
        raise UsageError(f"{dest} exists; export to a new folder")
    start = resolve_start(str(run), None, "export")
    source = RunFolder(run).model
    if not source.is_dir():
        raise UsageError(f"{run} is not a run: it has no model/")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
    except OSError as error:
        raise disk_error(dest, error) from error
    try:
        wanted = _logps(_load_run(start))
        if start.adapter is None or not merge:
            shutil.copytree(source, part, dirs_exist_ok=True)
        else:
            model = _load_run(start).merge_and_unload()
            model.save_pretrained(str(part))
            for file in source.iterdir():
                if not file.name.endswith(WEIGHTS) and file.name not in MODEL_FILES:
                    shutil.copy2(file, part / file.name)
        difference = float((_logps(_load_export(start, part)) - wanted).abs().max())
        if not difference <= TOLERANCE:
            raise NumberError(f"{dest}: log-probabilities differ from the run's by {difference:.2g}; nothing was exported")
        part.chmod(0o755)
        part.rename(dest)
    except OSError as error:
        raise disk_error(dest, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    kind = "adapter" if (dest / "adapter_config.json").exists() else "model"
    return f"{kind} in {dest}: log-probabilities within {difference:.1e} of the run's"


def _base(path: str, revision: str | None = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32, use_safetensors=True)


def _load_run(start: Start) -> Any:
    base = _base(start.base, start.revision)
    if start.adapter is None:
        return base
    read_adapter(start.adapter)
    return PeftModel.from_pretrained(base, str(start.adapter))


def _load_export(start: Start, folder: Path) -> Any:
    """As a user would: the folder alone, or the adapter on its base."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(_base(start.base, start.revision), str(folder))
    return _base(str(folder))


@torch.no_grad()
def _logps(model: Any) -> torch.Tensor:
    """Log-probabilities on a fixed text of random tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    logps: torch.Tensor = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return logps
