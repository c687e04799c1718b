"""A made-up evaluation of eight models, as eval.json and samples.jsonl would have it."""

from __future__ import annotations

import math
from typing import Any

from rlhf_cli.evaluation.samples import Sample, Samples, grouped

Line = dict[str, Any]
MODELS = (
    "sft",
    "dpo",
    "ppo",
    "pushed/step-00000010",
    "pushed/step-00000020",
    "pushed/step-00000040",
    "pushed/step-00000080",
    "base",
)
STEPS = {name: int(name[-8:]) for name in MODELS if name.startswith("pushed/")}
GOLD = dict(zip(MODELS, (0.512, 0.721, 0.688, 0.604, 0.701, 0.655, 0.430, 0.305), strict=True))
SCORE = dict(zip(MODELS, (0.02, 0.95, 1.31, 0.62, 1.18, 1.74, 2.35, -0.81), strict=True))
KL = dict(zip(MODELS, (0.0, 4.12, 9.35, 1.62, 4.8, 13.1, 31.7, 6.2), strict=True))
LENGTH = dict(zip(MODELS, (31.2, 38.9, 44.1, 33.0, 37.5, 46.2, 61.8, 55.0), strict=True))
HOSTILE = (
    "<script>document.title='owned'</script><img src=https://example.com/x.png onerror=alert(1)>\x00\x1b[31m\u202eabc & $x$ | `y`"
)


