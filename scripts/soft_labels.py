"""What are a judge's probabilities worth? dpo on soft labels of one that errs, and on its more likely responses as hard labels.

    python scripts/soft_labels.py [--seeds N] [--noise S] [--rationality β …] [--folder DIR]

The judge is the quickstart's reward model. Each time it is asked, noise of deviation S is added to the score of each response;
`rlhf label` with `judge: {function, rationality: β}` makes probabilities σ(β · difference) of the scores, and dpo.yaml of the
quickstart learns from its 3,000 pairs with these, and without. With β = 1 the judge knows nothing of its noise, and is too sure.
A seed is one of the noise and of training. It needs what `make quickstart` makes first: the data, and the runs of sft and rm.
The intervals are those of scripts/rounds.py.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import SFT, made, measure, shown, stage
from transformers import AutoModelForSequenceClassification, AutoTokenizer

REWARD = Path("runs/quickstart/rm")


@cache
def judge() -> tuple[Any, Any, np.random.Generator, float]:
    """Model, tokenizer, and where its noise comes from, of which deviation."""
    seed, noise = os.environ["JUDGE_NOISE"].split()
    model = AutoModelForSequenceClassification.from_pretrained(REWARD / "model").eval()
    return model, AutoTokenizer.from_pretrained(REWARD / "model"), np.random.default_rng(int(seed)), float(noise)


@torch.no_grad()
def erring(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward model's score of each response, with noise."""
    model, tokenizer, drawn, noise = judge()
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    texts = [text.rstrip("\n") for text in tokenizer.apply_chat_template(turns, tokenize=False)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    return [float(score) for score in scores + noise * drawn.standard_normal(len(scores))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=2.0)
    parser.add_argument("--rationality", type=float, nargs="+", default=[1.0, 0.4])
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart/soft-labels"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    recipe, policies = given.folder.resolve() / "label.yaml", dict[str, Path]()
    if not recipe.exists():
        asked = {"function": f"{Path(__file__).resolve()}:erring"}
        recipe.write_text(json.dumps({"rows": "data/quickstart/pairs.jsonl", "judge": asked, "output": "runs/labels"}))
    for seed in range(given.seeds):
        os.environ["JUDGE_NOISE"] = f"{seed} {given.noise}"
        for at, beta in enumerate(given.rationality):
            labels, since = given.folder / f"labels-{beta}-{seed}", max(made(run / "manifest.json") for run in (SFT, REWARD))
            since = stage("label", str(recipe), labels, {"seed": seed, "judge.rationality": beta}, since)
            rows = [json.loads(line) for line in (labels / "preferences.jsonl").read_text().splitlines()]
            right = json.loads((labels / "label.json").read_text())["annotators"]["erring"]["gold"]["value"]
            sure = np.mean([row["probability"] for row in rows])
            print(f"seed {seed}, β {beta}: {right:.1%} of {len(rows):,} pairs as the rows have them, P {sure:.3f} in the mean")
            # Whatever β is, the more likely response is the same one.
            for kind, ignored in ((f"soft-{beta}", []), *([("hard", ["probability"])] if at == 0 else [])):
                name, source = f"{kind}-{seed}", {"path": str(labels / "preferences.jsonl"), "ignore": ignored}
                stage("dpo", "dpo.yaml", given.folder / name, {"seed": seed, "data.train": [source]}, since)
                policies[name] = given.folder / name
    golds = measure(given.folder, policies)
    print(f"sft {golds['sft'].mean():.3f}")
    hard = np.stack([golds[f"hard-{seed}"] for seed in range(given.seeds)])
    print(f"hard {shown(hard)}")
    for beta in given.rationality:
        soft = np.stack([golds[f"soft-{beta}-{seed}"] for seed in range(given.seeds)])
        each = ", ".join(f"{own:.3f}" for own in (soft - hard).mean(1))
        print(f"soft, β {beta}: {shown(soft)}, less hard {shown(soft - hard)}; by seed {each}")


if __name__ == "__main__":
    main()
