"""The gold reward of what runs of the quickstart say: does training on preferences raise what the preferences came from?

    python scripts/quickstart_gold.py runs/quickstart/sft runs/quickstart/dpo … [--samples N]

Samples at temperature 1 on data/quickstart/eval_prompts.jsonl, which no stage trains on. Prints, for every run, the mean gold
reward of its responses, and the difference to the first run's on the same prompts, each with a 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]


def load(run: Path) -> tuple[Any, Any]:
    """A run's policy and tokenizer, as anybody loads them."""
    model = run / "model"
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if not (model / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer
    base = json.loads((run / "manifest.json").read_text())["base_model"]["path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), model).eval(), tokenizer


@torch.no_grad()
def respond(run: Path, prompts: list[str], samples: int) -> list[list[str]]:
    """`samples` responses to every prompt."""
    model, tokenizer = load(run)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    out = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64,
        num_return_sequences=samples,
        pad_token_id=tokenizer.eos_token_id,
    )
    said = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [said[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval over prompts."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def main() -> None:
    """Parse the command line, sample, print."""
    parser = argparse.ArgumentParser(description="The gold reward of what runs of the quickstart say.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="responses to a prompt")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "data/quickstart/eval_prompts.jsonl").read_text().splitlines()]
    gold = runpy.run_path(str(ROOT / "recipes/quickstart/gold.py"))["gold"]
    first = None
    for run in options.runs:
        said = respond(run, prompts, options.samples)
        means = np.array([np.mean(gold([p] * options.samples, mine)) for p, mine in zip(prompts, said, strict=True)])
        first = means if first is None else first
        words = np.mean([len(response.split()) for mine in said for response in mine])
        print(f"{run}: gold {interval(means)}, against the first {interval(means - first)}, {words:.1f} words a response")


if __name__ == "__main__":
    main()