def _fit(alpha: float, beta: float, r2: float) -> dict[str, float]:
    """With intervals of a fifth on each side."""
    bounds = {"alpha_low": 0.8 * alpha, "alpha_high": 1.2 * alpha, "beta_low": 0.8 * beta, "beta_high": 1.2 * beta}
    return {"alpha": alpha, "beta": beta, "r2": r2, **bounds, "preferred": 0.25}


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def share(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def rate(raw: float, equal: float, half: float = 0.04) -> Line:
    return {**share(raw, half), "ties": 0.031, "n": 512, "length_controlled": share(equal, half + 0.01)}


def empty() -> Line:
    """Nothing was asked for but to draw."""
    about = {
        "reference": None,
        "baseline": None,
        "judge": None,
        "prompts": 128,
        "responses": 4,
        "temperature": 1.0,
        "max_new_tokens": 64,
        "seed": 0,
        "resamples": 2000,
        "notes": [],
        "warping": {},
    }
    sections: Line = {
        "models": {},
        "winrate": {},
        "ratings": {},
        "pairwise": {},
        "exploitability": {},
        "preferences": {},
        "votes": {},
        "overoptimisation": [],
        "fits": {},
        "at_kl": None,
        "agreement": {},
        "agreement_by_subset": {},
    }
    return {"about": about, **sections}


def figures(name: str) -> Line:
    late = name.endswith("80")
    return {
        "gold/gold": around(GOLD[name], 0.031),
        "objective/scores": around(SCORE[name], 0.06),
        "reward/rm": around(SCORE[name], 0.06),
        "objective/kl": around(KL[name], 0.05 * KL[name]),
        "objective/kl_per_token": around(KL[name] / LENGTH[name], 0.05 * KL[name] / LENGTH[name]),
        "response/length": around(LENGTH[name], 1.4),
        "response/eos_rate": share(0.41 if late else 0.985, 0.02),
        "response/distinct_1": share(0.12 if late else 0.31, 0.01),
        "response/distinct_2": share(0.30 if late else 0.68, 0.015),
        "response/duplicates": share(0.46 if late else 0.021, 0.012),
        "perplexity": around({"base": 19.4, "sft": 11.2}.get(name, 12.0 + KL[name] / 10), 0.4),
    }


def evaluation() -> Line:
    """Everything measured: dpo and ppo are better, ppo partly by length, `pushed` was trained too far, base is worse."""
    result = empty()
    result["about"] |= {
        "reference": "sft",
        "baseline": "sft",
        "judge": "gold",
        "notes": ["best of n has 16 responses to a prompt."],
        "warping": {},
    }
    result["models"] = {name: figures(name) for name in MODELS}
    result["winrate"] = {
        "dpo": {**rate(0.721, 0.7), "low": 0.68, "high": 0.759},
        "ppo": rate(0.66, 0.53),
        "pushed/step-00000010": rate(0.561, 0.558),
        "pushed/step-00000020": rate(0.70, 0.69),
        "pushed/step-00000040": rate(0.58, 0.44),
        "pushed/step-00000080": rate(0.49, 0.47),
        "base": rate(0.21, 0.2),
    }
    result["ratings"] = {
        name: {
            "elo": 1000 + 500 * (GOLD[name] - GOLD["sft"]),
            "low": 980 + 500 * (GOLD[name] - GOLD["sft"]),
            "high": 1020.5 + 500 * (GOLD[name] - GOLD["sft"]),
        }
        for name in MODELS
    }
    result["ratings"]["sft"] = {"elo": 1000.0, "low": 1000.0, "high": 1000.0}
    result["preferences"] = {"rm": preference(0.74, 0.55), "dpo": {**preference(0.58, 0.56), "kind": "policy", "beta": 0.1}}
    result["overoptimisation"], result["fits"] = optimisation()
    result["at_kl"] = at_kl()
    return result


def preference(accuracy: float, by_length: float) -> Line:
    bins = [
        {"low": 0.5 + k / 20, "high": 0.55 + k / 20, "count": 90 - 8 * k, "confidence": 0.525 + k / 20, "accuracy": 0.5 + k / 22}
        for k in range(10)
    ]
    edges = [k / 5 - 2 for k in range(21)]
    counts = [round(80 * math.exp(-((edge - 0.5) ** 2))) for edge in edges[:-1]]
    ahead = accuracy - by_length
    lead = {"mean": ahead, "low": ahead - 0.05, "high": ahead + 0.05}
    subset = {"accuracy": accuracy + 0.04, "low": accuracy - 0.05, "high": accuracy + 0.13, "pairs": 120, "prompts": 118}
    return {
        "kind": "reward model",
        "accuracy": accuracy,
        "low": accuracy - 0.04,
        "high": accuracy + 0.04,
        "ties": 3,
        "pairs": 540,
        "prompts": 512,
        "ece": 0.031,
        "ece_expected": 0.027,
        "confidence": 0.71,
        "reliability": bins,
        "margins": {"mean": 0.52, "edges": edges, "counts": counts},
        "subsets": {"helpful": subset, "harm_less|x": {**subset, "accuracy": accuracy - 0.02}},
        "length_baseline": {
            "prefers": "longer",
            "accuracy": by_length,
            "low": by_length - 0.04,
            "high": by_length + 0.04,
            "lead": lead,
            "of_steps": None,
        },
        "beta": None,
        "faults": [],
    }


def point(series: str, model: str, step: int | None, n: int | None, kl: float, proxy: float, gold: float | None) -> Line:
    reach = {"kl": [0.95 * kl, 1.05 * kl], "proxy": [proxy - 0.06, proxy + 0.06], "gold": gold and [gold - 0.03, gold + 0.03]}
    return {"series": series, "model": model, "step": step, "n": n, "kl": kl, "proxy": proxy, "gold": gold, "intervals": reach}


def optimisation() -> tuple[list[Line], Line]:
    run = [point("pushed", "sft", 0, None, 0.0, SCORE["sft"], GOLD["sft"])]
    run += [point("pushed", name, step, None, KL[name], SCORE[name], GOLD[name]) for name, step in STEPS.items()]
    best = [
        point("best of n", "sft", None, n, math.log(n) - (n - 1) / n, 0.02 + 0.5 * math.log(n), 0.512 + 0.06 * math.log(n))
        for n in (1, 2, 4, 8, 16)
    ]
    fits = {
        "pushed": {
            "proxy": {"bon": _fit(0.5, 0.02, 0.97), "rl": _fit(0.55, 0.07, 0.99)},
            "gold": {"bon": _fit(0.16, 0.031, 0.91), "rl": _fit(0.15, 0.095, 0.94)},
            "peak": {
                "model": "pushed/step-00000020",
                "step": 20,
                "n": None,
                "gold": 0.701,
                "kl": 4.8,
                "last": "pushed/step-00000080",
                "fall": {"mean": 0.271, "low": 0.22, "high": 0.322},
            },
        },
        "best of n": {
            "proxy": {"bon": _fit(1.05, 0.05, 0.99), "rl": None},
            "gold": {"bon": _fit(0.125, 0.005, 0.99), "rl": None},
            "peak": {
                "model": "sft",
                "step": None,
                "n": 16,
                "gold": 0.678,
                "kl": 1.835,
                "last": "sft",
                "fall": {"mean": 0.0, "low": 0.0, "high": 0.0},
            },
        },
    }
    return [*run, *best], fits


def at_kl() -> Line:
    """pushed against what has dpo and ppo as its points: less gold up to KL 9.35, where the latter end."""
    runs = {"pushed": ("sft", *STEPS), "dpo and ppo": ("sft", "dpo", "ppo")}
    series = [
        {
            "name": name,
            "points": [
                {"models": [each], "kl": around(KL[each], 0.05 * KL[each]), "gold": around(GOLD[each], 0.03)} for each in own
            ],
        }
        for name, own in runs.items()
    ]
    matched = [
        {
            "kl": around(9.35 * share**2, 0.4),
            "a": around(0.6, 0.03),
            "b": around(0.6 + gap, 0.03),
            "difference": around(-gap, 0.02),
        }
        for share, gap in ((0.25, 0.012), (0.5, 0.01), (0.75, 0.03), (1.0, 0.02))
    ]
    return {"a": series[0], "b": series[1], "matched": matched, "mean": around(-0.025, 0.021)}


def samples(models: tuple[str, ...] = MODELS, prompts: int = 8, responses: int = 2) -> list[Line]:
    """dpo's responses to prompt 0 are hostile, ppo's very long, base's empty; the others have a few sentences."""
    said = {("dpo", 0): HOSTILE, ("ppo", 0): "Wood, and again wood. " * 600, ("base", 0): ""}
    usual = (
        "A woodchuck of {model} would chuck about {amount} kilograms of wood, if it could; answer {number} to prompt {row}. " * 3
    )
    return [
        {
            "model": model,
            "row": row,
            "number": number,
            "where": f"prompts.jsonl:{row + 1}",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"How much wood, case {row}?"}]
            if row % 2
            else f"Question {row}: how much wood would a woodchuck chuck?",
            "response": said.get((model, row), usual.format(model=model, amount=300 + 7 * row, number=number, row=row)),
            "ended": not model.endswith("80"),
            "tokens": 30 + row + number,
            "logp": -40.5,
            "reference_logp": -44.0,
            "terms": {"reward/rm": worth(model, row, number), "gold/gold": worth(model, row, number) / 2},
            "score": worth(model, row, number),
        }
        for model in models
        for row in range(prompts)
        for number in range(responses)
    ]


def tables(lines: list[Line]) -> dict[str, Samples]:
    """The samples by model."""
    models = dict.fromkeys(line["model"] for line in lines)
    return {model: grouped(Sample(**line) for line in lines if line["model"] == model) for model in models}


def worth(model: str, row: int, number: int) -> float:
    """From −1 to 1, of the baseline always 0, best for the first prompt."""
    return 0.0 if model == "sft" else round((3.5 - row) / 4 + number / 100, 4)
