"""Seconds a drawn token of `rlhf`'s own token loop and of transformers' `generate`, on the same model and prompts.

    OMP_NUM_THREADS=2 python scripts/bench_rollout.py [--model FOLDER] [--data HH.jsonl.gz] [--new-tokens 32] [--batch 16]

Without --model the weights are random, in SmolLM2-135M's shape; without --data the prompts are random, of 8 to 64 tokens. Else
they are the last human turns of HH-RLHF transcripts, their first 64 tokens, those of at least 8. So that responses are of
ragged lengths, every id that --end-every divides ends one, besides the model's own ends (0: those alone). Float32, on a GPU
bfloat16, temperature 1, no adapter, one sample a prompt. Both sides take turns, --repeats times each with other draws, after a
warm-up. Prints one JSON object; a token after a response's end counts on neither side.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf_cli.models.backbone import Backbone, end_ids
from rlhf_cli.models.load import load_tokenizer, resolve_dtype
from rlhf_cli.rollout.decoders import Aligned, Graphed
from rlhf_cli.rollout.generate import Request, TransformersEngine

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SHORTEST, LONGEST = 8, 64


def load(folder: str | None) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype("auto", device)
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(device, dtype).eval()


def read_prompts(options: argparse.Namespace, vocabulary: int) -> list[np.ndarray]:
    """The first `batch` prompts."""
    if options.data is None:
        random = np.random.default_rng(0)
        lengths = random.integers(SHORTEST, LONGEST + 1, options.batch)
        return [random.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    tokenizer = load_tokenizer(options.model, None, False)
    prompts: list[np.ndarray] = []
    with gzip.open(options.data, "rt", encoding="utf-8") as lines:
        for line in lines:
            human = re.findall(r"\n\nHuman: (.*?)\n\nAssistant:", json.loads(line)["chosen"], flags=re.DOTALL)
            ids = tokenizer(human[-1])["input_ids"][:LONGEST] if human else []
            if len(ids) >= SHORTEST:
                prompts.append(np.array(ids, np.int32))
            if len(prompts) == options.batch:
                break
    return prompts


def ours(engine: TransformersEngine, request: Request) -> list[int]:
    """The length of every response."""
    drawn = engine.generate(request)
    return [len(one.ids) for (one,) in drawn]


@torch.no_grad()
def theirs(model: Any, request: Request) -> list[int]:
    """The same of transformers' generate, prompts padded on the left."""
    torch.manual_seed(request.seed)
    width = max(map(len, request.prompts))
    ids = torch.zeros(len(request.prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(request.prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    model.generation_config = GenerationConfig(eos_token_id=list(request.ends), pad_token_id=request.ends[0])
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": request.temperature, "use_cache": True}
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=request.max_new_tokens, **settings)[:, width:].cpu().numpy()
    over = np.isin(out, request.ends)
    lengths: list[int] = np.where(over.any(1), over.argmax(1) + 1, out.shape[1]).tolist()
    return lengths


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="CPU seconds a drawn token, ours and transformers'.")
    parser.add_argument("--model", help="a transformers folder; default: random weights in SmolLM2-135M's shape")
    parser.add_argument("--data", help="HH-RLHF transcripts, .jsonl.gz; needs --model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--end-every", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.data and not options.model:
        parser.error("--data needs the tokenizer of a --model")
    print(json.dumps(measure(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides take turns; ours without graphs too, where there are some."""
    model = load(options.model)
    vocabulary = model.config.vocab_size
    ends = end_ids(model, *(range(0, vocabulary, options.end_every) if options.end_every else ()))
    prompts = read_prompts(options, vocabulary)
    backbone = Backbone(model, model.dtype)
    engine = TransformersEngine(backbone, "policy")
    engines = {"rlhf": engine}
    if engine.decoder is Graphed:
        engines["rlhf, not graphed"] = TransformersEngine(backbone, "policy")
        engines["rlhf, not graphed"].decoder = Aligned
    took = {side: [0.0, 0.0] for side in (*engines, "transformers")}
    lengths: dict[str, list[int]] = {side: [] for side in took}
    for seed in range(options.repeats + 1):
        request = Request(prompts, range(len(prompts)), 1, options.new_tokens, 1.0, ends, seed)
        for side in took:
            with backbone.plain_attention():
                cpu, wall = time.process_time(), time.perf_counter()
                found = ours(engines[side], request) if side in engines else theirs(model, request)
                spent = time.process_time() - cpu, time.perf_counter() - wall
            if seed:  # the first turn is the warm-up
                took[side] = [sum(pair) for pair in zip(took[side], spent, strict=True)]
                lengths[side] += found
    sides = {
        side: {
            "cpu_seconds_a_token": took[side][0] / sum(lengths[side]),
            "wall_seconds_a_token": took[side][1] / sum(lengths[side]),
            "mean_length": float(np.mean(lengths[side])),
        }
        for side in took
    }
    ratio = sides["transformers"]["cpu_seconds_a_token"] / sides["rlhf"]["cpu_seconds_a_token"]
    return {"threads": torch.get_num_threads(), "prompt_tokens": sum(map(len, prompts)), **sides, "ratio": ratio}


if __name__ == "__main__":
    main()
