"""Loads finished runs as somebody does who has only transformers and PEFT; a process of its own, which imports nothing of ours.

python plain.py INPUTS OUTPUT: INPUTS is JSON, {name: {"run": folder, "rows": [[ids]]}}; OUTPUT gets {name: values}: of a policy
the logits of its last token for every row, of a reward model the score of every row, alone and all rows padded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def policy(run: Path, manifest: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    if (run / "model" / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(manifest["base_model"]["path"])
        model = PeftModel.from_pretrained(base, run / "model").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    return {"logits": [model(input_ids=torch.tensor([row])).logits[0, -1].tolist() for row in rows]}


def reward(manifest: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(manifest["load"]), names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    alone = [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]
    tokenizer.pad_token_id, longest = model.config.pad_token_id, max(map(len, rows))
    padded = torch.tensor([row + [model.config.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    together = model(input_ids=padded, attention_mask=mask).logits[:, 0].tolist()
    text = tokenizer.decode(rows[0])
    return {"alone": alone, "padded": together, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


with torch.no_grad():
    found = {}
    for name, wanted in json.loads(Path(sys.argv[1]).read_text()).items():
        manifest = json.loads((Path(wanted["run"]) / "manifest.json").read_text())
        is_reward = manifest["stage"] == "train-rm"
        found[name] = reward(manifest, wanted["rows"]) if is_reward else policy(Path(wanted["run"]), manifest, wanted["rows"])
    Path(sys.argv[2]).write_text(json.dumps(found))
